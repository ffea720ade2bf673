"""What this engine wrote itself: no images, though it may lie among them."""

import re
from contextlib import suppress
from pathlib import Path

from icce_ray.images.folder_walk import identity_of
from icce_ray.images.uris import is_remote
from icce_ray.store.run_records import LATEST_FOLDER, RUNS_FOLDER

RESULT_FOLDERS = (
    "images", "embed", "sample", "cluster_count", "neighbors", "method", "consensus", "corrections", "classifier",
    "assign", "evaluate", "report", "silhouette_spaces", "trial_scores", "sweep", "comparison",
)  # fmt: skip
"""Folders of an output whose subfolders hold artifacts."""
RUN_FOLDERS = (RUNS_FOLDER, LATEST_FOLDER)
RESULT = re.compile(rf"/(?:{'|'.join(RUN_FOLDERS)}|(?:{'|'.join(RESULT_FOLDERS)})/[0-9a-f]{{16}})/")


def is_result(uri: str, output: str) -> bool:
    """Whether a remote file was written to the output folder `output` by this engine."""
    root = output.rstrip("/")
    return uri.startswith(root) and RESULT.match(uri, len(root)) is not None


def result_folders(output: str) -> frozenset[tuple[int, int]]:
    """What the engine wrote: (device, inode) of each folder of an artifact, that of the run records and the
    one that ``latest`` leads to."""
    if is_remote(output):
        return frozenset()
    root = Path(output).expanduser()
    folders = [root / name for name in RUN_FOLDERS]
    for stage in RESULT_FOLDERS:
        with suppress(OSError):
            folders += [folder for folder in (root / stage).iterdir() if RESULT.match(f"/{stage}/{folder.name}/")]
    identities = (identity_of(str(folder)) for folder in folders)
    return frozenset(identity for identity in identities if identity is not None)
