from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.embed.decode_and_embed import (
    DecodedPart,
    assemble_part,
    decode_part,
    decoded_from_table,
    decoded_to_table,
    embed_contents,
)
from icce_ray.embed.embedding_parts import (
    PartRange,
    images_per_item,
    items_per_part,
    part_table,
    plan_parts,
    read_part,
    write_part,
)
from icce_ray.embed.feature_matrix import joined_columns, table_to_arrays
from icce_ray.embed.finished_parts import DUPLICATES_NAME, ERRORS_NAME, Tally
from icce_ray.embed.networks import SeveralBackbones, build_backbone
from icce_ray.errors import DamagedArtifactError, InputError
from icce_ray.images.preprocessing import Preprocessing, SeveralViews
from icce_ray.images.read_images import ListedImage
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

PREPROCESSING = Preprocessing(size=4, scale_size=4)


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


class MeanBackbone:
    """One feature: the mean of the pixels, times `factor`."""

    batch_size = 64

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.batches: list[int] = []

    def load(self, images_BHWC: np.ndarray) -> np.ndarray:
        return images_BHWC

    def embed(self, images_BHWC: np.ndarray) -> np.ndarray:
        self.batches.append(len(images_BHWC))
        with np.errstate(over="ignore"):
            return (images_BHWC.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] * self.factor).astype(np.float16)


def context_at(folder: Path) -> StageContext:
    return StageContext(ArtifactWriter(Folder.at(folder)), {}, Progress("embed", quiet=True))


def listed(uris: list[str], start: int = 0) -> list[ListedImage]:
    return [ListedImage(start + number, uri, None, None) for number, uri in enumerate(uris)]


def embed_part(
    decoded: DecodedPart, backbone: MeanBackbone, batch_size: int, dims: tuple[int, ...] = (1,)
) -> tuple[pa.Table, list[tuple[int, str]]]:
    """The table and the errors of a part, with nothing known before."""
    outcomes = embed_contents(decoded, sorted(set(decoded.hashes)), backbone.embed, batch_size)
    return assemble_part(decoded, outcomes, dims)


def records_at(folder: Path) -> PartRecords:
    return PartRecords(Folder.at(folder), "source")


class Names:
    """As much of a listing as the tally asks for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def uri(self, image_id: int) -> str:
        return f"{image_id}.png"

    def table(self, start: int, stop: int) -> pa.Table:
        return pa.table({"uri": [self.uri(image_id) for image_id in range(start, stop)]})


def write_images(folder: Path, count: int, bad: tuple[int, ...] = ()) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:03d}.png"
        Image.new("RGB", (4, 4), (number, number, number)).save(path)
        if number in bad:
            path.write_bytes(b"text")
        paths.append(str(path))
    return paths


@pytest.mark.parametrize(("num_images", "size"), [(1, 1), (10, 3), (9, 3), (5, 100)])
def test_parts_cover_each_image_once(num_images: int, size: int) -> None:
    parts = plan_parts(num_images, size)
    assert [image for part in parts for image in range(part.start, part.stop)] == list(range(num_images))
    assert [part.index for part in parts] == list(range(len(parts)))


def test_parts_of_large_images_are_smaller() -> None:
    assert images_per_item(10**6, Preprocessing(224, 224)) == 512
    assert images_per_item(10**6, Preprocessing(1024, 1024)) == 42  # 3 MiB each, 128 MiB together
    assert images_per_item(10**6, SeveralViews((Preprocessing(1024, 1024), Preprocessing(512, 512)))) == 34
    assert images_per_item(10**6, Preprocessing(20_000, 20_000)) == 1


@pytest.mark.parametrize(("num_images", "size"), [(1, 16), (200, 16), (300, 32), (1_797, 128), (8_192, 512)])
def test_small_collections_have_several_parts_and_a_few_more_images_do_not_change_them(
    num_images: int, size: int
) -> None:
    assert images_per_item(num_images, PREPROCESSING) == images_per_item(num_images + 50, PREPROCESSING) == size


def test_only_large_collections_have_parts_of_several_items_and_none_has_too_many_rows() -> None:
    assert [items_per_part(count, 512, 768) for count in (40, 100_000, 131_072, 1_000_000, 10**7, 10**9)] == [
        *(1, 1, 2, 8, 64, 64)
    ]
    assert items_per_part(10**9, 512, 384) == 128
    assert items_per_part(10**9, 42, 1024) * 42 <= 32_768


def test_a_part_holds_its_good_images_and_says_why_the_others_failed(tmp_path: Path) -> None:
    uris = write_images(tmp_path / "images", 10, bad=(6,))
    uris[8] = str(tmp_path / "gone.png")
    part = PartRange(1, 5, 10)
    decoded = decode_part(part, listed(uris[5:], 5), PREPROCESSING, max_pixels=100)
    backbone = MeanBackbone()
    finished = write_part(records_at(tmp_path / "out"), part, *embed_part(decoded, backbone, batch_size=2))
    assert backbone.batches == [2, 2]  # filled up: all have one shape
    (file,) = finished.files
    assert (file.name, file.rows, file.shape, file.dtype) == ("part-00001.parquet", 3, (3, 1), "float16")
    errors = [(6, "not an image"), (8, "missing")]
    assert finished.metrics == {"start": 5, "num_images": 5, "errors": errors, "num_embedded": 0}
    stored = pq.read_table(tmp_path / "out" / "part-00001.parquet").to_pylist()
    assert [row["image_id"] for row in stored] == [5, 7, 9]
    assert [row["embedding"] for row in stored] == [[5.0], [7.0], [9.0]]
    files = [Path(uris[row["image_id"]]).read_bytes() for row in stored]
    assert [row["content_hash"] for row in stored] == [hashlib.sha256(data).hexdigest() for data in files]


def test_a_decoded_part_travels_as_one_row_without_a_change(tmp_path: Path) -> None:
    uris = write_images(tmp_path / "images", 4, bad=(2,))
    part = PartRange(3, 12, 16)
    decoded = decode_part(part, listed(uris, 12), PREPROCESSING, max_pixels=100)
    table = decoded_to_table(part, decoded)
    assert table.num_rows == 1
    same_part, same = decoded_from_table(table)
    assert same_part == part
    assert np.array_equal(same.pixels, decoded.pixels)
    assert same.image_ids.tolist() == decoded.image_ids.tolist() == [12, 13, 15]
    assert (same.hashes, same.errors) == (decoded.hashes, decoded.errors)
    assert same.rows.tolist() == [0, 1, 2]


def test_features_that_are_no_float16_numbers_are_errors_not_infinities() -> None:
    pixels = np.full((3, 4, 4, 3), 200, np.uint8)
    pixels[1] = 1
    decoded = DecodedPart(np.arange(3), np.arange(3, dtype=np.int32), pixels, ["a", "b", "c"], [])
    for factor, reason in ((1000.0, "feature overflow"), (np.nan, "feature not a number")):
        backbone = MeanBackbone(factor)
        table, errors = embed_part(decoded, backbone, 8)
        good = [1] if np.isfinite(factor) else []
        assert table["image_id"].to_pylist() == good
        assert table["content_hash"].to_pylist() == ["b"] * len(good)
        assert errors == [(image_id, reason) for image_id in range(3) if image_id not in good]


def test_each_feature_set_has_its_column_and_an_image_that_fails_in_one_is_in_none(tmp_path: Path) -> None:
    views = [PREPROCESSING, Preprocessing(2, 2), PREPROCESSING]
    backbone = SeveralBackbones([MeanBackbone(), MeanBackbone(2.0), MeanBackbone(10_000.0)], views)
    uris = write_images(tmp_path / "images", 12, bad=(3,))
    part = PartRange(0, 0, 12)
    decoded = decode_part(part, listed(uris), SeveralViews((PREPROCESSING, Preprocessing(2, 2))), max_pixels=100)
    assert decoded.pixels.shape == (11, 4 * 4 * 3 + 2 * 2 * 3)
    table, errors = embed_part(decoded, backbone, 4, (1, 1, 1))
    write_part(records_at(tmp_path / "out"), part, table, errors)
    stored = pq.read_table(tmp_path / "out" / part.file_name)
    assert stored.schema.names == ["image_id", "embedding", "embedding_1", "embedding_2", "content_hash"]
    assert {str(stored.schema.field(name).type) for name in stored.schema.names[1:4]} == {
        "fixed_size_list<element: halffloat>[1]"
    }
    good = [0, 1, 2, 4, 5, 6]
    assert stored["image_id"].to_pylist() == good
    for feature_set, factor in enumerate((1.0, 2.0, 10_000.0)):
        ids, rows = table_to_arrays(stored, feature_set)
        assert ids.tolist() == good
        assert rows[:, 0].tolist() == [np.float16(factor * number) for number in good]
    assert joined_columns(stored).shape == (6, 3)
    assert errors == [(3, "not an image")] + [(number, "feature overflow") for number in range(7, 12)]


def test_one_feature_set_is_written_the_same_whether_its_width_is_named_or_not() -> None:
    rows = np.arange(12, dtype=np.float16).reshape(4, 3)
    table = part_table(np.array([0, 1, 2, 4]), rows)
    assert table.schema.names == ["image_id", "embedding", "content_hash"]
    named = part_table(np.array([0, 1, 2, 4]), rows, None, (3,))
    assert table.equals(named, check_metadata=True)


def test_a_part_without_a_good_image_still_has_its_width(tmp_path: Path) -> None:
    part = PartRange(0, 0, 2)
    decoded = decode_part(part, listed(write_images(tmp_path / "images", 2, bad=(0, 1))), PREPROCESSING, max_pixels=100)
    table, errors = embed_part(decoded, MeanBackbone(), 8)
    assert write_part(records_at(tmp_path / "out"), part, table).files[0].shape == (0, 1)
    assert errors == [(0, "not an image"), (1, "not an image")]


def test_a_part_has_the_same_bytes_every_time_and_is_found_again(tmp_path: Path) -> None:
    part = PartRange(0, 0, 6)
    uris = write_images(tmp_path / "images", 6, bad=(1,))
    finished = []
    for name in ("a", "b"):
        decoded = decode_part(part, listed(uris), PREPROCESSING, max_pixels=100)
        finished.append(write_part(records_at(tmp_path / name), part, *embed_part(decoded, MeanBackbone(), 4)))
    assert finished[0] == finished[1]
    assert (tmp_path / "a" / part.file_name).read_bytes() == (tmp_path / "b" / part.file_name).read_bytes()
    found = records_at(tmp_path / "a").read(part.name)
    assert found is not None
    assert found.files == finished[0].files


def test_damage_to_a_part_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    folder, part = Folder.at(tmp_path), PartRange(0, 0, 40)
    table = part_table(np.arange(40), np.random.default_rng(0).standard_normal((40, 8)).astype(np.float16))
    write_part(records_at(tmp_path), part, table)
    path = tmp_path / part.file_name
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    assert read_part(folder, part.file_name).equals(table)
    refused = 0
    for position in range(4, footer, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert read_part(folder, part.file_name).equals(table), position  # a bit that is not used
        except DamagedArtifactError:
            refused += 1
    assert refused > 0.9 * len(range(4, footer, 7))
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedArtifactError, match=r"part-00000\.parquet: missing or damaged"):
        read_part(folder, part.file_name)


def record_of(part: PartRange, folder: Path, bad: dict[int, str]) -> Any:
    good = np.setdiff1d(np.arange(part.start, part.stop), list(bad))
    hashes = pa.array([f"{image_id % 7:064x}" for image_id in good], pa.string())
    table = part_table(good, np.ones((len(good), 2), np.float16), hashes)
    return write_part(records_at(folder), part, table, sorted(bad.items()))


def test_the_tally_takes_up_finished_parts_and_sums_up_in_any_order(tmp_path: Path) -> None:
    parts = plan_parts(10, 4)
    bad = {1: "truncated", 5: "missing", 9: "truncated"}
    record_of(parts[1], tmp_path, {5: "missing"})
    context = context_at(tmp_path)
    tally = Tally(context, Names(10), max_error_rate=0.3)
    assert tally.resume(parts, records_at(tmp_path)) == ([parts[0], parts[2]], {})
    tally.add(record_of(parts[2], tmp_path, {9: "truncated"}))
    tally.add(record_of(parts[0], tmp_path, {1: "truncated"}))
    metrics = tally.finish("pixels")
    assert metrics.pop("images_per_s") > 0
    assert metrics == {
        "num_images": 7,
        "num_errors": 3,
        "errors": {"truncated": 2, "missing": 1},
        "num_duplicates": 1,
        "num_embedded": 0,
        "num_stretched": 0,
        "dim": 2,
        "dtype": "float16",
        "feature_set": "pixels",
    }
    assert sorted(context.output.parts) == [DUPLICATES_NAME, ERRORS_NAME, *(part.file_name for part in parts)]
    duplicates = pq.read_table(tmp_path / DUPLICATES_NAME).to_pylist()
    assert [(row["image_id"], row["uri"], row["duplicate_of"]) for row in duplicates] == [(7, "7.png", 0)]
    assert [row["content_hash"] for row in duplicates] == [f"{0:064x}"]
    errors = pq.read_table(tmp_path / ERRORS_NAME).to_pylist()
    assert errors == [{"image_id": i, "uri": f"{i}.png", "reason": reason} for i, reason in bad.items()]


def test_an_errors_table_without_errors_has_its_columns(tmp_path: Path) -> None:
    tally = Tally(context_at(tmp_path), Names(2), max_error_rate=0.0)
    tally.add(record_of(PartRange(0, 0, 2), tmp_path, {}))
    tally.finish("pixels")
    table = pq.read_table(tmp_path / ERRORS_NAME)
    assert {field.name: str(field.type) for field in table.schema} == {
        "image_id": "int64",
        "uri": "string",
        "reason": "string",
    }


def test_too_many_errors_stop_the_stage_with_what_it_saw(tmp_path: Path) -> None:
    tally = Tally(context_at(tmp_path), Names(20), max_error_rate=0.1)
    tally.add(record_of(PartRange(0, 0, 5), tmp_path, {0: "truncated", 3: "missing"}))
    with pytest.raises(InputError) as caught:
        tally.add(record_of(PartRange(1, 5, 10), tmp_path, {7: "truncated"}))
    assert "3 of 20 images" in str(caught.value)
    assert "embed.max_error_rate (0.1)" in str(caught.value)
    assert "2 x truncated (such as 0.png), 1 x missing (such as 3.png)" in str(caught.value)


def test_a_content_is_decoded_and_embedded_once_in_a_part(tmp_path: Path) -> None:
    uris = write_images(tmp_path / "images", 6)
    for copy, original in ((3, 1), (5, 0)):
        Path(uris[copy]).write_bytes(Path(uris[original]).read_bytes())
    part = PartRange(0, 0, 6)
    known = hashlib.sha256(Path(uris[2]).read_bytes()).hexdigest()
    decoded = decode_part(part, listed(uris), PREPROCESSING, max_pixels=100, known=lambda hashes: {known} & {*hashes})
    assert decoded.rows.tolist() == [0, 1, -1, 1, 2, 0]
    assert len(decoded.pixels) == 3
    backbone = MeanBackbone()
    told: list[int] = []
    new = sorted({*decoded.hashes} - {known})
    outcomes = embed_contents(decoded, new, backbone.embed, batch_size=8, on_batch=told.append)
    assert told == [3]
    table, _ = assemble_part(decoded, outcomes | {known: np.array([77], np.float16)}, (1,))
    assert table["embedding"].to_pylist() == [[0], [1], [77], [1], [4], [0]]
    assert backbone.batches == [8]


def test_an_embedding_does_not_depend_on_what_else_is_embedded_beside_it(tmp_path: Path) -> None:
    """Bit for bit, on a network: else what a cache holds would show in the results."""
    embed = {"backbone": "test_vit", "weights": "random", "image_size": 64}
    config = Config(images={"uri": "x"}, num_clusters=2, output="x", embed=embed)
    backbone = build(config)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    hashes = [f"{number:064x}" for number in range(20)]
    decoded = DecodedPart(np.arange(20), np.arange(20, dtype=np.int32), pixels, hashes, [])
    together = embed_contents(decoded, hashes, backbone.embed, batch_size=8)
    for chosen in ([3], [0, 19], list(range(1, 20, 2))):
        alone = embed_contents(decoded, [hashes[number] for number in chosen], backbone.embed, batch_size=8)
        for number in chosen:
            assert np.array_equal(alone[hashes[number]], together[hashes[number]])


def test_names_of_parts_sort_as_their_numbers_do() -> None:
    numbers = [0, 1, 99_999, 100_000, 100_001, 2_000_000]
    names = [PartRange(number, 0, 1).file_name for number in numbers]
    assert sorted(names) == names
    assert names[0] == "part-00000.parquet"
    assert min(PartRange(3, 0, 1, revision=2).file_name, PartRange(4, 0, 1).file_name) == "part-00003.r2.parquet"
