"""All artifacts under an output, and what each was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from icce_ray.store.artifact import MANIFEST_NAME, Artifact, Manifest
from icce_ray.store.filesystem import Folder

FINGERPRINT = re.compile(r"[0-9a-f]{16}")

Artifacts = dict[str, Artifact | None]
"""By their folder below the output, ``<stage>/<fingerprint>``; None: without a manifest, so unfinished."""


def find_artifacts(root: Folder) -> Artifacts:
    """The artifacts under an output. Only manifests are read; the parts are not looked at."""
    found: Artifacts = {}
    for stage in root.folder_names():
        for name in (root / stage).folder_names():
            if FINGERPRINT.fullmatch(name):
                found[f"{stage}/{name}"] = read_manifest(root / stage / name)
    return found


def read_manifest(folder: Folder) -> Artifact | None:
    """The artifact in a folder, without a look at its parts; None if it is unfinished."""
    try:
        return Artifact(folder, Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME)))
    except (FileNotFoundError, ValidationError):
        return None


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
