"""The content of an output: records of runs, and all artifacts and what each was made from.

``<output>/runs/<run>.json`` says which artifacts belong to a run, and ``runs/unfinished/<name>.json`` which ones a
command uses that no run records: for new images, or in a sweep.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from icce_ray.errors import InputError
from icce_ray.store.artifact import Artifact
from icce_ray.store.filesystem import Folder

SAFE_NAME, FINGERPRINT = re.compile(r"[\w-]+"), re.compile(r"[0-9a-f]{16}")
RUNS_FOLDER = "runs"
UNFINISHED_FOLDER = "unfinished"
MAX_UNFINISHED_S = 14 * 86_400.0
"""Artifacts of a command that began longer ago are no longer kept for it."""
LATEST_FOLDER = "latest"
SUMMARY_NAME = "summary.json"
"""File in ``<output>/latest`` about the newest finished run, see :mod:`icce_ray.pipeline.latest`."""


Values = Mapping[str, Any]


def write_record(
    output: str, run: str, fingerprints: Mapping[str, str], config: Values, result: Values | None = None
) -> None:
    """Note which artifacts, by stage, make up a run with these settings. While it runs, `result` is None, and an
    existing record is kept. Raises InputError: the output cannot be written to."""
    if result is None and (Folder.at(output) / RUNS_FOLDER).exists(f"{run}.json"):
        return
    _write(output, f"{run}.json", {"run": run, "stages": dict(fingerprints), "config": dict(config), "result": result})


def write_unfinished(output: str, name: str, fingerprints: Mapping[str, str]) -> None:
    """Note, before they are made, the artifacts of a command that no run records, so that they are kept. Raises as
    :func:`write_record`."""
    _write(output, f"{UNFINISHED_FOLDER}/{name}.json", {"stages": dict(fingerprints), "began": time.time()})


def take_unfinished(output: str, *, remove_old: bool) -> list[dict[str, Any]]:
    """The notes of :func:`write_unfinished` that are no older than MAX_UNFINISHED_S. The others may be removed."""
    folder, found = Folder.at(output) / RUNS_FOLDER / UNFINISHED_FOLDER, []
    for name in folder.names():
        record = _read(folder, name)
        if time.time() - record["began"] <= MAX_UNFINISHED_S:
            found.append(record)
        elif remove_old:
            folder.remove(name)
    return found


def _write(output: str, name: str, record: Mapping[str, Any]) -> None:
    try:
        (Folder.at(output) / RUNS_FOLDER).write_bytes(name, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise InputError(f"output: {output!r} cannot be written to: {error}") from None


def remove_record(output: str, run: str) -> None:
    """Forget a run, but not its artifacts."""
    (Folder.at(output) / RUNS_FOLDER).remove(f"{run}.json")


def read_records(output: str) -> list[dict[str, Any]]:
    """The records of all runs under an output folder. Raises InputError: one of them is damaged."""
    folder = Folder.at(output) / RUNS_FOLDER
    return [_read(folder, name) for name in folder.names() if name.endswith(".json")]


def _read(folder: Folder, name: str) -> dict[str, Any]:
    """A record whose `stages` lead to folders of artifacts and nowhere else."""
    try:
        record = json.loads(folder.read_bytes(name))
    except (ValueError, RecursionError):
        record = None
    stages = record.get("stages") if isinstance(record, dict) else None
    if not isinstance(stages, dict) or any(
        "." in stage or not SAFE_NAME.fullmatch(str(stages[stage])) for stage in stages
    ):
        raise InputError(f"{folder.file_uri(name)} is damaged, or no record of a run; move it away")
    found: dict[str, Any] = record
    return found


def read_latest(output: str) -> dict[str, Any] | None:
    """The summary of the newest finished run under an output folder: its result, and `stages`, the fingerprints of its
    artifacts. None if there is none."""
    try:
        summary = json.loads((Folder.at(output) / LATEST_FOLDER).read_bytes(SUMMARY_NAME))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return summary if isinstance(summary, dict) and {"run", "stages"} <= summary.keys() else None


Artifacts = dict[str, Artifact | None]
"""Artifacts by their folder below the output, ``<stage>/<fingerprint>``; None: unfinished, without a manifest."""


def find_artifacts(root: Folder) -> Artifacts:
    """The artifacts under an output. Only manifests are read; the parts are not looked at."""
    found: Artifacts = {}
    for stage in root.folder_names():
        for name in (root / stage).folder_names():
            if FINGERPRINT.fullmatch(name):
                found[f"{stage}/{name}"] = Artifact.read(root / stage / name)
    return found


def inputs_of(artifact: Artifact) -> list[str]:
    """The folders below the output of what an artifact was made from."""
    return [f"{stage}/{identity.partition('.')[0]}" for stage, identity in artifact.manifest.inputs.items()]


def with_inputs(wanted: set[str], artifacts: Mapping[str, Artifact | None]) -> set[str]:
    """`wanted`, what these were made from, and the folders that hold parts of theirs."""
    kept, pending = set[str](), list(wanted)
    while pending:
        key = pending.pop()
        if key not in kept:
            kept.add(key)
            artifact = artifacts.get(key)
            if artifact is not None:
                pending += [*inputs_of(artifact), *artifact.part_folders()]
    return kept
