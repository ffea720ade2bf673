from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from icce_ray.images import file_shards
from icce_ray.images.file_shards import OTHER_NAME, File, FileShards, shards_of
from icce_ray.store import Folder


def random_sources(rng: np.random.Generator) -> list[list[File]]:
    """Sources that name some files twice, and some files by several names."""
    names = sorted({"".join(rng.choice(list("abä\U0001f600/"), rng.integers(1, 5))) for _ in range(150)})
    sources: list[list[File]] = [[], [], []]
    for _ in range(300):
        number = int(rng.integers(3))
        uri = names[rng.integers(len(names))]
        identity = f"1:{rng.integers(60)}" if rng.random() < 0.5 else None
        etag = str(rng.integers(3))
        sources[number].append(File(uri, int(rng.integers(9)), etag, bool(rng.random() < 0.1), None, identity, bool(rng.random() < 0.3)))  # fmt: skip  # noqa: E501
    return sources


def reference(sources: list[list[File]]) -> list[File]:
    """The first of each URI, then of each identity the first name that no link leads to."""
    files: dict[str, File] = {}
    for file in (file for source in sources for file in source):
        files.setdefault(file.uri, file)
    best: dict[str, tuple[bool, str]] = {}
    for file in files.values():
        if file.identity is not None:
            name = file.is_linked, file.uri
            best[file.identity] = min(best.get(file.identity, name), name)
    kept = (file for file in files.values() if file.identity is None or best[file.identity][1] == file.uri)
    return sorted(kept, key=lambda file: file.uri.encode())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shard_rows", "held_rows"), [(10_000, 10_000), (7, 20), (40, 0)])
def test_any_division_into_shards_gives_the_files_of_a_plain_sort(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, shard_rows: int, held_rows: int
) -> None:
    sources = random_sources(np.random.default_rng(seed))
    whole = FileShards([shard for source in sources for shard in shards_of(source, Folder.at(tmp_path), "x")], Folder.at(tmp_path / "0"), Counter())  # fmt: skip  # noqa: E501
    monkeypatch.setattr(file_shards, "SHARD_ROWS", shard_rows)
    monkeypatch.setattr(file_shards, "MAX_ROWS_HELD", held_rows)
    monkeypatch.setattr(file_shards, "GROUP_ROWS", 5)
    skipped = Counter[str]()
    shards = [s for number, source in enumerate(sources) for s in shards_of(source, Folder.at(tmp_path), f"s{number}")]
    files = FileShards(shards, Folder.at(tmp_path), skipped)
    expected = reference(sources)
    assert [File(*row.values()) for table in files.tables() for row in table.to_pylist()] == expected
    assert skipped[OTHER_NAME] == len({file.uri for source in sources for file in source}) - len(expected)
    assert files.digest == whole.digest
    changed = [[file._replace(etag="new") if file == expected[7] else file for file in source] for source in sources]
    assert FileShards([shard for source in changed for shard in shards_of(source, Folder.at(tmp_path), "y")], Folder.at(tmp_path / "1"), Counter()).digest != whole.digest  # fmt: skip  # noqa: E501

    # Found again: all but those that are gone and containers that changed. The rest is unknown.
    wanted = [(file.uri, file.etag, file.is_container) for file in expected[::3]] + [("gone", None, False)]
    wanted += [(file.uri, "other", True) for file in expected[1::3] if file.is_container]
    found = files.find_again(wanted)
    assert found[: len(expected[::3])] == expected[::3]
    assert set(found[len(expected[::3]) :]) == {None}
    unknown = [File(*row.values()) for table in files.unknown() for row in table.to_pylist()]
    assert unknown == [file for number, file in enumerate(expected) if number % 3]
