from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from icce_ray.errors import InputError
from icce_ray.store import Claim, Folder

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
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is writing this artifact now"):
            Claim(Folder.at(tmp_path)).__enter__()
        holder.kill()
    with Claim(Folder.at(tmp_path)):
        pass


def test_a_file_is_created_only_where_there_is_none(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.create_bytes("a", b"first")
    with pytest.raises(FileExistsError):
        folder.create_bytes("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert folder.names() == ["a"]
