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

from icce_ray.assign import job as assign_job
from icce_ray.assign.exemplars import pick_exemplars
from icce_ray.assign.labeling import SCHEMA, label_images
from icce_ray.classifier import job as classifier_job
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import Config
from icce_ray.embed import embedding_parts as embed_parts
from icce_ray.errors import DamagedArtifactError, InputError, WorkerError
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_LISTED = 240
GOOD = np.setdiff1d(np.arange(NUM_LISTED), [0, 17, 18, 100, 239])
RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 4, len(GOOD))
FEATURES = (RNG.normal(size=(len(GOOD), 6)) + 4 * np.eye(6)[TRUE]).astype(np.float16)
CONSENSUS = np.where(np.arange(len(GOOD)) % 5 == 4, -1, TRUE).astype(np.int32)
AGREEMENT = RNG.random(len(GOOD)).astype(np.float32)


def config_for(tmp_path: Path, **sections: Any) -> Config:
    resources = {"classifier": {"cpus_per_worker": 1}, "assign": {"num_workers": 2, "cpus_per_worker": 1}}
    base = {
        "images": {"uri": "/images"},
        "num_clusters": 4,
        "output": str(tmp_path),
        "embed": {"backbone": "pixels"},
        "classifier": {"num_iterations": 200},
        "assign": {"rows_per_part": 60, "num_exemplars": 3},
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
    for part in embed_parts.plan_parts(NUM_LISTED, 25):
        rows = np.flatnonzero((part.start <= GOOD) & (part.stop > GOOD))
        table = embed_parts.part_table(part, GOOD[rows], FEATURES[rows])
        writer.add(embed_parts.write_part(writer.folder, part, table).part)
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


def read(folder: Path) -> pa.Table:
    return pq.read_table(folder / "assignments")


def test_the_classifier_on_ray_is_the_one_of_a_single_process(
    with_classifier: dict[str, Artifact], tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    alone = fit_classifier(
        FEATURES,
        CONSENSUS,
        config.classifier,
        num_clusters=4,
        seed=config.seed,
        outlier_quantile=config.assign.outlier_quantile,
    )
    np.testing.assert_allclose(model_of(with_classifier).weights, alone.weights, atol=1e-6)
    metrics = with_classifier["classifier"].metrics
    assert metrics["learning_rate"] == alone.learning_rate
    assert metrics["holdout_agreement"] == alone.holdout_agreement > 0.9


@pytest.mark.slow
def test_workers_of_ray_train_share_the_grid_and_make_the_same_classifier(
    with_classifier: dict[str, Artifact], tmp_path: Path
) -> None:
    config = config_for(tmp_path, resources={"classifier": {"num_workers": 2, "cpus_per_worker": 1}})
    context = context_for(tmp_path / "classifier", with_classifier)
    metrics = classifier_job.run(config, context)
    alone = with_classifier["classifier"].metrics
    for name in ("learning_rate", "num_diverged", "num_holdout", "holdout_agreement"):
        assert metrics[name] == alone[name]
    made = LinearClassifier.from_bytes(context.output.folder.read_bytes("classifier.safetensors"))
    np.testing.assert_allclose(made.weights, model_of(with_classifier).weights, atol=1e-5)


@pytest.mark.slow
def test_a_mistake_that_all_workers_meet_is_the_users_to_mend(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    resources = {"classifier": {"num_workers": 2, "cpus_per_worker": 1}}
    diverging = {"num_iterations": 200, "learning_rates": [1.5e39, 1.6e39]}
    config = config_for(tmp_path, classifier=diverging, resources=resources)
    with pytest.raises(InputError, match=r"classifier\.learning_rates"):
        classifier_job.run(config, context_for(tmp_path, inputs))


def test_the_description_says_how_to_embed_a_new_image(with_classifier: dict[str, Artifact]) -> None:
    described = with_classifier["classifier"].read_json("classifier.json")
    assert described["embed"]["backbone"] == "pixels"
    assert {"features", "weights", "image_size", "grayscale"} <= described["embed"].keys()
    assert described["cluster_sizes"] == np.bincount(CONSENSUS[CONSENSUS >= 0]).tolist()
    assert {"temperature", "outlier_rule", "versions", "ece", "learning_rate"} <= described.keys()


def test_assignments_equal_those_of_a_single_process_whatever_the_parts_and_workers(
    with_classifier: dict[str, Artifact], tmp_path: Path
) -> None:
    model = model_of(with_classifier)
    expected, _ = label_images(model, FEATURES, CONSENSUS, AGREEMENT)
    exemplars = np.concatenate(pick_exemplars(FEATURES, CONSENSUS, AGREEMENT, model, num_exemplars=3, seed=0))
    for name, rows_per_part, num_workers in (("many", 30, 2), ("one", 1000, 1)):
        sections = {
            "assign": {"rows_per_part": rows_per_part, "num_exemplars": 3},
            "resources": {"assign": {"num_workers": num_workers, "cpus_per_worker": 1}},
        }
        context = context_for(tmp_path / name, with_classifier)
        metrics = assign_job.run(config_for(tmp_path, **sections), context)
        assert len(context.output.parts) == (10 if name == "many" else 1)
        table = read(tmp_path / name)
        assert table.schema == SCHEMA
        assert table["image_id"].to_pylist() == GOOD.tolist()
        assert table["uri"].to_pylist() == [f"/images/{number:03d}.png" for number in GOOD]
        assert (table["cluster"].to_numpy() == expected.cluster).all()
        assert (table["second_choice"].to_numpy() == expected.second_choice).all()
        np.testing.assert_allclose(table["confidence"].to_numpy(), expected.confidence, atol=1e-6)
        assert table["agreement"].null_count == (CONSENSUS < 0).sum()
        assert np.flatnonzero(table["is_exemplar"].to_numpy()).tolist() == sorted(exemplars)
        assert metrics["num_images"] == len(GOOD)
        assert metrics["num_exemplars"] == 12
        assert metrics["cluster_sizes"] == np.bincount(expected.cluster, minlength=4).tolist()


def test_a_run_that_was_cut_off_takes_up_whole_parts_and_makes_the_rest_again(
    with_classifier: dict[str, Artifact], tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    folder = tmp_path / "assign"
    first = context_for(folder, with_classifier)
    metrics = assign_job.run(config, first)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "assignments").iterdir()}
    content = {path.name: path.read_bytes() for path in (folder / "assignments").iterdir()}
    (folder / "part-00000.done.json").unlink()
    (folder / "assignments" / "part-00001.parquet").write_bytes(b"cut")
    (folder / "part-00002.done.json").write_text("{")
    again = context_for(folder, with_classifier)
    assert assign_job.run(config, again) == metrics
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "assignments").iterdir()}
    redone = {name for name in before if before[name] != after[name]}
    assert redone == {f"part-0000{number}.parquet" for number in range(3)}
    assert len(before) > 3
    assert {path.name: path.read_bytes() for path in (folder / "assignments").iterdir()} == content
    assert again.output.parts == first.output.parts


def test_parts_of_another_model_are_not_taken_up(with_classifier: dict[str, Artifact], tmp_path: Path) -> None:
    config = config_for(tmp_path)
    assign_job.run(config, context_for(tmp_path / "assign", with_classifier))
    consensus = ArtifactWriter(Folder.at(tmp_path / "consensus"))
    consensus.write_array("labels.npy", (CONSENSUS + 1) % 4)
    consensus.write_array("agreement.npy", AGREEMENT)
    settings: dict[str, Any] = {"fingerprint": "o", "inputs": {}, "config": {}, "metrics": {}, "seconds": 0}
    changed = with_classifier | {"consensus": consensus.commit(stage="consensus", **settings)}
    assign_job.run(config, context_for(tmp_path / "assign", changed))
    assert (read(tmp_path / "assign")["cluster"].to_numpy() == (CONSENSUS + 1) % 4).all()


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
    # The features were cached from the sound parts, so it is the labelling that meets the damage.
    with pytest.raises(DamagedArtifactError, match=r"part-00009\.parquet: the bytes are not those that were written"):
        assign_job.run(config, context_for(tmp_path / "assign", with_classifier | {"embed": whole}))
    assert (tmp_path / "assign" / "part-00000.done.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 3])
def test_a_killed_worker_costs_its_part_a_try_and_three_end_the_stage(
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
    note = tmp_path / "assign" / "part-00004.tries.json"
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < num_kills:
            time.sleep(0.05)
            pid = json.loads(note.read_bytes())["pid"] if note.exists() else None
            if pid is None or pid in killed:
                continue
            if len(killed) == 0 and num_kills == 1:
                stopper.unlink()
                shutil.copy(source / stopper.name, stopper)
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
        with pytest.raises(WorkerError, match="killed their process 3 times"):
            assign_job.run(config, context)
    killer.join()


def test_a_part_that_cannot_be_written_says_why(with_classifier: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "assign").mkdir()
    (tmp_path / "assign" / "assignments").write_text("in the way")
    config = config_for(tmp_path, resources={"assign": {"num_workers": 1, "cpus_per_worker": 1}})
    with pytest.raises(
        WorkerError, match=r"assign: .*the same command goes on.*part-0000.\.parquet: \w*Error: .*assign"
    ):
        assign_job.run(config, context_for(tmp_path / "assign", with_classifier))


def test_learning_rates_that_all_diverge_are_the_users_to_mend(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    config = config_for(tmp_path, classifier={"num_iterations": 200, "learning_rates": [1.5e39]})
    with pytest.raises(InputError, match=r"^classifier\.learning_rates"):
        classifier_job.run(config, context_for(tmp_path, inputs))
