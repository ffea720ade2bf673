"""``icce-ray export RUN --to FORMAT``: take a run's images and clusters into other tools.

``export.json`` in the output says what is exported and, once it is finished, how many images. The same command resumes
an export that was cut off, and does nothing for one that is finished.
"""

import json
import pkgutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icce_ray.errors import InputError
from icce_ray.export import FORMATS
from icce_ray.export.selected_images import SelectedImages, Selection
from icce_ray.runtime.progress import Progress
from icce_ray.store import Folder

RECORD_NAME = "export.json"


@dataclass(frozen=True)
class ExportTask:
    """Where and how to export."""

    to: str
    output: Folder
    copy: bool
    """Copy image files that could be linked to."""
    progress: Progress
    digest: str
    """Changes with what is exported."""


@dataclass(frozen=True)
class Written:
    """The outcome of an export."""

    num_images: int
    num_failed: int = 0
    """Images that could not be read and were left out."""
    problem: str = ""
    """Why one of them could not be read."""

    def sentence(self, output: str) -> str:
        failed = f", {self.num_failed:,} left out that cannot be read ({self.problem})" if self.num_failed else ""
        return f"{self.num_images:,} images{failed}: {output}"


def export_run(
    run: str | Path,
    to: str,
    output: str | Path,
    *,
    clusters: str | None = None,
    min_agreement: float | None = None,
    copy: bool = False,
    quiet: bool = False,
) -> Written:
    """Export a finished run.

    Args:
        run: its config (.yaml), its output folder, which means the newest run, or its record (``runs/*.json``).
        to: csv, folders, fiftyone, webdataset, huggingface or cleanlab.
        output: an empty folder or prefix, or that of an export that was cut off.
        clusters: only these, such as ``3,7-9``.
        min_agreement: only images at least this agreed on.
        copy: with `folders` and `fiftyone`: copy image files on this machine instead of linking to them.
        quiet: no progress on standard error.

    Raises:
        InputError: there is no such run or format, nothing is selected, or the output cannot be used.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to}: the formats are {', '.join(FORMATS)}")
    source = SelectedImages(str(run), Selection.parse(clusters, min_agreement))
    folder = Folder.at(output)
    wanted = {"format": to, "assignments": source.assign.identity, "copy": copy}
    wanted |= json.loads(json.dumps(asdict(source.selection)))
    found = _read_record(folder)
    if found is not None:
        if {key: found.get(key) for key in wanted} != wanted:
            raise InputError(f"{output} holds another export, see its {RECORD_NAME}; choose another --output")
        if "num_images" in found:
            return Written(found["num_images"], found["num_failed"], found["problem"])
    elif folder.names() or folder.folder_names():
        raise InputError(f"{output} is not empty; choose another --output")
    if not any(len(table) for table in source.tables()):
        raise InputError(f"{run}: no image is selected; ask for more clusters, or for less agreement")
    try:
        folder.write_bytes(RECORD_NAME, json.dumps(wanted, indent=1).encode())
        task = ExportTask(to, folder, copy, Progress("export", quiet=quiet), json.dumps(wanted))
        written: Written = pkgutil.resolve_name(FORMATS[to])(source, task)
        if not written.num_images:
            raise InputError(f"{run}: none of the images can be read: {written.problem}")
        folder.write_bytes(RECORD_NAME, json.dumps(wanted | asdict(written), indent=1).encode())
    except OSError as error:
        raise InputError(f"{output}: cannot be written to: {error}") from None
    return written


def _read_record(folder: Folder) -> dict[str, Any] | None:
    try:
        found = json.loads(folder.read_bytes(RECORD_NAME))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None
