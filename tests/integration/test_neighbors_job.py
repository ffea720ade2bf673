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
from icce_ray.errors import InputError, ResourceError, find_cause
from icce_ray.neighbors import job
from icce_ray.neighbors.audit import Audit
from icce_ray.neighbors.graph import build, build_graph, load_graph
from icce_ray.neighbors.graph_rows import part_ranges
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

NUM_IMAGES = 2500


def features() -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 24))
    rows = centres[rng.integers(0, 5, NUM_IMAGES)] + rng.standard_normal((NUM_IMAGES, 24))
    rows[1000:1100] = rows[0]
    return rows.astype(np.float16)


def write_embed(folder: Path, rows: npt.NDArray[np.float16]) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for number, ids in enumerate(np.array_split(np.arange(NUM_IMAGES), 3)):
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows[ids].ravel()), rows.shape[1])
        writer.write_table(f"part-{number:05d}.parquet", pa.table({"image_id": ids, "embedding": embedding}))
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
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_any_number_of_shards_gives_the_graph_of_one_process(num_workers: int, embed: Artifact, tmp_path: Path) -> None:
    stage = context(tmp_path / f"workers{num_workers}", embed)
    metrics = job.run(config(num_workers), stage)
    artifact = commit(stage, metrics)
    graph = load_graph(artifact)
    built = build(features(), config().neighbors, num_clusters=5, seed=3)
    expected, audit = built.graph, built.audit
    assert np.array_equal(graph.indptr, expected.indptr)
    assert np.array_equal(graph.indices, expected.indices)
    indptr_names = [name for name in artifact.part_names("part-") if name.endswith("-indptr.npy")]
    assert len(indptr_names) == len(part_ranges(NUM_IMAGES)) > 1
    written = Audit.from_json(artifact.read_json("audit.json"))
    assert written.to_json() | {"predicted_s": 0} == audit.to_json() | {"predicted_s": 0}
    assert metrics["similarity_threshold"] == audit.similarity_threshold
    assert metrics["num_edges"] == expected.num_edges
    degrees = expected.degrees[expected.anchors]
    assert len(degrees) == NUM_IMAGES - 100
    assert metrics["mean_neighbors"] == pytest.approx(degrees.mean(), abs=1e-3)
    assert metrics["min_neighbors"] == degrees.min()
    assert metrics["max_neighbors"] == expected.degrees.max()
    json.dumps(metrics)
    # Rows 1000 to 1099 are copies of row 0.
    assert metrics["num_left_out"] == 100
    assert metrics["num_duplicate_pairs"] == len(built.duplicates) > 1000
    groups = artifact.read_table("duplicate_groups.parquet").to_pydict()
    assert groups == {"image_id": [0, *range(1000, 1100)], "leader": [0] * 101}
    assert artifact.read_table("duplicate_pairs.parquet").num_rows == len(built.duplicates)
    assert not np.isin(graph.indices, np.arange(1000, 1100)).any()


@pytest.mark.usefixtures("ray_cluster")
def test_a_resumed_run_builds_only_what_is_missing(embed: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    settings = config(duplicate_threshold=None)
    metrics = job.run(settings, context(folder, embed))
    assert metrics["num_left_out"] == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "part-00001-indices.npy").unlink()
    stage = context(folder, embed)
    assert job.run(settings, stage) == metrics
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


class KillOnce(Progress):
    """Kills one shard's process as soon as a part is built, with others under way."""

    def __init__(self) -> None:
        super().__init__("neighbors", quiet=True)
        self.actors: list[Any] = []
        self.killed_pid: int | None = None
        self.num_answers: list[int] = []

    def update(self, done: int, total: int, note: str = "") -> None:
        if 0 < done < total and self.killed_pid is None:
            self.killed_pid = int(ray.get(self.actors[1].__ray_call__.remote(lambda _: os.getpid())))
            os.kill(self.killed_pid, signal.SIGKILL)
        if done == total:
            calls = [actor.__ray_call__.remote(lambda worker: worker.num_answers) for actor in self.actors]
            self.num_answers = ray.get(calls)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_shard_costs_its_own_work_only(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = KillOnce()
    start = job.Shards.start

    def remember(self: job.Shards) -> list[Any]:
        progress.actors = start(self)
        return progress.actors

    monkeypatch.setattr(job.Shards, "start", remember)
    monkeypatch.setattr(job, "PARTS_IN_FLIGHT", 1)
    settings = config(3, duplicate_threshold=None)
    stage = StageContext(ArtifactWriter(Folder.at(tmp_path / "killed")), {"embed": embed}, progress)
    graph = load_graph(commit(stage, job.run(settings, stage)))
    expected, _ = build_graph(features(), settings.neighbors, num_clusters=5, seed=3)
    assert progress.killed_pid is not None
    assert not Path(f"/proc/{progress.killed_pid}").exists()
    num_parts = len(part_ranges(NUM_IMAGES))
    # The others answered once for each part; the new one only for those that the dead one had not.
    assert (progress.num_answers[0], progress.num_answers[2]) == (num_parts, num_parts)
    assert 0 < progress.num_answers[1] < num_parts
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
    monkeypatch.setattr(job, "needed_bytes", lambda *sizes: 10**15)
    message = r"2,500 images x 24 dimensions .* need 1000000\.0 GB on a machine with 2 of 2 workers; available: .* GB"
    with pytest.raises(ResourceError, match=message):
        job.run(config(2), context(tmp_path / "out", embed))
