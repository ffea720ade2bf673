"""The job as its users start it: a command, its output, its exit code, and what lies on storage afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.config import Config, load_config
from icce_ray.pipeline.plan import plan, run_name, stages_of
from icce_ray.pipeline.status import RunStatus, find_status
from icce_ray.run import main
from icce_ray.store import Folder

STAGE_NAMES = [stage.name for stage in stages_of(Config(images={"uri": "x"}, num_clusters=2, output="y"))]
NUM_IMAGES, NUM_CLASSES = 120, 3
BROKEN = {"a/empty.png": b"", "b/text.jpg": b"this is no image", "c/cut.png": None}
SETTINGS = {
    "num_clusters": NUM_CLASSES,
    "embed": {"backbone": "pixels", "image_size": 8},
    "neighbors": {"min_neighbors": 10, "max_neighbors": 60},
    "heads": {"num_heads": 4, "num_epochs": 6, "batch_size": 32, "warmup_epochs": 1, "learning_rate": 0.002},
    "classifier": {"num_iterations": 100},
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "icce_ray.run", *arguments]


def run_job(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def write_images(folder: Path) -> None:
    """Three kinds of noisy pictures in folders a, b, c, and three files that are no pictures."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (NUM_CLASSES, 8, 8, 3))
    for number in range(NUM_IMAGES):
        kind = number % NUM_CLASSES
        pixels = np.clip(patterns[kind] + rng.normal(0, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
        path = folder / "abc"[kind] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for name, content in BROKEN.items():
        (folder / name).write_bytes((folder / "a" / "000.png").read_bytes()[:100] if content is None else content)


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    places = {"images": {"uri": str(folder / "photos")}, "output": str(folder / "out")}
    path.write_text(json.dumps(places | SETTINGS | changes))
    return path


def read_assignments(folder: str) -> dict[str, list[Any]]:
    return dict(pq.read_table(folder).sort_by("image_id").to_pydict())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A folder with a finished run, its JSON, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "photos")
    write_config(folder, evaluate={"labels": "folder"})
    done = run_job("run.yaml", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


MISTAKES = [
    (["run.yaml", "--set", "heads.num_head=3"], "heads.num_head: unknown setting; did you mean num_heads"),
    (["run.yaml", "--set", "images.uri=nowhere"], "nowhere"),
    (["run.yaml", "--set", "embed.backbone=resnet5"], "resnet50"),
    (["run.yaml", "--set", "evaluate.labels=nowhere.npy"], "nowhere.npy"),
    (["run.yaml", "--set", "num_clusters=1000"], "1000"),
    (["nothing.yaml"], "nothing.yaml: there is no such config file"),
]
MISTAKES_OF_A_PROCESS = [
    (["run.yaml", "--set", "resources.method.num_workers=50", "--set", "resources.num_cpus=2"], "50 workers, but"),
    (["run.yaml", "--set", "resources.ray_address=127.0.0.1:1"], "no Ray answers at '127.0.0.1:1'"),
    (["--nonsense"], "--nonsense"),
]
"""The Ray of this process would be taken for the one meant; of an unknown option argparse ends the process."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run that has not begun."""
    write_images(tmp_path / "photos")
    write_config(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
@pytest.mark.slow
def test_a_mistake_is_one_message_with_exit_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(place)
    assert main(arguments) == 2
    assert_is_one_message(capsys.readouterr().err, message)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES_OF_A_PROCESS)
@pytest.mark.slow
def test_a_mistake_ends_the_process_with_one_message_and_exit_code_2(
    place: Path, arguments: list[str], message: str
) -> None:
    done = run_job(*arguments, folder=place)
    assert done.returncode == 2, done.stderr
    assert_is_one_message(done.stderr, message)


def assert_is_one_message(said: str, message: str) -> None:
    assert message in said
    assert "Traceback" not in said
    assert message in said.splitlines()[-1]


@pytest.mark.slow
def test_a_run_finds_the_clusters_and_says_what_it_made(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, said = finished
    assert (result["num_images"], result["num_errors"], result["num_clusters"]) == (NUM_IMAGES + 3, 3, NUM_CLASSES)
    steps = {step.name: step.artifact for step in plan(load_config(folder / "run.yaml"))}
    method, consensus = steps["method"], steps["consensus"]
    assert method is not None
    assert consensus is not None
    labels, matrix = consensus.read_array("labels.npy"), method.read_array("label_matrix.npy")
    assert result["anmi"] == pytest.approx(
        np.mean([normalized_mutual_info_score(labels, head, average_method="geometric") for head in matrix])
    )
    assert {"acc", "nmi", "ari"} <= result["metrics"].keys()
    assert result["metrics"]["acc"] > 0.9
    assert list(result["seconds"]) == STAGE_NAMES
    assert "<html" in Path(result["report"]).read_text().lower()
    latest = folder / "out" / "latest"
    places = (str(latest / "report" / "report.html"), str(latest / "assignments.parquet"))
    assert all(text in said for text in ("123 images, 3 errors, 3 clusters", *places))
    assert [Path(place).exists() for place in places] == [True, True]


@pytest.mark.slow
def test_every_good_image_is_assigned_once_and_every_bad_one_has_its_reason(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    folder, result, _ = finished
    rows = read_assignments(result["assignments"])
    errors = pq.read_table(result["errors"]).to_pydict()
    good = sorted(str(path) for path in (folder / "photos").rglob("*.png") if path.stem.isdigit())
    assert rows["uri"] == good
    assert sorted(errors["uri"]) == sorted(str(folder / "photos" / name) for name in BROKEN)
    assert all(errors["reason"])
    assert sorted(rows["image_id"] + errors["image_id"]) == list(range(NUM_IMAGES + 3))
    assert set(rows["cluster"]) == set(range(NUM_CLASSES))


@pytest.mark.slow
def test_the_same_command_again_does_nothing(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = finished
    done = run_job("run.yaml", "--json", folder=folder)
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["finished_before"] == STAGE_NAMES
    assert again["seconds"] == dict.fromkeys(STAGE_NAMES, 0.0)
    assert {**again, "seconds": 0, "finished_before": 0} == {**result, "seconds": 0, "finished_before": 0}


@pytest.mark.slow
def test_status_tells_what_is_finished(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = finished
    for target in ("run.yaml", "out"):
        done = subprocess.run(
            [sys.executable, "-m", "icce_ray", "status", target],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert result["run"] in done.stdout
        assert done.stdout.count("finished in") == len(STAGE_NAMES)


DYING = """
import os, signal, sys
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.run import main
save = CheckpointFolder.save

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

CheckpointFolder.save = save_and_die
main(sys.argv[1:])
"""
"""The command, killed (-9) as soon as there is a checkpoint of the heads."""


@pytest.fixture(scope="module")
def resumed(
    finished: tuple[Path, dict[str, Any], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, Any], list[RunStatus]]:
    """The settings and the JSON of a run with permuted labels in an output folder of its own, whose driver was killed
    while it trained; and what is told of it after its death, and at the end."""
    folder, _, _ = finished
    place = tmp_path_factory.mktemp("resumed")
    np.save(place / "permuted.npy", np.random.default_rng(0).integers(0, NUM_CLASSES, NUM_IMAGES + len(BROKEN)))
    labels = f"evaluate.labels={place / 'permuted.npy'}"
    changes = [labels, f"output={place}/out"]
    arguments = ["run.yaml", *(word for change in changes for word in ("--set", change))]
    steps = plan(load_config(folder / "run.yaml", changes))

    def ask() -> RunStatus:
        folders = {step.name: step.folder for step in steps}
        return find_status(Folder.at(place / "out"), run_name(steps), folders, lambda: time.time() + 100)

    killed = subprocess.run(
        [sys.executable, "-c", DYING, *arguments, "--quiet", "--set", "heads.checkpoint_interval_s=0.001"],
        cwd=folder, capture_output=True, check=False, timeout=600,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    told = [ask()]
    done = run_job(*arguments, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return [labels], json.loads(done.stdout.splitlines()[-1]), [*told, ask()]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_labels(
    finished: tuple[Path, dict[str, Any], str], resumed: tuple[list[str], dict[str, Any], list[RunStatus]]
) -> None:
    result, again = finished[1], resumed[1]
    assert again["finished_before"] == STAGE_NAMES[: STAGE_NAMES.index("method")]
    assert read_assignments(again["assignments"]) == read_assignments(result["assignments"])


@pytest.mark.slow
def test_status_tells_where_a_driver_was_killed_and_that_its_run_is_finished(
    resumed: tuple[list[str], dict[str, Any], list[RunStatus]],
) -> None:
    after_death, at_the_end = resumed[2]
    assert (after_death.state, at_the_end.state) == ("stopped", "finished")
    stopped = {stage.stage: stage for stage in after_death.stages if stage.state == "stopped"}
    assert stopped.keys() == {"method"}
    reading = stopped["method"].reading
    assert reading is not None
    assert reading.unit == "epochs"
    assert 100 < (after_death.heard_s_ago or 0) < 160


@pytest.mark.slow
def test_true_labels_permuted_labels_and_no_labels_give_the_same_clusters(
    finished: tuple[Path, dict[str, Any], str], resumed: tuple[list[str], dict[str, Any], list[RunStatus]]
) -> None:
    """Fingerprints: alike but for evaluation and report. Clusters: alike in a run that shares nothing."""
    folder, result, _ = finished
    permuted, other, _ = resumed
    plans = [plan(load_config(folder / "run.yaml", labels)) for labels in (permuted, ["evaluate.labels=null"])]
    for true_step, *other_steps in zip(plan(load_config(folder / "run.yaml")), *plans, strict=True):
        same = all(step.fingerprint == true_step.fingerprint for step in other_steps)
        assert same == (true_step.name not in ("evaluate", "report")), true_step.name
    assert other["metrics"]["acc"] < 0.7 < result["metrics"]["acc"]
    assert Path(other["assignments"]).parent != Path(result["assignments"]).parent
    assert read_assignments(other["assignments"]) == read_assignments(result["assignments"])
