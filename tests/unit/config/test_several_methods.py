"""Configs of several methods."""

from __future__ import annotations

import json
from typing import Any

import pytest

from icce_ray.config import Config, build_config, without_secrets
from icce_ray.errors import ConfigError


def config_of(method: Any, **settings: Any) -> Config:
    data = {"embeddings": "x.npy", "num_clusters": 3, "output": "out", "method": method}
    return build_config(data | settings, "test")


def test_each_method_of_a_list_fills_in_what_it_does_alone_over_the_same_sample() -> None:
    several = config_of(["icce", "temi"], heads={"num_heads": 7})
    alone = config_of("temi", heads={"num_heads": 7}, sample=several.sample.model_dump())
    assert several.of_method("temi").model_dump() == alone.model_dump()
    assert several.of_method("temi").heads.input_norm == "standardize"
    assert several.of_method("icce").model_dump() == config_of("icce", heads={"num_heads": 7}).model_dump()


@pytest.mark.parametrize("method", ["temi", ("icce", "temi")])
def test_a_record_makes_the_same_config_again_without_its_secrets(method: Any) -> None:
    storage = {"endpoint": "http://127.0.0.1:9000", "access_key": "open", "secret_key": "sesame"}
    config = config_of(method, heads={"num_heads": 7}, storage=storage)
    record = json.loads(json.dumps(config.to_record()))
    assert "sesame" not in str(record)
    again = build_config(without_secrets(record), "test")
    assert again.storage.endpoint == storage["endpoint"]
    left = {"storage"}
    assert again.of_method("temi").model_dump(exclude=left) == config.of_method("temi").model_dump(exclude=left)
    assert again.model_dump(exclude=left) == config.model_dump(exclude=left)


def test_a_list_of_one_method_is_that_method() -> None:
    assert config_of(["temi"]).model_dump() == config_of("temi").model_dump()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": ["icce", "medoids"]}, "method: 'medoids' is unknown; the methods are icce"),
        ({"method": []}, "method: the list is empty"),
        ({"method": ["icce", "icce"]}, "each method can be named once"),
        ({"method": ["icce", "temi"], "preset": "paper"}, "belongs to a single method"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)
