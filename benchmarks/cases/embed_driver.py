"""Memory of the driver of an embedding on Ray Data, over many work items that do nothing.

Ray Data, the content index, the waves and the tally are the real ones; decoding, the backbone and the files are left
out. Within a wave the driver's memory grows, because Ray Data keeps figures of each block. `slope` is what is left of
that for each item of the second half of the waves, in bytes that are allocated: the first ones fill caches, and freed
memory that the allocator keeps (resident) is used again. `own` is what our structures keep of an item, without Ray:
records of parts, counts, the tables of errors.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from cases import show_aim
from icce_ray.config import Config
from icce_ray.embed import job
from icce_ray.embed.embedding_parts import PartRange, plan_parts
from icce_ray.embed.finished_parts import Tally
from icce_ray.embed.work_items import OpenPart, OpenParts, WorkItems, joined
from icce_ray.runtime.ray_cluster import connect, disconnect
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder, Part, PartRecord

SETTINGS: dict[str, Any] = {
    "num_items": 100_000,
    "items_per_wave": 10_000,
    "num_cpus": 16,
    "num_workers": 4,
    "num_own_items": 100_000,
    "max_bytes_per_item": 250.0,
    "max_own_bytes": 50.0,
}
ITEM, ITEMS_PER_PART = 512, 128
PROGRESS: Any = SimpleNamespace(update=lambda *_, **__: None, note=print, waits=lambda *_: None)


def decode(batch: Any, task: Any, shards: list[Any]) -> Any:
    return pa.table({"part": batch["part"]})


class Embedder:
    def __init__(self, **_: Any) -> None:
        pass

    def __call__(self, batch: Any) -> Any:
        return job._to_row(record_of(PartRange.from_json(batch["part"][0].as_py())).model_dump_json())


def join(task: Any, shards: list[Any], whole: OpenPart, items: list[PartRecord]) -> pa.Table:
    return job._to_row(record_of(whole.part, joined=True).model_dump_json())


def record_of(part: PartRange, **metrics: Any) -> PartRecord:
    file = Part(name=part.file_name, num_bytes=1, sha256="0" * 64, rows=1, dtype="float16", shape=(1, 1))
    figures = {"start": part.start, "num_images": part.num_images, "errors": [], "num_embedded": 1}
    return PartRecord(name=part.name, files=(file,), metrics=figures | metrics)


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    num_items, per_wave = settings["num_items"], settings["items_per_wave"]
    job.decode, job.Embedder, job._join = decode, Embedder, join  # type: ignore[assignment, misc]
    job_items, job.ITEMS_PER_WAVE = job.ITEMS_PER_WAVE, per_wave
    with tempfile.TemporaryDirectory() as place:
        own = measure_own(place, settings["num_own_items"])
        print(f"{own:.0f} bytes of our own for each item", flush=True)
        # Ray Data looks ten times a second what is finished, so more CPUs than there are let it do more at a time.
        resources = {
            "num_cpus": settings["num_cpus"],
            "embed": {"num_workers": settings["num_workers"], "cpus_per_worker": 1},
        }
        config = Config.model_validate(
            {"images": {"uri": place}, "num_clusters": 2, "output": place, "resources": resources}
        )
        plan = SimpleNamespace(preprocessing=SimpleNamespace(shape=(224, 224, 3)))
        task: Any = SimpleNamespace(config=config, plan=plan, folders=[Folder.at(place)])
        pending, tally = of_items(place, num_items)
        connect(config.resources)
        held, resident, began, num_finished = [_allocated()], [_resident()], time.perf_counter(), 0
        try:
            with closing(job.embed_on_ray(task, pending, lambda *_: None, PROGRESS)) as finished:
                for record in finished:
                    tally.add(record)
                    num_finished += not record.metrics.get("joined")
                    if num_finished == len(held) * per_wave and not record.metrics.get("joined"):
                        gc.collect()
                        held.append(_allocated())
                        resident.append(_resident())
                        seconds = time.perf_counter() - began
                        sizes = f"{held[-1] / 1e6:8.2f} MB allocated, {resident[-1] / 1e6:6.1f} MB resident"
                        print(f"{num_finished:>9,} items {sizes} {seconds:6.0f} s", flush=True)
        finally:
            disconnect()
    assert tally._num_done == num_items * ITEM
    half = len(held) // 2
    num_waves = len(held) - 1 - half
    slope = (held[-1] - held[half]) / (num_waves * per_wave)
    show_aim("bytes of the driver for each item", "not known", f"{slope:.0f}, {own:.0f} of them our own", "0")
    print(f"{slope * per_wave / 1e6:.2f} MB for each wave, of which the run has one for {job_items:,} items")
    bounds = {
        f"at most {settings['max_bytes_per_item']:g} bytes for each item": slope <= settings["max_bytes_per_item"],
        f"at most {settings['max_own_bytes']:g} of them our own": own <= settings["max_own_bytes"],
    }
    figures = {"allocated": held, "resident": resident, "slope": slope, "own": own, "items_per_s": num_items / seconds}
    return figures, bounds


def measure_own(place: str, num_items: int) -> float:
    """Bytes that we keep of each item of the second half."""
    pending, tally = of_items(place, num_items)
    finished = joined(map(record_of, pending), pending, lambda whole, _: record_of(whole.part, joined=True))
    tracemalloc.start()
    for number, record in enumerate(finished):
        tally.add(record)
        if number == num_items // 2:
            before = _traced()
    after = _traced()
    tracemalloc.stop()
    assert tally._num_done == num_items * ITEM
    return (after - before) / (num_items / 2)


def of_items(place: str, num_items: int) -> tuple[OpenParts, Tally]:
    parts = plan_parts(num_items * ITEM, ITEM * ITEMS_PER_PART)
    listing: Any = range(num_items * ITEM)
    tally = Tally(StageContext(ArtifactWriter(Folder.at(place)), {}, PROGRESS), listing, 1.0)
    return OpenParts([OpenPart(part, WorkItems(part, ITEM)) for part in parts], {}), tally


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2.split())


def _allocated() -> int:
    """Bytes that Python and C++ have allocated in this process, by glibc."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
