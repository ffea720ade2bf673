"""Decoding in another process: the same pixels, and an image that kills the process costs only itself."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.errors import WorkerError
from icce_ray.images import decoding_process
from icce_ray.images.decoding import decode_image
from icce_ray.images.decoding_process import DecodingProcess
from icce_ray.images.preprocessing import Preprocessing

SMALL = Preprocessing(size=8, scale_size=8)
HOSTILE = """
import os, pathlib, time
from PIL import Image

def kill(*_):
    with open({log!r}, "a") as log:
        log.write("killed ")
    os.kill(os.getpid(), 9)

def hang(*_):
    pathlib.Path({log!r}).touch()
    time.sleep(60)

Image.preinit()  # only the promised formats are opened, so two of them are taken over
Image.register_open("PPM", kill, lambda prefix: prefix.startswith(b"KILL"))
Image.register_open("GIF", hang, lambda prefix: prefix.startswith(b"HANG"))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hostile images leave their mark. New processes have decoders that files can kill or stop."""
    (tmp_path / "sitecustomize.py").write_text(HOSTILE.format(log=str(tmp_path / "log")))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "log"


@pytest.fixture
def process(log: Path) -> Iterator[DecodingProcess]:
    process = DecodingProcess()
    yield process
    process.close()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def assert_decodes(process: DecodingProcess) -> None:
    pixels, expected = process.decode(png(7), SMALL, max_pixels=200), decode_image(png(7), SMALL)
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(pixels, expected)


def test_pixels_and_reasons_are_those_of_the_decoder(process: DecodingProcess) -> None:
    assert_decodes(process)
    assert process.decode(b"", SMALL, max_pixels=200) == "zero bytes"
    assert process.decode(png(7), SMALL, max_pixels=199) == "over the limit of 199 pixels"


def test_an_image_that_kills_two_processes_is_to_blame_and_the_next_image_is_decoded(
    process: DecodingProcess, log: Path
) -> None:
    assert process.decode(b"KILL", SMALL, max_pixels=200) == "killed its worker"
    assert log.read_text() == "killed killed "
    assert_decodes(process)


def test_an_image_that_takes_for_ever_is_given_up(process: DecodingProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_decodes(process)
    with monkeypatch.context() as patch:
        patch.setattr(decoding_process, "TIMEOUT_S", 0.1)
        assert process.decode(b"HANG", SMALL, max_pixels=200) == "over the limit of 0.1 s"
    assert_decodes(process)


def test_a_worker_ends_at_an_image_that_takes_for_ever(log: Path) -> None:
    code = """
import sys
from icce_ray.images import decoding_process
from icce_ray.images.preprocessing import Preprocessing
decoding_process.TIMEOUT_S = float(sys.argv[2])
print(decoding_process.decode_or_die(sys.argv[1].encode(), Preprocessing(size=8, scale_size=8), max_pixels=200))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(log.parent), *filter(None, sys.path)])}
    ran = {
        what: subprocess.run(
            [sys.executable, "-c", code, what, limit_s], env=environment, capture_output=True, text=True, check=False
        )
        for what, limit_s in (("HANG", "1"), ("picture", "60"))
    }
    assert log.exists()
    assert (ran["HANG"].returncode, ran["HANG"].stdout) == (1, "")
    assert (ran["picture"].returncode, ran["picture"].stdout) == (0, "not an image\n")


def test_closing_stops_a_thread_that_waits_for_an_image(process: DecodingProcess, log: Path) -> None:
    def decode() -> None:
        with pytest.raises(WorkerError, match="stopped"):
            process.decode(b"HANG", SMALL, max_pixels=200)
        log.write_text("raised")

    thread = threading.Thread(target=decode)
    thread.start()
    while not log.exists():
        time.sleep(0.01)
    process.close()
    thread.join(timeout=30)
    assert log.read_text() == "raised"


def test_a_process_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise ImportError('Pillow is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerError, match="Pillow is broken"):
        DecodingProcess().decode(png(7), SMALL, max_pixels=200)


def test_the_process_starts_with_nothing_but_numpy_and_pillow() -> None:
    """Each run on one machine starts one for each CPU; the settings and Arrow would take four times as long."""
    code = "import sys, icce_ray.images.decoding_process; print({'pyarrow', 'pydantic', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
