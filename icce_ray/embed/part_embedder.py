"""Embed decoded parts and write them: by an actor of Ray Data, or, in small runs, by the calling process.

An actor works on ITEMS_AT_ONCE work items at a time, each in a thread of its own, so that the device need not wait for
storage: while one item is on the device, the next is brought there and the last one is written. A batch never holds
images of two items: an item would have to wait for others, and its bytes would depend on them. An item is divided into
equal batches, so rows are wasted only where images fail or have an embedding, and in the last item; all batches have
the same shape, on which a network's rounding depends.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.embed.backbone_plan import EmbeddingPlan, embed_settings, model_key, plan_embedding
from icce_ray.embed.content_index import CLAIMED, ContentIndex, Index, keys_of, siblings
from icce_ray.embed.decode_and_embed import (
    DecodedPart,
    Outcome,
    assemble_part,
    decode_on_device,
    decode_part,
    embed_contents,
)
from icce_ray.embed.embedding_parts import PartRange, images_per_item, source_digest, write_part
from icce_ray.embed.feature_matrix import Draw
from icce_ray.embed.finished_parts import ReusableParts
from icce_ray.embed.gather_embeddings import VectorReader, gather, known_hashes
from icce_ray.embed.networks import Backbone, Features, build_backbone
from icce_ray.embed.work_items import OpenParts, join_items, joined
from icce_ray.images.decoding_process import DecodingProcess
from icce_ray.images.listing import Listing
from icce_ray.images.preprocessing import Pixels
from icce_ray.images.stage import num_listed
from icce_ray.runtime.machine import usable_cpus
from icce_ray.runtime.threads import Turns
from icce_ray.store import Artifact, Folder, PartRecord, PartRecords
from icce_ray.store.attempts import Attempt

ITEMS_AT_ONCE = 3
"""Work items in an actor: on the device, on its way there, and being written."""


@dataclass(frozen=True)
class EmbedTask:
    """Settings and inputs that the work on all parts shares."""

    config: Config
    images: Artifact
    folders: list[Folder]
    """Where embeddings of the same model lie; the first is this artifact's."""
    plan: EmbeddingPlan
    model: str
    run_id: str

    @classmethod
    def of(cls, config: Config, images: Artifact, folder: Folder) -> EmbedTask:
        plan = plan_embedding(config.embed)
        model = model_key(embed_settings(config.embed, config.embeddings, config.seed), plan)
        folders = [folder, *siblings(Folder.at(config.output) / "embed", folder, model, num_listed(images))]
        return cls(config, images, folders, plan, model, uuid.uuid4().hex)

    @property
    def records(self) -> PartRecords:
        return PartRecords(self.folders[0], source_digest(self.images, self.model))

    @property
    def draw(self) -> Draw | None:
        return Draw.of(num_listed(self.images), self.config.sample.max_images, self.config.seed)

    def reusable(self) -> list[ReusableParts]:
        """Finished artifacts of the same model with another listing."""
        artifacts, listings = (
            filter(None, map(Artifact.find, self.folders[1:])),
            Folder.at(self.config.output) / "images",
        )
        found = [
            (each, Artifact.find(listings / each.manifest.inputs["images"].partition(".")[0])) for each in artifacts
        ]
        return [ReusableParts(artifact, Listing(images)) for artifact, images in found if images is not None]

    @property
    def images_per_item(self) -> int:
        """Images of each work item but the last, whose batches have the same shape."""
        num_images = num_listed(self.images)
        return min(num_images, images_per_item(num_images, self.plan.preprocessing))

    def attempt(self, part: PartRange, step: str) -> Attempt:
        what = f"embed: images {part.start} to {part.stop - 1}"
        remedy = "use a smaller embed.batch_size, fewer workers on each machine, or machines with more memory"
        return Attempt(self.folders[0], f".{part.name}.{step}", self.run_id, what, remedy)

    def decode(self, part: PartRange, listing: Listing, **options: Any) -> DecodedPart:
        images = listing.rows(part.start, part.stop)
        max_pixels, keep_jpegs = self.config.embed.max_image_pixels, self.config.embed.decoder == "nvjpeg"
        return decode_part(
            part, images, self.plan.preprocessing, max_pixels=max_pixels, keep_jpegs=keep_jpegs, **options
        )


class BackboneThread:
    """A backbone that any thread may use. It runs in a thread of its own, one batch after the other, while other
    threads bring the next batches to the device."""

    def __init__(self, build: Callable[[], Backbone]) -> None:
        self.busy_s = 0.0
        """Time for which the backbone was at work."""
        self._build = build
        self._building: Future[Backbone] | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "icce_ray-backbone")

    @property
    def backbone(self) -> Backbone:
        """Built when it is needed first: not if all embeddings are on storage."""
        with self._lock:
            self._building = self._building or self._thread.submit(self._build)
        return self._building.result()

    def embed(self, images_BHWC: Pixels) -> Features:
        """As :meth:`Backbone.embed`."""
        loaded = self.backbone.load(images_BHWC)
        return self._thread.submit(self._embed, loaded).result()

    def _embed(self, loaded: Any) -> Features:
        began = time.perf_counter()
        try:
            return self.backbone.embed(loaded)
        finally:
            self.busy_s += time.perf_counter() - began


class PartEmbedder:
    """Holds the backbone, embeds decoded parts and writes them. ITEMS_AT_ONCE threads may call it at a time.

    Args:
        decode: decodes all images of a part, also those that the index knows.
        on_batch: told, after each batch, the part and how many of its images were embedded so far.
    """

    def __init__(
        self,
        task: EmbedTask,
        index: Index,
        *,
        num_threads: int,
        device: str,
        decode: Callable[[PartRange], DecodedPart],
        on_batch: Callable[[PartRange, int], None],
    ) -> None:
        self._task, self._index, self._reader = task, index, VectorReader(task.folders)
        self._decode, self._on_batch = decode, on_batch
        self.backbone = BackboneThread(
            lambda: build_backbone(
                task.config.embed, task.config.seed, device=device, num_threads=num_threads, plan=task.plan
            )
        )
        self._turns = Turns(ITEMS_AT_ONCE)
        self._images_per_item = task.images_per_item
        self._decode_jpegs = partial(decode_on_device, preprocessing=task.plan.preprocessing, device=device)

    def embed(self, part: PartRange, decoded: DecodedPart, attempt: Attempt | None = None) -> PartRecord:
        """Embed and write a part. A careful attempt works alone: if the process dies then, it was at that part."""
        attempt = attempt or Attempt()
        with self._turns.taken(alone=attempt.is_careful):
            record = self._embed(part, decoded, attempt.begin())
            attempt.end()
        return record

    def _embed(self, part: PartRange, decoded: DecodedPart, attempt: Attempt) -> PartRecord:
        def embed(hashes: list[str]) -> dict[str, Outcome]:
            nonlocal decoded
            skipped = {content for content, row in zip(decoded.hashes, decoded.rows, strict=True) if row < 0}
            if not skipped.isdisjoint(hashes):  # on storage when decoding was skipped, but no longer
                decoded = self._decode(part).with_jpegs(self._decode_jpegs)
            on_batch, size = partial(self._on_batch, part), self._images_per_item
            batch_size = math.ceil(size / math.ceil(size / self.backbone.backbone.batch_size))
            return embed_contents(decoded, hashes, self.backbone.embed, batch_size, attempt, on_batch)

        decoded = decoded.with_jpegs(self._decode_jpegs)
        contents = list(dict.fromkeys(decoded.hashes))
        outcomes, embedded = gather(part.file_name, contents, self._index, self._reader, embed)
        dims, model = self._task.plan.dims, self._task.model
        table, failed = assemble_part(decoded, outcomes, dims, model=model)
        counts = {"num_embedded": len(embedded), "num_stretched": decoded.num_stretched}
        record = write_part(self._task.records, part, table, failed, self._task.draw, **counts)
        rows = {value: row for row, value in enumerate(table["content_hash"].to_pylist())}
        rows_n = np.array([rows.get(value, CLAIMED) for value in embedded], np.uint32)
        self._index.finish(part.file_name, keys_of(embedded), rows_n)
        return record


def embed_here(task: EmbedTask, pending: OpenParts, show: Callable[[int], None]) -> Generator[PartRecord, None, None]:
    """Embed the `pending` parts in this process; yields each as it is finished, in order. Other processes decode.
    `show` is told how many images of the unfinished part are embedded."""
    index = ContentIndex(task.folders, pending.num_images)
    join = partial(join_items, task.records, task.draw, index)
    with closing(_embed_items(task, pending, index, show)) as finished:
        yield from joined(finished, pending, join)


def _embed_items(
    task: EmbedTask, pending: OpenParts, index: ContentIndex, show: Callable[[int], None]
) -> Generator[PartRecord, None, None]:
    if not len(pending):
        return
    listing = Listing(task.images)
    num_processes = min(usable_cpus(), len(pending))
    with ExitStack() as stack:
        # A thread for each process: closing a process lets its thread end.
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(num_processes)]
        processes = [stack.enter_context(closing(DecodingProcess())) for _ in range(num_processes)]
        turns = cycle(zip(threads, processes, strict=True))

        def start(part: PartRange, **options: Any) -> Future[DecodedPart]:
            thread, process = next(turns)
            return thread.submit(task.decode, part, listing, decode=process.decode, **options)

        embedder = PartEmbedder(
            task,
            index,
            num_threads=usable_cpus(),
            device="cpu",
            decode=lambda part: start(part).result(),
            on_batch=lambda part, num_embedded: show(num_embedded),
        )
        waiting, decoding = deque(pending), deque[tuple[PartRange, Future[DecodedPart]]]()
        while waiting or decoding:
            while waiting and len(decoding) <= num_processes:
                part = waiting.popleft()
                decoding.append((part, start(part, known=partial(known_hashes, index))))
            part, decoded = decoding.popleft()
            yield embedder.embed(part, decoded.result())
