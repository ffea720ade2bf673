from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.config import build_config
from icce_ray.errors import ConfigError
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.sweeps.sweep_files import TrialRun, config_yaml, with_peers
from icce_ray.sweeps.trial_table import Row


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


def test_the_peers_of_a_trial_are_the_others_seed_by_seed(tmp_path: Path) -> None:
    config = build_config({"embeddings": "x.npy", "num_clusters": 2, "output": "out"}, "test")
    labels = np.random.default_rng(0).integers(-1, 3, (3, 2, 30))

    def run_of(trial: int, seed: int) -> TrialRun:
        writer = ArtifactWriter(Folder.at(tmp_path / f"{trial}-{seed}"))
        # Every trial was trained on other images: the first 30 are those that all have.
        ids = np.append(np.arange(30), 100 + trial)
        writer.write_array("image_ids.npy", ids)
        writer.write_array("labels.npy", np.append(labels[trial, seed], 0))
        artifact = writer.commit(stage="consensus", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0)
        return TrialRun("run", config, {"consensus": artifact})

    runs = {trial: [run_of(trial, seed) for seed in range(2)] for trial in range(3)}
    rows = [Row(0, {}, {"anmi": 0.5}), Row(1, {}), Row(2, {}), Row(3, {}, error="it failed")]
    found = with_peers(rows, runs)
    for trial in range(3):
        others = [other for other in range(3) if other != trial]
        pairs = [(labels[trial, seed], labels[other, seed]) for other in others for seed in range(2)]
        expected = np.mean([normalized_mutual_info_score(*pair, average_method="geometric") for pair in pairs])
        assert found[trial].metrics["peers"] == pytest.approx(expected)
    assert found[0].metrics["anmi"] == 0.5
    assert found[3] == rows[3]
    assert with_peers(rows[:1], {0: runs[0]}) == rows[:1], "a single trial has none"
