from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import ray

from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.errors import InputError, ResourceError, find_cause
from icce_ray.neighbors import job, memory
from icce_ray.neighbors.audit import Audit
from icce_ray.neighbors.graph import build_graph, load_graph, part_ranges
from icce_ray.progress import Progress
from icce_ray.store import Artifact, ArtifactWriter, Folder

NUM_IMAGES = 2500


def features() -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 24))
    rows = centres[rng.integers(0, 5, NUM_IMAGES)] + rng.standard_normal((NUM_IMAGES, 24))
    rows[1000:1100] = rows[0]
    return rows.astype(np.float16)


def write_embed(folder: Path, rows_ND: npt.NDArray[np.float16]) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for number, rows in enumerate(np.array_split(rows_ND, 3)):
        ids = np.arange(len(rows)) + sum(len(part) for part in np.array_split(rows_ND, 3)[:number])
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        table = pa.table({"image_id": ids, "embedding": embedding, "content_hash": [""] * len(rows)})
        writer.write_table(f"part-{number:05d}.parquet", table)
    return writer.commit(stage="embed", fingerprint=folder.name, inputs={}, config={}, metrics={}, seconds=0.0)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_embed(tmp_path_factory.mktemp("embed"), features())


def config(num_workers: int = 1, **neighbors: Any) -> Config:
    return Config(
        output="unused",
        num_clusters=5,
        seed=3,
        embeddings={"uri": "unused.npy"},
        neighbors={"max_neighbors": 200} | neighbors,
        resources={"neighbors": {"num_workers": num_workers}},
    )


def context(folder: Path, embed: Artifact) -> StageContext:
    return StageContext(ArtifactWriter(Folder.at(folder)), {"embed": embed}, Progress("neighbors", quiet=True))


def commit(stage: StageContext, metrics: dict[str, Any]) -> Artifact:
    name = Path(stage.output.folder.path).name
    return stage.output.commit(stage="neighbors", fingerprint=name, inputs={}, config={}, metrics=metrics, seconds=0.0)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_graph_of_one_process(
    num_workers: int, embed: Artifact, tmp_path: Path
) -> None:
    stage = context(tmp_path / f"workers{num_workers}", embed)
    metrics = job.run(config(num_workers), stage)
    artifact = commit(stage, metrics)
    graph = load_graph(artifact)
    expected, audit = build_graph(features(), config().neighbors, num_clusters=5, seed=3)
    assert np.array_equal(graph.indptr, expected.indptr)
    assert np.array_equal(graph.indices, expected.indices)
    assert len(artifact.part_names("part-")) == 2 * len(part_ranges(NUM_IMAGES)) > 2
    written = Audit.from_json(artifact.read_json("audit.json"))
    assert written.to_json() | {"predicted_s": 0} == audit.to_json() | {"predicted_s": 0}
    assert metrics["similarity_threshold"] == audit.similarity_threshold
    assert metrics["num_edges"] == expected.num_edges
    assert metrics["mean_neighbors"] == pytest.approx(expected.degrees.mean(), abs=1e-3)
    assert metrics["min_neighbors"] == expected.degrees.min()
    assert metrics["max_neighbors"] == expected.degrees.max()
    json.dumps(metrics)


@pytest.mark.usefixtures("ray_cluster")
def test_a_resumed_run_builds_only_what_is_missing(embed: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    metrics = job.run(config(), context(folder, embed))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "part-00001-indices.npy").unlink()
    stage = context(folder, embed)
    assert job.run(config(), stage) == metrics
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert {name for name in changed if name.startswith("part")} == {
        "part-00001-indices.npy",
        "part-00001-indptr.npy",
        "part-00001.done.json",
    }
    assert load_graph(commit(stage, metrics)).num_images == NUM_IMAGES


@pytest.mark.usefixtures("ray_cluster")
def test_parts_made_of_other_embeddings_are_not_taken_up(embed: Artifact, tmp_path: Path) -> None:
    job.run(config(), context(tmp_path / "out", embed))
    other_features = features()[::-1].copy()
    stage = context(tmp_path / "out", write_embed(tmp_path / "other", other_features))
    graph = load_graph(commit(stage, job.run(config(), stage)))
    expected, _ = build_graph(other_features, config().neighbors, num_clusters=5, seed=3)
    assert np.array_equal(graph.indices, expected.indices)


class KillWorkerOnce(Progress):
    """Kills the worker's process as soon as a part is built, with others under way."""

    def __init__(self) -> None:
        super().__init__("neighbors", quiet=True)
        self.worker: Any = None
        self.killed_pid: int | None = None

    def pid(self) -> int:
        return int(ray.get(self.worker.__ray_call__.remote(lambda _: os.getpid())))

    def update(self, done: int, total: int, note: str = "") -> None:
        if 0 < done < total and self.killed_pid is None:
            self.killed_pid = self.pid()
            os.kill(self.killed_pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_its_part_only(embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = KillWorkerOnce()
    start_workers = job._start_workers

    def remember_worker(*arguments: Any) -> list[Any]:
        workers = start_workers(*arguments)
        progress.worker = workers[0]
        return workers

    monkeypatch.setattr(job, "_start_workers", remember_worker)
    stage = StageContext(ArtifactWriter(Folder.at(tmp_path / "killed")), {"embed": embed}, progress)
    graph = load_graph(commit(stage, job.run(config(), stage)))
    expected, _ = build_graph(features(), config().neighbors, num_clusters=5, seed=3)
    assert progress.killed_pid is not None
    assert not Path(f"/proc/{progress.killed_pid}").exists()
    assert np.array_equal(graph.indptr, expected.indptr)
    assert np.array_equal(graph.indices, expected.indices)


@pytest.mark.usefixtures("ray_cluster")
def test_features_that_are_not_finite_are_the_users_to_mend(tmp_path: Path) -> None:
    rows = features()
    rows[77, 3] = np.nan
    with pytest.raises(Exception, match="row 77") as caught:
        job.run(config(), context(tmp_path / "out", write_embed(tmp_path / "embed", rows)))
    cause = find_cause(caught.value, InputError)
    assert cause is not None
    assert str(cause).startswith("the feature of row 77 is not finite")


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_without_the_memory_is_refused_with_both_numbers(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.NeighborWorker, "available_memory_bytes", lambda self: 1_000_000)
    with pytest.raises(ResourceError, match=r"2,500 images x 24 dimensions .* need .* GB .* available: 0\.0 GB"):
        job.run(config(), context(tmp_path / "out", embed))
    assert memory.available_memory_bytes() > 1_000_000
