from __future__ import annotations

from pathlib import Path

import pytest

from icce_ray.config import Config
from icce_ray.pipeline.numbers_kept import remember, with_numbers_from
from icce_ray.store import Folder


def test_the_same_run_keeps_its_numbers_and_others_those_of_the_newest_that_is_there(tmp_path: Path) -> None:
    asked = Config(images={"uri": "photos"}, num_clusters=2, output=str(tmp_path))

    def kept(images: str) -> str:
        return with_numbers_from(asked, asked, images).consensus.numbers_from

    assert kept("listing 1") == "none"
    remember(asked, "b", "listing 2", numbers_from="a")
    assert kept("listing 2") == "a", "although the run a was given up: the same command has the same result again"
    assert kept("listing 3") == "none"
    Folder.at(tmp_path / "runs").write_bytes("b.json", b"{}")
    assert kept("listing 3") == "b"


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"{}", b"5"])
def test_a_damaged_note_is_none(tmp_path: Path, damage: bytes) -> None:
    asked = Config(images={"uri": "photos"}, num_clusters=2, output=str(tmp_path))
    remember(asked, "b", "listing 2", numbers_from="a")
    (note,) = (tmp_path / "numbers_kept").iterdir()
    note.write_bytes(damage)
    assert with_numbers_from(asked, asked, "listing 2").consensus.numbers_from == "none"
