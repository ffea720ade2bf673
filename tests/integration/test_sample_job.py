from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from icce_ray.config import Config, SampleConfig
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import InputError, find_cause
from icce_ray.runtime import workers
from icce_ray.runtime.progress import Progress
from icce_ray.sample import job, near_duplicates
from icce_ray.sample.near_duplicates import find_near_duplicates
from icce_ray.sample.training_set import TrainingRows, sample_ids, training_rows, training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

NUM_IMAGES = 900
FIRST_ID = 10


def features() -> npt.NDArray[np.float16]:
    """Images 0 to 799; 800 to 849 are copies of image 3, 850 to 899 near-copies of images 100 to 149."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_IMAGES, 24))
    rows[800:850] = rows[3]
    rows[850:] = rows[100:150] + 0.005 * rows[850:]
    return rows.astype(np.float16)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder, rows = tmp_path_factory.mktemp("embed"), features()
    writer = ArtifactWriter(Folder.at(folder))
    for number, ids in enumerate(np.array_split(np.arange(NUM_IMAGES), 4)):
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows[ids].ravel()), rows.shape[1])
        table = pa.table({"image_id": FIRST_ID + ids, "embedding": embedding})
        writer.write_table(f"part-{number:05d}.parquet", table)
    writer.write_table("errors.parquet", pa.table({"image_id": np.arange(FIRST_ID)}))
    metrics = {"dim": 24, "feature_set": "planted"}
    return writer.commit(stage="embed", fingerprint=folder.name, inputs={}, config={}, metrics=metrics, seconds=0.0)


@pytest.fixture
def _many_tasks(monkeypatch: pytest.MonkeyPatch, ray_cluster: Any) -> None:
    monkeypatch.setattr(job, "ROWS_PER_TASK", 250)
    monkeypatch.setattr(near_duplicates, "ROWS_PER_PART", 150)


def run(folder: Path, embed: Artifact, progress: Progress | None = None, **sample: Any) -> tuple[Artifact, Any]:
    config = Config(output="unused", num_clusters=5, seed=3, embeddings={"uri": "unused.npy"}, sample=sample)
    output = ArtifactWriter(Folder.at(folder))
    metrics = job.run(config, StageContext(output, {"embed": embed}, progress or Progress("sample", quiet=True)))
    name = folder.name
    return output.commit(
        stage="sample", fingerprint=name, inputs={}, config={}, metrics=metrics, seconds=0.0
    ), config.sample


def expected_rows(sample: SampleConfig) -> TrainingRows:
    """The training set by row, made in this process."""
    drawn_ids = sample_ids(NUM_IMAGES, sample.max_images, 3, np.arange(FIRST_ID))
    drawn = np.arange(NUM_IMAGES) if drawn_ids is None else drawn_ids - FIRST_ID
    if sample.duplicate_threshold is None:
        return TrainingRows(drawn, drawn[:0], drawn[:0])
    found = find_near_duplicates(features()[drawn], sample.duplicate_threshold)
    return TrainingRows(drawn[found.leaders], drawn[found.followers], drawn[found.leader_N[found.followers]])


@pytest.mark.usefixtures("_many_tasks")
@pytest.mark.parametrize("settings", [{}, {"max_images": 600}, {"max_images": 600, "duplicate_threshold": None}])
def test_tasks_choose_the_training_set_of_one_process(
    settings: dict[str, Any], embed: Artifact, tmp_path: Path
) -> None:
    artifact, sample = run(tmp_path / "out", embed, **settings)
    rows = expected_rows(sample)
    inputs = {"embed": embed, "sample": artifact}
    chosen = load_features(training_set(inputs))
    assert np.array_equal(chosen.image_ids, FIRST_ID + rows.image_ids_n)
    assert np.array_equal(chosen.matrix, features()[rows.image_ids_n])
    found = training_rows(inputs)
    assert found is not None
    everything = np.arange(NUM_IMAGES)
    assert np.array_equal(found.rows_of(FIRST_ID + everything), rows.rows_of(everything))
    expected = {"dim": 24, "feature_set": "planted", "num_embedded": 900, "num_images": len(rows.image_ids_n)}
    if sample.duplicate_threshold is not None:
        drawn = np.sort([*rows.image_ids_n, *rows.follower_ids_F])
        whole = find_near_duplicates(features()[drawn], "auto")
        expected |= {"duplicate_threshold": whole.threshold, "num_duplicate_pairs": len(whole.pairs)}
        expected |= {"num_left_out": len(rows.follower_ids_F)}
        pairs = artifact.read_table("duplicate_pairs.parquet")
        assert np.array_equal(pairs["image_id"], FIRST_ID + drawn[whole.pairs.higher_P])
        assert np.array_equal(pairs["duplicate_of"], FIRST_ID + drawn[whole.pairs.lower_P])
    if not settings:
        assert chosen.image_ids.tolist() == list(range(FIRST_ID, FIRST_ID + 800))
        groups = artifact.read_table("duplicate_groups.parquet").to_pylist()
        assert len(groups) == 51 + 2 * 50
        assert [row["leader"] for row in groups[:51]] == 51 * [FIRST_ID + 3]
    assert artifact.metrics == expected
    left = {path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {*artifact.file_names()}


def test_a_collection_without_near_duplicates_is_not_copied(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "runs_here", lambda *_: True)
    artifact, _ = run(tmp_path / "out", embed, duplicate_threshold=1.0)
    assert artifact.metrics["num_left_out"] == 50  # the copies alone
    artifact, _ = run(tmp_path / "none", embed, duplicate_threshold=None)
    assert artifact.part_names() == []
    assert training_set({"embed": embed, "sample": artifact}) is embed


class EndAt(Progress):
    """Ends the run when a step of it is half done."""

    def __init__(self, step: str) -> None:
        super().__init__("sample", quiet=True)
        self.step = step

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        if note == self.step and done >= total / 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("max_images", [None, 700])
def test_a_killed_run_resumes_with_the_parts_it_has(
    max_images: int | None, embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "runs_here", lambda *_: True)
    monkeypatch.setattr(near_duplicates, "ROWS_PER_PART", 150)
    searched: list[int] = []
    find_pairs = near_duplicates.find_pairs
    monkeypatch.setattr(near_duplicates, "find_pairs", lambda *given: searched.append(given[2]) or find_pairs(*given))
    for step in ("near-duplicates", "copy"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", embed, EndAt(step), max_images=max_images)
        # A second run that planned or projected again would now fail.
        monkeypatch.setattr(near_duplicates, "plan_search", None)
        monkeypatch.setattr(near_duplicates, "project_rows", None)
    artifact, _ = run(tmp_path / "out", embed, max_images=max_images)
    assert sorted(searched) == sorted(set(searched))
    monkeypatch.undo()
    monkeypatch.setattr(workers, "runs_here", lambda *_: True)
    assert artifact.metrics == run(tmp_path / "again", embed, max_images=max_images)[0].metrics
    ids = [training_rows({"sample": Artifact.find(Folder.at(tmp_path / name))}) for name in ("out", "again")]
    assert np.array_equal(ids[0].image_ids_n, ids[1].image_ids_n)


@pytest.mark.usefixtures("_many_tasks")
def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    rows = features()
    rows[77, 3] = np.nan
    writer = ArtifactWriter(Folder.at(tmp_path / "embed"))
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 24)
    writer.write_table("part-00000.parquet", pa.table({"image_id": np.arange(NUM_IMAGES), "embedding": embedding}))
    writer.write_table("errors.parquet", pa.table({"image_id": np.arange(0)}))
    broken = writer.commit(stage="embed", fingerprint="nan", inputs={}, config={}, metrics={}, seconds=0.0)
    with pytest.raises(Exception, match="row 77") as caught:
        run(tmp_path / "out", broken)
    cause = find_cause(caught.value, InputError)
    assert cause is not None
    assert str(cause).startswith("the feature of row 77 is not finite")
