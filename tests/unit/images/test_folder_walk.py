from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.images import folder_walk, list_images
from icce_ray.images.folder_walk import RESULT_FOLDERS, is_result
from icce_ray.images.forgotten import FORGOTTEN_FOLDER, FORGOTTEN_NAME, add_forgotten, read_forgotten, uri_hash
from icce_ray.images.read_images import read_image
from icce_ray.pipeline.plan import stages_of
from icce_ray.runtime.progress import Progress
from icce_ray.stage import Stage, StageContext
from icce_ray.store import ArtifactWriter, Folder
from icce_ray.store.filesystem import open_uri
from icce_ray.sweeps.trial import SCORES, SPACES

Listed = Callable[[Config], pa.Table]
FINGERPRINT = "0123456789abcdef"


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.fixture
def outcome(listed: Listed) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Lists a folder: the images' paths below it, and the problems by path."""

    def run(folder: Path, uri: Path | None = None, output: str = "unused") -> tuple[list[str], dict[str, str]]:
        rows = listed(Config(output=output, num_clusters=2, images={"uri": str(uri or folder)})).to_pylist()
        names = {row["uri"]: os.path.relpath(row["uri"], folder) for row in rows}
        good = [names[row["uri"]] for row in rows if row["problem"] is None]
        return good, {names[row["uri"]]: row["problem"] for row in rows if row["problem"] is not None}

    return run


Outcome = Callable[..., tuple[list[str], dict[str, str]]]


def test_each_real_file_is_listed_once_whatever_leads_to_it(outcome: Outcome, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_files(photos, "a.png", "x/b.png")
    write_files(tmp_path / "elsewhere", "c.png")
    (photos / "x" / "loop").symlink_to(photos)
    (photos / "0").symlink_to(photos / "x")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(tmp_path / "elsewhere")
    (photos / "0.png").symlink_to(photos / "a.png")
    os.link(photos / "a.png", photos / "z.png")
    assert outcome(photos) == (["a.png", "again/c.png", "x/b.png"], {})


def test_folders_with_links_to_each_other_are_walked_once(outcome: Outcome, tmp_path: Path) -> None:
    for name in "abcdefg":
        write_files(tmp_path, f"{name}/{name}.png")
    for name in "abcdefg":
        for other in "abcdefg":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert outcome(tmp_path) == ([f"{name}/{name}.png" for name in "abcdefg"], {})


def test_the_same_files_in_a_list_and_a_folder_are_listed_once(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "photos/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "list.txt").write_text("link/a.png\nphotos/a.png\n")
    uris = [str(tmp_path / "link"), str(tmp_path / "list.txt")]
    rows = listed(Config(output="unused", num_clusters=2, images={"uri": uris}))
    assert len(rows) == 1


def test_an_entry_that_cannot_be_read_costs_itself_only(outcome: Outcome, tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "x/b.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / "folder").symlink_to("folder")
    (tmp_path / "long.png").symlink_to("y" * 300)
    (tmp_path / "table.csv").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "shard.tar")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png")) if len(str(tmp_path)) < 90 else os.mkfifo(tmp_path / "s.png")
        good, problems = outcome(tmp_path)
    assert good == ["a.png", "x/b.png"]
    assert set(problems) == {"self.png", "gone.png", "folder", "long.png", "pipe.png", "shard.tar", "s.png"}
    assert problems["gone.png"] == "missing"
    assert problems["self.png"] == problems["folder"] == "unreadable: Too many levels of symbolic links"
    assert problems["long.png"] == "unreadable: File name too long"
    assert problems["pipe.png"] == problems["shard.tar"] == "not a file: a named pipe"


def test_a_folder_that_cannot_be_read_is_a_row(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "a.png", "locked.v2/b.png")
    scan = os.scandir

    def refuse(path: str) -> Any:  # the tests may run as root, whom no permission stops
        if str(path).endswith("locked.v2"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(folder_walk.os, "scandir", refuse)
    assert outcome(tmp_path) == (["a.png"], {"locked.v2": "folder not readable: Permission denied"})
    with pytest.raises(InputError, match=r"locked\.v2 cannot be read: Permission denied"):
        outcome(tmp_path / "locked.v2")


def test_very_deep_folders_are_walked(outcome: Outcome, tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("z.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert outcome(tmp_path) == (["a.png", "d/" * 1200 + "z.png"], {})
    finally:  # shutil, with which pytest cleans up, is recursive
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.parametrize("place", [".", "photos", "photos/out", ".."])
def test_only_what_the_engine_wrote_is_left_out_below_the_output(outcome: Outcome, tmp_path: Path, place: str) -> None:
    photos = tmp_path / "photos"
    output = Path(os.path.normpath(photos / place if place == ".." else tmp_path / place))
    write_files(photos, "a.png", "report/b.png", "report/x/c.png", "method/0123/d.png", "out/e.png", "out2/f.png")
    results = [f"report/{FINGERPRINT}/clusters.png", f"sweep/{FINGERPRINT}/p.png", "runs/progress/q.png"]
    write_files(output, *results)
    mine = ["a.png", "method/0123/d.png", "out/e.png", "out2/f.png", "report/b.png", "report/x/c.png"]
    (photos / "latest").symlink_to(output / "report" / FINGERPRINT)
    assert outcome(photos, output=str(output)) == (mine, {})
    link = tmp_path / "link"
    link.symlink_to(output)
    assert outcome(photos, output=str(link)) == (mine, {})
    # The results of another output are images like any other.
    assert len(outcome(photos, output=str(tmp_path / "another"))[0]) > len(mine)


@pytest.mark.parametrize("is_linked", [False, True])
def test_results_under_their_plain_names_are_left_out_too(outcome: Outcome, tmp_path: Path, is_linked: bool) -> None:
    write_files(tmp_path, "a.png", "late/latest/b.png", f"comparison/{FINGERPRINT}/c.png", "runs/1/report/d.png")
    if is_linked:
        (tmp_path / "latest").symlink_to("runs/1")
    else:
        write_files(tmp_path, "latest/report/d.png", "latest/e.png")
    assert outcome(tmp_path, output=str(tmp_path)) == (["a.png", "late/latest/b.png"], {})


def test_results_in_a_bucket_are_known_by_their_keys() -> None:
    folders = ("latest", "latest/report", "runs", f"corrections/{FINGERPRINT}", f"comparison/{FINGERPRINT}")
    assert all(is_result(f"s3://b/out/{folder}/x.png", "s3://b/out/") for folder in folders)
    mine = ("late/x.png", "latest.png", "comparison/x.png", "a/latest/x.png")
    assert not any(is_result(f"s3://b/out/{name}", "s3://b/out/") for name in mine)


def test_forgotten_images_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, "photos/a.png", "photos/b.png")
    output = str(tmp_path / "out")
    add_forgotten(output, [uri_hash(str(tmp_path / "photos" / "a.png"))])
    config = Config(output=output, num_clusters=2, images={"uri": str(tmp_path / "photos")})
    writer = ArtifactWriter(Folder.at(tmp_path / "listing"))
    metrics = list_images.run(config, StageContext(writer, {}, Progress("images", quiet=True)))
    assert (metrics["num_images"], metrics["skipped"]) == (1, {"forgotten": 1})


def test_every_stage_is_known_by_the_folder_of_its_results() -> None:
    base = {"output": "o", "images": {"uri": "i"}}
    configs = [Config(**base, num_clusters=2, evaluate={"labels": "folder"}), Config(**base, num_clusters="auto")]
    names = {stage.name for config in configs for stage in stages_of(config) if isinstance(stage, Stage)}
    assert names
    assert names | {SPACES.name, SCORES.name, "corrections", "sweep", "comparison"} == set(RESULT_FOLDERS)


def list_file(listed: Listed, tmp_path: Path, *entries: str) -> dict[str, str | None]:
    (tmp_path / "list.txt").write_text("\n".join(entries))
    rows = listed(Config(output="unused", num_clusters=2, images={"uri": str(tmp_path / "list.txt")})).to_pylist()
    return {row["uri"]: row["problem"] for row in rows}


def test_an_entry_with_an_unknown_scheme_is_a_row(listed: Listed, tmp_path: Path) -> None:
    write_files(tmp_path, "a.png")
    found = list_file(listed, tmp_path, "a.png", "http://host/x.jpg?signature=abc", "ftp://host/y.jpg", "what://")
    assert found == {
        f"{tmp_path}/a.png": None,
        "http://host/x.jpg?...": "http:// is not supported; copy the image to a folder or a bucket",
        "ftp://host/y.jpg": "ftp:// is not supported; copy the image to a folder or a bucket",
        "what://": "what:// is not supported; copy the image to a folder or a bucket",
    }


@pytest.mark.parametrize(
    "entry", ["http://user:pa/ss@host/x.jpg", "s3://user:secret@bucket/x.jpg", "gs://user:secret@bucket/x.jpg"]
)
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_credentials_in_an_entry_are_shown_nowhere(listed: Listed, tmp_path: Path, entry: str, kind: str) -> None:
    if kind == "txt":
        found = list_file(listed, tmp_path, entry)
    else:
        pq.write_table(pa.table({"uri": [entry]}), tmp_path / "list.parquet")
        rows = listed(Config(output="unused", num_clusters=2, images={"uri": str(tmp_path / "list.parquet")}))
        found = {row["uri"]: row["problem"] for row in rows.to_pylist()}
    (uri, problem), *_ = found.items()
    assert problem is not None
    for secret in ("user", "secret", "pa/ss", "ss@"):
        assert secret not in uri + problem


def test_a_message_on_a_location_shows_no_credentials() -> None:
    with pytest.raises(InputError) as caught:
        open_uri("http://user:pa/ss@host/x.jpg?key=secret")
    assert "http://...@host/x.jpg?...: cannot be opened" in str(caught.value)
    for secret in ("user", "pa/ss", "secret"):
        assert secret not in str(caught.value)


def test_devices_pipes_and_unknown_schemes_in_a_list_are_rows(listed: Listed, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    found = list_file(listed, tmp_path, "pipe.png", "/dev/zero", "/dev", "nul\0.png", "y" * 5000)
    assert found[f"{tmp_path}/pipe.png"] == "not a file: a named pipe"
    assert found["/dev/zero"] == "not a file: a device"
    assert found["/dev"] == "not a file: a folder"
    assert sorted(str(problem) for uri, problem in found.items() if uri.startswith(str(tmp_path)))[1:] == [
        "over the limit of 4,096 characters",
        "unreadable: embedded null byte",
    ]


@pytest.mark.parametrize("entry", ['"a.png"', "'a.png'", "a.png\tcat", "a.png,cat", "a.png 3", "a.png # a comment"])
def test_a_line_that_holds_more_than_a_path_says_so(listed: Listed, tmp_path: Path, entry: str) -> None:
    write_files(tmp_path, "a.png", "b c, d.png", "#e.png")
    found = list_file(listed, tmp_path, entry, "b c, d.png", "./#e.png", "x.png", "t.parquet")
    assert list(found.values()).count(None) == 2
    assert found[f"{tmp_path}/{entry}"] == "missing: write one path a line, without quotes, labels or comments"
    assert found[f"{tmp_path}/x.png"] == "missing"
    assert found[f"{tmp_path}/t.parquet"] == "a Parquet file in a list; name it in images.uri"


@pytest.mark.parametrize("uri", ["s3a://b/x", "S3://b/x", "ftp://h/x"])
def test_a_scheme_that_is_unknown_is_answered_with_those_that_are(uri: str) -> None:
    with pytest.raises(InputError, match=r"supported are local paths and s3://, gs://"):
        open_uri(uri)


def test_reading_waits_for_no_pipe_and_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert read_image(str(tmp_path / "pipe.png")) == "unreadable: OSError: not a file"
    assert read_image("/dev/zero") == "unreadable: OSError: not a file"
    assert str(read_image("http://host/x.jpg")).startswith("unreadable: http://host/x.jpg: cannot be opened")
    monkeypatch.setattr("icce_ray.images.read_images.MAX_FILE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(11))
    assert read_image(str(tmp_path / "a.png")) == "unreadable: ValueError: over the limit of 10 bytes"
    assert read_image(f"{tmp_path}/a.tar#0+11/a.png") == "missing"
    assert read_image("s3://bucket/a.png", 11) == "unreadable: over the limit of 10 bytes"


def test_forgotten_images_do_not_come_back_because_their_file_is_damaged(tmp_path: Path) -> None:
    add_forgotten(str(tmp_path), [uri_hash("a"), uri_hash("b")])
    assert len(read_forgotten(str(tmp_path))) == 2
    path = tmp_path / FORGOTTEN_FOLDER / FORGOTTEN_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is damaged"):
        read_forgotten(str(tmp_path))
