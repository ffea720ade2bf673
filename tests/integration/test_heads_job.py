"""Training on Ray when its workers die, and when what it is asked for does not fit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray import ICCE
from icce_ray.config import Config
from icce_ray.errors import ResourceError
from icce_ray.methods.heads import job
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

from .stages import run_until, workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

HEADS: dict[str, Any] = {
    "num_heads": 4,
    "num_epochs": 100,
    "hidden_dim": 64,
    "bottleneck_dim": 32,
    "learning_rate": 2e-3,
    "precision": "float32",
    "checkpoint_interval_s": 0.5,
}
CLASSIFIER = {"num_iterations": 100}


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    generator = np.random.default_rng(4)
    centres = generator.normal(size=(5, 24)) * 1.2
    return (centres[generator.integers(0, 5, 900)] + generator.normal(size=(900, 24))).astype(np.float32)


@pytest.fixture(scope="module")
def undisturbed(features: np.ndarray) -> np.ndarray:
    heads = dict(HEADS)
    estimator = ICCE(
        5, n_heads=heads.pop("num_heads"), epochs=heads.pop("num_epochs"), heads=heads, classifier=CLASSIFIER,
        random_state=0,
    )  # fmt: skip
    labels: np.ndarray = estimator.fit(features).label_matrix_
    return labels


def make_config(folder: Path, num_workers: int = 1, **heads: object) -> Config:
    return Config.model_validate(
        {
            "embeddings": {"uri": str(folder / "features.npy")},
            "num_clusters": 5,
            "output": str(folder / "out"),
            "heads": HEADS | heads,
            "classifier": CLASSIFIER,
            "resources": {"method": {"num_workers": num_workers, "cpus_per_worker": 1}},
        }
    )


@pytest.fixture(scope="module")
def inputs(features: np.ndarray, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Embeddings and neighbours, as the pipeline makes them."""
    folder = tmp_path_factory.mktemp("inputs")
    np.save(folder / "features.npy", features)
    return run_until("neighbors", make_config(folder))


def run_heads(inputs: dict[str, Artifact], folder: Path, num_workers: int = 1, **heads: object) -> ArtifactWriter:
    writer = ArtifactWriter(Folder.at(folder))
    job.run(make_config(folder, num_workers, **heads), StageContext(writer, inputs, Progress("heads", quiet=True)))
    return writer


class Killer(threading.Thread):
    """Kills one of the workers as soon as there is a checkpoint."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output = output
        self.killed: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(self.output.glob("checkpoints/epoch-*.safetensors")):
                pids = workers("RayTrainWorker")
                if pids:
                    os.kill(pids[-1], signal.SIGKILL)
                    self.killed = pids[-1]
                    return
            time.sleep(0.01)


def test_a_killed_worker_costs_no_labels(inputs, undisturbed, tmp_path: Path) -> None:
    killer = Killer(tmp_path)
    killer.start()
    run_heads(inputs, tmp_path, num_workers=2)
    killer.join()
    assert killer.killed is not None
    assert killer.killed not in workers("RayTrainWorker")
    assert np.array_equal(np.load(tmp_path / "label_matrix.npy"), undisturbed)
    history = json.loads((tmp_path / "clusterings.json").read_text())["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, HEADS["num_epochs"] + 1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


def test_more_workers_than_heads_are_refused_before_any_starts(inputs, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"5 workers for 4 heads; .* at most 4 can work"):
        run_heads(inputs, tmp_path, num_workers=5)


def test_heads_that_do_not_fit_are_refused_before_they_are_made(inputs, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^heads: 400 heads .* GB are free"):
        run_heads(inputs, tmp_path, num_heads=400, hidden_dim=200_000, bottleneck_dim=100_000)
