from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.images import image_files, list_images
from icce_ray.images.listing import SCHEMA, Listing, has_ids_of
from icce_ray.images.read_images import read_image
from icce_ray.pipeline import run as pipeline
from icce_ray.pipeline.plan import plan
from icce_ray.runtime.progress import Progress
from icce_ray.store import Artifact, ArtifactWriter, Folder

Listed = Callable[[Config], pa.Table]


def config_for(uri: Path | str, **images: Any) -> Config:
    return Config(output="unused", num_clusters=2, images={"uri": str(uri)} | images)


def source_digest(config: Config) -> str:
    return list_images.source_digest(config)


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_a_folder_is_searched_recursively_for_the_known_endings_in_any_case(listed: Listed, tmp_path: Path) -> None:
    wanted = [
        "i.jfif",
        "j.JPE",
        "k.avif",
        "l.jp2",
        "m.pgm",
        "b.JPG",
        "a.jpeg",
        "x/c.PNG",
        "x/y/d.webp",
        "e.bmp",
        "f.gif",
        "g.tif",
        "h.Tiff",
    ]
    write_files(tmp_path, *wanted, "notes.txt", "x/table.csv", "no_ending", ".hidden.jpg", ".cache/z.jpg", "x/._a.jpg")
    assert listed(config_for(tmp_path))["uri"].to_pylist() == sorted(str(tmp_path / name) for name in wanted)


def test_what_is_not_taken_is_counted_and_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "photos", "a.png", "b.heic", "c.HEIC", "d.tar.gz", "e.nef", "f.csv", "LICENSE", ".x.png")
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    skipped = run_stage(local(tmp_path)).metrics["skipped"]
    assert skipped == {".heic": 2, ".tar.gz": 1, ".nef": 1, ".csv": 1, "no ending": 1, "hidden": 1}
    (line,) = [text for text in said if text.startswith("not taken: ")]
    assert line.startswith("not taken: 2 x .heic (HEIC: not supported; convert to JPEG or PNG")
    assert "1 x .tar.gz (unpack it, or repack it as a plain .tar)" in line
    assert "1 x .nef (RAW: not supported; convert" in line


def test_ids_follow_the_sorted_uris_and_sizes_and_times_are_kept(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "b.png", "a.png", "B.png", "ä.png", "a/z.png")
    table = listed(config_for(tmp_path))
    assert table.schema.equals(SCHEMA)
    assert table["image_id"].to_pylist() == list(range(5))
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    for row in table.to_pylist():
        status = os.stat(row["uri"])
        assert (row["size_bytes"], row["etag"]) == (status.st_size, str(status.st_mtime_ns))


def test_a_file_name_that_is_not_utf8_is_listed_and_can_be_read(listed: Listed, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"coffee")
    write_files(tmp_path, "a.png")
    encoded = listed(config_for(tmp_path))["uri"].to_pylist()[1]
    assert encoded.startswith("file://")
    assert encoded.endswith("caf%E9.png")
    assert read_image(encoded) == b"coffee"


def test_a_text_list_skips_comments_resolves_relative_paths_and_drops_repeats(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "x/a.png", "b.unusual_ending")
    lines = [
        "# mine",
        "",
        "  x/a.png  ",
        "b.unusual_ending",
        f"{tmp_path}/x/a.png",
        "./x/../x/a.png",
        "s3://bucket/c.png",
        "gone.png",
    ]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    table = listed(config_for(tmp_path / "list.txt"))
    expected = {str(tmp_path / "b.unusual_ending"): 16, str(tmp_path / "gone.png"): None, str(tmp_path / "x/a.png"): 7}
    expected["s3://bucket/c.png"] = None
    assert dict(zip(table["uri"].to_pylist(), table["size_bytes"].to_pylist(), strict=True)) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_list_is_read_from_the_named_column(listed: Listed, tmp_path: Path, kind: pa.DataType) -> None:
    write_files(tmp_path, "a.png", "b.png")
    table = pa.table({"path": pa.array(["b.png", "a.png", "b.png"]).cast(kind), "label": [1, 2, 1]})
    pq.write_table(table, tmp_path / "list.parquet")
    config = config_for(tmp_path / "list.parquet", uri_column="path")
    assert listed(config)["uri"].to_pylist() == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_a_folder_of_parquet_files_is_one_list(listed: Listed, tmp_path: Path) -> None:
    (tmp_path / "list.parquet").mkdir()
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "list.parquet" / "1.parquet")
    pq.write_table(pa.table({"uri": ["/b.png"]}), tmp_path / "list.parquet" / "2.parquet")
    assert listed(config_for(tmp_path / "list.parquet"))["uri"].to_pylist() == ["/a.png", "/b.png"]


def test_a_damaged_file_among_several_lists_is_a_row(listed: Listed, tmp_path: Path) -> None:
    (tmp_path / "list.parquet").mkdir()
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "list.parquet" / "1.parquet")
    (tmp_path / "list.parquet" / "2.parquet").write_bytes(b"PAR1 no PAR1")
    damaged, good = listed(config_for(tmp_path / "list.parquet")).to_pylist()[::-1]
    assert (good["uri"], damaged["uri"]) == ("/a.png", f"{tmp_path}/list.parquet/2.parquet")
    assert damaged["problem"].startswith("damaged Parquet file: ")


def test_a_remote_folder_is_listed_under_its_own_uri(
    listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "bucket/b.png", "bucket/x/a.png", "bucket/.x/h.png", "bucket/n.md")
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(image_files, "open_uri", lambda uri: (remote, "bucket"))
    assert listed(config_for("gs://bucket/"))["uri"].to_pylist() == ["gs://bucket/b.png", "gs://bucket/x/a.png"]


MESSAGES = {
    "nothing there": ("photoz", ["does not exist", "did you mean", "photos"]),
    "empty folder": ("empty", ["holds no files", "jpg, jpeg, jpe, jfif, png"]),
    "no images": ("docs", ["no images", "jpg, jpeg, jpe, jfif, png", "2 x .md", "1 x no ending"]),
    "a pattern": ("photos/*.png", ["patterns are not expanded: name the folder"]),
    "an archive": ("photos.zip", [".zip file: unpack it, or repack it as a plain .tar"]),
    "one image": ("photos/a.png", ["is one file", ".txt or .parquet"]),
    "empty list": ("empty.txt", ["names no images"]),
    "binary list": ("binary.txt", ["cannot be read as text"]),
    "no such column": ("list.parquet", ["no column 'uri'", "it has url, size", "did you mean 'url'"]),
    "broken parquet": ("broken.parquet", ["damaged Parquet file"]),
    "two columns of a name": ("twice.parquet", ["has 2 columns 'uri'; rename or remove all but one"]),
    "wrong type": ("numbers.parquet", ["is int64, not text"]),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_an_input_that_cannot_work_is_refused_with_what_is_wrong(listed: Listed, tmp_path: Path, case: str) -> None:
    write_files(tmp_path, "photos/a.png", "docs/a.md", "docs/x/b.md", "docs/LICENSE")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    pq.write_table(pa.table({"url": ["a", "b"], "size": [1, 2]}), tmp_path / "list.parquet")
    pq.write_table(pa.table({"uri": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table([["a"], ["b"]], names=["uri", "uri"]), tmp_path / "twice.parquet")
    name, words = MESSAGES[case]
    for look in (listed, source_digest):
        with pytest.raises(InputError) as caught:
            look(config_for(tmp_path / name))
        for word in words:
            assert word in str(caught.value)


def test_a_bad_entry_of_a_list_costs_itself_only(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "l.txt")
    latin, long = b"caf\xe9.png", b"x" * 5000
    (tmp_path / os.fsdecode(latin)).write_bytes(b"content")
    (tmp_path / "l.txt").write_bytes(b"\n".join([b"a.png", latin, long, b"gs://b/" + latin]))
    raw = pa.array([b"a.png", latin, long, None, b" "])
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())  # no check for UTF-8
    pq.write_table(pa.table({"uri": text}), tmp_path / "l.parquet")
    for name, num_bad in (("l.txt", 2), ("l.parquet", 3)):
        rows = listed(config_for(tmp_path / name)).to_pylist()
        good = [row["uri"] for row in rows if row["problem"] is None]
        assert good == [str(tmp_path / "a.png"), f"file://{tmp_path}/caf%E9.png"]
        assert len(rows) - len(good) == num_bad
        assert all(len(row["uri"]) < 1000 for row in rows)


def test_containers_with_names_in_latin_1_are_opened(listed: Listed, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"content"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / os.fsdecode(b"caf\xe9.parquet"))
    with tarfile.open(tmp_path / os.fsdecode(b"caf\xe9.tar"), "w") as tar:
        (tmp_path / "x").write_bytes(b"content")
        tar.add(tmp_path / "x", "x.png")
    uris = listed(config_for(tmp_path))["uri"].to_pylist()
    assert [read_image(uri) for uri in uris] == [b"content", b"content"]


def test_a_list_in_utf_16_is_read(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "ü.png")
    (tmp_path / "l.txt").write_bytes("ü.png\r\n".encode("utf-16"))
    assert listed(config_for(tmp_path / "l.txt"))["uri"].to_pylist() == [str(tmp_path / "ü.png")]


@pytest.mark.parametrize("column", ["other", "image"])
def test_a_parquet_file_of_another_kind_among_others_is_a_row(listed: Listed, tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({column: [1, 2]}), tmp_path / "b.parquet")
    rows = listed(config_for(tmp_path)).to_pylist()
    assert [row["problem"] is None for row in rows] == [True, True, False]
    assert rows[2]["problem"].startswith("not usable: ")


def test_names_that_read_like_places_in_containers_are_read_as_files(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "s.tar#0+5/a.png", "q.parquet#3/b.png")
    pq.write_table(pa.table({"c.tar#0+5/d": [b"content"]}), tmp_path / "c.parquet")
    (tmp_path / "l.txt").write_text("s.tar#0+5/a.png\n", encoding="utf-8")
    names = [b"content", b"q.parquet#3/b.png", b"s.tar#0+5/a.png"]
    for place, contents in ((tmp_path, names), (tmp_path / "l.txt", names[2:])):
        uris = listed(config_for(place))["uri"].to_pylist()
        assert sorted(map(read_image, uris)) == contents


def test_the_digest_changes_when_an_image_is_added_removed_or_changed_and_only_then(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.png", "c.png")
    config = config_for(tmp_path)
    digests = [source_digest(config)]
    assert source_digest(config) == digests[0]
    write_files(tmp_path, "notes.txt")
    assert source_digest(config) == digests[0]
    write_files(tmp_path, "d.png")
    digests.append(source_digest(config))
    (tmp_path / "a.png").write_bytes(b"longer than before")
    digests.append(source_digest(config))
    os.utime(tmp_path / "b.png", ns=(1, 1))
    digests.append(source_digest(config))
    (tmp_path / "c.png").unlink()
    digests.append(source_digest(config))
    assert len(set(digests)) == 5


def test_a_plan_of_the_last_listing_does_not_look_at_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "photos", "a.png")
    config = config_for(tmp_path / "photos").model_copy(update={"output": str(tmp_path / "clusters")})
    looks: list[Config] = []
    monkeypatch.setattr(list_images, "list_files", looks.append)
    assert plan(config, lists=False)[0].name == "images"
    assert looks == []


def test_ready_made_embeddings_are_listed_by_file_and_row_in_their_order(listed: Listed, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((12, 3), np.float32))
    config = Config(output="unused", num_clusters=2, embeddings={"uri": str(tmp_path / "e.npy")})
    table = listed(config)
    assert table.schema.equals(SCHEMA)
    assert table["uri"].to_pylist() == [f"{tmp_path}/e.npy#{row}" for row in range(12)]
    assert table["size_bytes"].null_count == 12
    before = source_digest(config)
    np.save(tmp_path / "e.npy", np.ones((13, 3), np.float32))
    assert source_digest(config) != before


def test_the_metrics_count_the_images_and_their_bytes(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "a.png", "b.png")
    metrics = run_stage(local(tmp_path)).metrics
    assert (metrics["num_images"], metrics["num_removed"], metrics["size_bytes"]) == (2, 0, 10)


def run_stage(config: Config) -> Artifact:
    step = pipeline.plan(config)[0]
    return step.artifact or pipeline.run_stage(config, step, {}, True)


def names(config: Config) -> list[str]:
    listing = Listing(run_stage(config))
    return [Path(uri).name for uri in listing.table(0, len(listing))["uri"].to_pylist()]


def local(tmp_path: Path) -> Config:
    return Config(output=str(tmp_path / "out"), num_clusters=2, images={"uri": str(tmp_path / "photos")})


def test_a_refresh_keeps_ids_adds_what_is_new_and_marks_what_is_gone(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "b.png", "d.png", "f.png")
    config = local(tmp_path)
    pipeline.refresh_listing(config, True)  # there is no listing yet: the run makes the first
    assert names(config) == ["b.png", "d.png", "f.png"]
    write_files(tmp_path / "photos", "e.png", "a.png")
    (tmp_path / "photos" / "d.png").unlink()
    (tmp_path / "photos" / "f.png").write_bytes(b"another picture")
    pipeline.refresh_listing(config, True)
    assert names(config) == ["b.png", "d.png", "f.png", "a.png", "e.png"]
    refreshed = run_stage(config)
    assert refreshed.metrics["num_removed"] == 1
    rows = Listing(refreshed).rows(0, 5)
    assert [row.image_id for row in rows] == list(range(5))
    assert [row.problem for row in rows] == [None, "removed", None, None, None]
    assert rows[2].size_bytes == len(b"another picture")
    # Nothing has changed: the listing stays.
    pipeline.refresh_listing(config, True)
    assert run_stage(config).fingerprint == refreshed.fingerprint
    # A removed image that comes back has its id again.
    write_files(tmp_path / "photos", "d.png", "c.png")
    pipeline.refresh_listing(config, True)
    assert names(config) == ["b.png", "d.png", "f.png", "a.png", "e.png", "c.png"]
    assert run_stage(config).metrics["num_removed"] == 0


def test_the_last_of_many_listings_is_known_without_a_clock(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "9.png")
    expected = names(local(tmp_path))
    for number in "876543":
        write_files(tmp_path / "photos", f"{number}.png")
        pipeline.refresh_listing(local(tmp_path), True)
        expected.append(f"{number}.png")
        assert names(local(tmp_path)) == expected
    assert run_stage(local(tmp_path)).metrics["generation"] == 7


def test_a_refresh_keeps_the_ids_of_the_images_in_a_shard_that_did_not_change(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for shard in ("a", "b"):
        with tarfile.open(tmp_path / "photos" / f"{shard}.tar", "w") as tar:
            for number in (1, 2):
                tar.addfile(tarfile.TarInfo(f"{shard}{number}.png"))
    config = local(tmp_path)
    assert names(config) == ["a1.png", "a2.png", "b1.png", "b2.png"]
    with tarfile.open(tmp_path / "photos" / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("a3.png"))
    pipeline.refresh_listing(config, True)
    assert names(config) == ["a1.png", "a2.png", "b1.png", "b2.png", "a1.png", "a2.png", "a3.png"]
    problems = Listing(run_stage(config)).table(0, 10)["problem"].to_pylist()
    assert problems == ["removed"] * 2 + [None] * 5


def test_without_refresh_a_local_change_numbers_all_images_anew(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "b.png", "c.png")
    assert names(local(tmp_path)) == ["b.png", "c.png"]
    write_files(tmp_path / "photos", "a.png")
    assert names(local(tmp_path)) == ["a.png", "b.png", "c.png"]


def test_a_listing_is_cut_into_parts_and_read_across_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_images, "PART_ROWS", 4)
    write_files(tmp_path / "photos", *(f"{number:02d}.png" for number in range(12)))
    artifact = run_stage(local(tmp_path))
    assert artifact.part_names() == [f"images-{index:05d}.parquet" for index in range(3)]
    listing = Listing(artifact)
    assert len(listing) == 12
    rows = listing.rows(2, 10)
    assert [row.image_id for row in rows] == list(range(2, 10))
    assert [Path(row.uri).stem for row in rows] == [f"{number:02d}" for number in range(2, 10)]
    assert Path(listing.uri(8)).stem == "08"
    assert listing.rows(12, 20) == []


def test_ids_mean_the_same_images_in_a_listing_and_in_those_that_continue_it(tmp_path: Path) -> None:
    def listing(name: str, *continues: str) -> Artifact:
        return ArtifactWriter(Folder.at(tmp_path / name)).commit(
            stage="images", fingerprint=name, inputs={}, config={}, metrics={"continues": list(continues)}, seconds=0.0
        )

    first, second, third = listing("first"), listing("second", "first"), listing("third", "first", "second")
    assert [has_ids_of(third, earlier) for earlier in (first, second, third)] == [True, True, True]
    assert [has_ids_of(later, listing("other")) for later in (first, second, third)] == [False, False, False]
    assert not has_ids_of(first, second)
