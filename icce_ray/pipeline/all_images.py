"""``<output>/latest/all_images``: a row for every image, of the newest run and of new ones that its model labelled.

    all_images/model=1f2e.../embedding=9a8b.../code=0.1.0/source=run/*.parquet
    all_images/model=1f2e.../embedding=7c6d.../code=0.1.0/source=<listing>/*.parquet

The folders' names are columns (Hive partitions): the fingerprints of the model and of the embeddings, the version of
the code, and where the images come from. `image_id` is unique (:mod:`icce_ray.images.first_ids`). Nothing is read or
written again: on a local disk the last folder is a link; elsewhere the files are copied within the store.
"""

from __future__ import annotations

import os

from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import LATEST_FOLDER, read_latest

ALL_IMAGES_NAME = "all_images"
ASSIGNMENTS_PREFIX = "assignments/"


def place_of(assign: Artifact) -> str:
    """The folder of an artifact's assignments in ``latest``."""
    manifest = assign.manifest
    source = "run" if "consensus" in manifest.inputs else manifest.inputs.get("images", assign.fingerprint)
    lineage = {
        "model": manifest.inputs.get("classifier", "none"),
        "embedding": manifest.inputs.get("embed", "none"),
        "code": manifest.libraries.get("icce_ray", "unknown"),
        "source": source,
    }
    return "/".join([ALL_IMAGES_NAME, *(f"{name}={value}" for name, value in lineage.items())])


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
            if folder.s3_options is None:  # S3 has no folders
                folder.filesystem.create_dir(f"{folder.path}/{place}")
            folder.filesystem.copy_file(source, f"{folder.path}/{name}")
    return folder.file_uri(ALL_IMAGES_NAME)
