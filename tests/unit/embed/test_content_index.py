from __future__ import annotations

import hashlib
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.embed import content_index, gather_embeddings
from icce_ray.embed.backbone_plan import embed_settings, model_key, plan_embedding
from icce_ray.embed.content_index import (
    AT,
    BUSY,
    CLAIMED,
    YOURS,
    Answers,
    ContentIndex,
    ShardedIndex,
    keys_of,
    num_shards,
    siblings,
)
from icce_ray.embed.embedding_parts import PartRange, part_table, write_part
from icce_ray.embed.gather_embeddings import VectorReader, gather, known_hashes
from icce_ray.embed.part_hashes import HashTable, hashes_name
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords


def settings_of(config: Config) -> dict[str, Any]:
    return embed_settings(config.embed, config.embeddings, config.seed)


def sha(number: int) -> str:
    return f"{number:064x}"


def write(folder: Folder, index: int, numbers: list[int], model: str = "m") -> str:
    """A part whose embeddings say which content they are of."""
    part = PartRange(index, 0, len(numbers))
    rows = np.array([[number % 1000, 1] for number in numbers], dtype=np.float16).reshape(-1, 2)
    hashes = pa.array([sha(number) for number in numbers], pa.string())
    write_part(PartRecords(folder, ""), part, part_table(np.arange(len(numbers)), rows, hashes, model=model))
    return part.file_name


def sharded(folders: list[Folder], num_shards: int) -> ShardedIndex:
    """Shards in this process, whose messages are pickled."""
    shards = [ContentIndex(folders, 0, shard, num_shards) for shard in range(num_shards)]

    def call(method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        sent = pickle.loads(pickle.dumps(arguments))
        return {shard: getattr(shards[shard], method)(*values) for shard, values in sent.items()}

    return ShardedIndex(num_shards, call, put=pickle.dumps, get=pickle.loads)


def where(index: Any, hashes: list[str], part: str = "asks") -> list[Any]:
    """What a claim answers for each content."""
    answers: Answers = index.claim(part, keys_of(hashes))
    words = {YOURS: "yours", BUSY: "busy"}
    rows = zip(answers.kinds_n.tolist(), answers.rows_n.tolist(), answers.sources_n.tolist(), strict=True)
    return [
        (*answers.sources[source], row) if kind == AT else words.get(kind) or index.fetch(answers.sources[source])
        for kind, row, source in rows
    ]


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_the_index_answers_as_a_dictionary_does(tmp_path: Path, num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    contents = [hashlib.sha256(bytes([number])).hexdigest() for number in range(60)]
    folders = [Folder.at(tmp_path / "own"), Folder.at(tmp_path / "other")]
    at: dict[str, Any] = {}
    for place, folder in enumerate(folders):
        for part in range(3):
            chosen = rng.choice(60, 4)
            name = write(folder, part, [int(contents[i], 16) for i in chosen])
            for row, i in enumerate(chosen):
                at.setdefault(contents[i], (place, name, row))
    index: Any = sharded(folders, num_shards) if num_shards else ContentIndex(folders)
    holders: dict[str, str] = {}
    for step in range(200):
        asked = [contents[i] for i in rng.choice(60, 7, replace=False)]
        assert index.known(keys_of(asked)).tolist() == [value in at for value in asked]
        part = f"part-{10 + step % 5:05d}.parquet"
        expected = []
        for value in asked:
            if value not in at:
                holders.setdefault(value, part)
            expected.append(at.get(value) or ("yours" if holders[value] == part else "busy"))
        assert where(index, asked, part) == expected
        if rng.random() < 0.4:
            ours = [value for value, holder in holders.items() if holder == part]
            rows = rng.permutation(len(ours)).astype(np.uint32)
            rows[rng.random(len(ours)) < 0.2] = CLAIMED
            index.finish(part, keys_of(ours), rows)
            for value, row in zip(ours, rows.tolist(), strict=True):
                del holders[value]
                if row != CLAIMED:
                    at[value] = (0, part, row)
        if rng.random() < 0.05 and at:
            place, gone, _ = list(at.values())[rng.integers(len(at))]
            index.forget(place, gone)
            at = {value: found for value, found in at.items() if found[:2] != (place, gone)}


def test_the_table_keeps_what_it_has_when_it_grows() -> None:
    rng = np.random.default_rng(0)
    # Many want the same bucket, whatever the number of buckets; their neighbours are full.
    keys = rng.permutation(np.concatenate([np.arange(1000) * 5_000_000_000, np.arange(1000)])).astype(np.uint64)
    keys = np.unique(keys)[rng.permutation(1999)]
    table = HashTable(10)
    for start in range(0, len(keys), 170):
        slots = table.insert(np.repeat(keys[start : start + 170], 2))[::2]
        table.files[slots], table.rows[slots] = 7, np.arange(start, start + len(slots))
    assert table.num_keys == len(keys)
    assert table.rows[table.find(keys)].tolist() == list(range(len(keys)))
    assert (table.find(keys + np.uint64(2**63)) == -1).all()


def test_what_lies_on_storage_is_read_and_the_rest_embedded_once(tmp_path: Path) -> None:
    own, other = Folder.at(tmp_path / "own"), Folder.at(tmp_path / "other")
    write(own, 0, [1, 2])
    write(other, 0, [3])
    index = ContentIndex([own, other])
    assert known_hashes(index, [sha(1), sha(3), sha(9)]) == {sha(1), sha(3)}
    asked: list[list[str]] = []

    def embed(hashes: list[str]) -> dict[str, Any]:
        asked.append(hashes)
        return {value: np.array([int(value, 16), 7], np.float16) for value in hashes}

    wanted = [sha(number) for number in (1, 9, 3)]
    outcomes, embedded = gather("part-00001.parquet", wanted, index, VectorReader([own, other]), embed)
    assert {int(value, 16): row.tolist() for value, row in outcomes.items()} == {1: [1, 1], 3: [3, 1], 9: [9, 7]}
    assert asked == [[sha(9)]]
    assert embedded == [sha(9)]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_parts_with_each_others_content_wait_for_each_other_and_both_come_to_an_end(
    tmp_path: Path, num_shards: int
) -> None:
    folder = Folder.at(tmp_path)
    index, both = sharded([folder], num_shards), threading.Barrier(2, timeout=60)
    embedded: list[str] = []
    results: dict[int, Any] = {}

    def work(number: int, first: int, second: int) -> None:
        def embed(hashes: list[str]) -> dict[str, Any]:
            embedded.extend(hashes)
            return {value: np.array([int(value, 16), 1], np.float16) for value in hashes}

        name, wanted = PartRange(number, 0, 2).file_name, [sha(first), sha(second)]
        index.claim(name, keys_of(wanted[:1]))
        both.wait()
        outcomes, ours = gather(name, wanted, index, VectorReader([folder]), embed)
        write(folder, number, [first, second])
        index.finish(name, keys_of(ours), np.array([wanted.index(value) for value in ours], np.uint32))
        results[number] = [outcomes[value].tolist() for value in wanted]

    threads = [threading.Thread(target=work, args=args) for args in ((0, 1, 2), (1, 2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(embedded) == [sha(1), sha(2)]
    assert results == {0: [[1, 1], [2, 1]], 1: [[2, 1], [1, 1]]}


def test_a_part_that_never_finishes_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_embeddings, "MAX_WAIT_S", 0.2)
    index = ContentIndex([Folder.at(tmp_path)])
    assert where(index, [sha(1)], "dead") == ["yours"]
    assert where(index, [sha(1)], "alive") == ["busy"]
    outcomes, embedded = gather("alive", [sha(1)], index, VectorReader([]), lambda hashes: dict.fromkeys(hashes, "why"))
    assert (outcomes, embedded) == ({sha(1): "why"}, [sha(1)])


def test_what_a_dead_worker_published_is_embedded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_embeddings, "MAX_WAIT_S", 0.2)
    index = sharded([Folder.at(tmp_path)], 2)
    index.claim("dead", keys_of([sha(1)]))
    index.publish("dead", keys_of([sha(1)]), {})  # without the content: as when Ray has lost it
    outcomes, _ = gather("alive", [sha(1)], index, VectorReader([]), lambda hashes: dict.fromkeys(hashes, "why"))
    assert outcomes == {sha(1): "why"}


def test_a_damaged_part_is_embedded_again(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    name = write(folder, 0, [1])
    index = ContentIndex([folder])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    vector = np.array([5], np.float16)
    outcomes, embedded = gather("p", [sha(1)], index, VectorReader([folder]), lambda hashes: {hashes[0]: vector})
    assert outcomes == {sha(1): vector}
    assert embedded == [sha(1)]


def test_hashes_of_another_part_give_no_wrong_embedding(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    name, other = write(folder, 0, [1, 2]), write(folder, 1, [3, 4])
    (tmp_path / hashes_name(name)).write_bytes((tmp_path / hashes_name(other)).read_bytes())
    vector = np.array([5], np.float16)
    index, wanted = ContentIndex([folder]), [sha(2), sha(4)]
    outcomes, embedded = gather(
        "p", wanted, index, VectorReader([folder]), lambda hashes: dict.fromkeys(hashes, vector)
    )
    assert embedded == wanted
    assert outcomes == {sha(2): vector, sha(4): vector}


def test_another_content_with_the_same_key_gets_its_own_embedding(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    write(folder, 0, [1])
    other, vector = "f" + sha(1)[1:], np.array([5], np.float16)
    reader = VectorReader([folder])
    outcomes, _ = gather("p", [other], ContentIndex([folder]), reader, lambda new: dict.fromkeys(new, vector))
    assert outcomes == {other: vector}


def test_finished_content_is_known_and_no_longer_claimed(tmp_path: Path) -> None:
    index = ContentIndex([Folder.at(tmp_path)])
    part, both = "part-00000.parquet", [sha(1), sha(2)]
    where(index, both, part)
    published = {sha(1): np.array([1]), sha(2): "feature overflow"}
    index.publish(part, keys_of(both), published)
    assert where(index, [sha(2)]) == [published]
    index.finish(part, keys_of(both), np.array([4, CLAIMED], np.uint32))
    assert where(index, both) == [(0, part, 4), "yours"]


def test_a_restarted_index_knows_what_was_finished_before(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for _ in range(2):
        index = ContentIndex([folder], num_new=4)
        name = write(folder, 0, [1, 2])
        index.finish(name, keys_of([sha(1), sha(2)]), np.array([0, 1], np.uint32))
        assert where(index, [sha(2), sha(1)]) == [(0, name, 1), (0, name, 0)]
    assert where(ContentIndex([folder]), [sha(2)]) == [(0, name, 1)]


def test_a_large_index_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_index, "CONTENTS_PER_SHARD", 4)
    folder = Folder.at(tmp_path)
    assert num_shards([folder], 4) == 1
    write(folder, 0, [1, 2])
    assert num_shards([folder, folder], 5) == 3


def test_only_artifacts_of_the_same_model_are_siblings(tmp_path: Path) -> None:
    root = Folder.at(tmp_path)
    for name, model in (("a", "m"), ("b", "another"), ("own", "m")):
        write(root / name, 0, [1], model)
    (root / "empty").write_bytes("notes.txt", b"")
    assert [folder.uri for folder in siblings(root, root / "own", "m", 5)] == [f"{tmp_path}/a"]


def test_a_finished_artifact_that_is_far_larger_is_not_looked_at(tmp_path: Path) -> None:
    root = Folder.at(tmp_path)
    write(root / "a", 0, [1], "m")
    ArtifactWriter(root / "a").commit(
        stage="embed", fingerprint="a", inputs={}, config={}, metrics={"num_images": 1000}, seconds=0.0
    )
    assert siblings(root, root / "own", "m", 9) == []
    assert [folder.uri for folder in siblings(root, root / "own", "m", 10)] == [f"{tmp_path}/a"]


def test_the_model_key_counts_what_decides_an_embedding_and_nothing_else(tmp_path: Path) -> None:
    def key(**embed: Any) -> str:
        config = Config(images={"uri": "x"}, num_clusters=2, output="x", embed={"backbone": "pixels"} | embed)
        return model_key(settings_of(config), plan_embedding(config.embed))

    assert key() == key(max_image_pixels=7) == key(batch_size=3) == key(image_size=32)
    assert len({key(), key(image_size=16), key(grayscale=True)}) == 3
