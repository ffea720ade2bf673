"""Estimate what every stage of a run will take: embed a sample of the images where the run would, and run the other
stages on a pilot."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icce_ray.config import PIXELS, Config
from icce_ray.consensus.consensus_memory import coordinator_bytes
from icce_ray.consensus.consensus_memory import worker_bytes as consensus_bytes
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS
from icce_ray.embed.weights import local_weights
from icce_ray.errors import InputError
from icce_ray.images.listing import Listing
from icce_ray.images.stage import IMAGES
from icce_ray.methods.heads.pair_batches import choose_batch_size
from icce_ray.methods.heads.training_memory import training_bytes
from icce_ray.neighbors.search import shard_bytes
from icce_ray.neighbors.search import worker_bytes as search_bytes
from icce_ray.pipeline.estimate_sample import EmbeddedSample, embed_sample, read_sample
from icce_ray.pipeline.pilot import PilotRun, run_pilot, trains_heads
from icce_ray.pipeline.plan import plan, stages_of
from icce_ray.pipeline.run import run_stage
from icce_ray.report.page import EXEMPLARS_ON_SHEET
from icce_ray.report.pictures import MAX_SHEET_ROWS, SHEET_CELLS, contact_sheet, load_thumbnails, may_be_image, sheet
from icce_ray.runtime.machine import available_memory_bytes
from icce_ray.runtime.progress import LONG_S, format_bytes, format_seconds
from icce_ray.runtime.ray_cluster import runs_here

ROW = "{:<14} {:>13} {:>10} {:>10}"
RAY_START_S, WORKER_START_S = 8.0, 2.0
"""Times of a run that uses Ray, on two cores."""
WORKER_BYTES = 400_000_000
"""Memory of a worker on Ray with its imports."""
LIGHT_BYTES = 120_000_000
"""Memory of a process before it imports torch."""


@dataclass(frozen=True)
class StageEstimate:
    """Expected time, memory and storage of one stage."""

    stage: str
    seconds: float
    memory_bytes: int
    """At its peak, on the machine that needs most."""
    disk_bytes: int
    """On storage."""

    def line(self) -> str:
        memory, disk = format_bytes(self.memory_bytes), format_bytes(self.disk_bytes)
        return ROW.format(self.stage, format_seconds(self.seconds), memory, disk)


@dataclass(frozen=True)
class Estimate:
    """The same for a run of the whole collection, on this machine or on the cluster that it would use."""

    num_images: int
    num_sampled: int
    sampled_errors: int
    cpus: float
    gpus: float
    images_per_s: float | None
    """Rate of the embedding; None for ready-made embeddings."""
    stages: tuple[StageEstimate, ...]
    available_memory_bytes: int
    shortcuts: tuple[str, ...]
    """Settings that would shorten the stages that take hours."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def lines(self) -> list[str]:
        """The estimate as text."""
        rate = "" if self.images_per_s is None else f"; {self.images_per_s:,.3g} images/s"
        said = f"{self.num_sampled:,} of {self.num_images:,} images embedded, {self.sampled_errors:,} failed{rate}"
        largest = max(stage.memory_bytes for stage in self.stages)
        table = [*self.stages, StageEstimate("together", self.seconds, largest, self.disk_bytes)]
        memory = f"{self.cpus:g} CPUs, {self.gpus:g} GPUs, {format_bytes(self.available_memory_bytes)} of free memory"
        head = ROW.format("stage", "time", "memory", "storage")
        return [said, memory, "", head, *(stage.line() for stage in table), *self.shortcuts]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "disk_bytes": self.disk_bytes}


def estimate(config: Config, *, num_samples: int = 256, quiet: bool = False) -> Estimate:
    """List the images, embed a uniform sample of them, and run the other stages on a pilot. A later run uses the
    listing; nothing else is kept. Raises UserError: as :func:`icce_ray.pipeline.run.run_pipeline`."""
    with tempfile.TemporaryDirectory(prefix="icce_ray-estimate-") as place:
        folder = Path(place)
        began = time.monotonic()
        step = plan(config, (IMAGES,))[0]
        listed = step.artifact or run_stage(config, step, {}, quiet)
        listing_s = listed.manifest.seconds if step.artifact is not None else time.monotonic() - began
        num_images = len(Listing(listed))
        if config.embeddings.uri is None:
            embedded = embed_sample(config, Listing(listed), num_samples, folder, quiet)
        else:
            embedded = read_sample(config, num_samples)
        if len(embedded.features_nD) < 2:
            raise InputError(f"{embedded.num_errors:,} of {embedded.num_sampled:,} sampled images cannot be used")
        here = runs_here(config.resources, num_images)
        parallel = 1.0 if here else embedded.cpus
        pilot = run_pilot(config, embedded.features_nD, num_images=num_images, folder=folder, num_parallel=parallel)
    bytes_of = _memory(config, num_images, embedded, pilot, here)
    disk_bytes = {"images": listed.num_bytes()}
    disk_bytes |= {"embed": round(embedded.bytes_per_image * num_images), **pilot.disk_bytes}
    disk_bytes["classifier"] = disk_bytes.get("classifier", 0) + _backbone_bytes(config)
    seconds = {"images": listing_s, "embed": embedded.startup_s + num_images * embedded.seconds_per_image}
    seconds |= pilot.seconds
    for name in () if here else seconds:  # the first stage starts Ray, the others their workers
        seconds[name] += RAY_START_S if name == "embed" else WORKER_START_S
    pictures_s, pictures_bytes = _page_pictures(Listing(listed), config, pilot)
    seconds["report"] += pictures_s
    disk_bytes["report"] = disk_bytes.get("report", 0) + pictures_bytes
    return Estimate(
        num_images=num_images,
        num_sampled=embedded.num_sampled,
        sampled_errors=embedded.num_errors,
        cpus=embedded.cpus,
        gpus=embedded.gpus,
        images_per_s=1 / embedded.seconds_per_image if config.embeddings.uri is None else None,
        stages=tuple(
            StageEstimate(name, spent, bytes_of[name], disk_bytes.get(name, 0)) for name, spent in seconds.items()
        ),
        available_memory_bytes=available_memory_bytes(),
        shortcuts=tuple(
            f"{stage.name} takes long. Shorter: {stage.shortcut(config)}"
            for stage in stages_of(config)
            if stage.shortcut is not None and seconds.get(stage.name, 0.0) > LONG_S and stage.shortcut(config)
        ),
    )


def _memory(config: Config, num_images: int, sample: EmbeddedSample, pilot: PilotRun, here: bool) -> dict[str, int]:
    """Peak memory by stage: that of this process, and what the stage computes for itself before it starts. In a run
    that uses Ray, the driver imports less, and Ray's own processes take what that saves; its workers come on top."""
    n, dim = min(num_images, config.sample.max_images or num_images), sample.features_nD.shape[1]
    features = 4 * n * dim
    shards = config.resources.neighbors.num_workers
    search = shard_bytes(n, dim) // shards + search_bytes(n, dim, pilot.mean_neighbors)
    num_clusters = pilot.num_clusters if config.is_auto else config.num_clusters
    heads = np.full(config.heads.num_heads if trains_heads(config) else 1, num_clusters)
    needed = {"embed": sample.peak_bytes - sample.base_bytes, "sample": 2 * features, "neighbors": search}
    needed |= {"method": 2 * features, "classifier": 2 * features}
    if trains_heads(config):
        needed["method"] = training_bytes(
            config.heads,
            num_images=n,
            dim=dim,
            num_clusters=num_clusters,
            batch_size=choose_batch_size(n, config.heads.batch_size),
            device=torch.device("cpu"),
            num_threads=int(sample.cpus),
            num_workers=config.resources.method.num_workers,
        )
    needed["consensus"] = coordinator_bytes(n, heads, num_clusters, config.consensus.methods, pilot.mean_neighbors > 0)
    needed["consensus"] += consensus_bytes(n, heads, num_clusters)
    if not here:
        workers = {"neighbors": shards, "method": config.resources.method.num_workers}
        needed = {name: number + WORKER_BYTES * workers.get(name, 1) for name, number in needed.items()}
    without_torch: tuple[str, ...] = ()
    if here:
        is_read = config.embeddings.uri is not None or config.embed.backbone == PIXELS
        without_torch = ("images", "embed", "sample") if is_read else ("images",)
    return {
        name: (LIGHT_BYTES if name in without_torch else sample.base_bytes) + needed.get(name, 0)
        for name in ("images", *pilot.seconds, *needed)
    }


def _backbone_bytes(config: Config) -> int:
    """Size of the weights that the model folder gets a copy of."""
    weights = config.embed.weights
    if config.embeddings.uri is not None or weights in (None, RANDOM_WEIGHTS) or not config.classifier.include_backbone:
        return 0
    assert weights is not None
    return local_weights(weights).stat().st_size


def _page_pictures(listing: Listing, config: Config, pilot: PilotRun) -> tuple[float, int]:
    """Seconds and bytes of the thumbnails on the page and of the contact sheet, from those of a few images."""
    rows = np.linspace(0, len(listing) - 1, min(len(listing), 2 * SHEET_CELLS)).astype(np.int64)
    uris = [listing.rows(row, row + 1)[0].uri for row in rows.tolist()]
    if not any(map(may_be_image, uris)):
        return 0.0, 0
    began, spent, num_bytes = time.monotonic(), [], []
    for loaded in load_thumbnails(uris):
        num_bytes.append(len(sheet(loaded) or b"") / len(loaded))
        spent.append((time.monotonic() - began) / len(loaded))
        began = time.monotonic()
    pictures = [picture for picture in loaded if picture is not None][:EXEMPLARS_ON_SHEET]
    row_bytes = len(contact_sheet([("", pictures)]) or b"")
    row_s = time.monotonic() - began
    num_shown, num_rows = min(len(listing), config.report.max_images), min(pilot.num_clusters, MAX_SHEET_ROWS)
    # The first sheet has the start of a process, too.
    return num_shown * spent[-1] + num_rows * row_s, round(num_shown * num_bytes[-1] + num_rows * row_bytes)
