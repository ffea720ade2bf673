from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from icce_ray.errors import ResourceError
from icce_ray.store import cache
from icce_ray.store.cache import cache_entry, cache_folder, is_sealed, scratch_folder, seal


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_in_the_temporary_folder_is_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ICCE_CACHE")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder
    folder.rmdir()
    (tmp_path / "of-somebody").mkdir()
    folder.symlink_to(tmp_path / "of-somebody")
    with pytest.raises(ResourceError, match=r"is not a folder of yours; set ICCE_CACHE"):
        cache_folder()
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(cache.os, "getuid", lambda: int(folder.name.rpartition("-")[2]), raising=False)
    found = folder.lstat()
    monkeypatch.setattr(Path, "lstat", lambda path: SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid + 1))
    with pytest.raises(ResourceError, match="is not a folder of yours"):
        cache_folder()


def test_a_file_is_used_only_with_the_bytes_that_were_sealed(tmp_path: Path) -> None:
    file = tmp_path / "features.npy"
    assert not is_sealed(file)
    file.write_bytes(b"features")
    assert not is_sealed(file)  # unfinished
    seal(file)
    assert is_sealed(file)
    file.write_bytes(b"feature5")
    os.utime(file, ns=(0, 0))
    assert not is_sealed(file)


def age(folder: Path, seconds: float) -> None:
    os.utime(folder, (time.time() - seconds,) * 2)


def test_entries_that_are_old_or_fill_the_disk_are_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("lately", 60), ("yesterday", 86_400), ("week", 7 * 86_400), ("month", 30 * 86_400)):
        (cache_entry("embed", name) / "features.npy").write_bytes(b"x" * 100)
        age(root / "embed" / name, seconds)
    cache_entry("embed", "lately")
    assert (root / "embed" / "month").exists()  # room is made only for new entries
    age(root / "embed" / "lately", 60)
    cache_entry("embed", "new")
    assert {folder.name for folder in (root / "embed").iterdir()} == {"lately", "yesterday", "week", "new"}
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=110))
    cache_entry("neighbors", "new")
    assert {folder.name for folder in (root / "embed").iterdir()} == {"lately", "yesterday", "new"}
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    cache_entry("neighbors", "newer")
    assert {folder.name for folder in (root / "embed").iterdir()} == {"lately", "new"}


def test_an_entry_counts_as_used_when_it_is_asked_for(root: Path) -> None:
    age(cache_entry("embed", "a"), 30 * 86_400)
    cache_entry("embed", "a")
    cache_entry("embed", "b")
    assert (root / "embed" / "a").exists()


def test_scratch_folders_go_even_if_their_process_is_killed(root: Path) -> None:
    code = "from icce_ray.store.cache import scratch_folder; import sys\n"
    code += "with scratch_folder() as folder: (folder / 'x').touch(); print(folder, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with scratch_folder() as mine:
            assert mine.is_dir()
            assert (theirs / "x").exists()  # its process lives
        assert not mine.exists()
        other.kill()
    assert theirs.exists()
    with scratch_folder():
        assert not theirs.exists()
    assert list((root / "scratch").iterdir()) == []


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_lost_seal_means_that_the_file_is_made_again(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    (tmp_path / "a").write_bytes(b"data")
    seal(tmp_path / "a")
    harm(tmp_path / ".a.sha256")
    assert not is_sealed(tmp_path / "a")
