from __future__ import annotations

from pathlib import Path

import pytest

from icce_ray.errors import WorkerError
from icce_ray.store import Folder
from icce_ray.store.attempts import Attempt

NAME = ".part-00000.parquet.decode"


class DiedError(Exception):
    pass


def begin(folder: Folder, run_id: str = "run") -> Attempt:
    return Attempt(folder, NAME, run_id, "embed: images 0 to 19", "use fewer workers").begin()


def work(folder: Folder, killers: set[int], careful_batch_size: int) -> list[int]:
    """One worker's attempt at images 0 to 19: the images it worked on. It dies at the first killer."""
    attempt = begin(folder)
    done: list[int] = []
    for ids in attempt.steps(range(20), careful_batch_size if attempt.is_careful else 8):
        if killers & set(ids):
            raise DiedError
        done += ids
    attempt.end()
    return done


@pytest.mark.parametrize("careful_batch_size", [1, 8])
@pytest.mark.parametrize("killers", [{5}, {0}, {19}, {3, 4}, {1, 18}])
def test_killers_are_found_in_three_deaths_each_and_no_other_image_is_blamed(
    tmp_path: Path, killers: set[int], careful_batch_size: int
) -> None:
    folder = Folder.at(tmp_path)
    num_deaths = 0
    while True:
        try:
            done = work(folder, killers, careful_batch_size)
            break
        except DiedError:
            num_deaths += 1
    assert done == sorted(set(range(20)) - killers)
    assert num_deaths <= 3 * len(killers)
    assert not list(tmp_path.iterdir())


def test_deaths_with_another_cause_blame_no_image(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for killers in ({2}, {11}, {17}):  # a different image each time
        with pytest.raises(DiedError):
            work(folder, killers, 1)
    assert work(folder, set(), 1) == list(range(20))


def test_three_workers_that_die_before_their_first_image_end_the_stage(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for _ in range(3):
        begin(folder)
    with pytest.raises(WorkerError, match=r"embed: images 0 to 19: the workers died 3 times\. .* use fewer workers"):
        begin(folder)
    assert not begin(folder, "another run").is_careful


def test_a_damaged_note_is_ignored(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"run": "run", "number": ')
    assert not begin(Folder.at(tmp_path)).is_careful


def test_work_in_a_single_process_goes_in_batches_of_all_images() -> None:
    attempt = Attempt().begin()
    assert [list(ids) for ids in attempt.steps(range(5), 2)] == [[0, 1], [2, 3], [4]]
    attempt.end()
    assert not attempt.is_careful
    assert attempt.blamed() == set()
