"""What a stage says while it runs."""

from __future__ import annotations

import sys

import pytest

from icce_ray.runtime.progress import Progress, format_bytes, format_seconds


def test_times_and_sizes_are_said_in_the_unit_that_fits() -> None:
    times = {0.4: "0 s", 59.4: "59 s", 59.6: "1 min 0 s", 185: "3 min 5 s", 3599: "59 min 59 s", 3600: "1 h 0 min"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times
    sizes = {999: "999 B", 1000: "1 kB", 123_456: "123 kB", 1_234_567: "1.23 MB", 45.6e12: "45.6 TB", 5e15: "5000 TB"}
    assert {size: format_bytes(size) for size in sizes} == sizes


def test_a_stage_that_will_take_hours_says_once_what_would_be_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress("embed", clock=lambda: now[0], shortcut="a small backbone")
    for second in range(0, 200, 10):
        now[0] = float(second)
        progress.update(second, 36_000)
        if second < 30:  # the rate is not known yet
            assert "small backbone" not in capsys.readouterr().err
    said = capsys.readouterr().err
    assert said.count("small backbone") == 1
    assert "embed: this will take about 9 h 59 min here. Shorter: a small backbone\n" in said


@pytest.mark.parametrize(("total", "shortcut"), [(1_000, "a small backbone"), (36_000, "")])
def test_a_stage_that_is_short_or_has_no_remedy_says_nothing(
    total: int, shortcut: str, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    progress = Progress("embed", clock=lambda: now[0], shortcut=shortcut)
    for second in range(0, 200, 10):
        now[0] = float(second)
        progress.update(second, total)
    assert "this will take" not in capsys.readouterr().err


@pytest.mark.parametrize(("on_terminal", "before", "after"), [(True, "\r\x1b[K", ""), (False, "", "\n")])
def test_on_a_terminal_each_line_replaces_the_last_one_but_not_a_note(
    on_terminal: bool, before: str, after: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    now, lines = [0.0], []
    progress = Progress("embed", clock=lambda: now[0])
    for done in (10, 20):
        now[0] = float(done)
        progress.update(done, 100)
        lines.append(f"{before}embed: {progress.read().text()}{after}")
    progress.note("a note")
    assert capsys.readouterr().err == "".join([*lines, f"{before}embed: a note\n"])
