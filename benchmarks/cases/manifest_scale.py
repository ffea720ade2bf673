"""Memory and time of finding an artifact of millions of parts, and of what the stages then ask of it.

The parts are invented: only the manifest and its table are written. For comparison, `listed` is how manifests were in
schema version 1: a JSON list of all parts, read as one object each, and a listing of the folder. Only the reading of
the list is measured, for fewer parts.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cases import show_aim
from icce_ray.store import Artifact, ArtifactWriter, Folder, Part
from icce_ray.store.artifact import MANIFEST_NAME
from icce_ray.store.parts_table import SCHEMA, parts_bytes, table_bytes

SETTINGS: dict[str, Any] = {"num_parts": 2_000_000, "listed_parts": 100_000, "max_bytes": 100e6, "max_s": 2.0}
ROWS_PER_PART = 65_536


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Each measurement has a process of its own."""
    num_parts, num_listed = settings["num_parts"], settings["listed_parts"]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as p:
        for count in (num_parts, 1_000_000_000 // ROWS_PER_PART):
            place = f"{folder}/{count}"
            p.apply(write, (place, count))
            for name in ("find", "find and use"):
                figures[f"{name}, {count:,} parts"] = p.apply(measure, (name, place))
        p.apply(write_list, (folder, num_listed))
        for name, value in p.apply(measure, ("listed", folder)).items():
            figures.setdefault(f"listed, {num_parts:,} parts (from {num_listed:,})", {})[name] = (
                value * num_parts / num_listed
            )
    for name, values in figures.items():
        print(f"{name:50} {values['bytes'] / 1e6:10,.1f} MB {values['seconds']:8.3f} s, {values['cpu_s']:.3f} of CPU")
    used = figures[f"find and use, {num_parts:,} parts"]
    listed = figures[f"listed, {num_parts:,} parts (from {num_listed:,})"]
    sizes = (f"{values['bytes'] / 1e6:,.0f} MB and {values['cpu_s']:.1f} s" for values in (listed, used))
    show_aim(f"to find and use {num_parts:,} parts", *sizes, "100 MB and 2 s")
    bounds = {
        f"found and used below {settings['max_bytes'] / 1e6:g} MB": used["bytes"] < settings["max_bytes"],
        f"found and used below {settings['max_s']:g} s of CPU": used["cpu_s"] < settings["max_s"],
    }
    return figures, bounds


def write(folder: str, count: int) -> None:
    names = pa.array([f"part-x{number:010d}.parquet" for number in range(count)])
    contents = np.random.default_rng(0).bytes(32 * count)
    columns = {
        "name": names,
        "folder": pa.nulls(count, SCHEMA.field("folder").type),
        "num_bytes": pa.array(np.full(count, 100_000_000)),
        "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(contents)]),
        "rows": pa.array(np.full(count, ROWS_PER_PART)),
        "dtype": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), ["float16"]),
        "shape": pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32) * 2), pa.array(np.tile([ROWS_PER_PART, 768], count))
        ),
    }
    artifact = ArtifactWriter(Folder.at(folder)).commit(
        stage="embed", fingerprint="0", inputs={}, config={}, metrics={}, seconds=0.0
    )
    data = table_bytes(pa.table(columns, schema=SCHEMA))
    parts = Part(name="parts.parquet", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=count)
    artifact.folder.write_bytes(parts.name, data)
    artifact.folder.write_bytes(
        MANIFEST_NAME, artifact.manifest.model_copy(update={"parts": parts}).model_dump_json().encode()
    )


def write_list(folder: str, count: int) -> None:
    part = {"num_bytes": 100_000_000, "sha256": "0" * 64, "rows": 512, "dtype": "float16", "shape": [512, 768]}
    parts = [{"name": f"part-x{number:010d}.parquet", **part} for number in range(count)]
    Path(folder, MANIFEST_NAME).write_text(json.dumps(parts, indent=1))


def measure(what: str, folder: str) -> dict[str, float]:
    """Seconds, and how much the peak of this process grows."""
    json.dumps(pq.read_metadata(_tiny()).to_dict())  # what the first use of a library takes
    peak, began, cpu_began = _peak(), time.perf_counter(), time.process_time()
    if what == "listed":
        parts = [Part(**part) for part in json.loads(Path(folder, MANIFEST_NAME).read_bytes())]
        assert len({part.name: part for part in parts}) == len(parts)
    else:
        artifact = Artifact.find(Folder.at(folder))
        assert artifact is not None
        if what == "find and use":
            rows = artifact.num_rows("part-")
            assert artifact.part(f"part-x{len(rows) - 1:010d}.parquet").num_bytes * len(rows) == artifact.num_bytes()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
        "bytes": float(_peak() - peak),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tiny() -> pa.BufferReader:
    return pa.BufferReader(parts_bytes([]))
