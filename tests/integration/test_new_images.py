"""A finished run's model on new images: the command, the five lines of Python, a copy on a machine without Ray."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icce_ray
from icce_ray import cli
from icce_ray.assign import embeddings_to_label
from icce_ray.assign.new_images import AssignResult
from icce_ray.assign.part_labeler import SCHEMA
from icce_ray.classifier import job as classifier_job
from icce_ray.config import Config
from icce_ray.embed import embed_images
from icce_ray.errors import InputError
from icce_ray.images import list_images
from icce_ray.images.listing import IDS_PER_SOURCE
from icce_ray.pipeline.plan import plan, run_name
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.run_records import write_record

pytestmark = pytest.mark.slow

NUM_KINDS = 3
PATTERNS = np.random.default_rng(0).integers(0, 256, (NUM_KINDS + 1, 8, 8, 3))


def write_images(folder: Path, kinds: list[int], seed: int) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, kind in enumerate(kinds):
        pixels = np.clip(PATTERNS[kind] + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings_to_label, "MIN_ROWS_PER_PART", 30)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run, as far as its model needs it: images, embed, a consensus (the kinds), classifier."""
    root = tmp_path_factory.mktemp("run")
    kinds = [number % NUM_KINDS for number in range(240)]
    write_images(root / "photos", kinds, 0)
    settings = {
        "images": {"uri": str(root / "photos")},
        "output": str(root / "out"),
        "num_clusters": NUM_KINDS,
        "embed": {"backbone": "pixels", "image_size": 8},
        "classifier": {"num_iterations": 300},
        "assign": {"num_exemplars": 2},
    }
    (root / "run.yaml").write_text(json.dumps(settings))
    config = Config.model_validate(settings)
    planned = {step.name: step for step in plan(config)}
    made: dict[str, Artifact] = {}

    def consensus(_: Config, context: StageContext) -> dict[str, Any]:
        context.output.write_array("labels.npy", np.array(kinds, dtype=np.int32))
        context.output.write_array("agreement.npy", np.ones(len(kinds), dtype=np.float32))
        return {}

    stages = {
        "images": list_images.run,
        "embed": embed_images.run,
        "consensus": consensus,
        "classifier": classifier_job.run,
    }
    for name, function in stages.items():
        step = planned[name]
        context = StageContext(ArtifactWriter(step.folder), made, Progress(name, quiet=True))
        made[name] = context.output.commit(
            stage=name,
            fingerprint=step.fingerprint,
            inputs=step.input_fingerprints,
            config=config.model_dump(mode="json"),
            metrics=function(config, context),
            seconds=0,
        )
    name = run_name(list(planned.values()))
    fingerprints = {step.name: step.fingerprint for step in planned.values()}
    write_record(config.output, name, fingerprints, config.model_dump(mode="json"))
    return root


@pytest.fixture(scope="module")
def model_folder(run: Path) -> Path:
    (folder,) = (run / "out" / "classifier").iterdir()
    return folder


@pytest.fixture(scope="module")
def new_images(run: Path) -> tuple[list[Path], list[int]]:
    """100 new images of the run's kinds 0 and 1, 20 of another kind, and one that is no image."""
    kinds = [0, 0, 0, 1] * 25 + [NUM_KINDS] * 20
    paths = write_images(run / "new", kinds, 1)
    (run / "new" / "zzz.png").write_bytes(b"no image")
    return paths, kinds


@pytest.fixture(scope="module")
def assigned(run: Path, new_images: tuple[list[Path], list[int]]) -> AssignResult:
    return icce_ray.assign_images(run / "out", images=run / "new", quiet=True)


def read(result: AssignResult) -> pa.Table:
    return pq.read_table(result.assignments)


def test_new_images_get_their_clusters_once_each(
    run: Path, new_images: tuple[list[Path], list[int]], assigned: AssignResult
) -> None:
    paths, kinds = new_images
    table = read(assigned)
    assert table.schema == SCHEMA
    assert table["agreement"].null_count == 120
    assert table["uri"].to_pylist() == [str(path) for path in paths]
    first = table["image_id"][0].as_py()
    assert first > 0
    assert first % IDS_PER_SOURCE == 0
    assert table["image_id"].to_pylist() == [first + number for number in range(120)]
    known = np.array(kinds) < NUM_KINDS
    assert (table["cluster"].to_numpy()[known] == np.array(kinds)[known]).all()
    assert table["is_outlier"].to_numpy()[~known].all()
    assert not table["is_outlier"].to_numpy()[known].any()
    assert (assigned.num_images, assigned.num_errors, assigned.num_outliers) == (120, 1, 20)
    assert pq.read_table(str(assigned.errors))["reason"].to_pylist() == ["not an image"]


def test_the_drift_is_told(assigned: AssignResult) -> None:
    drift = json.loads(Path(assigned.drift_file).read_text())
    assert drift == assigned.drift
    assert drift["cluster_shares"]["index"] > 0.25 > 5 * drift["cluster_shares"]["by_chance"]
    assert drift["outlier_rate"]["new"] == 20 / 120
    assert drift["outlier_rate"]["training"] < 0.1
    assert [round(row["training_share"], 4) for row in drift["clusters"]] == [0.3333] * 3


def test_exemplars_are_of_their_cluster_and_no_outliers(assigned: AssignResult) -> None:
    exemplars = pq.read_table(assigned.exemplars).to_pylist()
    rows = {row["image_id"]: row for row in read(assigned).to_pylist()}
    assert [(row["cluster"], row["rank"]) for row in exemplars] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in exemplars:
        assert rows[row["image_id"]]["cluster"] == row["cluster"]
        assert rows[row["image_id"]]["uri"] == row["uri"]
        assert not rows[row["image_id"]]["is_outlier"]


def test_the_model_alone_says_the_same_as_the_command(
    new_images: tuple[list[Path], list[int]], assigned: AssignResult, model_folder: Path
) -> None:
    paths, _ = new_images
    model = icce_ray.load(model_folder)
    by_path = model.predict([*paths, model_folder / "nothing.png"])
    by_image = model.predict([Image.open(path) for path in paths])
    table = read(assigned)
    for name in ("cluster", "consensus_probability", "second_choice", "outlier_score", "is_outlier"):
        np.testing.assert_allclose(getattr(by_path, name)[:-1], table[name].to_numpy(), atol=1e-5)
        np.testing.assert_allclose(getattr(by_image, name), getattr(by_path, name)[:-1], rtol=1e-5)
    assert by_path.errors == {120: "missing"}
    assert (by_path.cluster[120], np.isnan(by_path.consensus_probability[120])) == (-1, True)
    features = np.array([np.asarray(Image.open(path)).ravel() / np.float32(255) for path in paths])
    assert (model.predict_features(features).cluster == by_path.cluster[:-1]).all()


def test_a_copy_of_the_folder_works_by_itself_without_ray(
    new_images: tuple[list[Path], list[int]], assigned: AssignResult, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    program = (
        "import sys\nimport icce_ray\n"
        "model = icce_ray.load('model')\n"
        f"found = model.predict({[str(path) for path in new_images[0][:5]]})\n"
        "print(found.cluster.tolist(), 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[0, 0, 0, 1, 0] False", done.stderr


def test_a_second_time_nothing_is_done_and_an_unfinished_run_goes_on(run: Path, assigned: AssignResult) -> None:
    folder = Path(assigned.assignments).parent
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    again = icce_ray.assign_images(run / "run.yaml", images=run / "new", quiet=True)
    assert again == AssignResult(**{**vars(assigned), "seconds": dict.fromkeys(assigned.seconds, 0.0)})
    (folder / "manifest.json").unlink()
    (folder / "exemplars.parquet").unlink()
    (folder / "assignments" / "part-00000.parquet").unlink()
    icce_ray.assign_images(run / "out", images=run / "new", quiet=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before


def test_embeddings_give_what_their_images_give_for_any_number_of_parts_and_workers(
    ray_cluster: None,
    assigned: AssignResult,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = read(assigned)
    pixels = [np.asarray(Image.open(uri)).ravel() for uri in table["uri"].to_pylist()]
    features: npt.NDArray[np.float16] = (np.array(pixels) / np.float32(255)).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"uri": table["uri"], "x": lists}), tmp_path / "x.parquet", row_group_size=16)
    bad = np.full((1, features.shape[1]), np.nan, np.float16)
    np.save(tmp_path / "x.npy", np.concatenate([features, bad]))
    wanted = [name for name in SCHEMA.names if name not in ("image_id", "uri", "agreement")]
    exemplars: list[list[int]] = []
    for source, rows_per_part, num_workers in (("x.parquet", 32, 2), ("x.parquet", 1000, 1), ("x.npy", 40, 1)):
        arguments = ["assign", str(model_folder), "--embeddings", str(tmp_path / source), "--output"]
        arguments += [str(tmp_path / f"out-{rows_per_part}"), "--json", "--quiet"]
        arguments += ["--set", f"resources.assign.num_workers={num_workers}"]
        monkeypatch.setattr(embeddings_to_label, "MIN_ROWS_PER_PART", rows_per_part)
        assert cli.main(arguments) == 0
        result = AssignResult(**json.loads(capsys.readouterr().out.splitlines()[-1]))
        found = read(result)
        assert found.num_rows == 120
        for name in wanted:
            np.testing.assert_allclose(found[name].to_numpy(), table[name].to_numpy(), atol=1e-4)
        assert [image_id % IDS_PER_SOURCE for image_id in found["image_id"].to_pylist()] == list(range(120))
        exemplars.append(pq.read_table(result.exemplars)["image_id"].to_pylist())
        if source == "x.parquet":
            assert found["uri"] == table["uri"]
        errors = pq.read_table(result.errors)["image_id"].to_pylist()
        assert errors == ([120] if source == "x.npy" else [])
        assert result.num_errors == len(errors)
    assert exemplars[0] == exemplars[1]  # drawn by the ids, which are those of the source
    assert len(list((tmp_path / "out-32").rglob("assignments/*.parquet"))) == 4


def test_one_new_image_is_enough(run: Path, new_images: tuple[list[Path], list[int]], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(new_images[0][3], tmp_path / "one")
    result = icce_ray.assign_images(run / "out", images=tmp_path / "one", output=tmp_path / "out", quiet=True)
    assert read(result)["cluster"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nowhere", "--images", "{run}/new"], "no model there"),
        (["{run}/out", "--images", "{run}/nowhere"], "does not exist"),
        (["{run}/out", "--embeddings", "{tmp}/wide.npy"], "has 5 dimensions; the model takes 192"),
        (["{run}/out", "--embeddings", "{tmp}/nan.npy"], "1 of 3 images cannot be used so far, more than"),
        (
            ["{run}/out", "--images", "{run}/new", "--set", "embed.backbone=resnet18"],
            "given by the model",
        ),
        (["{run}/out", "--images", "{run}/new", "--set", "assign.rows=3"], "assign.rows: unknown setting"),
        (["{model}", "--images", "{run}/new"], "give output"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2(
    run: Path,
    model_folder: Path,
    new_images: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((3, 5), dtype=np.float32))
    broken = np.zeros((3, 192), dtype=np.float32)
    broken[1, 7] = np.nan
    np.save(tmp_path / "nan.npy", broken)
    places = {"run": run, "tmp": tmp_path, "model": model_folder}
    assert cli.main(["assign", *(argument.format(**places) for argument in arguments), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_damaged_model_is_named_and_left_as_it_is(model_folder: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "classifier.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"classifier\.safetensors: the bytes are not those that were written"):
        icce_ray.load(tmp_path / "model")
    assert (tmp_path / "model" / "manifest.json").exists()
    path.unlink()
    with pytest.raises(InputError, match="no model there"):
        icce_ray.load(tmp_path / "model")


def test_what_the_model_cannot_take_is_refused(model_folder: Path) -> None:
    model = icce_ray.load(model_folder)
    for wrong in ("one.png", [3]):
        with pytest.raises(InputError):
            model.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\(2, 5\).*\(n, 192\)"):
        model.predict_features(np.zeros((2, 5)))
    with pytest.raises(InputError, match="row 1"):
        model.predict_features(np.where(np.arange(3)[:, None] == 1, np.nan, np.zeros((3, 192))))
    assert len(model.predict([]).cluster) == 0
