"""Share of the time for which an embedding actor keeps its device at work, for one part at a time and for several.

The device is a backbone that sleeps as long as a large network takes for a batch on a GPU. Each read and each write of
storage sleeps, too. Both ways must write the same bytes.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cases import show_aim
from icce_ray.config import Config
from icce_ray.embed.content_index import ContentIndex
from icce_ray.embed.decode_and_embed import DecodedPart
from icce_ray.embed.embedding_parts import plan_parts
from icce_ray.embed.networks import PixelsBackbone
from icce_ray.embed.part_embedder import ITEMS_AT_ONCE, BackboneThread, EmbedTask, PartEmbedder
from icce_ray.store import Folder

SETTINGS: dict[str, Any] = {"num_parts": 24, "batch_s": 0.213, "storage_s": 0.03, "min_busy": 0.9}
PART = 512
SIZE = 8


@dataclass(frozen=True)
class SlowFolder(Folder):
    storage_s: float = 0.0

    def read_bytes(self, name: str, num_bytes: int | None = None) -> bytes:
        time.sleep(self.storage_s)
        return super().read_bytes(name, num_bytes)

    def write_bytes(self, name: str, data: bytes | memoryview, *, wait: bool = True) -> None:
        time.sleep(self.storage_s)
        super().write_bytes(name, data, wait=wait)

    def remove(self, name: str) -> None:
        time.sleep(self.storage_s)
        super().remove(name)


class SlowBackbone(PixelsBackbone):
    batch_size = PART

    def __init__(self, batch_s: float) -> None:
        self._batch_s = batch_s

    def embed(self, images_BHWC: Any) -> Any:
        time.sleep(self._batch_s)
        return super().embed(images_BHWC)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    busy: dict[str, float] = {}
    written = []
    for num_threads in (1, ITEMS_AT_ONCE):
        with tempfile.TemporaryDirectory() as place:
            share, content = _embed(Path(place), settings, num_threads)
        print(f"{num_threads} parts at a time: busy for {share:.0%} of the time", flush=True)
        busy[f"{num_threads} at a time"] = share
        written.append(content)
    show_aim("share of the time that the device is busy", *(f"{value:.0%}" for value in busy.values()), "90%")
    bounds = {
        f"busy for at least {settings['min_busy']:.0%} of the time": share >= settings["min_busy"],
        "the parts have the same bytes": written[0] == written[1],
    }
    return {"busy_share": busy}, bounds


def _embed(place: Path, settings: dict[str, Any], num_threads: int) -> tuple[float, dict[str, str]]:
    """(share of the time, digests of the parts)."""
    from PIL import Image

    from icce_ray.pipeline import run as pipeline

    (place / "images").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(place / "images" / "one.png")
    embed = {"backbone": "pixels", "image_size": SIZE}
    config = Config(output=str(place / "out"), num_clusters=2, images={"uri": str(place / "images")}, embed=embed)
    images = pipeline.run_stage(config, pipeline.plan(config)[0], {}, True)
    task = EmbedTask.of(config, images, Folder.at(place / "embed"))
    own = task.folders[0]
    folder = SlowFolder(own.filesystem, own.path, own.uri, storage_s=settings["storage_s"])
    task = replace(task, folders=[folder])

    def work(number: int) -> None:
        part = parts[number]
        embedder.embed(part, decoded[number], task.attempt(part, "embed"))

    parts = plan_parts(settings["num_parts"] * PART, PART)
    decoded = [_decoded(part.start) for part in parts]
    embedder = PartEmbedder(
        task, ContentIndex([folder]), num_threads=1, device="cpu", decode=lambda part: decoded[part.index],
        on_batch=lambda part, num: None,
    )  # fmt: skip
    embedder.backbone = BackboneThread(lambda: SlowBackbone(settings["batch_s"]))
    embedder._images_per_item = PART  # the listing has a single image
    began = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(work, range(len(parts))))
    share = embedder.backbone.busy_s / (time.perf_counter() - began)
    return share, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(own.path).glob("part-*")}


def _decoded(start: int) -> DecodedPart:
    pixels = np.random.default_rng(start).integers(0, 256, (PART, SIZE, SIZE, 3), dtype=np.uint8)
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    return DecodedPart(np.arange(start, start + PART), np.arange(PART, dtype=np.int32), pixels, hashes, [])
