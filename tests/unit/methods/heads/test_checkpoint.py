from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.store import Folder


def save(path: Path, epoch: int, *shares: range, folder: CheckpointFolder | None = None) -> None:
    for heads in shares:
        tensors = {"a": torch.tensor([[10.0 * epoch + head] * 3 for head in heads])}
        (folder or CheckpointFolder(Folder.at(path))).save(tensors, {"epoch": epoch}, heads)


def load(path: Path, heads: range, max_epoch: int | None = None) -> tuple[list[float], int] | None:
    found = CheckpointFolder(Folder.at(path)).load(heads, max_epoch)
    return None if found is None else (found[0]["a"][:, 0].tolist(), found[1]["epoch"])


def test_heads_are_joined_from_the_files_of_another_division(tmp_path: Path) -> None:
    save(tmp_path, 2, range(0, 2), range(2, 5))
    assert load(tmp_path, range(5)) == ([20.0, 21.0, 22.0, 23.0, 24.0], 2)
    assert load(tmp_path, range(1, 4)) == ([21.0, 22.0, 23.0], 2)
    assert load(tmp_path, range(4, 5)) == ([24.0], 2)


def test_a_checkpoint_that_lacks_a_worker_or_is_damaged_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2, range(0, 2), range(2, 5))
    save(tmp_path, 3, range(0, 2))
    assert load(tmp_path, range(5)) == ([20.0, 21.0, 22.0, 23.0, 24.0], 2)
    assert load(tmp_path, range(2)) == ([30.0, 31.0], 3)
    assert load(tmp_path, range(2), max_epoch=2) == ([20.0, 21.0], 2)
    assert load(tmp_path, range(2), max_epoch=1) is None
    newest = tmp_path / "checkpoints/epoch-000003-heads-00000-00002.safetensors"
    whole = newest.read_bytes()
    for damaged in (whole[:90], whole[:-1] + bytes([whole[-1] ^ 1])):
        newest.write_bytes(damaged)
        assert load(tmp_path, range(2)) == ([20.0, 21.0], 2)


def test_two_epochs_are_kept_of_all_workers_also_those_of_an_earlier_division(tmp_path: Path) -> None:
    def epochs() -> set[str]:
        folders = (tmp_path / "checkpoints", tmp_path / "checkpoints/records")
        return {path.name[6:12] for folder in folders for path in folder.glob("epoch-*")}

    for epoch in (0, 1):
        save(tmp_path, epoch, range(3), range(3, 5))
    resumed = CheckpointFolder(Folder.at(tmp_path))
    assert resumed.load(range(5)) is not None
    for epoch, expected in ((2, {"000001", "000002"}), (3, {"000002", "000003"}), (4, {"000003", "000004"})):
        save(tmp_path, epoch, range(5), folder=resumed)
        assert epochs() == expected
    resumed.clear()
    assert epochs() == set()


def test_values_come_back_with_the_tensors(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(Folder.at(tmp_path))
    values: dict[str, Any] = {"epoch": 1, "history": [{"loss": 0.1, "label_change": None}]}
    checkpoints.save({"a": torch.ones(2, 1)}, values, range(2))
    found = checkpoints.load(range(2))
    assert found is not None
    assert found[1] == values
