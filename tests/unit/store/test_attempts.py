from __future__ import annotations

from pathlib import Path

import pytest

from icce_ray.errors import WorkerError
from icce_ray.store import Folder
from icce_ray.store.attempts import Tries

NAME = ".part-00000.parquet.decode"


class DiedError(Exception):
    pass


def attempt(folder: Folder, killers: set[int], batch_size: int, run_id: str = "run") -> list[int]:
    """One worker's try at images 0 to 19: what it got through; dies at the first killer."""
    tries = Tries(folder, NAME, run_id, "images 0 to 19")
    done: list[int] = []
    for ids in tries.steps(range(20), 1 if tries.is_careful and batch_size == 1 else max(batch_size, 8)):
        if killers & set(ids):
            raise DiedError
        done += ids
    tries.end()
    return done


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("killers", [{5}, {0}, {19}, {3, 4}, {1, 18}])
def test_killers_are_found_in_three_deaths_each_and_nobody_else_is_blamed(
    tmp_path: Path, killers: set[int], batch_size: int
) -> None:
    folder = Folder.at(tmp_path)
    for _ in range(3 * len(killers) + 1):
        try:
            done = attempt(folder, killers, batch_size)
        except DiedError:
            continue
        break
    assert done == sorted(set(range(20)) - killers)
    assert not list(tmp_path.iterdir())


def test_deaths_from_outside_blame_nobody(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for killers in ({2}, {11}, {17}):  # another image each time: it was not the images
        with pytest.raises(DiedError):
            attempt(folder, killers, 1)
    assert attempt(folder, set(), 1) == list(range(20))


def test_workers_that_die_before_they_begin_end_the_stage(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for _ in range(4):
        Tries(folder, NAME, "run", "images 7 to 8")
    with pytest.raises(WorkerError, match="images 7 to 8: workers died 4 times before they began"):
        Tries(folder, NAME, "run", "images 7 to 8")
    assert not Tries(folder, NAME, "another run", "images 7 to 8").is_careful


def test_a_damaged_note_is_no_note(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"run": "run", "begun": ')
    assert not Tries(Folder.at(tmp_path), NAME, "run", "images").is_careful
