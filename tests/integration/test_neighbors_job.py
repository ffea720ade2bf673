from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
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
from icce_ray.neighbors.graph import build_graph, load_graph, part_ranges
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

NUM_IMAGES = 2500


def features() -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 24))
    rows = centres[rng.integers(0, 5, NUM_IMAGES)] + rng.standard_normal((NUM_IMAGES, 24))
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
@pytest.mark.parametrize("num_workers", [0, 1])
def test_any_number_of_shards_gives_the_graph_of_one_process(
    num_workers: int, embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if num_workers == 0:  # without Ray
        monkeypatch.setattr(job, "runs_here", lambda *_: True)
    stage = context(tmp_path / f"workers{num_workers}", embed)
    metrics = job.run(config(max(1, num_workers)), stage)
    artifact = commit(stage, metrics)
    graph = load_graph(artifact)
    expected, audit = build_graph(features(), config().neighbors, num_clusters=5, seed=3)
    assert np.array_equal(graph.indptr, expected.indptr)
    assert np.array_equal(graph.indices, expected.indices)
    indptr_names = [name for name in artifact.part_names("part-") if name.endswith("-indptr.npy")]
    assert len(indptr_names) == len(part_ranges(NUM_IMAGES)) > 1
    written = Audit(**artifact.read_json("audit.json"))
    assert replace(written, predicted_s=0) == replace(audit, predicted_s=0)
    assert metrics["similarity_threshold"] == audit.similarity_threshold
    assert metrics["num_edges"] == len(expected.indices)
    assert metrics["mean_neighbors"] == pytest.approx(expected.degrees.mean(), abs=1e-3)
    assert metrics["min_neighbors"] == expected.degrees.min()
    assert metrics["max_neighbors"] == expected.degrees.max()
    json.dumps(metrics)
    assert not (tmp_path / f"workers{num_workers}" / "records").exists()


class EndAfter(Progress):
    """Ends the run once a number of images is done."""

    def __init__(self, num_images: int) -> None:
        super().__init__("neighbors", quiet=True)
        self.num_images = num_images

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        if done >= self.num_images:
            raise KeyboardInterrupt


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, as if the collection were small."""
    monkeypatch.setattr(job, "runs_here", lambda *_: True)


@pytest.mark.usefixtures("_here")
def test_a_resumed_run_builds_only_what_is_missing(embed: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    begun = StageContext(ArtifactWriter(Folder.at(folder)), {"embed": embed}, EndAfter(1))
    with pytest.raises(KeyboardInterrupt):
        job.run(config(), begun)
    finished = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    assert 1 < len(finished) < 1 + len(part_ranges(NUM_IMAGES))  # the audit among them
    names = [file["name"] for record in finished for file in record["files"]]
    before = {name: (folder / name).stat().st_mtime_ns for name in names}
    stage = context(folder, embed)
    metrics = job.run(config(), stage)
    assert all((folder / name).stat().st_mtime_ns == written for name, written in before.items())
    graph = load_graph(commit(stage, metrics))
    expected, _ = build_graph(features(), config().neighbors, num_clusters=5, seed=3)
    assert np.array_equal(graph.indices, expected.indices)


@pytest.mark.usefixtures("_here")
def test_parts_made_of_other_embeddings_are_not_taken_up(embed: Artifact, tmp_path: Path) -> None:
    begun = StageContext(ArtifactWriter(Folder.at(tmp_path / "out")), {"embed": embed}, EndAfter(1))
    with pytest.raises(KeyboardInterrupt):
        job.run(config(), begun)
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
def test_three_shards_give_the_graph_of_one_process_and_a_killed_one_costs_its_own_work_only(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = KillOnce()
    start = job.start_shards

    def remember(*arguments: Any) -> list[Any]:
        progress.actors = start(*arguments)
        return progress.actors

    monkeypatch.setattr(job, "start_shards", remember)
    monkeypatch.setattr(job, "PARTS_IN_FLIGHT", 1)
    settings = config(3)
    stage = StageContext(ArtifactWriter(Folder.at(tmp_path / "killed")), {"embed": embed}, progress)
    artifact = commit(stage, job.run(settings, stage))
    graph = load_graph(artifact)
    expected, audit = build_graph(features(), settings.neighbors, num_clusters=5, seed=3)
    written = Audit(**artifact.read_json("audit.json"))
    assert replace(written, predicted_s=0) == replace(audit, predicted_s=0)
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
    message = r"2,500 images x 24 dimensions .* about 1000000\.0 GB on a machine with 2 of 2 workers; .* GB are free"
    with pytest.raises(ResourceError, match=message):
        job.run(config(2), context(tmp_path / "out", embed))
