from __future__ import annotations

import hashlib
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config import Config
from icce_ray.embed import part_embedder
from icce_ray.embed.backbone_plan import plan_embedding
from icce_ray.embed.content_index import ContentIndex
from icce_ray.embed.decode_and_embed import DecodedPart
from icce_ray.embed.embedding_parts import PartRange, plan_parts
from icce_ray.embed.networks import PixelsBackbone
from icce_ray.embed.part_embedder import ITEMS_AT_ONCE, BackboneThread, EmbedTask, PartEmbedder
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
TIMEOUT_S = 60.0
"""Far longer than any thread takes: only a test that fails waits so long."""


class Watched(PixelsBackbone):
    """Notes the batches, and which threads they come from. With `waits`, the first is on the device until the next has
    been brought there, and a moment more, in which no other may begin."""

    batch_size = 8

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits
        self.num_loaded = 0
        self.second_loaded, self.second_begun = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.sizes: set[int] = set()
        self.num_rows = 0
        self.num_batches = 0

    def load(self, images_BHWC: Any) -> Any:
        self.num_loaded += 1
        if self.num_loaded >= 2:
            self.second_loaded.set()
        return images_BHWC

    def embed(self, images_BHWC: Any) -> Any:
        self.num_batches += 1
        self.sizes.add(len(images_BHWC))
        self.num_rows += len(images_BHWC)
        self.threads.add(threading.current_thread().name)
        if self.num_batches > 1:
            self.second_begun.set()
        elif self.waits:
            assert self.second_loaded.wait(TIMEOUT_S)
            assert not self.second_begun.wait(0.1)
        return super().embed(images_BHWC)


class Task(EmbedTask):
    @property
    def records(self) -> PartRecords:
        return PartRecords(self.folders[0], "source")

    draw = None
    images_per_item = 16


def task_at(folder: Path) -> EmbedTask:
    embed = {"backbone": "pixels", "image_size": 4}
    config = Config(images={"uri": "x"}, num_clusters=2, output=str(folder), embed=embed)
    images: Any = None
    return Task(config, images, [Folder.at(folder)], plan_embedding(config.embed), "model", "run")


def decoded_part(part: PartRange) -> DecodedPart:
    """Two parts after each other have the same 16 images."""
    pixels = IMAGES[part.index // 2 * 16 % len(IMAGES) :][:16]
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    return DecodedPart(np.arange(part.start, part.stop), np.arange(16, dtype=np.int32), pixels, hashes, [])


def embedder_of(task: EmbedTask) -> PartEmbedder:
    index = ContentIndex([task.folders[0]])
    return PartEmbedder(task, index, num_threads=1, device="cpu", decode=decoded_part, on_batch=lambda part, num: None)


def embed_all(folder: Path, num_threads: int) -> tuple[dict[str, bytes], Watched, int]:
    """(files, backbone, number of contents that were embedded)."""
    task, backbone = task_at(folder), Watched(waits=num_threads > 1)
    embedder = embedder_of(task)
    embedder.backbone = BackboneThread(lambda: backbone)
    with ThreadPoolExecutor(num_threads) as threads:
        parts = plan_parts(128, 16)
        records = list(
            threads.map(lambda part: embedder.embed(part, decoded_part(part), task.attempt(part, "e")), parts)
        )
    files = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    return files, backbone, sum(record.metrics["num_embedded"] for record in records)


def test_parts_that_are_embedded_at_the_same_time_have_the_same_bytes(tmp_path: Path) -> None:
    alone, _, num_alone = embed_all(tmp_path / "alone", 1)
    together, backbone, num_together = embed_all(tmp_path / "together", ITEMS_AT_ONCE)
    assert len(alone) == 16
    assert together == alone
    assert num_together == num_alone == 64
    assert len(backbone.threads) == 1
    assert not list((tmp_path / "together").glob(".part-*"))


@pytest.mark.parametrize("batch_size", [4, 7, 8, 12, 16, 64])
def test_batches_that_do_not_cross_items_waste_few_rows(tmp_path: Path, batch_size: int) -> None:
    """Four items of 16 new contents, of which one has two images that failed, and a last one of three images."""
    task, backbone = task_at(tmp_path), Watched()
    backbone.batch_size = batch_size
    embedder = embedder_of(task)
    embedder.backbone = BackboneThread(lambda: backbone)
    for number, num_images in enumerate((16, 16, 14, 16, 3)):
        part = PartRange(number, 16 * number, 16 * number + num_images)
        whole = decoded_part(PartRange(2 * number, part.start, part.start + 16))
        ids, rows, hashes = (values[:num_images] for values in (whole.image_ids, whole.rows, whole.hashes))
        fresh = [hashlib.sha256(f"{number} {content}".encode()).hexdigest() for content in hashes]
        embedder.embed(part, replace(whole, image_ids=ids, rows=rows, hashes=fresh))
    rows_of_an_item = 18 if batch_size == 7 else 16  # three batches of six
    (size,) = backbone.sizes
    assert size <= batch_size
    assert backbone.num_rows == 4 * rows_of_an_item + size


@pytest.mark.parametrize(("batch_size", "rows"), [(8, 8), (64, 16)])
def test_the_last_item_has_batches_of_the_same_shape(tmp_path: Path, batch_size: int, rows: int) -> None:
    """A network's rounding depends on the shape, and must not depend on where a collection ends."""
    task, backbone = task_at(tmp_path), Watched()
    backbone.batch_size = batch_size
    embedder = embedder_of(task)
    embedder.backbone = BackboneThread(lambda: backbone)
    last = PartRange(2, 32, 35)
    decoded = decoded_part(PartRange(2, 32, 48))
    embedder.embed(
        last, replace(decoded, image_ids=decoded.image_ids[:3], rows=decoded.rows[:3], hashes=decoded.hashes[:3])
    )
    assert backbone.sizes == {rows}


def test_a_careful_attempt_has_the_process_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part says that it is at work, or that it has to wait, before the next step is taken. Which thread runs when
    makes no difference."""
    task = task_at(tmp_path)
    parts = plan_parts(64, 16)
    task.attempt(parts[2], "embed").begin()  # its worker died
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    may_end = [threading.Event() for _ in parts]
    gather = part_embedder.gather

    class Told(threading.Semaphore):
        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if not blocking or timeout is not None:
                return super().acquire(blocking, timeout)
            if not super().acquire(blocking=False):
                said.put("waits")
                super().acquire()
            return True

    def at_work(name: str, *arguments: Any) -> Any:
        index = int(name[5:10])
        said.put(f"{index} works")
        assert may_end[index].wait(TIMEOUT_S)
        return gather(name, *arguments)

    def begin(part: PartRange) -> str:
        work.append(threads.submit(embedder.embed, part, decoded_part(part), task.attempt(part, "embed")))
        return said.get(timeout=TIMEOUT_S)

    def end(index: int) -> str:
        may_end[index].set()
        return said.get(timeout=TIMEOUT_S)

    monkeypatch.setattr(part_embedder, "gather", at_work)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Semaphore", Told)
        embedder = embedder_of(task)
    work: list[Future[Any]] = []
    with ThreadPoolExecutor(len(parts)) as threads:
        try:
            assert begin(parts[0]) == "0 works"
            assert begin(parts[1]) == "1 works", "two ordinary parts are at work at the same time"
            assert begin(parts[2]) == "waits", "a careful attempt lets those at work end"
            assert end(0) == "waits", "all of them"
            assert end(1) == "2 works"
            assert begin(parts[3]) == "waits", "nothing begins beside a careful attempt"
            assert end(2) == "3 works"
        finally:
            for event in may_end:
                event.set()
    assert [each.result().name for each in work] == [part.name for part in parts]


def test_a_backbone_that_cannot_be_built_fails_for_every_part(tmp_path: Path) -> None:
    def build() -> Any:
        raise ValueError("no weights")

    backbone = BackboneThread(build)
    for _ in range(2):
        with pytest.raises(ValueError, match="no weights"):
            backbone.embed(IMAGES)


def test_known_contents_need_no_backbone(tmp_path: Path) -> None:
    embed_all(tmp_path, 1)
    task = task_at(tmp_path)
    embedder = embedder_of(task)
    embedder.backbone = BackboneThread(lambda: pytest.fail("built"))
    part = replace(plan_parts(128, 16)[3], index=90)
    assert embedder.embed(part, decoded_part(part)).metrics["num_embedded"] == 0
