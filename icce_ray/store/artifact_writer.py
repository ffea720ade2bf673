"""Writes the parts of an artifact, and commits it."""

import hashlib
import importlib.metadata
import io
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from icce_ray.errors import WorkerError
from icce_ray.store.artifact import MANIFEST_NAME, Artifact, Manifest
from icce_ray.store.claim import check_claim
from icce_ray.store.filesystem import Folder, open_uri
from icce_ray.store.parts_table import Part, parts_bytes

RECORDED_LIBRARIES = ("icce_ray", "numpy", "torch", "faiss-cpu", "ray", "timm", "pyarrow", "pymetis")


class ArtifactWriter:
    """Collects the parts of an artifact and commits it. It can be pickled: workers write parts and return them to the
    driver, which calls :meth:`add` and, at the end, :meth:`commit`. Where several jobs might write, `folder` is
    :attr:`Claim.folder`, so that one that lost its claim writes no part."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.parts: dict[str, Part] = {}

    def add(self, part: Part) -> None:
        self.parts[part.name] = part

    def write_bytes(self, name: str, data: bytes | memoryview, **about: Any) -> Part:
        """Write a part atomically and add it to the manifest, with what is known `about` it: rows, dtype, shape. Raises
        WorkerError: another job took the claim over."""
        check_claim(self.folder)
        self.folder.write_bytes(name, data)
        return self._added(name, len(data), hashlib.sha256(data).hexdigest(), **about)

    def _added(self, name: str, num_bytes: int, sha256: str, **about: Any) -> Part:
        part = Part(name=name, num_bytes=num_bytes, sha256=sha256, **about)
        self.add(part)
        return part

    def write_json(self, name: str, value: Any) -> Part:
        return self.write_bytes(name, json.dumps(value, indent=1).encode())

    def write_table(self, name: str, table: pa.Table) -> Part:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return self.write_bytes(name, sink.getbuffer(), rows=table.num_rows)

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> Part:
        """Write a table of any size that comes in pieces."""
        rows = 0
        with TemporaryFile() as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
                    rows += len(table)
            num_bytes = file.tell()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            check_claim(self.folder)
            with self.folder.writing(name) as target:
                shutil.copyfileobj(file, target)
        return self._added(name, num_bytes, digest, rows=rows)

    def write_array(self, name: str, array: npt.NDArray[Any]) -> Part:
        """Write an array as .npy."""
        sink = io.BytesIO()
        np.save(sink, array, allow_pickle=False)
        rows = array.shape[0] if array.ndim else None
        return self.write_bytes(name, sink.getbuffer(), rows=rows, dtype=str(array.dtype), shape=array.shape)

    def copy_file(self, name: str, uri: str) -> Part:
        """Copy the file at `uri` as a part, without holding it in memory."""
        filesystem, path = open_uri(uri)
        with filesystem.open_input_file(path) as file:
            digest, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.size()
        target = self.folder.filesystem
        check_claim(self.folder)
        target.create_dir(self.folder.path)
        pafs.copy_files(path, f"{self.folder.path}/{name}", source_filesystem=filesystem, destination_filesystem=target)
        return self._added(name, num_bytes, digest)

    def commit(
        self,
        *,
        stage: str,
        fingerprint: str,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        seconds: float,
        exclusive: bool = False,
    ) -> Artifact:
        """Write the table of parts, then the manifest. From then on the artifact exists. Raises WorkerError: with
        `exclusive`, if another job finished the artifact in the meantime with other parts."""
        manifest = Manifest(
            stage=stage,
            fingerprint=fingerprint,
            inputs=dict(inputs),
            parts=self._write_parts_table(),
            config=dict(config),
            metrics=dict(metrics),
            libraries=_library_versions(),
            seconds=round(seconds, 3),
        )
        return self._finish(manifest, exclusive=exclusive)

    def amend(self, artifact: Artifact, metrics: Mapping[str, Any], *, revision: int) -> Artifact:
        """Commit the parts as those of a finished artifact, and remove files that it no longer has."""
        changed = {"parts": self._write_parts_table(), "metrics": dict(metrics), "revision": revision}
        changed["libraries"] = _library_versions()
        amended = self._finish(artifact.manifest.model_copy(update=changed))
        for name in set(artifact.file_names()) - set(amended.file_names()):
            self.folder.remove(name)
        return amended

    def _finish(self, manifest: Manifest, *, exclusive: bool = False) -> Artifact:
        """Write the manifest, after what killed workers left has been removed. Raises as :meth:`commit`."""
        self.folder.remove_unfinished()
        write = self.folder.create_bytes if exclusive else self.folder.write_bytes
        try:
            write(MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
        except FileExistsError:
            there = Artifact.find(self.folder)
            if there is None or there.manifest.parts != manifest.parts:
                Artifact.discard_damage(self.folder)
                raise WorkerError(
                    f"{self.folder.uri}: another job wrote this artifact at the same time; run the command again"
                ) from None
            return there
        return Artifact(self.folder, manifest)

    def _write_parts_table(self) -> Part:
        table = parts_bytes(self.parts.values())
        digest = hashlib.sha256(table).hexdigest()
        parts = Part(name=f"parts-{digest[:12]}.parquet", num_bytes=len(table), sha256=digest, rows=len(self.parts))
        self.folder.write_bytes(parts.name, table)
        return parts


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in RECORDED_LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions
