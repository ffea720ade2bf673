from __future__ import annotations

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

    def ask(uri: str, options: StorageConfig) -> bool:
        asked.append(uri)
        return next(answers, True)

    monkeypatch.setattr(progress_module, "POLL_S", 0.001)
    monkeypatch.setattr(s3, "answers", ask)
    progress = Progress("embed")
    monkeypatch.setattr(progress, "waits", lambda text: (said.append(text), Progress.waits(progress, text)))
    with progress_module.outages_told(["s3://photos/a", "s3://photos/b", "/local"], StorageConfig(), progress):
        while len(said) < 6:
            pass
    assert set(asked) == {"s3://photos"}
    assert [bool(text) for text in said[:6]] == [False, False, False, False, True, False]  # once is a slow answer
    assert (
        "embed: nothing counted yet, waits for s3://photos, which has not answered for 0 s" in capsys.readouterr().err
    )
    assert progress.read().note == ""
