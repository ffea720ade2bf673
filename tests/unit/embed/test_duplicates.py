"""Images with the same content, against a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from icce_ray.embed import duplicates
from icce_ray.embed.duplicates import HashedPart, find_duplicates
from icce_ray.embed.part_hashes import PartHashes, write_hashes
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder


def parts_at(folder: Folder, contents: np.ndarray, failed: list[int], size: int) -> list[HashedPart]:
    """Two contents that differ in the last of the compared bytes have the same hash otherwise."""
    parts = []
    for start in range(0, len(contents), size):
        stop = min(start + size, len(contents))
        bad = np.array([image_id for image_id in failed if start <= image_id < stop], dtype=np.int64)
        part = HashedPart(folder, f"part-{start:05d}.parquet", start, stop, bad)
        ids = np.setdiff1d(np.arange(start, stop), bad)
        hashes = np.repeat((contents[ids] // 2)[:, None], 32, axis=1).astype(np.uint8)
        hashes[:, 31] = contents[ids] % 2
        write_hashes(folder, part.name, PartHashes(bytes(32), hashes))
        parts.append(part)
    return parts


@pytest.mark.parametrize("together", [2**26, 40])
@pytest.mark.parametrize("num_contents", [3, 150, 500])
def test_duplicates_are_named_after_the_first_of_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_contents: int, together: int
) -> None:
    monkeypatch.setattr(duplicates, "IMAGES_TOGETHER", together)
    contents = np.random.default_rng(num_contents).integers(0, num_contents, 200)
    failed = [0, 1, 64, 199]
    parts = parts_at(Folder.at(tmp_path), contents, failed, size=32)
    first: dict[int, int] = {}
    expected = []
    for image_id, content in enumerate(contents.tolist()):
        if image_id not in failed and first.setdefault(content, image_id) != image_id:
            expected.append((image_id, first[content]))
    found = list(find_duplicates(parts))
    pairs = [pair for part in found for pair in zip(part.image_ids.tolist(), part.first_ids.tolist(), strict=True)]
    assert pairs == expected
    told = np.concatenate([part.hashes_nB for part in found])[:, 0]
    assert told.tolist() == [contents[image_id] // 2 for image_id, _ in expected]


def test_a_part_with_other_images_than_its_record_says_is_damaged(tmp_path: Path) -> None:
    (part,) = parts_at(Folder.at(tmp_path), np.arange(10), [], size=10)
    with pytest.raises(DamagedArtifactError, match="does not hold the images"):
        list(find_duplicates([HashedPart(part.folder, part.name, 0, 10, np.array([3]))]))


def test_each_hash_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "IMAGES_TOGETHER", 16)
    read, read_bytes = list[str](), Folder.read_bytes
    monkeypatch.setattr(Folder, "read_bytes", lambda folder, name: read.append(name) or read_bytes(folder, name))
    parts = parts_at(Folder.at(tmp_path), np.arange(200) // 2 * 2, [], size=100)
    assert sum(len(found.image_ids) for found in find_duplicates(parts)) == 100
    assert sorted(read) == ["part-00000.hashes", "part-00100.hashes"]


def test_nothing_has_no_duplicates() -> None:
    assert list(find_duplicates([])) == []
