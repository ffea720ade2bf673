"""Embed a sample of the images where the run would, and measure what that takes."""

import time
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import Config, EmbedConfig
from icce_ray.embed.backbone_plan import check_backbones, plan_embedding
from icce_ray.embed.decode_and_embed import decode_part
from icce_ray.embed.embedding_parts import PartRange, read_part
from icce_ray.embed.feature_matrix import table_to_arrays
from icce_ray.images.embedding_files import open_embeddings
from icce_ray.images.listing import Listing
from icce_ray.runtime.machine import num_gpus, peak_memory_bytes, usable_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import runs_here
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

MAX_READ_ROWS = 65_536
MAX_DECODED = 64
"""Images of the sample that are read and decoded here, to time only that."""


@dataclass(frozen=True)
class EmbeddedSample:
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


def read_sample(config: Config, num_samples: int) -> EmbeddedSample:
    began = time.monotonic()
    found = open_embeddings(config.embeddings)
    block = next(iter(found.blocks(min(found.num_rows, MAX_READ_ROWS))))
    read_s = (time.monotonic() - began) / len(block.rows_nD)
    num_read = len(block.rows_nD)
    rows = np.random.default_rng(config.seed).choice(num_read, min(num_samples, num_read), replace=False)
    usable = rows[block.is_usable_n[rows]]
    return EmbeddedSample(
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


def embed_sample(config: Config, listing: Listing, num_samples: int, folder: Path, quiet: bool) -> EmbeddedSample:
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
    # The sample was decoded while the workers started, so their rate is the rate of embedding alone. Without GPUs both
    # use the same CPUs.
    together = max if config.resources.embed.gpus_per_worker else add
    return EmbeddedSample(
        features_nD=features_nD,
        num_sampled=len(rows),
        num_errors=metrics["num_errors"],
        seconds_per_image=together(1 / embedded_per_s, decode_s / cpus),
        startup_s=startup_s,
        bytes_per_image=sum(writer.parts[name].num_bytes for name in parts) / max(1, metrics["num_images"]),
        base_bytes=base_bytes,
        peak_bytes=peak_memory_bytes(),
        cpus=cpus,
        gpus=gpus,
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
