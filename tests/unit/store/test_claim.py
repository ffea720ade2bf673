from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from icce_ray.errors import InputError, WorkerError
from icce_ray.store import ArtifactWriter, Claim, Folder
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
