"""``<output>/latest``: the newest finished run under names that a person can guess.

    latest/assignments.parquet    a row per image: a file, or a folder of parts
    latest/all_images/            the same, and new images that its model labelled
    latest/report/                report.html and what belongs to it
    latest/model/                 the folder that `icce_ray.load` reads
    latest/summary.json           the run's name and figures

On a local disk these are links: ``latest`` leads to ``runs/<run>``, and one rename moves it to the next run. Elsewhere
they are copies; ``summary.json`` is removed before they are made and written after them, so without it there is no
latest run. Either way the run that finishes last wins.

``all_images`` is a dataset of Parquet files whose folders' names are columns (Hive partitions): the fingerprints of the
model and of the embeddings, the version of the code, and where the images come from:

    all_images/model=1f2e.../embedding=9a8b.../code=0.1.0/source=run/*.parquet
    all_images/model=1f2e.../embedding=7c6d.../code=0.1.0/source=<listing>/*.parquet

`image_id` is unique (:mod:`icce_ray.images.listing`). Nothing is read or written again: on a local disk the last
folder is a link; elsewhere the files are copied within the store.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from icce_ray.errors import BusyError
from icce_ray.store import Artifact, Claim, Folder
from icce_ray.store.cache import replacing
from icce_ray.store.claim import CLAIM_NAME
from icce_ray.store.run_records import LATEST_FOLDER, RUNS_FOLDER, SUMMARY_NAME, read_latest

ALL_IMAGES_NAME = "all_images"
ASSIGNMENTS_PREFIX = "assignments/"
ASSIGNMENTS_NAME = "assignments.parquet"
FOLDERS = {"report": "report", "classifier": "model"}
"""The stages whose folders are in ``latest``, and their names there."""
MAX_COPIED_BYTES = 2**30
"""An entry that is larger is not copied; the run's closing lines say where it lies."""
MAX_WAIT_S = 600.0
"""How long a job waits for another that is writing copies."""
NUM_THREADS = 16


def place_of(assign: Artifact) -> str:
    """The folder of an artifact's assignments in ``latest``."""
    inputs, code = assign.manifest.inputs, assign.manifest.libraries.get("icce_ray", "unknown")
    source = "run" if "consensus" in inputs else inputs.get("images", assign.fingerprint)
    model, embedding = inputs.get("classifier", "none"), inputs.get("embed", "none")
    return f"{ALL_IMAGES_NAME}/model={model}/embedding={embedding}/code={code}/source={source}"


def copies_of(assign: Artifact) -> dict[str, str]:
    """The paths of the files to copy, by their names in ``latest``."""
    return {
        f"{place_of(assign)}/{name.removeprefix(ASSIGNMENTS_PREFIX)}": f"{assign.folder.path}/{name}"
        for name in assign.part_names(ASSIGNMENTS_PREFIX)
    }


def add_new_images(output: str, assign: Artifact) -> str | None:
    """Add the assignments of new images to ``latest``, if its run has the model that made them. Returns the place of
    all images; None if they were not added."""
    root, latest = Folder.at(output), read_latest(output)
    if latest is None or latest["stages"].get("classifier") != assign.manifest.inputs["classifier"].partition(".")[0]:
        return None
    folder, place = root / LATEST_FOLDER, place_of(assign)
    if root.local_path is not None and (root.local_path / LATEST_FOLDER).is_symlink():
        path = (root.local_path / LATEST_FOLDER).resolve() / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(os.path.relpath(assign.folder.path + "/assignments", path.parent))
    else:
        for name, source in copies_of(assign).items():
            _copy_file(folder, name, source)
    return folder.file_uri(ALL_IMAGES_NAME)


def publish(
    output: str, run: str, artifacts: Mapping[str, Artifact], result: Mapping[str, Any], *, is_new: bool
) -> dict[str, str]:
    """Make `run` the latest one, with its artifacts by stage and its figures. Unless it `is_new` (has made anything),
    what is there for it is kept. Returns where the entries lie (`assignments.parquet`, `report`, `model`): in
    ``latest``, or in their artifacts if they are too large to copy. Raises OSError: the output cannot be written to;
    BusyError: another job has been writing copies for MAX_WAIT_S."""
    root = Folder.at(output)
    summary = {**result, "run": run, "stages": {name: artifact.fingerprint for name, artifact in artifacts.items()}}
    entries = {ASSIGNMENTS_NAME: artifacts["assign"].folder / "assignments"}
    entries |= {name: artifacts[stage].folder for stage, name in FOLDERS.items() if stage in artifacts}
    links = entries | {place_of(artifacts["assign"]): entries[ASSIGNMENTS_NAME]}
    latest = root / LATEST_FOLDER
    if root.local_path is not None and _link(root.local_path, links, summary, is_new):
        return {name: latest.file_uri(name) for name in entries}
    left_out = _copy(root, artifacts, summary, is_new)
    return {name: folder.uri if name in left_out else latest.file_uri(name) for name, folder in entries.items()}


def _link(root: Path, entries: Mapping[str, Folder], summary: Mapping[str, Any], is_new: bool) -> bool:
    """Link the entries. Returns False if the disk has no links, or ``latest`` is not one: then it holds copies."""
    latest, run = root / LATEST_FOLDER, root / RUNS_FOLDER / summary["run"]
    if latest.exists() and not latest.is_symlink():
        return False
    run.mkdir(parents=True, exist_ok=True)
    try:
        for name, folder in entries.items():
            parts = sorted(Path(folder.path).glob("*.parquet"))
            # A single part is an ordinary file, which every program opens.
            target = parts[0] if name == ASSIGNMENTS_NAME and len(parts) == 1 else Path(folder.path)
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            _replace_link(run / name, os.path.relpath(target, (run / name).parent))
        if is_new or not (run / SUMMARY_NAME).exists():
            Folder.at(run).write_bytes(SUMMARY_NAME, _to_json(summary))
        _replace_link(latest, os.path.relpath(run, root))
    except (NotImplementedError, PermissionError):  # of disks without links
        shutil.rmtree(run)
        return False
    return True


def _replace_link(path: Path, target: str) -> None:
    if path.is_symlink() and os.readlink(path) == target:
        return
    with replacing(path) as temporary:
        temporary.symlink_to(target)


def _copy(root: Folder, artifacts: Mapping[str, Artifact], summary: dict[str, Any], is_new: bool) -> list[str]:
    """Copy the entries. Returns the names of those that are too large."""
    deadline = time.monotonic() + MAX_WAIT_S
    latest = root / LATEST_FOLDER
    while True:
        there = read_latest(root.uri)
        if there is not None and there["run"] == summary["run"] and not is_new:
            return list(there["left_out"])
        try:
            with Claim(latest):
                return _copy_all(latest, artifacts, summary)
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _copy_all(latest: Folder, artifacts: Mapping[str, Artifact], summary: dict[str, Any]) -> list[str]:
    latest.remove(SUMMARY_NAME)
    assign, left_out, copies = artifacts["assign"], list[str](), dict[str, str]()
    for stage, name in FOLDERS.items():
        artifact = artifacts.get(stage)
        if artifact is not None and artifact.num_bytes() > MAX_COPIED_BYTES:
            left_out.append(name)
        elif artifact is not None:
            copies |= {f"{name}/{file}": f"{artifact.folder.path}/{file}" for file in artifact.file_names()}
    if assign.num_bytes(ASSIGNMENTS_PREFIX) > MAX_COPIED_BYTES:
        left_out.append(ASSIGNMENTS_NAME)
    else:
        _join(latest, assign)
        copies |= copies_of(assign)
    for name in latest.sizes().keys() - copies.keys() - {ASSIGNMENTS_NAME, CLAIM_NAME} | set(left_out):
        latest.remove(name)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(partial(_copy_file, latest), copies.keys(), copies.values()))
    latest.write_bytes(SUMMARY_NAME, _to_json(summary | {"left_out": left_out}))
    return left_out


def _join(latest: Folder, assign: Artifact) -> None:
    """Write the parts of the assignments as one file, a part at a time."""
    parts = assign.part_names(ASSIGNMENTS_PREFIX)
    schema = assign.read_table(parts[0]).schema
    with latest.writing(ASSIGNMENTS_NAME) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(assign.read_table(part))


def _copy_file(latest: Folder, name: str, source: str) -> None:
    target = f"{latest.path}/{name}"
    if latest.s3_options is None:  # S3 has no folders
        latest.filesystem.create_dir(target.rpartition("/")[0])
    latest.filesystem.copy_file(source, target)


def _to_json(summary: Mapping[str, Any]) -> bytes:
    return json.dumps(summary, indent=1).encode()
