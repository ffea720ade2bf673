"""Peak memory of the tables that the embed stage writes at its end, for one listing and for one three times as long.

The listing, the hashes beside the parts and the records are invented; a hundredth of the images have failed, and a
tenth are duplicates. From the two peaks follows that of `wanted` images.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.embed.finished_parts import DUPLICATES_NAME, Tally
from icce_ray.embed.part_hashes import PartHashes, write_hashes
from icce_ray.images.listing import SCHEMA, Listing
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part, PartRecord

# In both, as many images are compared at once.
SETTINGS: dict[str, Any] = {"num_images": [4_000_000, 8_000_000], "wanted": 100_000_000, "max_gb": 4.0}
SIZE = 65_536
MULTIPLIERS = np.random.default_rng(0).integers(2**64 - 1, size=4, dtype=np.uint64) | np.uint64(1)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    few, many = settings["num_images"]
    peaks = list[float]()
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as p:
        for count in (few, many):
            p.apply(write, (f"{folder}/{count}", count))
            peaks.append(p.apply(measure, (f"{folder}/{count}", count)))
            print(f"{count:>10,} images: {peaks[-1] / 1e6:,.0f} MB", flush=True)
    per_image = (peaks[1] - peaks[0]) / (many - few)
    total = peaks[1] + per_image * (settings["wanted"] - many)
    figures = {"peak_bytes": peaks, "bytes_per_image": per_image, "gb_of_wanted": total / 1e9}
    print(f"{settings['wanted']:,} images: {total / 1e9:.2f} GB ({per_image:.1f} bytes an image)")
    return figures, {f"below {settings['max_gb']:g} GB": total / 1e9 < settings["max_gb"]}


def write(folder: str, num_images: int) -> None:
    listing, place = ArtifactWriter(Folder.at(f"{folder}/images")), Folder.at(f"{folder}/embed")
    for number, start in enumerate(range(0, num_images, SIZE)):
        ids = np.arange(start, min(start + SIZE, num_images))
        columns = [pa.array(ids), pa.array([f"s3://bucket/folder/{image_id:012d}.jpg" for image_id in ids])]
        columns += [pa.nulls(len(ids), field.type) for field in SCHEMA][2:]
        listing.write_table(f"images-{number:05d}.parquet", pa.table(columns, schema=SCHEMA))
        contents = np.where(ids % 10 == 1, ids - 1, ids)[ids % 100 != 7]
        words = contents.astype(np.uint64)[:, None] * MULTIPLIERS
        write_hashes(place, f"part-{number:05d}.parquet", PartHashes(bytes(32), words.view(np.uint8)))
    listing.commit(stage="images", fingerprint="0", inputs={}, config={}, metrics={}, seconds=0.0)


def measure(folder: str, num_images: int) -> float:
    """How much the peak of this process grows while the tables are written."""
    images = Artifact.find(Folder.at(f"{folder}/images"))
    assert images is not None
    progress: Any = SimpleNamespace(update=lambda *counts, **more: None, note=print)
    context = StageContext(ArtifactWriter(Folder.at(f"{folder}/embed")), {}, progress)
    before = _peak()
    tally = Tally(context, Listing(images), 1.0)
    for number, start in enumerate(range(0, num_images, SIZE)):
        stop = min(start + SIZE, num_images)
        errors = [(image_id, "truncated") for image_id in range(start, stop) if image_id % 100 == 7]
        file = Part(name=f"part-{number:05d}.parquet", num_bytes=1, sha256="0" * 64, dtype="float16", shape=(1, 1))
        metrics = {"start": start, "num_images": stop - start, "errors": errors, "num_embedded": 0}
        tally.add(PartRecord(name=f"part-{number:05d}", files=(file,), metrics=metrics))
    began, found = time.perf_counter(), tally.finish("vectors")
    assert found["num_duplicates"] == context.output.parts[DUPLICATES_NAME].rows == num_images // 10
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    return float(_peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
