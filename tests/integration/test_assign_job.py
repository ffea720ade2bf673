"""The classifier and assign stages on a real Ray: equal to one process, each image once, whatever is cut or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.assign import embeddings_to_label
from icce_ray.assign import job as assign_job
from icce_ray.assign.part_labeler import SCHEMA
from icce_ray.classifier import job as classifier_job
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import Config
from icce_ray.embed.embedding_parts import part_table, plan_parts
from icce_ray.errors import DamagedArtifactError, InputError, WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

from .stages import two_workers_in_turn, workers

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_LISTED = 240
ROWS_PER_PART = 60
GOOD = np.setdiff1d(np.arange(NUM_LISTED), [0, 17, 18, 100, 239])
RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 4, len(GOOD))
FEATURES = (RNG.normal(size=(len(GOOD), 6)) + 4 * np.eye(6)[TRUE]).astype(np.float16)
CONSENSUS = np.where(np.arange(len(GOOD)) % 5 == 4, -1, TRUE).astype(np.int32)
AGREEMENT = RNG.random(len(GOOD)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_to_label, "MIN_ROWS_PER_PART", ROWS_PER_PART)


def config_for(tmp_path: Path, **sections: Any) -> Config:
    resources = {"classifier": {"cpus_per_worker": 1}, "assign": {"num_workers": 2, "cpus_per_worker": 1}}
    base = {
        "images": {"uri": "/images"},
        "num_clusters": 4,
        "output": str(tmp_path),
        "embed": {"backbone": "pixels"},
        "classifier": {"num_iterations": 200},
        "assign": {"num_exemplars": 3},
        "resources": resources,
    }
    return Config.model_validate(base | sections)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    made: dict[str, Artifact] = {}

    def commit(writer: ArtifactWriter, stage: str) -> None:
        made[stage] = writer.commit(stage=stage, fingerprint=stage, inputs={}, config={}, metrics={}, seconds=0)

    writer = ArtifactWriter(Folder.at(root / "images"))
    uris = [f"/images/{number:03d}.png" for number in range(NUM_LISTED)]
    writer.write_table("images.parquet", pa.table({"image_id": range(NUM_LISTED), "uri": uris}))
    commit(writer, "images")
    writer = ArtifactWriter(Folder.at(root / "embed"))
    for part in plan_parts(NUM_LISTED, 25):
        rows = np.flatnonzero((part.start <= GOOD) & (part.stop > GOOD))
        writer.write_table(part.file_name, part_table(GOOD[rows], FEATURES[rows]))
    commit(writer, "embed")
    writer = ArtifactWriter(Folder.at(root / "consensus"))
    writer.write_array("labels.npy", CONSENSUS)
    writer.write_array("agreement.npy", AGREEMENT)
    commit(writer, "consensus")
    return made


@pytest.fixture(scope="module")
def with_classifier(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("classifier")
    context = context_for(folder, inputs)
    metrics = classifier_job.run(config_for(folder), context)
    settings: dict[str, Any] = {"fingerprint": "c", "inputs": {}, "config": {}, "seconds": 0}
    return inputs | {"classifier": context.output.commit(stage="classifier", metrics=metrics, **settings)}


def context_for(folder: Path, inputs: dict[str, Artifact]) -> StageContext:
    return StageContext(ArtifactWriter(Folder.at(folder)), inputs, Progress("test", quiet=True))


def model_of(artifacts: dict[str, Artifact]) -> LinearClassifier:
    return LinearClassifier.from_bytes(artifacts["classifier"].read_bytes("classifier.safetensors"))


def fit_here(config: Config) -> LinearClassifier:
    """The classifier that one process makes without Ray."""
    return fit_classifier(
        FEATURES,
        CONSENSUS,
        config.classifier,
        num_clusters=4,
        seed=config.seed,
        outlier_quantile=config.assign.outlier_quantile,
    )


def read(folder: Path) -> pa.Table:
    return pq.read_table(folder / "assignments")


def test_the_classifier_on_ray_is_the_one_of_a_single_process(
    with_classifier: dict[str, Artifact], tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    alone = fit_here(config)
    np.testing.assert_allclose(model_of(with_classifier).weights, alone.weights, atol=1e-6)
    metrics = with_classifier["classifier"].metrics
    assert metrics["learning_rate"] == alone.learning_rate
    assert metrics["holdout_agreement"] == alone.holdout_agreement > 0.9


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages that the two workers of a job gather."""
    import torch.distributed as dist

    found: list[Any] = [None, None]

    def all_gather_object(candidates: list[Any], best: Any) -> None:
        found[dist.get_rank()] = best
        candidates[:] = found

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    return found


def test_workers_share_the_grid_and_make_the_same_classifier(
    inputs: dict[str, Artifact], gathered: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = two_workers_in_turn(monkeypatch, classifier_job, "classifier", 2, "gloo")
    rates = [0.001, 0.1]
    config = config_for(tmp_path, classifier={"num_iterations": 200, "learning_rates": rates})
    context = context_for(tmp_path / "classifier", inputs)
    metrics = classifier_job.run(config, context)
    assert [outcome is None for outcome in outcomes] == [True, False]
    assert [best.position for best in gathered] == [0, 1]
    made = LinearClassifier.from_bytes(context.output.folder.read_bytes("classifier.safetensors"))
    alone = fit_here(config)
    for name in ("learning_rate", "num_diverged", "num_holdout", "holdout_agreement"):
        assert metrics[name] == getattr(alone, name)
    np.testing.assert_allclose(made.weights, alone.weights, atol=1e-5)


def test_a_mistake_that_all_workers_meet_is_reported_as_the_users(
    inputs: dict[str, Artifact], gathered: list[Any], tmp_path: Path
) -> None:
    """What a worker of Ray Train raises, `attempt` returns: see tests/unit/runtime/test_ray_train.py."""
    config = config_for(tmp_path, classifier={"num_iterations": 200, "learning_rates": [1.5e39, 1.6e39]})
    with pytest.raises(InputError, match=r"classifier\.learning_rates"):
        classifier_job.run(config, context_for(tmp_path, inputs))


def test_the_description_says_how_to_embed_a_new_image(with_classifier: dict[str, Artifact]) -> None:
    described = with_classifier["classifier"].read_json("classifier.json")
    assert described["embed"]["backbone"] == "pixels"
    assert {"features", "weights", "image_size", "grayscale"} <= described["embed"].keys()
    assert described["cluster_sizes"] == np.bincount(CONSENSUS[CONSENSUS >= 0]).tolist()
    assert {"temperature", "outlier_rule", "versions", "ece", "learning_rate"} <= described.keys()


def test_assignments_and_exemplars_are_the_same_for_any_number_of_parts_and_workers(
    with_classifier: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_of(with_classifier).label(FEATURES, CONSENSUS)
    exemplars = []
    for name, rows_per_part, num_workers in (("many", 30, 2), ("one", 1000, 1)):
        monkeypatch.setattr(embeddings_to_label, "MIN_ROWS_PER_PART", rows_per_part)
        resources = {"assign": {"num_workers": num_workers, "cpus_per_worker": 1}}
        context = context_for(tmp_path / name, with_classifier)
        metrics = assign_job.run(config_for(tmp_path, resources=resources), context)
        assert len(list((tmp_path / name / "assignments").iterdir())) == (10 if name == "many" else 1)
        table = read(tmp_path / name)
        assert table.schema == SCHEMA
        assert table["image_id"].to_pylist() == GOOD.tolist()
        assert table["uri"].to_pylist() == [f"/images/{number:03d}.png" for number in GOOD]
        for column in ("cluster", "second_choice", "is_outlier"):
            assert (table[column].to_numpy() == getattr(expected, column)).all()
        np.testing.assert_allclose(table["consensus_probability"].to_numpy(), expected.consensus_probability, atol=1e-6)
        agreement = [float(value) if label >= 0 else None for value, label in zip(AGREEMENT, CONSENSUS, strict=True)]
        assert table["agreement"].to_pylist() == agreement
        assert metrics["num_images"] == len(GOOD)
        assert metrics["num_in_consensus"] == len(GOOD)
        assert metrics["num_noise"] == (CONSENSUS < 0).sum() > 0
        assert metrics["num_exemplars"] == 12
        assert metrics["cluster_sizes"] == np.bincount(expected.cluster[expected.cluster >= 0], minlength=4).tolist()
        exemplars.append(pq.read_table(tmp_path / name / "exemplars.parquet"))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["assignments", "exemplars.parquet"]
    assert exemplars[0] == exemplars[1]
    rows = np.searchsorted(GOOD, exemplars[0]["image_id"].to_numpy())
    assert (expected.cluster[rows] == exemplars[0]["cluster"].to_numpy()).all()
    assert not expected.is_outlier[rows].any()


class Stopped(Exception):
    """Raised in place of the last step of the stage: all parts are recorded, and nothing is cleared."""


@pytest.fixture(scope="module")
def stopped(with_classifier: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose driver ended when its five parts were written."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop(*_: Any) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings_to_label, "MIN_ROWS_PER_PART", ROWS_PER_PART)
        patch.setattr(assign_job, "choose_exemplars", stop)
        with pytest.raises(Stopped):
            assign_job.run(config_for(folder), context_for(folder, with_classifier))
    assert len(list((folder / "records").iterdir())) == 5
    return folder


@pytest.fixture
def cut_off(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "assign")


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "assignments").iterdir()}


def test_a_killed_run_keeps_whole_parts_and_makes_the_others_again(
    with_classifier: dict[str, Artifact], cut_off: Path, tmp_path: Path
) -> None:
    before = times(cut_off)
    content = {path.name: path.read_bytes() for path in (cut_off / "assignments").iterdir()}
    (cut_off / "records" / "part-00000.json").unlink()
    (cut_off / "assignments" / "part-00001.parquet").write_bytes(b"cut")
    (cut_off / "candidates" / "part-00002.parquet").write_bytes(b"cut")
    context = context_for(cut_off, with_classifier)
    assert assign_job.run(config_for(tmp_path), context)["num_images"] == len(GOOD)
    redone = {name for name, time_ns in times(cut_off).items() if before[name] != time_ns}
    assert redone == {f"part-0000{number}.parquet" for number in range(3)}
    assert {path.name: path.read_bytes() for path in (cut_off / "assignments").iterdir()} == content
    assert sorted(context.output.parts) == [*(f"assignments/{name}" for name in sorted(content)), "exemplars.parquet"]


def test_parts_made_from_another_consensus_are_made_again(
    with_classifier: dict[str, Artifact], cut_off: Path, tmp_path: Path
) -> None:
    consensus = ArtifactWriter(Folder.at(tmp_path / "consensus"))
    consensus.write_array("labels.npy", (CONSENSUS + 1) % 4)
    consensus.write_array("agreement.npy", AGREEMENT)
    settings: dict[str, Any] = {"fingerprint": "o", "inputs": {}, "config": {}, "metrics": {}, "seconds": 0}
    changed = with_classifier | {"consensus": consensus.commit(stage="consensus", **settings)}
    assign_job.run(config_for(tmp_path), context_for(cut_off, changed))
    assert (read(cut_off)["cluster"].to_numpy() == (CONSENSUS + 1) % 4).all()


def test_a_damaged_input_is_named_and_finished_parts_stay(with_classifier: dict[str, Artifact], tmp_path: Path) -> None:
    source = with_classifier["embed"].folder.local_path
    assert source is not None
    damaged = tmp_path / "embed"
    damaged.mkdir()
    for path in source.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    whole = Artifact.find(Folder.at(damaged))
    assert whole is not None
    data = bytearray((damaged / "part-00009.parquet").read_bytes())
    data[30] ^= 1
    (damaged / "part-00009.parquet").write_bytes(data)
    config = config_for(tmp_path, resources={"assign": {"num_workers": 1, "cpus_per_worker": 1}})
    with pytest.raises(DamagedArtifactError, match=r"part-00009\.parquet: the bytes are not those that were written"):
        assign_job.run(config, context_for(tmp_path / "assign", with_classifier | {"embed": whole}))
    assert (tmp_path / "assign" / "records" / "part-00000.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 3])
def test_a_killed_worker_costs_an_attempt_and_three_end_the_stage(
    with_classifier: dict[str, Artifact], tmp_path: Path, num_kills: int
) -> None:
    source = with_classifier["embed"].folder.local_path
    assert source is not None
    shutil.copytree(source, tmp_path / "embed")
    embed = Artifact.find(Folder.at(tmp_path / "embed"))
    assert embed is not None
    # Reading a pipe that nobody writes to stops the worker within its part, where it is killed.
    stopper = tmp_path / "embed" / "part-00009.parquet"
    stopper.unlink()
    os.mkfifo(stopper)
    note = tmp_path / "assign" / "part-00004.attempt.json"
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < num_kills:
            time.sleep(0.05)
            if not note.exists() or json.loads(note.read_bytes())["number"] != len(killed) + 1:
                continue
            if num_kills == 1:
                stopper.unlink()
                shutil.copy(source / stopper.name, stopper)
            for pid in set(workers("CallingActor")) - set(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    config = config_for(tmp_path, resources={"assign": {"num_workers": 1, "cpus_per_worker": 1}})
    context = context_for(tmp_path / "assign", with_classifier | {"embed": embed})
    if num_kills == 1:
        assert assign_job.run(config, context)["num_images"] == len(GOOD)
        assert read(tmp_path / "assign")["image_id"].to_pylist() == GOOD.tolist()
        assert not note.exists()
    else:
        with pytest.raises(WorkerError, match=r"part-00004 \(\d+ images\): the workers died 3 times"):
            assign_job.run(config, context)
    killer.join()


def test_a_part_that_cannot_be_written_says_why(with_classifier: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "assign").mkdir()
    (tmp_path / "assign" / "assignments").write_text("in the way")
    config = config_for(tmp_path, resources={"assign": {"num_workers": 1, "cpus_per_worker": 1}})
    with pytest.raises(WorkerError, match=r"assign: .*the same command resumes\. \w*Error: .*assign"):
        assign_job.run(config, context_for(tmp_path / "assign", with_classifier))
