import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.store import parts_table
from icce_ray.store.parts_table import Part, PartsTable, parts_bytes


def some_parts(seed: int) -> list[Part]:
    rng = random.Random(seed)
    parts = {}
    for _ in range(300):
        name = rng.choice(["part-", "part-x", "assignments/", "", "p\u00e4rt-", "\U0001f600"]) + str(rng.randrange(500))
        shape = (rng.randrange(9), 3) if rng.random() < 0.5 else None
        parts[name] = Part(
            name=name,
            num_bytes=rng.randrange(2**40),
            sha256=rng.randbytes(32).hex(),
            rows=rng.choice([None, 0, 7]),
            dtype=rng.choice([None, "float16", "int32"]),
            shape=shape,
            folder=rng.choice([None, "embed/other"]),
        )
    return list(parts.values())


def table_of(parts: list[Part]) -> PartsTable:
    return PartsTable(pa.BufferReader(parts_bytes(parts)))


@pytest.mark.parametrize(
    "prefix", ["", "part-", "part-x", "part-1", "assignments/", "nothing", "p\u00e4", "\U0001f600"]
)
@pytest.mark.parametrize("rows_per_group", [1, 7, 16_384])
def test_the_table_answers_as_a_dictionary_of_parts_does(
    prefix: str, rows_per_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_table, "ROWS_PER_GROUP", rows_per_group)
    parts = some_parts(seed=len(prefix))
    table = table_of(parts)
    expected = sorted((part for part in parts if part.name.startswith(prefix)), key=lambda part: part.name)
    assert table.names(prefix) == [part.name for part in expected]
    assert [table.part(part.name) for part in expected] == expected
    assert table.num_rows(prefix).tolist() == [part.rows or 0 for part in expected]
    assert set(table.folders()) == {part.folder for part in parts if part.folder is not None}
    own = {part.name: part.num_bytes for part in parts if part.folder is None}
    assert table.own_parts_are_among(own)
    assert not table.own_parts_are_among(own | {min(own): -1})
    assert table.num_bytes(prefix) == sum(part.num_bytes for part in expected)
    with pytest.raises(KeyError):
        table.part(prefix + "-not there")


def test_another_table_and_what_is_none_are_refused() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"name": ["part-0"]}), sink)
    with pytest.raises(ValueError, match=r"columns .*name"):
        PartsTable(pa.BufferReader(sink.getvalue()))
    with pytest.raises(ValueError, match="Parquet"):
        PartsTable(pa.BufferReader(b"no table at all"))


def test_a_table_without_parts_is_a_table() -> None:
    table = table_of([])
    assert (table.names(), table.num_rows("").tolist(), table.num_bytes("")) == ([], [], 0)


def test_the_checksum_changes_with_any_name_or_content_and_only_below_the_prefix() -> None:
    parts = [Part(name=f"{kind}-{number}", num_bytes=1, sha256="0" * 64) for kind in "ab" for number in range(3)]
    before = table_of(parts)
    for changed in ({"name": "a-9"}, {"sha256": "1" * 64}):
        after = table_of([parts[0].model_copy(update=changed), *parts[1:]])
        assert after.checksum("a") != before.checksum("a")
        assert after.checksum("b") == before.checksum("b")
