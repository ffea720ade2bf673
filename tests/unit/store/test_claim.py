from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icce_ray.errors import InputError
from icce_ray.store import Claim, Folder
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
