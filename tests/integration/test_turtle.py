"""TURTLE through the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config import Config, TurtleConfig
from icce_ray.errors import InputError
from icce_ray.methods.clusterings import Clusterings, read_losses
from icce_ray.methods.turtle import job
from icce_ray.methods.turtle.run_block import run_blocks
from icce_ray.methods.turtle.train_runs import WEIGHTS_NAME, clusterings_of, train_runs
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Artifact, Folder

from .stages import run_until, two_workers_in_turn

pytestmark = pytest.mark.slow

NUM_IMAGES = 240
TURTLE = {"num_runs": 4, "num_steps": 30, "inner_steps": 5, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, NUM_IMAGES)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> list[Path]:
    """Two feature sets: the first cannot tell cluster 1 from 2, the second cannot tell 0 from 1."""
    generator = np.random.default_rng(2)
    found = []
    for groups in ([0, 1, 1], [0, 0, 1]):
        centres = 4 * np.eye(2, 16)
        features = centres[np.array(groups)[labels]] + generator.normal(size=(NUM_IMAGES, 16))
        found.append(tmp_path_factory.mktemp("features") / "features.npy")
        np.save(found[-1], features.astype(np.float32))
    return found


def make_config(places: list[Path], output: Path, **changes: Any) -> Config:
    settings = {
        "embeddings": {"uri": str(places[0]), "extra": [str(place) for place in places[1:]]},
        "num_clusters": 3,
        "method": "turtle",
        "turtle": TURTLE,
        "classifier": {"num_iterations": 50},
        "output": str(output),
    }
    return Config.model_validate(settings | changes)


def train_here(places: list[Path]) -> Clusterings:
    features = [np.load(place) for place in places]
    settings = TurtleConfig.model_validate(TURTLE)
    return clusterings_of(train_runs(features, settings, run_blocks(4, 3), num_clusters=3, seed=0))


def test_a_run_clusters_by_two_feature_sets(places: list[Path], labels: np.ndarray, tmp_path: Path) -> None:
    truth = tmp_path / "labels.npy"
    np.save(truth, labels)
    result = run_pipeline(make_config(places, tmp_path / "out", evaluate={"labels": str(truth)}), quiet=True)
    (folder,) = (tmp_path / "out" / "method").iterdir()
    found = Artifact.find(Folder.at(folder))
    assert found is not None
    assert found.metrics["feature_sets"] == ["ready-made", "ready-made 2"]
    assert found.metrics["prediction_error"] == found.read_json("clusterings.json")["history"][-1]["loss"]
    expected = train_here(places)
    assert np.array_equal(found.read_array("label_matrix.npy"), expected.labels_HN)
    assert np.array_equal(read_losses(found), expected.losses_H)
    assert result.metrics["acc"] > 0.8, "one feature set alone tells two groups apart: 0.67"


def test_feature_sets_of_different_length_are_refused(places: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short.npy"
    np.save(short, np.load(places[1])[:-1])
    with pytest.raises(InputError, match=r"short.npy has 239 rows, .* has 240; all must have the same images"):
        run_pipeline(make_config([places[0], short], tmp_path / "out"), quiet=True)


def test_two_workers_make_the_runs_of_one(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They exchange nothing, so they can run one after the other."""
    two_workers_in_turn(monkeypatch, job, "method", 2, "gloo")
    method = run_until("method", make_config(places, tmp_path))["method"]
    assert np.array_equal(method.read_array("label_matrix.npy"), train_here(places).labels_HN)
    assert method.read_bytes(WEIGHTS_NAME) == train_here(places).files[WEIGHTS_NAME]
    assert not [part for part in method.folder.sizes() if part.startswith(("runs", "records"))]
