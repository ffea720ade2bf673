"""Artifacts: the finished result of a stage, as part files and a ``manifest.json`` that is written last.

Without a manifest there is no artifact. The manifest names a table (:mod:`icce_ray.store.parts_table`) that lists every
part with its rows and checksum; a part whose bytes differ is never used. The folder is named by the fingerprint, a hash
of everything that determines the content: the stage, its version, the settings it depends on, and the fingerprints of
its inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from icce_ray.errors import DamagedArtifactError
from icce_ray.store.cache import cache_entry, sha256_of
from icce_ray.store.filesystem import Folder
from icce_ray.store.parts_table import Part, PartsTable

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_LISTED_PARTS = 900
"""Up to here one page of a listing shows whether all parts are there; more are checked when they are read."""
CHECK_THREADS = 8
LARGE_TABLE_BYTES = 2**22
"""A local table of parts of this size is not held in memory."""


def fingerprint(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name of the artifact that this version of `stage` makes of the settings that determine its content and of
    `inputs` (fingerprints by stage): 16 hex digits."""
    content = {"stage": stage, "version": version, "settings": settings, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Manifest(BaseModel):
    """How an artifact was made, and where its parts are listed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    stage: str
    fingerprint: str
    inputs: dict[str, str]
    parts: Part
    """The file of the table of parts. Its name has its checksum, so that a job that writes the artifact at the same
    time cannot replace it."""
    config: dict[str, Any]
    metrics: dict[str, Any]
    libraries: dict[str, str]
    seconds: float
    revision: int = 0
    """Number of times that the finished artifact was amended in place."""


class Artifact:
    """A finished artifact: its manifest and its parts, which are checked against their checksums when read."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verified: set[str] = set()

    @classmethod
    def read(cls, folder: Folder) -> Artifact | None:
        """The artifact in `folder`, without a look at its parts; None if it has no manifest."""
        try:
            return cls(folder, Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME)))
        except (FileNotFoundError, ValidationError):
            return None

    @classmethod
    def find(cls, folder: Folder) -> Artifact | None:
        """The artifact in `folder`, or None if there is no manifest, its table is damaged, or, of at most
        MAX_LISTED_PARTS parts, one is missing or of the wrong size."""
        artifact = cls.read(folder)
        if artifact is None or artifact.manifest.schema_version != SCHEMA_VERSION:
            return None
        table = artifact.manifest.parts
        if (table.rows or 0) > MAX_LISTED_PARTS:
            return artifact if folder.size(table.name) == table.num_bytes else None
        try:
            return artifact if artifact._parts.own_parts_are_among(folder.sizes()) else None
        except DamagedArtifactError:
            return None

    @staticmethod
    def discard_damage(folder: Folder) -> list[str]:
        """If the manifest and the parts of an artifact disagree, remove the manifest and the damaged parts. Sound parts
        stay, so that the stage can resume with them. A damaged part that another artifact holds is judged by that one's
        manifest: it may have been written anew since, and be sound. Returns names of the missing or damaged parts. If
        it is empty, nothing was removed."""
        try:
            manifest = Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME))
            artifact = Artifact(folder, manifest)
            parts = [artifact.part(name) for name in artifact.part_names()]
        except FileNotFoundError:
            return []
        except (ValidationError, DamagedArtifactError):
            folder.remove(MANIFEST_NAME)
            return [MANIFEST_NAME]
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            sound = threads.map(lambda part: is_sound(artifact.folder_of(part), part), parts)
            damaged = [part for part, is_whole in zip(parts, sound, strict=True) if not is_whole]
        if damaged:
            folder.remove(MANIFEST_NAME)
            folder.remove(manifest.parts.name)
        owners = {owner.uri: owner for owner in map(artifact.folder_of, damaged)}
        for part in damaged:
            if artifact.folder_of(part).uri == folder.uri:
                folder.remove(part.name)
        for uri in owners.keys() - {folder.uri}:
            Artifact.discard_damage(owners[uri])
        return [part.name for part in damaged]

    def __getstate__(self) -> dict[str, Any]:
        """Without the table, which every process reads for itself."""
        return {name: value for name, value in vars(self).items() if name != "_parts"}

    @cached_property
    def _parts(self) -> PartsTable:
        file, local_folder = self.manifest.parts, self.folder.local_path
        try:
            if local_folder is None or file.num_bytes < LARGE_TABLE_BYTES:
                source = pa.BufferReader(self._read(file))
            else:
                source = pa.OSFile(str(local_folder / file.name))
                self._check(file, sha256_of(local_folder / file.name))
        except FileNotFoundError:
            raise DamagedArtifactError(f"{self.folder.file_uri(file.name)}: the table of parts is missing") from None
        try:
            return PartsTable(source)
        except ValueError as error:
            raise DamagedArtifactError(
                f"{self.folder.file_uri(file.name)}: this is no table of parts: {error}"
            ) from None

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def identity(self) -> str:
        """What later stages depend on: the fingerprint and, if the artifact was amended, its revision."""
        revision = self.manifest.revision
        return self.fingerprint if revision == 0 else f"{self.fingerprint}.r{revision}"

    def part_names(self, prefix: str = "") -> list[str]:
        """Names of the parts that begin with `prefix`, sorted. The methods below are about the same parts."""
        return self._parts.names(prefix)

    def part(self, name: str) -> Part:
        return self._parts.part(name)

    def num_rows(self, prefix: str) -> npt.NDArray[np.int64]:
        """Rows of each of :meth:`part_names`; 0 where they are unknown."""
        return self._parts.num_rows(prefix)

    def num_bytes(self, prefix: str = "") -> int:
        return self._parts.num_bytes(prefix)

    def checksum(self, prefix: str = "") -> str:
        return self._parts.checksum(prefix)

    def part_folders(self) -> list[str]:
        """The folders of other artifacts, below the output, that hold parts of this one."""
        return self._parts.folders()

    def file_names(self) -> list[str]:
        """All files of the artifact, the manifest last."""
        return [*self.part_names(), self.manifest.parts.name, MANIFEST_NAME]

    def folder_of(self, part: Part) -> Folder:
        return folder_of(self.folder, part)

    def read_bytes(self, name: str) -> bytes:
        """Content of a part. Raises DamagedArtifactError: it is missing, or its bytes do not match the manifest."""
        part = self.part(name)
        try:
            return self._read(part)
        except FileNotFoundError:
            raise DamagedArtifactError(f"{self.folder_of(part).file_uri(name)}: the part is missing") from None

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read_bytes(name)))

    def read_array(self, name: str) -> npt.NDArray[Any]:
        """A .npy part, memory-mapped read-only, as :meth:`local_file`."""
        array: npt.NDArray[Any] = np.load(self.local_file(name), mmap_mode="r", allow_pickle=False)
        return array

    def local_file(self, name: str) -> Path:
        """A part as a local file, checked. Remote parts are first copied to this machine's cache folder. Raises as
        :meth:`read_bytes`."""
        part = self.part(name)
        local_folder = self.folder_of(part).local_path
        if local_folder is not None:
            path = local_folder / name
            if name not in self._verified:
                try:
                    self._check(part, sha256_of(path))
                except FileNotFoundError:
                    raise DamagedArtifactError(f"{path}: the part is missing") from None
                self._verified.add(name)
            return path
        # The checksum is in the name, since an amended artifact may hold another file under the same name.
        copy = f"{part.sha256[:12]}-{name.replace('/', '-')}"
        cache = Folder.at(cache_entry(self.manifest.stage, self.fingerprint))
        assert cache.local_path is not None
        # The artifact may have been checked on another machine, whose cache is not this one's.
        if copy not in self._verified or not (cache.local_path / copy).exists():
            if not is_sound(cache, part.model_copy(update={"name": copy})):
                cache.write_bytes(copy, self.read_bytes(name))
            self._verified.add(copy)
        return cache.local_path / copy

    def _read(self, part: Part) -> bytes:
        data = self.folder_of(part).read_bytes(part.name, part.num_bytes)
        self._check(part, hashlib.sha256(data).hexdigest())
        return data

    def _check(self, part: Part, digest: str) -> None:
        if digest != part.sha256:
            uri = self.folder_of(part).file_uri(part.name)
            raise DamagedArtifactError(f"{uri}: the bytes are not those that were written")


def folder_of(own: Folder, part: Part) -> Folder:
    """Where the file of a part of the artifact in `own` lies."""
    return own if part.folder is None else own.parent.parent / part.folder


def is_sound(folder: Folder, part: Part) -> bool:
    """Whether the part's file is there, with the bytes that were written."""
    if folder.size(part.name) != part.num_bytes:
        return False
    try:
        data = folder.read_bytes(part.name, part.num_bytes)
    except FileNotFoundError:
        return False
    return hashlib.sha256(data).hexdigest() == part.sha256
