"""Peak memory of the tables that the embed stage writes at its end, for one listing and for one three times as long.

The listing, the hashes beside the parts and the records are invented; a hundredth of the images have failed, and a
tenth are duplicates. From the two peaks follows that of `wanted` images: up to `IMAGES_PER_PASS` images the comparison
of contents grows with them, beyond it does not.
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

from icce_ray.embed import duplicates
from icce_ray.embed.finished_parts import DUPLICATES_NAME, Tally
from icce_ray.embed.part_hashes import PartHashes, write_hashes
from icce_ray.images.listing import SCHEMA, Listing
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part, PartRecord

SETTINGS: dict[str, Any] = {"num_images": [1_000_000, 3_000_000], "wanted": 100_000_000, "max_gb": 4.0}
SIZE = 65_536


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    few, many = settings["num_images"]
    peaks: dict[str, list[float]] = {"in one pass": [], "in passes of a million": []}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as p:
        for count in (few, many):
            p.apply(write, (f"{folder}/{count}", count))
            for name, per_pass in zip(peaks, (duplicates.IMAGES_PER_PASS, few), strict=True):
                peaks[name].append(p.apply(measure, (f"{folder}/{count}", count, per_pass)))
                print(f"{count:>10,} images, {name}: {peaks[name][-1] / 1e6:,.0f} MB", flush=True)
    compared, rest = ((last - first) / (many - few) for first, last in peaks.values())
    total = rest * settings["wanted"] + (compared - rest) * min(settings["wanted"], duplicates.IMAGES_PER_PASS)
    figures = {
        "peak_bytes": peaks,
        "bytes_per_image_in_one_pass": compared,
        "bytes_per_image_in_passes": rest,
        "gb_of_wanted": total / 1e9,
    }
    print(f"{settings['wanted']:,} images: {total / 1e9:.2f} GB ({compared:.0f} and {rest:.0f} bytes an image)")
    return figures, {f"below {settings['max_gb']:g} GB": total / 1e9 < settings["max_gb"]}


def write(folder: str, num_images: int) -> None:
    rng = np.random.default_rng(0)
    listing, place = ArtifactWriter(Folder.at(f"{folder}/images")), Folder.at(f"{folder}/embed")
    for number, start in enumerate(range(0, num_images, SIZE)):
        ids = np.arange(start, min(start + SIZE, num_images))
        columns = [pa.array(ids), pa.array([f"s3://bucket/folder/{image_id:012d}.jpg" for image_id in ids])]
        columns += [pa.nulls(len(ids), field.type) for field in SCHEMA][2:]
        listing.write_table(f"images-{number:05d}.parquet", pa.table(columns, schema=SCHEMA))
        contents = np.where(ids % 10 == 1, ids - 1, ids)[ids % 100 != 7]
        hashes = np.frombuffer(rng.bytes(32 * len(contents)), np.uint8).reshape(-1, 32).copy()
        hashes[:, 16:24] = contents.astype(np.uint64)[:, None].view(np.uint8) * np.uint8(97)
        hashes[:, 24:] = contents.astype(np.uint64)[:, None].view(np.uint8)
        write_hashes(place, f"part-{number:05d}.parquet", PartHashes(bytes(32), hashes))
    listing.commit(stage="images", fingerprint="0", inputs={}, config={}, metrics={}, seconds=0.0)


def measure(folder: str, num_images: int, images_per_pass: int) -> float:
    """How much the peak of this process grows while the tables are written."""
    duplicates.IMAGES_PER_PASS = images_per_pass
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
