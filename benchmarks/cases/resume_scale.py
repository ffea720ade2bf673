"""What a resumed or repeated embedding reads, and how long its driver needs for each work item.

The parts are invented. `resume` takes in finished parts of real size, half of whose images are duplicates, and counts
the bytes that are read: for the content index, and for the tables at the end of the stage. `retry` plans to try errors
again in artifacts of which only the tables are there: twice the parts must take twice the time. `driver` is what the
driver keeps of each work item that is finished, without what Ray Data keeps of the items of a wave.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from cases import show_aim
from icce_ray.embed.content_index import ContentIndex
from icce_ray.embed.embedding_parts import ERRORS_NAME, PartRange, part_table, plan_parts, write_part
from icce_ray.embed.finished_parts import ReusableParts, Tally
from icce_ray.embed.work_items import OpenPart, OpenParts, WorkItems, joined
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part, PartRecord, PartRecords

SETTINGS: dict[str, Any] = {
    "num_parts": 50,
    "retried_parts": [2_000, 4_000],
    "num_items": [12_800, 25_600],
    "images_per_item": 512,
    "dim": 768,
    "max_share": 0.03,
    "max_bytes_per_item": 100,
    "max_growth": 2.6,
}


class Uris:
    """As much of a listing as the tally asks for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def table(self, start: int, stop: int) -> pa.Table:
        return pa.table({"uri": [f"s3://bucket/{number:012d}.jpg" for number in range(start, stop)]})


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        figures |= resume(Folder.at(f"{folder}/resume"), settings)
        seconds = [retry(Folder.at(f"{folder}/{count}"), count, settings) for count in settings["retried_parts"]]
    figures |= {"retry_s": seconds, "retry_growth": seconds[-1] / seconds[0]}
    few, many = settings["num_items"]
    kept = (driver(many, settings["images_per_item"]) - driver(few, settings["images_per_item"])) / (many - few)
    figures |= {"driver_bytes_per_item": kept}
    for name, value in figures.items():
        print(f"{name:28} {value}")
    show_aim("bytes read, times the artifact", "2.0", f"{figures['read_share']:.3f}", f"{settings['max_share']:g}")
    show_aim("a retry of twice the parts, times as long", "4", f"{figures['retry_growth']:.1f}", "2")
    bounds = {
        "bytes read in all, share of the artifact": figures["read_share"] < settings["max_share"],
        "retry of twice the parts, times as long": figures["retry_growth"] < settings["max_growth"],
        "bytes that the driver keeps of an item": kept < settings["max_bytes_per_item"],
    }
    return figures, bounds


def resume(folder: Folder, settings: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    parts = plan_parts(settings["num_parts"] * settings["images_per_item"], settings["images_per_item"])
    records = PartRecords(folder, "source")
    for part in parts:
        hashes = pa.array([rng.bytes(32).hex() for _ in range(part.num_images // 2)] * 2)
        vectors = rng.standard_normal((part.num_images, settings["dim"])).astype(np.float16)
        write_part(records, part, part_table(np.arange(part.start, part.stop), vectors, hashes))
    artifact_bytes = sum(size for name, size in folder.sizes().items() if name.endswith(".parquet"))
    tally = Tally(context_at(folder), Uris(parts[-1].stop), 0.0)  # type: ignore[arg-type]
    num_read, whole, start = [0], Folder.read_bytes, Folder.read_start

    def counted(read: Any) -> Any:
        def read_and_count(*arguments: Any) -> bytes:
            data: bytes = read(*arguments)
            num_read[-1] += len(data)
            return data

        return read_and_count

    Folder.read_bytes, Folder.read_start = counted(whole), counted(start)  # type: ignore[method-assign]
    began = time.process_time()
    try:
        missing, _ = tally.resume(parts, records)
        assert not missing
        resume_s = time.process_time() - began
        ContentIndex([folder])
        num_read.append(0)
        assert tally.finish("vectors")["num_duplicates"] == parts[-1].stop // 2
    finally:
        Folder.read_bytes, Folder.read_start = whole, start  # type: ignore[method-assign]
    return {
        "artifact_bytes": artifact_bytes,
        "read_share": sum(num_read) / artifact_bytes,
        "read_share_at_the_end": num_read[1] / artifact_bytes,
        "resume_cpu_ms_per_part": 1000 * resume_s / len(parts),
    }


def retry(folder: Folder, num_parts: int, settings: dict[str, Any]) -> float:
    """CPU seconds of the plan: a tenth of the parts have an error."""
    size = settings["images_per_item"]
    writer, num_images = ArtifactWriter(folder), num_parts * size
    for part in plan_parts(num_images, size):
        writer.add(Part(name=part.file_name, num_bytes=1, sha256="0" * 64, rows=size, dtype="float16", shape=(size, 1)))
    ids = np.arange(0, num_images, 10 * size)
    writer.write_table(ERRORS_NAME, pa.table({"image_id": ids, "reason": ["truncated"] * len(ids)}))
    artifact = writer.commit(
        stage="embed", fingerprint="0", inputs={}, config={}, metrics={"images_per_part": size}, seconds=0.0
    )
    found = Artifact.find(folder)
    assert found is not None
    listing: Any = Uris(num_images)
    began, tally = time.process_time(), Tally(context_at(folder), listing, 1.0)
    earlier, again = ReusableParts(artifact, listing), []
    for part in earlier.parts:
        record = earlier.record(part)
        if failed := [image_id for image_id, _ in record.metrics["errors"]]:
            again.append(OpenPart(part, WorkItems(part, size).with_images(failed), record))
        else:
            tally.add_earlier(record)
    assert len(OpenParts(again, {})) == len(ids)
    return time.process_time() - began


def driver(num_items: int, size: int) -> int:
    """Bytes that are kept when all items of a collection are finished, in parts of 128 items."""
    parts = plan_parts(num_items * size, 128 * size)
    tracemalloc.start()
    pending = OpenParts([OpenPart(part, WorkItems(part, size)) for part in parts], {})
    tally = Tally(context_at(Folder.at("/nowhere")), Uris(num_items * size), 1.0)  # type: ignore[arg-type]

    def finished() -> Iterator[PartRecord]:
        yield from (record_of(item, [(item.start, "truncated")]) for item in pending)

    def join(whole: OpenPart, items: list[PartRecord]) -> PartRecord:
        return record_of(whole.part, [], joined=True)

    for record in joined(finished(), pending, join):
        tally.add(record)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


def record_of(part: PartRange, errors: list[tuple[int, str]], **metrics: Any) -> PartRecord:
    file = Part(name=part.file_name, num_bytes=1, sha256="0" * 64, rows=1, dtype="float16", shape=(1, 1))
    figures = {"start": part.start, "num_images": part.num_images, "errors": errors, "num_embedded": 1}
    return PartRecord(name=part.name, files=(file,), metrics=figures | metrics)


def context_at(folder: Folder) -> StageContext:
    progress: Any = SimpleNamespace(update=lambda *counts, **more: None)
    return StageContext(ArtifactWriter(folder), {}, progress)
