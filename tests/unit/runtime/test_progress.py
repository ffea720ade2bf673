"""What a stage says while it runs."""

from __future__ import annotations

import pytest

from icce_ray.runtime.progress import Progress


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
