from __future__ import annotations

import pytest
import yaml

from icce_ray.config import build_config
from icce_ray.errors import ConfigError
from icce_ray.sweeps.sweep_files import config_yaml


def test_a_config_is_written_as_it_was_given_and_without_secrets() -> None:
    given = {
        "images": {"uri": "s3://photos"},
        "num_clusters": 5,
        "output": "s3://results",
        "method": "temi",
        "heads": {"num_heads": 4},
        "storage": {"endpoint": "http://store", "access_key": "the key", "secret_key": "the secret"},
    }
    config = build_config(given, "test")
    written = config_yaml(config.with_extra_runs(["b", "a", "b"]), "why").decode()
    assert written.startswith("# why\n")
    assert "the key" not in written
    assert "**" not in written
    read = yaml.safe_load(written)
    assert read["consensus"]["extra_runs"] == ["b", "a"]
    assert read["storage"] == {"endpoint": "http://store"}
    again = build_config(read, "again")
    assert again.heads == config.heads
    assert again.neighbors == config.neighbors
    assert again.consensus.methods == config.consensus.methods == ("best_head",)
    with pytest.raises(ConfigError):
        build_config(read | {"unknown": 1}, "again")
