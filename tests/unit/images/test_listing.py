from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.images import listing, sources
from icce_ray.images.listing import Listing, list_images, source_digest
from icce_ray.images.reading import read_image
from icce_ray.pipeline import run as pipeline
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder


def config_for(uri: Path | str, **sections: Any) -> Config:
    images = {"uri": str(uri)} | sections.pop("images", {})
    return Config(output="unused", num_clusters=sections.pop("num_clusters", 2), images=images, **sections)


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def uris(config: Config) -> list[str]:
    return list_images(config)["uri"].to_pylist()


def test_a_folder_is_searched_recursively_for_the_known_endings_in_any_case(tmp_path: Path) -> None:
    wanted = ["b.JPG", "a.jpeg", "x/c.PNG", "x/y/d.webp", "e.bmp", "f.gif", "g.tif", "h.Tiff"]
    write_files(tmp_path, *wanted, "notes.txt", "x/table.csv", "no_ending", ".hidden.jpg", ".cache/z.jpg", "x/._a.jpg")
    assert uris(config_for(tmp_path)) == sorted(str(tmp_path / name) for name in wanted)


def test_ids_are_dense_in_the_order_of_the_sorted_uris_and_sizes_and_times_are_kept(tmp_path: Path) -> None:
    write_files(tmp_path, "b.png", "a.png", "B.png", "ä.png", "a/z.png")
    table = list_images(config_for(tmp_path))
    assert table.schema.equals(listing.SCHEMA)
    assert table["image_id"].to_pylist() == list(range(5))
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    for row in table.to_pylist():
        status = os.stat(row["uri"])
        assert (row["size_bytes"], row["etag"]) == (status.st_size, str(status.st_mtime_ns))


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "a.png", "x/b.png")
    write_files(tmp_path / "elsewhere", "c.png")
    (tmp_path / "photos" / "x" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "gone.png").symlink_to(tmp_path / "nothing")
    found = [Path(uri).relative_to(tmp_path / "photos").as_posix() for uri in uris(config_for(tmp_path / "photos"))]
    assert found == ["a.png", "gone.png", "more/c.png", "x/b.png"]


def test_a_file_name_that_is_not_utf8_is_listed_and_can_be_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"coffee")
    write_files(tmp_path, "a.png")
    encoded = uris(config_for(tmp_path))[1]
    assert encoded.startswith("file://")
    assert encoded.endswith("caf%E9.png")
    assert read_image(encoded) == b"coffee"


def test_a_text_list_skips_blanks_and_comments_and_resolves_relative_paths_and_drops_repeats(tmp_path: Path) -> None:
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
    table = list_images(config_for(tmp_path / "list.txt"))
    expected = {str(tmp_path / "b.unusual_ending"): 16, str(tmp_path / "gone.png"): None, str(tmp_path / "x/a.png"): 7}
    expected["s3://bucket/c.png"] = None
    assert dict(zip(table["uri"].to_pylist(), table["size_bytes"].to_pylist(), strict=True)) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_list_is_read_from_the_named_column(tmp_path: Path, kind: pa.DataType) -> None:
    write_files(tmp_path, "a.png", "b.png")
    table = pa.table({"path": pa.array(["b.png", "a.png", "b.png"]).cast(kind), "label": [1, 2, 1]})
    pq.write_table(table, tmp_path / "list.parquet")
    config = config_for(tmp_path / "list.parquet", images={"uri_column": "path"})
    assert uris(config) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_a_folder_of_parquet_files_is_one_list(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").mkdir()
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "list.parquet" / "1.parquet")
    pq.write_table(pa.table({"uri": ["/b.png"]}), tmp_path / "list.parquet" / "2.parquet")
    assert uris(config_for(tmp_path / "list.parquet")) == ["/a.png", "/b.png"]


def test_a_remote_folder_is_listed_under_its_own_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "bucket/b.png", "bucket/x/a.png", "bucket/.x/h.png", "bucket/n.md")
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(sources, "open_uri", lambda uri: (remote, "bucket"))
    assert uris(config_for("gs://bucket/")) == ["gs://bucket/b.png", "gs://bucket/x/a.png"]


MESSAGES = {
    "nothing there": ("photoz", ["does not exist", "did you mean", "photos"]),
    "empty folder": ("empty", ["holds no files", "jpg, jpeg, png"]),
    "no images": ("docs", ["no images", "jpg, jpeg, png", "2 x .md", "1 x none"]),
    "one image": ("photos/a.png", ["is one file", ".txt or .parquet"]),
    "too few": ("photos", ["holds 1 images", "num_clusters (2)"]),
    "empty list": ("empty.txt", ["names no images"]),
    "binary list": ("binary.txt", ["cannot be read as UTF-8"]),
    "no such column": ("list.parquet", ["no column 'uri'", "it has url, size", "did you mean 'url'"]),
    "broken parquet": ("broken.parquet", ["cannot be read as Parquet"]),
    "wrong type": ("numbers.parquet", ["is int64, not text"]),
    "nulls": ("nulls.parquet", ["is empty, first row 1"]),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_an_input_that_cannot_work_is_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    write_files(tmp_path, "photos/a.png", "docs/a.md", "docs/x/b.md", "docs/LICENSE")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    pq.write_table(pa.table({"url": ["a", "b"], "size": [1, 2]}), tmp_path / "list.parquet")
    pq.write_table(pa.table({"uri": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"uri": ["a", None]}), tmp_path / "nulls.parquet")
    name, words = MESSAGES[case]
    for look in (list_images, source_digest):
        with pytest.raises(InputError) as caught:
            look(config_for(tmp_path / name))
        for word in words:
            assert word in str(caught.value)


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


def test_ready_made_embeddings_are_listed_by_file_and_row_in_their_order(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((12, 3), np.float32))
    config = Config(output="unused", num_clusters=2, embeddings={"uri": str(tmp_path / "e.npy")})
    table = list_images(config)
    assert table.schema.equals(listing.SCHEMA)
    assert table["uri"].to_pylist() == [f"{tmp_path}/e.npy#{row}" for row in range(12)]
    assert table["size_bytes"].null_count == 12
    before = source_digest(config)
    np.save(tmp_path / "e.npy", np.ones((13, 3), np.float32))
    assert source_digest(config) != before


def test_more_clusters_than_ready_made_embeddings_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((3, 3), np.float32))
    config = Config(output="unused", num_clusters=4, embeddings={"uri": str(tmp_path / "e.npy")})
    with pytest.raises(InputError, match=r"3 images, fewer than num_clusters \(4\)"):
        source_digest(config)


def test_the_stage_writes_the_listing_and_counts_it(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "a.png", "b.png")
    context = StageContext(ArtifactWriter(Folder.at(tmp_path / "out")), {}, Progress("images", quiet=True))
    metrics = listing.run(config_for(tmp_path / "photos"), context)
    assert (metrics["num_images"], metrics["size_bytes"]) == (2, 10)
    assert pq.read_table(tmp_path / "out" / "images-00000.parquet").equals(list_images(config_for(tmp_path / "photos")))


def test_results_inside_the_images_folder_are_no_images(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.png", "clusters/report/x/clusters.png", "clusters-2/c.png")
    config = config_for(tmp_path).model_copy(update={"output": str(tmp_path / "clusters")})
    names = [Path(uri).relative_to(tmp_path).as_posix() for uri in uris(config)]
    assert names == ["a.png", "b.png", "clusters-2/c.png"]


def test_results_in_the_images_folder_itself_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.png")
    with pytest.raises(InputError, match="is the folder of the images; name another"):
        uris(config_for(tmp_path).model_copy(update={"output": f"{tmp_path}/"}))


def make(config: Config) -> Listing:
    step = pipeline.plan(config)[0]
    return Listing(step.artifact or pipeline.run_stage(config, step, {}, True))


def names(listing_: Listing) -> list[str]:
    return [Path(uri).name for uri in listing_.table(0, len(listing_))["uri"].to_pylist()]


def local(tmp_path: Path, **images: Any) -> Config:
    given = {"uri": str(tmp_path / "photos")} | images
    embed = {"backbone": "pixels"}
    return Config(output=str(tmp_path / "out"), num_clusters=2, images=given, embed=embed)


def test_a_refresh_keeps_ids_adds_what_is_new_and_marks_what_is_gone(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "b.png", "d.png", "f.png")
    assert names(make(local(tmp_path))) == ["b.png", "d.png", "f.png"]
    write_files(tmp_path / "photos", "e.png", "a.png")
    (tmp_path / "photos" / "d.png").unlink()
    (tmp_path / "photos" / "f.png").write_bytes(b"another picture")
    refreshed = make(local(tmp_path, refresh=True))
    assert names(refreshed) == ["b.png", "d.png", "f.png", "a.png", "e.png"]
    rows = refreshed.rows(0, 5)
    assert [row.image_id for row in rows] == list(range(5))
    assert (rows[1].etag, rows[1].size_bytes) == ("removed", None)
    assert rows[2].size_bytes == len(b"another picture")
    # Nothing new: the same listing, with and without the setting.
    fingerprints = {pipeline.plan(local(tmp_path, refresh=refresh))[0].fingerprint for refresh in (True, False)}
    assert len(fingerprints) == 1
    # And a removed image that comes back has its id again.
    write_files(tmp_path / "photos", "d.png", "c.png")
    assert names(make(local(tmp_path, refresh=True))) == ["b.png", "d.png", "f.png", "a.png", "e.png", "c.png"]


def test_without_refresh_a_local_change_numbers_all_images_anew(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "b.png", "c.png")
    make(local(tmp_path))
    write_files(tmp_path / "photos", "a.png")
    assert names(make(local(tmp_path))) == ["a.png", "b.png", "c.png"]


def test_a_listing_is_cut_into_shards_and_read_across_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SHARD_ROWS", 4)
    write_files(tmp_path / "photos", *(f"{number:02d}.png" for number in range(11)))
    found = make(local(tmp_path))
    assert len(found) == 11
    assert [Path(row.uri).stem for row in found.rows(2, 10)] == [f"{number:02d}" for number in range(2, 10)]
    assert found.uri(8).endswith("08.png")
    assert found.rows(11, 20) == []
    assert len(list((tmp_path / "out").rglob("images-*.parquet"))) == 3
    write_files(tmp_path / "photos", "11.png")
    assert len(make(local(tmp_path, refresh=True))) == 12
