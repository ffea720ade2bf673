import os
import pickle
from pathlib import Path

import pytest

from icce_ray.errors import InputError
from icce_ray.store import Folder


def test_what_is_written_is_read_and_listed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "new" / "deep")
    folder.write_bytes("b", b"two")
    folder.write_bytes("a", b"one")
    assert folder.names() == ["a", "b"]
    assert folder.read_bytes("b") == b"two"
    assert (folder.size("a"), folder.size("missing")) == (3, None)


def test_a_file_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write_bytes("below/a", b"one")
    assert folder.read_bytes("below/a") == b"one"
    assert (folder / "below").names() == ["a"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(tmp_path)
    folder.write_bytes("a", b"old")

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        folder.write_bytes("a", b"new and longer")
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_unfinished_writes_are_not_listed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write_bytes("a", b"one")
    (tmp_path / ".b.0123").write_bytes(b"half")
    assert folder.names() == ["a"]


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "nowhere")
    assert folder.names() == []
    folder.clear()
    folder.remove("a")


def test_clear_removes_files_only_below_the_folder(tmp_path: Path) -> None:
    (Folder.at(tmp_path) / "a").write_bytes("x", b"1")
    (Folder.at(tmp_path) / "b").write_bytes("x", b"1")
    (Folder.at(tmp_path) / "a").clear()
    assert (Folder.at(tmp_path) / "a").names() == []
    assert (Folder.at(tmp_path) / "b").names() == ["x"]


def test_a_folder_pickles(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(Folder.at(tmp_path)))
    folder.write_bytes("a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_relative_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.at("results").uri == str(tmp_path / "results")


def test_an_unknown_scheme_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="nosuch://x/y: cannot be opened"):
        Folder.at("nosuch://x/y")
