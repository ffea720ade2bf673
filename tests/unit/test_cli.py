"""The command line in this process: exit codes, messages, and what is printed where."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icce_ray.pipeline.run as pipeline
from icce_ray import cli, demo
from icce_ray.errors import InputError, WorkerError
from icce_ray.pipeline.result import Result
from icce_ray.run import _WithoutRay, main

RESULT = Result(
    run="abc",
    num_images=3,
    num_errors=0,
    num_clusters=2,
    anmi=0.5,
    assignments="a",
    report="r",
    errors="e",
    metrics={"acc": 1.0},
    seconds={"embed": 1.0},
    finished_before=(),
)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(f"images: {{uri: photos}}\nnum_clusters: 10\noutput: {tmp_path / 'out'}\n")
    return str(path)


def pipeline_that(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[Any]:
    configs = []

    def run(config: Any, **options: bool) -> Result:
        configs.append(config)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(pipeline, "run_pipeline", run)
    return configs


def test_json_is_the_last_line_of_standard_output(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = pipeline_that(monkeypatch, RESULT)
    assert main([config_file, "--set", "num_clusters=5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert configs[0].num_clusters == 5
    wanted = {"run", "num_images", "num_errors", "num_clusters", "anmi", "assignments", "report", "metrics", "seconds"}
    assert wanted <= printed.keys()


class WrappedByRayError(RuntimeError):
    """Like Ray's: its text is a remote traceback, the error itself is its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long remote traceback\nwith lines")
        self.cause = cause


@pytest.mark.parametrize(
    ("outcome", "code", "last_line"),
    [
        (InputError("images.uri: 'photos' is not there"), 2, "error: images.uri: 'photos' is not there"),
        (WrappedByRayError(InputError("a label is missing")), 2, "error: a label is missing"),
        (WorkerError("embed: a worker died 4 times"), 1, "error: embed: a worker died 4 times"),
        (ZeroDivisionError("division\nby zero"), 1, "error: ZeroDivisionError: division by zero"),
        (WrappedByRayError(KeyError("x")), 1, "error: KeyError: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted; finished work is kept, and the same command resumes"),
    ],
)
def test_what_goes_wrong_is_the_last_line_and_sets_the_exit_code(
    config_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException,
    code: int,
    last_line: str,
) -> None:
    pipeline_that(monkeypatch, outcome)
    assert main([config_file]) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == last_line
    assert "Traceback" not in said


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGINT"], ["SIGINT", "SIGINT"], ["SIGTERM", "SIGTERM"]])
def test_both_signals_interrupt_and_a_second_one_ends_the_program_at_once(signals: list[str]) -> None:
    code = """
import sys, time
from icce_ray.run import guarded
import argparse
def work(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        if sys.argv[1] == "2":
            print("cleans up", file=sys.stderr, flush=True)
            time.sleep(60)
sys.exit(guarded(work, argparse.Namespace(debug=False)))
"""
    command = [sys.executable, "-c", code, str(len(signals))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        assert program.stderr.readline() == "ready\n"
        program.send_signal(getattr(signal, signals[0]))
        if len(signals) > 1:
            assert program.stderr.readline() == "cleans up\n"
            program.send_signal(getattr(signal, signals[1]))
        said = program.stderr.read()
    assert program.returncode == 130
    assert "Traceback" not in said
    assert len(signals) > 1 or said.splitlines()[-1].startswith("interrupted; finished work is kept")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    code = "import sys, argparse; from icce_ray.run import guarded; sys.stdin.read(); "
    code += "sys.exit(guarded(lambda arguments: 'much ' * 100_000, argparse.Namespace(debug=False)))"
    command = [sys.executable, "-c", code]
    program = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    program.stdout.close()
    program.stdout = None
    assert program.communicate("")[1] == ""
    assert program.returncode == 0


def test_rays_own_messages_are_left_out() -> None:
    sink = io.StringIO()
    stream = _WithoutRay(sink)
    print("embed: done", file=stream)
    print("\x1b[33m(raylet)\x1b[0m A worker died\nfor these reasons:\n", file=stream)
    print("(raylet, ip=10.0.0.1) The node is dead", file=stream)
    print("sample: done", file=stream)
    assert sink.getvalue() == "embed: done\nsample: done\n"


def test_debug_shows_the_traceback_before_the_cause(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline_that(monkeypatch, ZeroDivisionError("oh"))
    assert main([config_file, "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == "error: ZeroDivisionError: oh"


def test_an_unknown_option_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--nonsense"])
    assert caught.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_without_a_config_the_demo_is_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = pipeline_that(monkeypatch, RESULT)
    folders: list[str] = []
    monkeypatch.setattr(demo, "write_demo_images", lambda folder: folders.append(folder) or 1797)
    assert main(["--set", "seed=3"]) == 0
    assert (configs[0].seed, configs[0].embed.backbone) == (3, "pixels")
    said = capsys.readouterr().err
    assert "built-in demo" in said
    assert "1,797 handwritten digits" in said
    assert folders == [configs[0].images.uri]


def test_the_demos_images_are_written_once(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    assert demo.write_demo_images(tmp_path) == 1797
    paths = sorted(tmp_path.glob("*/*.png"), key=lambda path: path.stem)
    times = [path.stat().st_mtime_ns for path in paths]
    paths[5].unlink()
    assert demo.write_demo_images(tmp_path) == len(paths)
    again = [path.stat().st_mtime_ns for path in paths]
    assert [number for number, (a, b) in enumerate(zip(times, again, strict=True)) if a != b] == [5]
    digits = load_digits()
    for number in (0, 5, 1796):
        assert paths[number].parent.name == str(digits.target[number])
        restored = np.asarray(Image.open(paths[number])) * (16 / 255)
        assert np.abs(restored - digits.images[number]).max() < 0.04


def test_status_of_a_folder_without_runs_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no runs there; give the `output` of a run" in capsys.readouterr().err


def test_a_comparison_takes_settings_of_any_of_its_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("{embeddings: a.npy, num_clusters: 3, output: out, kmeans: {num_starts: 3}}")
    seen: list[Any] = []
    monkeypatch.setattr(
        "icce_ray.sweeps.method_comparison.compare_methods", lambda config, *_, **__: seen.append(config)
    )
    cli.main(["compare", str(tmp_path / "run.yaml"), "--methods", "icce, kmeans"])
    assert [config.kmeans.num_starts for config in seen] == [3]
    assert cli.main(["compare", str(tmp_path / "run.yaml"), "--methods", "icce,temi"]) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOTDIR, 2), (errno.ELOOP, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 2), (errno.EIO, 1)],
)
def test_a_place_that_cannot_be_used_is_the_users_to_mend(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    error = WorkerError("method: failed 3 times")
    error.__cause__ = OSError(number, os.strerror(number), "/out")
    pipeline_that(monkeypatch, error)
    assert main([config_file]) == code
    remedy = "free some space" if number == errno.ENOSPC else "give another place"
    assert (remedy in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize(
    "record", ["{", "[]", "5", '{"stages": 5}', '{"stages": {"..": "ab"}}', '{"stages": {"a": "../x"}}']
)
@pytest.mark.parametrize("command", ["status", "gc"])
def test_a_damaged_record_of_a_run_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str, command: str
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text(record)
    assert cli.main([command, str(tmp_path)]) == 2
    assert "runs/x.json is damaged, or no record of a run" in capsys.readouterr().err
