"""Artifacts: the finished result of a stage, as part files and a ``manifest.json`` that is written last.

Without a manifest there is no artifact. The manifest lists every part with its rows and checksum; a part whose bytes
differ is never used. The folder is named by the fingerprint, a hash of everything that determines the content: the
stage, its version, the settings it depends on, and the fingerprints of its inputs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from icce_ray.errors import DamagedArtifactError, WorkerError
from icce_ray.store.cache import cache_entry
from icce_ray.store.filesystem import Folder, open_uri

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
RECORDED_LIBRARIES = ("icce_ray", "numpy", "torch", "faiss-cpu", "ray", "timm", "pyarrow", "pymetis")


def fingerprint(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name of the artifact that `stage` makes from `settings` and `inputs`: 16 hex digits.

    Args:
        stage: name of the stage.
        version: raised by hand when the code would make something else of the same settings.
        settings: JSON-able settings that determine the content.
        inputs: fingerprints of the input artifacts by stage.
    """
    content = {"stage": stage, "version": version, "settings": settings, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Part(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("name")
    @classmethod
    def _lies_in_the_folder(cls, name: str) -> str:
        """A manifest on storage may come from anywhere: its names must not lead out of the artifact's folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name or not path.parts:
            raise ValueError(f"{name!r} is no name of a part")
        return name

    name: str
    num_bytes: int
    sha256: str
    rows: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


class Manifest(BaseModel):
    """The parts of an artifact and how it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    stage: str
    fingerprint: str
    inputs: dict[str, str]
    parts: tuple[Part, ...]
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
        self._parts = {part.name: part for part in manifest.parts}
        self._verified: set[str] = set()

    @classmethod
    def find(cls, folder: Folder) -> Artifact | None:
        """The artifact in `folder`, or None if there is no manifest, or a part is missing or of the wrong size."""
        try:
            manifest = Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME))
        except (FileNotFoundError, ValidationError):
            return None
        if manifest.schema_version != SCHEMA_VERSION:
            return None
        sizes = folder.sizes()
        if any(sizes.get(part.name) != part.num_bytes for part in manifest.parts):
            return None
        return cls(folder, manifest)

    @staticmethod
    def discard_damage(folder: Folder) -> list[str]:
        """If the manifest and the parts of an artifact disagree, remove the manifest and the damaged parts. Sound
        parts stay, so that the stage can resume with them.

        Returns:
            Names of the missing or damaged parts. If it is empty, nothing was removed.
        """
        try:
            manifest = Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME))
        except FileNotFoundError:
            return []
        except ValidationError:
            folder.remove(MANIFEST_NAME)
            return [MANIFEST_NAME]
        damaged = [part.name for part in manifest.parts if not is_sound(folder, part)]
        if damaged:
            folder.remove(MANIFEST_NAME)
        for name in damaged:
            folder.remove(name)
        return damaged

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
        return sorted(name for name in self._parts if name.startswith(prefix))

    def part(self, name: str) -> Part:
        return self._parts[name]

    def read_bytes(self, name: str) -> bytes:
        """Content of a part.

        Raises:
            DamagedArtifactError: the part is missing, or its bytes do not match the manifest.
        """
        try:
            data = self.folder.read_bytes(name, self._parts[name].num_bytes)
        except FileNotFoundError:
            raise DamagedArtifactError(f"{self.folder.file_uri(name)}: the part is missing") from None
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read_bytes(name)))

    def read_array(self, name: str) -> npt.NDArray[Any]:
        """A .npy part, memory-mapped read-only. Remote parts are first copied to this machine's cache folder."""
        path = self.local_file(name)
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array

    def local_file(self, name: str) -> Path:
        """A part as a local file, checked. Remote parts are first copied to this machine's cache folder.

        Raises:
            DamagedArtifactError: the part is missing, or its bytes do not match the manifest.
        """
        if self.folder.local_path is not None:
            path = self.folder.local_path / name
            if name not in self._verified:
                try:
                    with path.open("rb") as file:
                        self._check(name, hashlib.file_digest(file, "sha256").hexdigest())
                except FileNotFoundError:
                    raise DamagedArtifactError(f"{path}: the part is missing") from None
                self._verified.add(name)
            return path
        # The checksum is in the name, since an amended artifact may hold another file under the same name.
        copy = f"{self._parts[name].sha256[:12]}-{name.replace('/', '-')}"
        cache = Folder.at(cache_entry(self.manifest.stage, self.fingerprint))
        assert cache.local_path is not None
        # The artifact may have been checked on another machine, whose cache is not this one's.
        if copy not in self._verified or not (cache.local_path / copy).exists():
            try:
                self._check(name, hashlib.sha256(cache.read_bytes(copy)).hexdigest())
            except (FileNotFoundError, DamagedArtifactError):
                cache.write_bytes(copy, self.read_bytes(name))
            self._verified.add(copy)
        return cache.local_path / copy

    def _check(self, name: str, digest: str) -> None:
        if digest != self._parts[name].sha256:
            raise DamagedArtifactError(f"{self.folder.file_uri(name)}: the bytes are not those that were written")


class ArtifactWriter:
    """Collects the parts of an artifact and commits it. It can be pickled: workers write parts and return them to the
    driver, which calls :meth:`add` and, at the end, :meth:`commit`.

    Args:
        folder: the artifact's.
        amends: whether the artifact is finished and is amended. Otherwise a writer that lost its claim, on S3, must not
            write into what another job has finished.
    """

    def __init__(self, folder: Folder, *, amends: bool = False) -> None:
        self.folder = folder
        self._amends = amends
        self.parts: dict[str, Part] = {}

    def add(self, part: Part) -> None:
        self.parts[part.name] = part

    def write_bytes(
        self,
        name: str,
        data: bytes | memoryview,
        *,
        rows: int | None = None,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Part:
        """Write a part atomically and add it to the manifest.

        Raises:
            WorkerError: another job has finished the artifact.
        """
        if not self._amends:
            check_unfinished(self.folder)
        self.folder.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        part = Part(name=name, num_bytes=len(data), sha256=digest, rows=rows, dtype=dtype, shape=shape)
        self.add(part)
        return part

    def write_json(self, name: str, value: Any) -> Part:
        return self.write_bytes(name, json.dumps(value, indent=1).encode())

    def write_table(self, name: str, table: pa.Table) -> Part:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return self.write_bytes(name, sink.getbuffer(), rows=table.num_rows)

    def write_array(self, name: str, array: npt.NDArray[Any]) -> Part:
        """Write an array as .npy."""
        sink = io.BytesIO()
        np.save(sink, array, allow_pickle=False)
        rows = array.shape[0] if array.ndim else None
        return self.write_bytes(name, sink.getbuffer(), rows=rows, dtype=str(array.dtype), shape=array.shape)

    def copy_file(self, name: str, uri: str) -> Part:
        """Copy the file at `uri` as a part, without holding it in memory. A copy that was interrupted is in no manifest
        and is made again."""
        filesystem, path = open_uri(uri)
        with filesystem.open_input_file(path) as file:
            digest, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.size()
        target = self.folder.filesystem
        target.create_dir(self.folder.path)
        pafs.copy_files(path, f"{self.folder.path}/{name}", source_filesystem=filesystem, destination_filesystem=target)
        part = Part(name=name, num_bytes=num_bytes, sha256=digest)
        self.add(part)
        return part

    def commit(
        self,
        *,
        stage: str,
        fingerprint: str,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        seconds: float,
        revision: int = 0,
        exclusive: bool = False,
    ) -> Artifact:
        """Write the manifest. From then on the artifact exists.

        Args:
            revision: above 0 if this amends a finished artifact.
            exclusive: fail if there is a manifest already.

        Raises:
            WorkerError: with `exclusive`, if another job finished the artifact in the meantime with other parts.
        """
        manifest = Manifest(
            stage=stage,
            fingerprint=fingerprint,
            inputs=dict(inputs),
            parts=tuple(self.parts[name] for name in sorted(self.parts)),
            config=dict(config),
            metrics=dict(metrics),
            libraries=_library_versions(),
            seconds=round(seconds, 3),
            revision=revision,
        )
        data = manifest.model_dump_json(indent=1).encode()
        if not exclusive:
            self.folder.write_bytes(MANIFEST_NAME, data)
            return Artifact(self.folder, manifest)
        try:
            self.folder.create_bytes(MANIFEST_NAME, data)
        except FileExistsError:
            there = Artifact.find(self.folder)
            if there is None or there.manifest.parts != manifest.parts:
                Artifact.discard_damage(self.folder)
                raise WorkerError(
                    f"{self.folder.uri}: another job wrote this artifact at the same time; run the command again"
                ) from None
            return there
        return Artifact(self.folder, manifest)


def check_unfinished(folder: Folder) -> None:
    """Before a part is written where a lost claim is possible.

    Raises:
        WorkerError: another job has finished the artifact.
    """
    if folder.s3_options is not None and folder.exists(MANIFEST_NAME):
        raise WorkerError(
            f"{folder.uri}: another job has finished this artifact meanwhile, so this one stops; run the same command "
            "again, which uses its result"
        )


def is_sound(folder: Folder, part: Part) -> bool:
    """Whether the part's file is there, with the bytes that were written."""
    if folder.size(part.name) != part.num_bytes:
        return False
    try:
        data = folder.read_bytes(part.name, part.num_bytes)
    except FileNotFoundError:
        return False
    return hashlib.sha256(data).hexdigest() == part.sha256


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in RECORDED_LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
