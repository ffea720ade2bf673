from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest

from icce_ray.config import StorageConfig
from icce_ray.runtime import progress as progress_module
from icce_ray.runtime.progress import Progress
from icce_ray.store import s3


def test_a_store_that_is_away_stands_in_the_progress_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([True, False, True, False, False, True])
    asked: list[str] = []
    said: list[str] = []
    all_said = threading.Event()

    def ask(uri: str, options: StorageConfig) -> bool:
        asked.append(uri)
        return next(answers, True)

    monkeypatch.setattr(progress_module, "POLL_S", 0.001)
    monkeypatch.setattr(s3, "answers", ask)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=itertools.count(step=7).__next__))
    progress = Progress("embed", clock=lambda: 0.0)

    def waits(text: str) -> None:
        said.append(text)
        Progress.waits(progress, text)
        if len(said) == 6:
            all_said.set()

    monkeypatch.setattr(progress, "waits", waits)
    with progress_module.outages_told(["s3://photos/a", "s3://photos/b", "/local"], StorageConfig(), progress):
        assert all_said.wait(60)
    assert set(asked) == {"s3://photos"}
    assert [bool(text) for text in said[:6]] == [False, False, False, False, True, False]  # once is a slow answer
    told = capsys.readouterr().err
    assert "embed: nothing counted yet, waits for s3://photos, which has not answered for 7 s" in told
    assert progress.read().note == ""
