"""Estimate what a run will take, by embedding a sample of the images on the cluster that the run would use."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import numpy as np

from icce_ray.config import Config, EmbedConfig
from icce_ray.embed.backbone_plan import check_backbones, plan_embedding
from icce_ray.embed.decode_and_embed import decode_part
from icce_ray.embed.embedding_parts import PartRange
from icce_ray.errors import ConfigError
from icce_ray.images.listing import Listing
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_stage
from icce_ray.runtime.progress import Progress, format_bytes, format_seconds
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

MAX_DECODED = 64
"""Images of the sample that are read and decoded here, to time only that."""


@dataclass(frozen=True)
class Estimate:
    """What a run of the whole collection is expected to take."""

    num_images: int
    num_sampled: int
    sampled_errors: int
    cpus: float
    gpus: float
    images_per_s: float
    startup_s: float
    """Seconds until the workers have their model."""
    embed_s: float
    embeddings_bytes: int
    """Size on storage."""
    matrix_bytes: int
    """Size of the features as one matrix: on the disk of each machine that trains, and in the memory of the workers
    that search neighbours."""
    graph_bytes: int
    """Upper bound of the size of the neighbour lists."""
    labels_bytes: int
    """Size of the label matrix, which the consensus works on."""

    def lines(self) -> list[str]:
        """The estimate as text."""
        return [
            f"{self.num_images:,} images; {self.num_sampled:,} of them embedded, {self.sampled_errors:,} failed",
            f"cluster           {self.cpus:g} CPUs, {self.gpus:g} GPUs",
            f"embedding         {self.images_per_s:,.3g} images/s after {self.startup_s:.0f} s of start-up: "
            f"{format_seconds(self.embed_s)}",
            f"embeddings        {format_bytes(self.embeddings_bytes)} on storage",
            f"feature matrix    {format_bytes(self.matrix_bytes)} on each machine's disk, memory-mapped; the neighbour "
            "search holds it in memory",
            f"neighbour graph   at most {format_bytes(self.graph_bytes)}",
            f"label matrix      {format_bytes(self.labels_bytes)} for the consensus",
        ]


def estimate(config: Config, *, num_samples: int = 256, quiet: bool = False) -> Estimate:
    """List the images, and embed a uniform sample of them. A later run uses the listing; the embeddings are not kept.

    Raises:
        UserError: as :func:`icce_ray.pipeline.run.run_pipeline`.
    """
    if config.embeddings.uri is not None:
        raise ConfigError("embeddings.uri: these embeddings are ready-made, so there is nothing to estimate")
    from icce_ray.embed.job import run
    from icce_ray.runtime.cluster_resources import available_cpus, available_gpus, check_resources
    from icce_ray.runtime.ray_cluster import connect

    step = plan(config, (IMAGES,))[0]
    check_backbones(config.embed)
    check_resources(config, ["embed"])
    listing = Listing(step.artifact or run_stage(config, step, {}, quiet))
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(len(listing), min(num_samples, len(listing)), replace=False))
    connect(config.resources)
    with tempfile.TemporaryDirectory(prefix="icce_ray-estimate-") as folder:
        images = _sample(listing, rows.tolist(), Folder.at(f"{folder}/images"))
        writer, clock = ArtifactWriter(Folder.at(f"{folder}/embed")), _Clock(quiet)
        # An output of its own: embeddings that are found instead of made would make the sample look fast.
        embed = config.embed.model_copy(update={"max_error_rate": 1.0})
        sampled = config.model_copy(update={"embed": embed, "output": folder})
        metrics = run(sampled, StageContext(writer, {"images": images}, clock))
        stored = sum(part.num_bytes for name, part in writer.parts.items() if name.startswith("part-"))
    good, num_images = max(1, metrics["num_images"]), len(listing)
    startup_s, embedded_per_s = clock.figures()
    decode_s = _decode_s(config.embed, listing, rows[:MAX_DECODED].tolist())
    # The sample was decoded while the workers started, so their rate is the rate of embedding alone.
    if config.resources.embed.gpus_per_worker:
        images_per_s = min(embedded_per_s, available_cpus() / decode_s)
    else:  # both use the same CPUs
        images_per_s = 1 / (1 / embedded_per_s + decode_s / available_cpus())
    max_neighbors = config.neighbors.max_neighbors or num_images
    return Estimate(
        num_images=num_images,
        num_sampled=len(rows),
        sampled_errors=metrics["num_errors"],
        cpus=available_cpus(),
        gpus=available_gpus(),
        images_per_s=images_per_s,
        startup_s=startup_s,
        embed_s=startup_s + num_images / images_per_s,
        embeddings_bytes=stored * num_images // good,
        matrix_bytes=num_images * metrics["dim"] * np.dtype(metrics["dtype"]).itemsize,
        graph_bytes=num_images * min(max_neighbors, num_images) * (4 if num_images < 2**31 else 8),
        labels_bytes=config.heads.num_heads * num_images * (2 if config.needed_images[0] < 2**15 else 4),
    )


def _decode_s(embed: EmbedConfig, listing: Listing, rows: list[int]) -> float:
    """Seconds to read and decode an image: CPU time, or waiting for storage."""
    images = [listing.rows(row, row + 1)[0] for row in rows]
    part, preprocessing = PartRange(0, 0, len(images)), plan_embedding(embed).preprocessing
    began = time.monotonic()
    decode_part(part, images, preprocessing, max_pixels=embed.max_image_pixels)
    return (time.monotonic() - began) / len(images)


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

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        super().update(done, total, note, num_errors)
        self.seen.append((time.monotonic(), done))

    def figures(self) -> tuple[float, float]:
        """Seconds until the workers had started, and images per second from then on."""
        (first, done_first), (last, done_last) = self.seen[0], self.seen[-1]
        if done_last == done_first or last <= first:  # a single part: start-up and work cannot be separated
            return 0.0, done_last / max(last - self.began, 1e-9)
        rate = (done_last - done_first) / (last - first)
        return max(0.0, first - self.began - done_first / rate), rate
