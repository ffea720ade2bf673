import time
from pathlib import Path

import pytest

from icce_ray.collect_garbage import collect_garbage
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.run_records import MAX_UNFINISHED_S, write_record, write_unfinished


def write_artifact(output: Path, stage: str, digit: str, **inputs: str) -> str:
    name = digit * 16
    ArtifactWriter(Folder.at(output / stage / name)).commit(
        stage=stage, fingerprint=name, inputs=inputs, config={}, metrics={}, seconds=0.0
    )
    return name


def test_what_an_unfinished_command_uses_is_kept_for_two_weeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_artifact(tmp_path, "images", "a")
    older = write_artifact(tmp_path, "images", "0")
    used = write_artifact(tmp_path, "embed", "b", images=older)
    write_artifact(tmp_path, "embed", "d")
    write_record(str(tmp_path), "run", {"images": images}, {})
    write_unfinished(str(tmp_path), "day", {"embed": used, "assign": "e" * 16})
    assert list(collect_garbage(str(tmp_path), delete=True).sizes) == ["embed/" + "d" * 16]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + MAX_UNFINISHED_S + 1)
    assert list(collect_garbage(str(tmp_path)).sizes) == ["embed/" + used, "images/" + older]
    assert (tmp_path / "runs" / "unfinished" / "day.json").exists()
    assert list(collect_garbage(str(tmp_path), delete=True).sizes) == ["embed/" + used, "images/" + older]
    assert not (tmp_path / "runs" / "unfinished" / "day.json").exists()


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs there"):
        collect_garbage(str(tmp_path))
