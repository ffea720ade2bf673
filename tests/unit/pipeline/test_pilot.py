"""The pilot: how the times of a small collection become those of a large one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import icce_ray.pipeline.pilot as pilot_module
from icce_ray.config import Config, build_config
from icce_ray.pipeline.pilot import run_pilot

FEATURES = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
STARTING_S, EPOCH_S = 2.0, 0.5


def stage(name: str, num_bytes: int, **metrics: Any) -> Any:
    artifact = SimpleNamespace(num_bytes=lambda: num_bytes, metrics=metrics)
    return SimpleNamespace(name=name, artifact=artifact)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The pilot's runs. Each epoch takes half a second after two seconds of starting."""
    configs: list[Config] = []

    def run(config: Config, quiet: bool) -> Any:
        configs.append(config)
        seconds = {"images": 9.0, "embed": 9.0, "sample": 0.5, "neighbors": 1.0}
        seconds |= {"method": STARTING_S + EPOCH_S * config.heads.num_epochs, "consensus": 3.0, "classifier": 4.0}
        seconds |= {"assign": 0.25, "report": 2.0}
        return SimpleNamespace(seconds=({"cluster_count": 6.0} if config.is_auto else {}) | seconds)

    def plan(config: Config) -> Any:
        return [stage("neighbors", 100, mean_neighbors=20.0), stage("assign", 40, num_clusters_used=5)]

    monkeypatch.setattr(pilot_module, "run_pipeline", run)
    monkeypatch.setattr(pilot_module, "plan", plan)
    return configs


def config_of(**settings: Any) -> Config:
    base = {"images": {"uri": "x"}, "num_clusters": 5, "output": "out", "heads": {"num_epochs": 40}}
    return build_config(base | settings, "test")


def test_a_small_collection_is_piloted_at_its_size(ran: list[Config], tmp_path: Path) -> None:
    found = run_pilot(config_of(), FEATURES, num_images=1_000, folder=tmp_path)
    assert np.load(tmp_path / "pilot.npy").shape == (1_000, 4)
    assert found.seconds == {
        "sample": 0.5,
        "neighbors": 1.0,
        "method": STARTING_S + 40 * EPOCH_S,
        "consensus": 3.0,
        "classifier": 4.0,
        "assign": 0.25,
        "report": 2.0,
    }
    assert found.disk_bytes == {"neighbors": 100, "assign": 40}
    assert [config.heads.num_epochs for config in ran] == [1, 4]
    assert {config.heads.batch_size for config in ran} == {128}  # that of 1,000 images
    assert {config.sample.duplicate_threshold for config in ran} == {1.0}


def test_a_large_collection_takes_longer_by_what_each_stage_grows_with(ran: list[Config], tmp_path: Path) -> None:
    settings = {"sample": {"max_images": 8_000, "duplicate_threshold": None}, "neighbors": {"max_neighbors": 60}}
    found = run_pilot(config_of(**settings), FEATURES, num_images=80_000, folder=tmp_path)
    assert found.num_images == 2_000
    assert found.seconds["neighbors"] == 1.0 * 4**2
    assert found.seconds["consensus"] == 3.0 * 4
    assert found.seconds["classifier"] == 4.0
    assert found.seconds["assign"] == 0.25 * 40
    # 8,000 images in batches of 1,024 are 8 steps, where the pilot had 2.
    assert found.seconds["method"] == pytest.approx(STARTING_S + 40 * EPOCH_S * 8 / 2)
    assert found.disk_bytes == {"neighbors": 100 * 4**2, "assign": 40 * 40}
    assert found.mean_neighbors == 60
    settings["neighbors"]["max_neighbors"] = 90
    assert run_pilot(config_of(**settings), FEATURES, num_images=80_000, folder=tmp_path).mean_neighbors == 20 * 4
    assert {config.sample.duplicate_threshold for config in ran} == {None}


def test_a_number_that_is_to_be_chosen_costs_many_clusterings(ran: list[Config], tmp_path: Path) -> None:
    config = config_of(num_clusters="auto", cluster_count={"min_clusters": 5, "max_clusters": 24})
    found = run_pilot(config, FEATURES, num_images=1_000, folder=tmp_path, num_parallel=2)
    assert found.seconds["cluster_count"] == 6.0 * (1 + 20 / 8) / 2
    assert (ran[0].cluster_count.min_clusters, ran[0].cluster_count.max_clusters) == (20, 20)
