"""An embedding whose machines are taken away: half of the actors, the index of contents and the driver are killed in
turn. The same command must end with the same bytes, and with few images that went through the backbone twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS: dict[str, Any] = {"num_images": 1536, "num_copies": 64, "images_per_item": 8, "max_redone": 0.05}
ROOT = Path(__file__).resolve().parents[2]
COUNTING = """
import os, time
from icce_ray.embed.networks import PixelsBackbone
embed = PixelsBackbone.embed

def counting_embed(self, images):
    log = os.open(os.environ["ICCE_SPOT_LOG"], os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(log, len({image.tobytes() for image in images}).to_bytes(4, "little"))  # without what fills the batch up
    os.close(log)
    time.sleep(0.1)  # in which most of the kills come
    return embed(self, images)

PixelsBackbone.embed = counting_embed
"""
RUN = """
import sys
from icce_ray.config import build_config
from icce_ray.embed import embedding_parts
from icce_ray.pipeline import run as pipeline
embedding_parts.MAX_IMAGES_PER_ITEM = int(sys.argv[3])
workers = {"num_workers": 2, "cpus_per_worker": 0.5}
config = build_config({
    "output": sys.argv[1], "num_clusters": 2, "images": {"uri": sys.argv[2]},
    "embed": {"backbone": "pixels", "image_size": 8}, "resources": {"num_cpus": 4, "embed": workers},
}, "spot")
artifacts = {}
for step in pipeline.plan(config)[:2]:
    artifacts[step.name] = step.artifact or pipeline.run_stage(config, step, artifacts, True)
"""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num, copies = settings["num_images"], settings["num_copies"]
    with tempfile.TemporaryDirectory(prefix="icce_ray-spot-") as temporary:
        place = Path(temporary)
        _write_images(place / "images", num, copies)
        (place / "sitecustomize.py").write_text(COUNTING)
        undisturbed = Case(place, "undisturbed", settings)
        seconds = undisturbed.wait()
        disturbed = Case(place, "disturbed", settings)
        for share, kill in ((0.3, "Embedder"), (0.45, "_IndexActor"), (0.6, "")):
            disturbed.kill(share, kill)
        again = Case(place, "disturbed", settings)
        again.wait()
        embedded = {case.name: case.num_embedded() for case in (undisturbed, again)}
        redone = embedded["disturbed"] / (num - copies) - 1
        print(f"undisturbed {seconds:.0f} s; embedded {embedded}, {redone:.1%} of them again", flush=True)
        bounds = {
            "each content is embedded once if nothing is killed": embedded["undisturbed"] == num - copies,
            "the same bytes": undisturbed.content() == again.content(),
            f"under {settings['max_redone']:.0%} embedded again": redone < settings["max_redone"],
        }
    return {"seconds": seconds, "embedded": embedded, "redone": redone}, bounds


class Case:
    """A driver in a process of its own, with a Ray of its own."""

    def __init__(self, place: Path, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self._output, self._log = place / name, place / f"{name}.log"
        self._num_images = settings["num_images"]
        arguments = [self._output, place / "images", settings["images_per_item"]]
        environment = os.environ | {"PYTHONPATH": f"{place}:{ROOT}", "ICCE_SPOT_LOG": str(self._log)}
        self._began = time.monotonic()
        self._driver = subprocess.Popen([sys.executable, "-c", RUN, *map(str, arguments)], env=environment)

    def wait(self) -> float:
        assert self._driver.wait(600) == 0, "the driver failed"
        return time.monotonic() - self._began

    def kill(self, share: float, what: str) -> None:
        """When that share of the images is embedded, kill a worker called `what`; "": the driver and its Ray."""
        _wait_until(lambda: self._log.exists() and self.num_embedded() >= share * self._num_images)
        pids = _descendants(self._driver.pid)
        if what:
            os.kill(
                next(pid for pid, title in pids.items() if title.startswith("ray::") and what in title), signal.SIGKILL
            )
            return
        self._driver.kill()
        self._driver.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def num_embedded(self) -> int:
        return int(np.fromfile(self._log, np.uint32).sum())

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self._output.glob("embed/*/part-*")}


def _descendants(pid: int) -> dict[int, str]:
    sys.path.insert(0, str(ROOT / "tests" / "integration"))
    from hosts import descendants, process_table, title

    return {found: title(found) for found in descendants(pid, process_table())}


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def _write_images(folder: Path, num: int, num_copies: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num - num_copies):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:06d}.png")
    for number in range(num_copies):
        data = (folder / f"{number * 7:06d}.png").read_bytes()
        (folder / f"{number * 29:06d}-copy.png").write_bytes(data)
