"""Peak memory of the tables that the embed stage writes at its end, and of matching a label file that names all images,
each for two listings of different length. From the two peaks follows that of `wanted` images.

The listing, the hashes beside the parts, the records and the label file are invented; a hundredth of the images have
failed, and a tenth are duplicates. Both label files leave as many names to match: the most that there can be.
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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cases import show_aim
from icce_ray.config import EvaluateConfig
from icce_ray.embed.finished_parts import DUPLICATES_NAME, Tally
from icce_ray.embed.part_hashes import PartHashes, write_hashes
from icce_ray.evaluate.labels import named_images
from icce_ray.evaluate.run_scores import MAX_SCORED
from icce_ray.images.listing import SCHEMA, Listing
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part, PartRecord

SETTINGS: dict[str, Any] = {
    "num_images": [4_000_000, 8_000_000],  # in both, as many images are compared at once
    "num_named": [1_980_000, 7_920_000],  # all of them are used, or a quarter
    "wanted": 100_000_000,
    "max_gb": 4.0,
}
SIZE = 65_536
BEFORE_GB = {"tables": 40, "labels": 92}
"""What `wanted` images took before tables were written in pieces, and label files read in pieces."""
MULTIPLIERS = np.random.default_rng(0).integers(2**64 - 1, size=4, dtype=np.uint64) | np.uint64(1)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures, bounds = dict[str, Any](), dict[str, bool]()
    for name, counts, prepare, work in (
        ("tables", settings["num_images"], write, measure),
        ("labels", settings["num_named"], write_labels, measure_labels),
    ):
        peaks = list[float]()
        with (
            tempfile.TemporaryDirectory() as folder,
            multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as p,
        ):
            for count in counts:
                p.apply(prepare, (f"{folder}/{count}", count))
                peaks.append(p.apply(work, (f"{folder}/{count}", count)))
                print(f"{name}, {count:>10,} images: {peaks[-1] / 1e6:,.0f} MB", flush=True)
        per_image = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
        gigabytes = (max(peaks) + max(0, per_image) * (settings["wanted"] - counts[1])) / 1e9
        figures[name] = {"peak_bytes": peaks, "bytes_per_image": per_image, "gb_of_wanted": gigabytes}
        print(f"{name}, {settings['wanted']:,} images: {gigabytes:.2f} GB ({per_image:.1f} bytes an image)", flush=True)
        show_aim(
            f"memory of {name}", f"{BEFORE_GB[name]} GB", f"{gigabytes:.2f} GB", f"below {settings['max_gb']:g} GB"
        )
        bounds[f"{name}: below {settings['max_gb']:g} GB"] = gigabytes < settings["max_gb"]
    return figures, bounds


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


def write_labels(folder: str, num_images: int) -> None:
    listing = ArtifactWriter(Folder.at(f"{folder}/images"))
    labels = pa.schema([("uri", pa.string()), ("label", pa.string())])
    with pq.ParquetWriter(f"{folder}.parquet", labels) as file:
        for number, start in enumerate(range(0, num_images, SIZE)):
            ids = np.arange(start, min(start + SIZE, num_images))
            names = pa.array([f"folder/{image_id:012d}.jpg" for image_id in ids])
            uris = pc.binary_join_element_wise("s3://bucket/", names, "")
            columns = [pa.array(ids), uris, *[pa.nulls(len(ids), field.type) for field in SCHEMA][2:]]
            listing.write_table(f"images-{number:05d}.parquet", pa.table(columns, schema=SCHEMA))
            classes = pc.binary_join_element_wise("class ", pa.array(ids % 1000).cast(pa.string()), "")
            file.write_table(pa.table([names, classes], schema=labels))
    listing.commit(stage="images", fingerprint="0", inputs={}, config={}, metrics={}, seconds=0.0)


def measure_labels(folder: str, num_images: int) -> float:
    """How much the peak of this process grows while the names of a label file are matched."""
    images = Artifact.find(Folder.at(f"{folder}/images"))
    assert images is not None
    evaluate = EvaluateConfig(labels=f"{folder}.parquet", uri_column="uri")
    before, began = _peak(), time.perf_counter()
    found = named_images(evaluate, Listing(images), MAX_SCORED)
    assert MAX_SCORED / 2 < len(found.image_ids) <= MAX_SCORED
    assert [int(found.names[code][6:]) for code in found.classes[::1000]] == (found.image_ids[::1000] % 1000).tolist()
    print(f"{time.perf_counter() - began:.1f} s, {len(found.image_ids):,} images with a label", flush=True)
    return float(_peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
