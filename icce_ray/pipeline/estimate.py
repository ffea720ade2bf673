"""Estimate what every stage of a run will take: embed a sample of the images where the run would, and run the other
stages on a pilot."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import PIXELS, Config, EmbedConfig
from icce_ray.consensus.consensus_memory import coordinator_bytes
from icce_ray.consensus.consensus_memory import worker_bytes as consensus_bytes
from icce_ray.embed.backbone_plan import RANDOM_WEIGHTS, check_backbones, plan_embedding
from icce_ray.embed.decode_and_embed import decode_part
from icce_ray.embed.embedding_parts import PartRange, read_part
from icce_ray.embed.feature_matrix import table_to_arrays
from icce_ray.embed.weights import local_weights
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import open_embeddings
from icce_ray.images.listing import Listing
from icce_ray.images.stage import IMAGES
from icce_ray.methods.heads.pair_batches import choose_batch_size
from icce_ray.methods.heads.training_memory import training_bytes
from icce_ray.neighbors.search import shard_bytes
from icce_ray.neighbors.search import worker_bytes as search_bytes
from icce_ray.pipeline.pilot import PilotRun, run_pilot, trains_heads
from icce_ray.pipeline.plan import plan, stages_of
from icce_ray.pipeline.run import run_stage
from icce_ray.report.page import EXEMPLARS_ON_SHEET
from icce_ray.report.pictures import MAX_SHEET_ROWS, SHEET_CELLS, contact_sheet, load_thumbnails, may_be_image, sheet
from icce_ray.runtime.machine import available_memory_bytes, num_gpus, peak_memory_bytes, usable_cpus
from icce_ray.runtime.progress import LONG_S, Progress, format_bytes, format_seconds
from icce_ray.runtime.ray_cluster import runs_here
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

RAY_START_S, WORKER_START_S = 8.0, 2.0
"""Of a run that uses Ray, on two cores."""
WORKER_BYTES = 400_000_000
"""Memory of a worker on Ray with its imports."""
LIGHT_BYTES = 120_000_000
"""Memory of a process before it imports torch."""
MAX_READ_ROWS = 65_536
MAX_DECODED = 64
"""Images of the sample that are read and decoded here, to time only that."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage is expected to take."""

    stage: str
    seconds: float
    memory_bytes: int
    """At its peak, on the machine that needs most."""
    disk_bytes: int
    """On storage."""

    def line(self) -> str:
        memory, disk = format_bytes(self.memory_bytes), format_bytes(self.disk_bytes)
        return _row(self.stage, format_seconds(self.seconds), memory, disk)


def _row(stage: str, time: str, memory: str, disk: str) -> str:
    return f"{stage:<14} {time:>13} {memory:>10} {disk:>10}"


@dataclass(frozen=True)
class Estimate:
    """What a run of the whole collection is expected to take on this machine, or on the cluster that it would use."""

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
    """What would make the stages shorter that take hours."""

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
        head = _row("stage", "time", "memory", "storage")
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
            embedded = _embed_sample(config, Listing(listed), num_samples, folder, quiet)
        else:
            embedded = _read_sample(config, num_samples)
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
    if not here:  # the first stage starts Ray, the others their workers
        seconds = {
            name: spent + (RAY_START_S if name == "embed" else WORKER_START_S) for name, spent in seconds.items()
        }
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


@dataclass(frozen=True)
class _Sample:
    """The features of a sample, and what it took to get them."""

    features_nD: npt.NDArray[Any]
    num_sampled: int
    num_errors: int
    seconds_per_image: float
    startup_s: float
    bytes_per_image: float
    base_bytes: int
    """Memory of this process with all that it has imported."""
    peak_bytes: int
    """The same while it embedded."""
    cpus: float
    gpus: float


def _read_sample(config: Config, num_samples: int) -> _Sample:
    began = time.monotonic()
    found = open_embeddings(config.embeddings)
    block = next(iter(found.blocks(min(found.num_rows, MAX_READ_ROWS))))
    read_s = (time.monotonic() - began) / len(block.rows_nD)
    rows = np.random.default_rng(config.seed).choice(
        len(block.rows_nD), min(num_samples, len(block.rows_nD)), replace=False
    )
    usable = rows[block.is_usable_n[rows]]
    return _Sample(
        features_nD=block.rows_nD[usable],
        num_sampled=len(rows),
        num_errors=len(rows) - len(usable),
        seconds_per_image=3 * read_s,  # read, compressed, written
        startup_s=0.0,
        bytes_per_image=found.dim * found.dtype.itemsize,
        base_bytes=peak_memory_bytes(),
        peak_bytes=peak_memory_bytes(),
        cpus=usable_cpus(),
        gpus=num_gpus(),
    )


def _embed_sample(config: Config, listing: Listing, num_samples: int, folder: Path, quiet: bool) -> _Sample:
    """Embed a sample as the run would: in this process, or on the cluster that it would use."""
    from icce_ray.embed.embed_images import run
    from icce_ray.runtime.cluster_resources import available_cpus, available_gpus, check_resources
    from icce_ray.runtime.ray_cluster import connect

    check_backbones(config.embed)
    check_resources(config, ["embed"])
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(len(listing), min(num_samples, len(listing)), replace=False))
    here = runs_here(config.resources, len(rows))
    if not here:
        connect(config.resources)
    cpus, gpus = (float(usable_cpus()), 0.0) if here else (available_cpus(), available_gpus())
    base_bytes = peak_memory_bytes()
    images = _sample(listing, rows.tolist(), Folder.at(folder / "images"))
    writer, clock = ArtifactWriter(Folder.at(folder / "embed")), _Clock(quiet)
    # An output of its own: embeddings that are found instead of made would make the sample look fast.
    embed = config.embed.model_copy(update={"max_error_rate": 1.0})
    sampled = config.model_copy(update={"embed": embed, "output": str(folder)})
    metrics = run(sampled, StageContext(writer, {"images": images}, clock))
    parts = [name for name in writer.parts if name.startswith("part-")]
    tables = [read_part(writer.folder, name) for name in sorted(parts)]
    features_nD = np.concatenate([table_to_arrays(table)[1] for table in tables])
    startup_s, embedded_per_s = clock.figures()
    decode_s = _decode_s(config.embed, listing, rows[:MAX_DECODED].tolist())
    # The sample was decoded while the workers started, so their rate is the rate of embedding alone.
    if config.resources.embed.gpus_per_worker:
        seconds_per_image = max(1 / embedded_per_s, decode_s / cpus)
    else:  # both use the same CPUs
        seconds_per_image = 1 / embedded_per_s + decode_s / cpus
    return _Sample(
        features_nD=features_nD,
        num_sampled=len(rows),
        num_errors=metrics["num_errors"],
        seconds_per_image=seconds_per_image,
        startup_s=startup_s,
        bytes_per_image=sum(writer.parts[name].num_bytes for name in parts) / max(1, metrics["num_images"]),
        base_bytes=base_bytes,
        peak_bytes=peak_memory_bytes(),
        cpus=cpus,
        gpus=gpus,
    )


def _memory(config: Config, num_images: int, sample: _Sample, pilot: PilotRun, here: bool) -> dict[str, int]:
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


def _decode_s(embed: EmbedConfig, listing: Listing, rows: list[int]) -> float:
    """Seconds to read and decode an image: CPU time, or waiting for storage."""
    images = [listing.rows(row, row + 1)[0] for row in rows]
    part, preprocessing = PartRange(0, 0, len(images)), plan_embedding(embed).preprocessing
    began = time.monotonic()
    decode_part(part, images, preprocessing, max_pixels=embed.max_image_pixels)
    return (time.monotonic() - began) / len(images)


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


def _sample(listing: Listing, rows: list[int], folder: Folder) -> Artifact:
    """A listing of some rows of another listing, numbered from 0."""
    import pyarrow as pa

    table = pa.concat_tables([listing.table(row, row + 1) for row in rows])
    ids = pa.array(np.arange(len(table), dtype=np.int64))
    writer = ArtifactWriter(folder)
    writer.write_table("images-00000.parquet", table.set_column(0, "image_id", ids))
    return writer.commit(stage="images", fingerprint="sample", inputs={}, config={}, metrics={}, seconds=0.0)


class _Clock(Progress):
    """Records how many images were done at which time."""

    def __init__(self, quiet: bool) -> None:
        super().__init__("estimate", quiet=quiet)
        self.began = time.monotonic()
        self.seen: list[tuple[float, int]] = []

    def update(self, done: int, total: int | None, note: str = "", num_errors: int = 0) -> None:
        super().update(done, total, note, num_errors)
        self.seen.append((time.monotonic(), done))

    def figures(self) -> tuple[float, float]:
        """Seconds until the workers had started, and images per second from then on."""
        (first, done_first), (last, done_last) = self.seen[0], self.seen[-1]
        if done_last == done_first or last <= first:  # a single part: start-up and work cannot be separated
            return 0.0, done_last / max(last - self.began, 1e-9)
        rate = (done_last - done_first) / (last - first)
        return max(0.0, first - self.began - done_first / rate), rate
