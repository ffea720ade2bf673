from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from icce_ray.config import StorageConfig
from icce_ray.errors import InputError, WorkerError
from icce_ray.store import ArtifactWriter, Claim, Folder, claim, s3
from icce_ray.store.claim import CLAIM_NAME

HOLD = """
import sys
from icce_ray.store import Claim, Folder
with Claim(Folder.at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_writes_and_may_when_the_first_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is writing this artifact"):
            Claim(Folder.at(tmp_path)).__enter__()
        holder.kill()
    with Claim(Folder.at(tmp_path)):
        pass


def test_a_linked_claim_file_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / CLAIM_NAME).symlink_to(victim)
    with pytest.raises(InputError, match="is a link; remove it"):
        Claim(Folder.at(tmp_path / "artifact")).__enter__()
    assert victim.read_text() == "precious"


LEAVE_A_WORKER = """
import pickle, sys
from icce_ray.store import ArtifactWriter, Claim, Folder
with Claim(Folder.at(sys.argv[1])) as claim:
    print(pickle.dumps(ArtifactWriter(claim.folder)).hex(), flush=True)
    sys.stdin.read()
"""


def test_a_worker_of_a_killed_job_cannot_write_once_another_has_taken_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE_A_WORKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        worker: ArtifactWriter = pickle.loads(bytes.fromhex(holder.stdout.readline()))
        worker.write_json("part.json", "of the worker")
        holder.kill()
    (tmp_path / "other").write_text("x")
    options: dict[str, Any] = {"stage": "s", "fingerprint": "f", "inputs": {}, "config": {}, "metrics": {}}
    with Claim(Folder.at(tmp_path)) as claim:
        writer = ArtifactWriter(claim.folder)
        writer.write_json("part.json", "of the second")
        for write in (
            lambda: worker.write_json("part.json", "of the worker"),
            lambda: worker.write_tables("part.json", pa.schema([]), []),
            lambda: worker.copy_file("part.json", str(tmp_path / "other")),
        ):
            with pytest.raises(WorkerError, match="another job took this artifact over"):
                write()
        finished = writer.commit(**options, seconds=0.0, exclusive=True)
    with pytest.raises(WorkerError, match="another job took this artifact over"):
        worker.write_json("part.json", "of the worker")
    with pytest.raises(WorkerError, match="another job wrote this artifact at the same time"):
        worker.commit(**options, seconds=0.0, exclusive=True)
    assert finished.read_json("part.json") == "of the second"
    with Claim(Folder.at(tmp_path)) as claim:  # to amend it
        ArtifactWriter(claim.folder).write_json("more.json", 1)


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_a_file_is_created_only_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_hard_links: bool
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_hard_links:  # exFAT, some network mounts
        monkeypatch.setattr(os, "link", no_link)
    folder = Folder.at(tmp_path)
    folder.create_bytes("a", b"first")
    with pytest.raises(FileExistsError):
        folder.create_bytes("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert folder.names() == ["a"]


class Bucket:
    """The client of a store with conditional puts."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def put_object(self, Bucket: str, Key: str, Body: bytes, **condition: str) -> dict[str, str]:
        with self.lock:
            tag = str(self.objects.get(Key))
            if condition != ({"IfMatch": tag} if Key in self.objects else {"IfNoneMatch": "*"}):
                raise FileExistsError(Key)
            self.objects[Key] = Body
        return {"ETag": str(Body)}

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        if Key not in self.objects:
            raise FileNotFoundError(Key)
        return {"Body": io.BytesIO(self.objects[Key]), "ETag": str(self.objects[Key])}

    def delete_object(self, Bucket: str, Key: str) -> None:
        del self.objects[Key]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    found = Bucket()
    monkeypatch.setattr(s3, "client", lambda options, **_: found)
    monkeypatch.setattr(claim, "RENEW_S", 0.001)
    return found


@pytest.fixture
def in_bucket(tmp_path: Path) -> Folder:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    return Folder(filesystem, "bucket/x", "s3://bucket/x", StorageConfig())


def lose(held: Claim, bucket: Bucket) -> None:
    """Another job takes the claim over, and its holder finds out."""
    with bucket.lock:  # not within a renewal
        bucket.objects = dict.fromkeys(bucket.objects, b"of another job")
    assert held._renewer is not None
    held._renewer.join(timeout=60)
    assert not held._renewer.is_alive()


def test_a_claim_in_a_bucket_is_renewed_and_removed_at_the_end(bucket: Bucket, in_bucket: Folder) -> None:
    with Claim(in_bucket) as held:
        before, deadline = dict(bucket.objects), time.monotonic() + 60
        while bucket.objects == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        held.confirm()
    assert bucket.objects == {}


@pytest.mark.parametrize(("own_error", "raised"), [(None, WorkerError), (ZeroDivisionError, ZeroDivisionError)])
def test_a_claim_that_was_lost_is_told_unless_the_work_failed_by_itself_and_the_others_stays(
    bucket: Bucket, in_bucket: Folder, own_error: type[Exception] | None, raised: type[Exception]
) -> None:
    def work() -> None:  # not in the main thread, which would be interrupted
        with Claim(in_bucket) as held:
            lose(held, bucket)
            if own_error is not None:
                raise own_error

    with ThreadPoolExecutor(1) as threads, pytest.raises(raised, match=None if own_error else "another job took"):
        threads.submit(work).result()
    assert list(bucket.objects.values()) == [b"of another job"]
