from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.embed import content_index as content
from icce_ray.embed.backbone_plan import embed_settings, model_key, plan_embedding
from icce_ray.embed.content_index import ContentIndex, VectorReader, gather, siblings
from icce_ray.embed.embedding_parts import PartRange, part_table, write_part
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords


def settings_of(config: Config) -> dict[str, Any]:
    return embed_settings(config.embed, config.embeddings, config.seed)


def sha(number: int) -> str:
    return f"{number:064x}"


def write(folder: Folder, index: int, numbers: list[int], model: str = "m") -> str:
    """A part whose embeddings say which content they are of."""
    part = PartRange(index, 0, len(numbers))
    rows = np.array([[number, 1] for number in numbers], dtype=np.float16).reshape(-1, 2)
    hashes = pa.array([sha(number) for number in numbers], pa.string())
    write_part(PartRecords(folder, ""), part, part_table(np.arange(len(numbers)), rows, hashes, model=model))
    return part.file_name


def test_what_lies_on_storage_is_read_and_the_rest_embedded_once(tmp_path: Path) -> None:
    own, other = Folder.at(tmp_path / "own"), Folder.at(tmp_path / "other")
    write(own, 0, [1, 2])
    write(other, 0, [3])
    index = ContentIndex([own, other])
    assert index.known([sha(1), sha(3), sha(9)]) == {sha(1), sha(3)}
    asked: list[list[str]] = []

    def embed(hashes: list[str]) -> dict[str, Any]:
        asked.append(hashes)
        return {value: np.array([int(value, 16), 7], np.float16) for value in hashes}

    wanted = [sha(number) for number in (1, 9, 3)]
    outcomes, embedded = gather("part-00001.parquet", wanted, index, VectorReader([own, other]), embed)
    assert {int(value, 16): row.tolist() for value, row in outcomes.items()} == {1: [1, 1], 3: [3, 1], 9: [9, 7]}
    assert asked == [[sha(9)]]
    assert embedded == [sha(9)]


def test_parts_with_each_others_content_wait_for_each_other_and_both_come_to_an_end(tmp_path: Path) -> None:
    index, both = ContentIndex([Folder.at(tmp_path)]), threading.Barrier(2)
    counts: dict[str, int] = {}

    def work(part: str, first: int, second: int, results: dict[str, Any]) -> None:
        def embed(hashes: list[str]) -> dict[str, Any]:
            for value in hashes:
                counts[value] = counts.get(value, 0) + 1
            return {value: np.array([int(value, 16)], np.float16) for value in hashes}

        index.claim(part, [sha(first)])
        both.wait()
        results[part] = gather(part, [sha(first), sha(second)], index, VectorReader([]), embed)[0]

    results: dict[str, Any] = {}
    threads = [threading.Thread(target=work, args=args) for args in (("a", 1, 2, results), ("b", 2, 1, results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counts == {sha(1): 1, sha(2): 1}
    assert results["a"] == results["b"] == {sha(1): np.array([1]), sha(2): np.array([2])}


def test_a_part_that_never_finishes_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_WAIT_S", 0.2)
    index = ContentIndex([Folder.at(tmp_path)])
    assert index.claim("dead", [sha(1)]) == [["yours"]]
    assert index.claim("alive", [sha(1)]) == [["busy"]]
    outcomes, embedded = gather("alive", [sha(1)], index, VectorReader([]), lambda hashes: dict.fromkeys(hashes, "why"))
    assert (outcomes, embedded) == ({sha(1): "why"}, [sha(1)])


def test_a_damaged_part_is_embedded_again(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    name = write(folder, 0, [1])
    index = ContentIndex([folder])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    vector = np.array([5], np.float16)
    outcomes, embedded = gather("p", [sha(1)], index, VectorReader([folder]), lambda hashes: {hashes[0]: vector})
    assert outcomes == {sha(1): vector}
    assert embedded == [sha(1)]


def test_finished_content_is_known_and_no_longer_claimed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    index = ContentIndex([folder])
    index.claim("part-00000.parquet", [sha(1), sha(2)])
    index.publish("part-00000.parquet", {sha(1): np.array([1]), sha(2): "feature overflow"})
    assert index.claim("other", [sha(2)]) == [["here", "feature overflow"]]
    write(folder, 0, [1])
    index.finish("part-00000.parquet", [sha(1)])
    assert index.claim("other", [sha(1), sha(2)]) == [["at", 0, "part-00000.parquet"], ["yours"]]


def test_only_artifacts_of_the_same_model_are_siblings(tmp_path: Path) -> None:
    root = Folder.at(tmp_path)
    for name, model in (("a", "m"), ("b", "another"), ("own", "m")):
        write(root / name, 0, [1], model)
    (root / "empty").write_bytes("notes.txt", b"")
    assert [folder.uri for folder in siblings(root, root / "own", "m")] == [f"{tmp_path}/a"]


def test_the_model_key_counts_what_decides_an_embedding_and_nothing_else(tmp_path: Path) -> None:
    def key(**embed: Any) -> str:
        config = Config(images={"uri": "x"}, num_clusters=2, output="x", embed={"backbone": "pixels"} | embed)
        return model_key(settings_of(config), plan_embedding(config.embed))

    assert key() == key(max_image_pixels=7) == key(batch_size=3) == key(image_size=32)
    assert len({key(), key(image_size=16), key(grayscale=True)}) == 3
