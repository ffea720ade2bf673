"""Records of runs beside their artifacts: ``<output>/runs/<run>.json`` says which artifacts belong to a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from icce_ray.errors import InputError
from icce_ray.store.filesystem import Folder

RUNS_FOLDER = "runs"
LATEST_FOLDER = "latest"
SUMMARY_NAME = "summary.json"
"""In ``<output>/latest``: the newest finished run, see :mod:`icce_ray.pipeline.latest`."""


def write_record(
    output: str,
    run: str,
    fingerprints: Mapping[str, str],
    config: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
) -> None:
    """Note which artifacts make up a run.

    Args:
        output: the run's output folder.
        run: its name.
        fingerprints: of its artifacts, by stage.
        config: its settings, JSON-able.
        result: what it ended with; None while it runs, and then an existing record is kept.

    Raises:
        InputError: the output cannot be written to.
    """
    folder = Folder.at(output) / RUNS_FOLDER
    if result is None and folder.exists(f"{run}.json"):
        return
    record = {"run": run, "stages": dict(fingerprints), "config": dict(config), "result": result}
    try:
        folder.write_bytes(f"{run}.json", json.dumps(record, indent=1).encode())
    except OSError as error:
        raise InputError(f"output: {output!r} cannot be written to: {error}") from None


def remove_record(output: str, run: str) -> None:
    """Forget a run, but not its artifacts."""
    (Folder.at(output) / RUNS_FOLDER).remove(f"{run}.json")


def read_records(output: str) -> list[dict[str, Any]]:
    """The records of all runs under an output folder."""
    folder = Folder.at(output) / RUNS_FOLDER
    return [json.loads(folder.read_bytes(name)) for name in folder.names() if name.endswith(".json")]


def read_latest(output: str) -> dict[str, Any] | None:
    """The summary of the newest finished run under an output folder: its result, and `stages`, the fingerprints of its
    artifacts. None if there is none."""
    try:
        summary = json.loads((Folder.at(output) / LATEST_FOLDER).read_bytes(SUMMARY_NAME))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return summary if isinstance(summary, dict) and {"run", "stages"} <= summary.keys() else None
