from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from icce_ray import run_pipeline
from icce_ray.config import Config
from icce_ray.errors import ResourceError
from icce_ray.methods.kmeans import job
from icce_ray.methods.kmeans.fit_kmeans import Shards, fit_kmeans
from icce_ray.methods.kmeans.kmeans_shard import KMeansShard
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

from .stages import run_until, without_ray

NUM_CLUSTERS = 9


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Overlapping clusters, six classes."""
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(6, 24)) * 0.9
    return (centres[np.arange(1100) % 6] + generator.normal(size=(1100, 24))).astype(np.float32)


def config(features: np.ndarray, folder: Path, num_workers: int, **sections: Any) -> Config:
    np.save(folder / "features.npy", features)
    np.save(folder / "labels.npy", np.arange(1100) % 6)
    return Config.model_validate(
        {
            "embeddings": str(folder / "features.npy"),
            "method": "kmeans",
            "num_clusters": NUM_CLUSTERS,
            "output": str(folder / "out"),
            "seed": 3,
            "kmeans": {"num_starts": 3},
            "sample": {"max_images": None},
            "classifier": {"num_iterations": 200},
            "evaluate": {"labels": str(folder / "labels.npy")},
            "resources": {"method": {"num_workers": num_workers, "cpus_per_worker": 1}},
        }
        | sections
    )


def here(features: np.ndarray, settings: Config) -> Any:
    shards = Shards([KMeansShard(lambda: features)])
    return fit_kmeans(
        shards, settings.kmeans, num_images=len(features), dim=24, num_clusters=NUM_CLUSTERS, seed=3
    ).clusterings(len(features))  # fmt: skip


@pytest.mark.slow
def test_a_whole_run_needs_no_graph(features: np.ndarray, tmp_path: Path) -> None:
    settings = config(features, tmp_path, 2, resources={})
    result = run_pipeline(settings, quiet=True)
    assert "neighbors" not in result.seconds
    assert "Cluster sizes" in Path(result.report).read_text()
    assert result.metrics["acc"] > 0.6  # nine clusters for six classes: three are left over
    assert result.metrics["many_to_one"] >= result.metrics["acc"]
    (path,) = (tmp_path / "out" / "method").iterdir()
    artifact = Artifact.find(Folder.at(path))
    assert artifact is not None
    expected = here(features, settings)
    assert np.array_equal(artifact.read_array("label_matrix.npy"), expected.labels_HN)
    best = expected.labels_HN[expected.losses_H.argmin()]
    clusters = pq.read_table(result.assignments).sort_by("image_id")["cluster"].to_numpy()
    assert np.array_equal(clusters, best)
    assert not (path / "starts").exists()


class KillOnce(Progress):
    """Kills one shard's process after the third iteration."""

    def __init__(self) -> None:
        super().__init__("method", quiet=True)
        self.actors: list[Any] = []
        self.killed_pid: int | None = None

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        if done == 3:
            self.killed_pid = int(ray.get(self.actors[1].__ray_call__.remote(lambda _: os.getpid())))
            os.kill(self.killed_pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_shards_of_which_one_is_killed_give_what_one_process_gives(
    features: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, progress = config(features, tmp_path, 2, kmeans={"num_starts": 1}), KillOnce()
    with without_ray():
        artifacts = run_until("sample", config(features, tmp_path, 2, resources={}))
    make = job.ShardActors.__init__

    def remember(self: job.ShardActors, *arguments: Any) -> None:
        make(self, *arguments)
        progress.actors = list(self.shards)

    monkeypatch.setattr(job.ShardActors, "__init__", remember)
    output = ArtifactWriter(Folder.at(tmp_path / "method"))
    job.run(settings, StageContext(output, artifacts, progress))
    assert progress.killed_pid is not None
    expected, folder = here(features, settings), tmp_path / "method"
    assert np.array_equal(np.load(folder / "label_matrix.npy"), expected.labels_HN)
    assert json.loads((folder / "clusterings.json").read_text())["losses"] == expected.losses_H.tolist()
    assert (folder / "kmeans.npz").read_bytes() == expected.files["kmeans.npz"]
    assert not (folder / "starts").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_without_the_memory_is_refused_with_both_numbers(
    features: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(features, tmp_path, 2)
    monkeypatch.setattr(job, "worker_bytes", lambda *sizes: 10**15)
    with without_ray():
        artifacts = run_until("sample", config(features, tmp_path, 2, resources={}))
    context = StageContext(ArtifactWriter(Folder.at(tmp_path / "method")), artifacts, Progress("method", quiet=True))
    message = r"1,100 images x 24 .* 9 clusters and 3 starts need about 2000000\.0 GB on a machine with 2 of 2 workers"
    with pytest.raises(ResourceError, match=message):
        job.run(settings, context)
