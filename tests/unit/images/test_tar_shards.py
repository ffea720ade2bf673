from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config, ImagesConfig
from icce_ray.images import tar_shards
from icce_ray.images.containers import labels_beside, members
from icce_ray.images.file_shards import File
from icce_ray.images.read_images import read_image

Listed = Callable[[Config], pa.Table]
BLOCK = tarfile.BLOCKSIZE


def shard(names: range, *, size: int = 700) -> bytes:
    """Members of one header block and two blocks of data each."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in names:
            add(tar, f"{number}.png", bytes([number]) * size)
    return sink.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a valid checksum, whatever size it states."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.fixture
def list_shard(listed: Listed, tmp_path: Path) -> Callable[[bytes], tuple[list[str], list[str]]]:
    """Lists a shard: the names of its images, each of which can be read, and the problems."""

    def run(data: bytes) -> tuple[list[str], list[str]]:
        (tmp_path / "0.tar").write_bytes(data)
        config = Config(output="unused", num_clusters=2, images={"uri": str(tmp_path / "0.tar")})
        rows = listed(config).to_pylist()
        good = [row for row in rows if row["problem"] is None]
        for row in good:
            found = read_image(row["uri"], row["size_bytes"])
            assert isinstance(found, bytes)
            assert len(found) == row["size_bytes"]
        return [row["uri"].rpartition("/")[2] for row in good], [row["problem"] for row in rows if row["problem"]]

    return run


ListShard = Callable[[bytes], tuple[list[str], list[str]]]


def test_a_whole_shard_has_no_problem(list_shard: ListShard) -> None:
    assert list_shard(shard(range(6))) == ([f"{number}.png" for number in range(6)], [])
    assert list_shard(shard(range(0))) == ([], [])


@pytest.mark.parametrize("byte", [0, 124, 150, 257, 400])
@pytest.mark.parametrize("member", [0, 3, 5])
def test_a_flipped_bit_in_a_header_costs_that_member_only(list_shard: ListShard, member: int, byte: int) -> None:
    data = bytearray(shard(range(6)))
    data[member * 3 * BLOCK + byte] ^= 1
    names, problems = list_shard(bytes(data))
    assert names == [f"{number}.png" for number in range(6) if number != member]
    assert problems == ["damaged shard: bad header"]


def test_concatenated_archives_are_all_listed(list_shard: ListShard) -> None:
    data = shard(range(3)) + shard(range(3, 5)) + shard(range(5, 9))
    assert list_shard(data) == ([f"{number}.png" for number in range(9)], [])


@pytest.mark.parametrize(("first", "stop"), [(1, 3), (0, 1), (4, 6)])
def test_a_hole_of_zeros_is_a_problem(list_shard: ListShard, first: int, stop: int) -> None:
    data = shard(range(6))
    start, end = first * 3 * BLOCK, stop * 3 * BLOCK
    names, problems = list_shard(data[:start] + bytes(end - start) + data[end:] + bytes(8192) * (stop == 6))
    assert names == [f"{number}.png" for number in range(6) if not first <= number < stop]
    assert problems == ["damaged shard: zeros where members may have been"]


@pytest.mark.parametrize("cut", [1, 500, 512, 600, 1535, 1536, 1537, 4607, 4608, 5000])
def test_a_shard_that_was_cut_off_gives_its_whole_members_and_a_problem(list_shard: ListShard, cut: int) -> None:
    names, problems = list_shard(shard(range(6))[:cut])
    num_whole = sum(number * 3 * BLOCK + BLOCK + 700 <= cut for number in range(6))
    assert names[:num_whole] == [f"{number}.png" for number in range(num_whole)]
    assert len(names) == num_whole
    assert problems in (["damaged shard: cut off"], ["damaged shard: no end mark: it was cut off or not closed"])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty file"),
        (b"no tar at all" * 100, "bad header"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed with gzip: unpack it to a plain .tar"),
        (shard(range(1)) + b"garbage" * 100, "bad header"),
    ],
)
def test_a_file_that_is_no_tar_is_one_problem(list_shard: ListShard, data: bytes, problem: str) -> None:
    assert list_shard(data)[1] == [f"damaged shard: {problem}"]


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40), 2**40, 2**62, 2**80])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_lies_about_its_size_costs_itself_only(list_shard: ListShard, size: int, kind: bytes) -> None:
    names, problems = list_shard(shard(range(2))[: 6 * BLOCK] + raw_header("liar.png", size, kind) + shard(range(2, 5)))
    assert names == [f"{number}.png" for number in range(5)]
    assert len(problems) == 1
    assert problems[0].startswith("damaged shard: ")


@pytest.mark.parametrize("size", ["-1024", "9" * 30, "9" * 5000, "x"])
def test_an_extended_header_that_lies_costs_its_member_only(list_shard: ListShard, size: str) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.png", b"a" * 700)
        add(tar, "liar.png", b"b" * 700, pax_headers={"size": size})
        add(tar, "c.png", b"c" * 700)
    names, problems = list_shard(sink.getvalue())
    assert names == ["a.png", "c.png"]
    assert len(problems) == 1


def test_links_in_a_shard_are_images_and_a_link_without_a_target_is_a_problem(list_shard: ListShard) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        add(tar, "blobs/1", b"one")
        add(tar, "x/a.png", b"two")
        add(tar, "x/hard.png", type=tarfile.LNKTYPE, linkname="blobs/1")
        add(tar, "x/soft.png", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "x/gone.png", type=tarfile.SYMTYPE, linkname="../../nothing.png")
        add(tar, "x/self.png", type=tarfile.SYMTYPE, linkname="self.png")
    names, problems = list_shard(sink.getvalue())
    assert names == ["a.png", "hard.png", "soft.png"]
    assert problems == ["missing: a link to a file that is not in the shard"] * 2


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_name_that_is_not_utf8_is_percent_encoded(list_shard: ListShard, kind: int) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind, encoding="latin-1") as tar:
        member = tarfile.TarInfo("café.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    expected = "café.png" if kind == tarfile.PAX_FORMAT else "caf%E9.png"
    assert list_shard(sink.getvalue()) == ([expected], [])


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(list_shard: ListShard, kind: int) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        add(tar, "long" * 60 + ".png", b"x")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="long" * 60 + ".png")
    assert list_shard(sink.getvalue()) == (["long" * 60 + ".png", "hard.png"], [])


def test_a_shard_that_cannot_be_opened_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    problems = [
        entry.problem
        for name in ("gone.tar", "folder.tar")
        for entry in members(File(f"{tmp_path}/{name}", None, None, True), ImagesConfig(), Counter())
    ]
    assert problems[0] == "damaged shard: missing"
    assert str(problems[1]).startswith("damaged shard: unreadable: ")


def test_what_a_shard_holds_besides_images_and_labels_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.png", "a.cls", "a.json", "b.HEIC", "c"):
            add(tar, name, b"x")
    skipped: Counter[str] = Counter()
    assert len(list(members(File(f"{tmp_path}/0.tar", None, None, True), ImagesConfig(), skipped))) == 1
    assert skipped == {".json": 1, ".heic": 1, "no ending": 1}


def test_a_label_of_absurd_size_is_not_read(list_shard: ListShard, tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for key, size in (("a", 65_536), ("b", 65_537)):
            add(tar, f"{key}.png", b"x")
            add(tar, f"{key}.cls", b"7" * size)
    list_shard(sink.getvalue())
    uris = [f"{tmp_path}/0.tar#512+1/{key}.png" for key in "ab"]
    assert [label and len(label) for label in labels_beside(uris)] == [65_536, None]


class CountingFile:
    """A remote file that counts what is asked of it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.num_requests, self.num_bytes = data, 0, 0

    def read_at(self, num_bytes: int, start: int) -> bytes:
        data = self.data[start : start + num_bytes]
        self.num_requests, self.num_bytes = self.num_requests + 1, self.num_bytes + len(data)
        return data


@pytest.mark.parametrize(("size", "max_requests"), [(700, 2), (40_000, 3), (2_000_000, 11)])
def test_headers_on_remote_storage_are_read_in_few_requests(size: int, max_requests: int) -> None:
    """Small members in windows of 4 MiB, large ones header by header."""
    rng = np.random.default_rng(size)
    data = shard(range(10), size=size)
    for _ in range(3):  # flipped bits, which make the walk search block by block
        expected = list(tar_shards.walk(io.BytesIO(data), len(data)))
        file = CountingFile(data)
        assert list(tar_shards.walk(tar_shards.RemoteHeaders(file), len(data))) == expected
        if data == shard(range(10), size=size):
            assert file.num_requests <= max_requests
            assert file.num_bytes <= min(len(data) + 512, 5_000_000)
        damaged = bytearray(data)
        damaged[int(rng.integers(10)) * (512 + -(-size // 512) * 512) + 100] ^= 255
        data = bytes(damaged)


def test_links_to_links_and_names_that_look_like_places_are_read(list_shard: ListShard) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        add(tar, "second.png", type=tarfile.SYMTYPE, linkname="first.png")
        add(tar, "first.png", type=tarfile.LNKTYPE, linkname="x.tar#0+5/real.png")
        add(tar, "loop.png", type=tarfile.SYMTYPE, linkname="loop.png")
        add(tar, "x.tar#0+5/real.png", b"r" * 700)
    names, problems = list_shard(sink.getvalue())
    assert sorted(names) == ["first.png", "real.png", "second.png"]
    assert problems == ["missing: a link to a file that is not in the shard"]
