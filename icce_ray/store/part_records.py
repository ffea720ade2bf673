"""Records of the parts that a stage has finished, so that a killed run resumes where it was.

A record is a small JSON file beside the parts, ``<artifact>/records/<name>.json``. It is written after the part's
files, so a part with a record is whole. A record counts only while it is valid: made from the same source, with every
file still there in the recorded size, also those that another artifact holds.

Usage, in a stage::

    records = PartRecords(context.output.folder, source)
    finished = records.read_all()
    for name in names:
        if name not in finished:
            finished[name] = records.write(name, [writer.write_table(f"{name}.parquet", table)], metrics)
    records.clear()
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from icce_ray.store.artifact import Artifact, folder_of, is_sound
from icce_ray.store.filesystem import Folder
from icce_ray.store.parts_table import Part

FOLDER_NAME = "records"
READ_THREADS = 8
"""Records are read concurrently: on an object store each takes a round trip."""


class PartRecord(BaseModel):
    """A finished part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    files: tuple[Part, ...]
    metrics: dict[str, Any]
    """Figures of the part, JSON-able: the stage adds them up."""


@dataclass(frozen=True)
class PartRecords:
    """The records of one artifact. Pickles: workers write records, the driver reads them."""

    folder: Folder
    source: str
    """Digest of what the parts are made from, besides the artifact's fingerprint: the bytes of the inputs, the stage's
    version. Records with another source don't count. Where each part has its own, make a ``PartRecords`` for each."""

    def write(self, name: str, files: Sequence[Part], metrics: Mapping[str, Any]) -> PartRecord:
        """Record that the part `name` is finished. Its `files` must be on storage already."""
        record = PartRecord(name=name, files=tuple(files), metrics=dict(metrics))
        content = {"source": self.source, **record.model_dump(mode="json")}
        self.folder.write_bytes(_file_name(name), json.dumps(content).encode())
        return record

    def read(self, name: str) -> PartRecord | None:
        """The part's record, or None if there is no valid one: its files must have the bytes that were written."""
        record = self._parse(name)
        return record if record is not None and self._own_are_sound(record) else None

    def read_all(self, *, check_files: bool = True) -> dict[str, PartRecord]:
        """All valid records by name, in the order of their names. Each folder with files of theirs is listed once. With
        `check_files` the files are read and their checksums compared; otherwise only their sizes."""
        sizes = self.folder.sizes()
        names = sorted(path[len(FOLDER_NAME) + 1 : -5] for path in sizes if re.match(rf"{FOLDER_NAME}/.*\.json$", path))
        with ThreadPoolExecutor(READ_THREADS) as threads:
            records = [record for record in threads.map(self._parse, names) if record is not None]
            files = {file.folder: file for record in records for file in record.files if file.folder is not None}
            listed = {None: sizes} | {name: folder_of(self.folder, file).sizes() for name, file in files.items()}

            def is_valid(record: PartRecord) -> bool:
                if any(listed[file.folder].get(file.name) != file.num_bytes for file in record.files):
                    return False
                return not check_files or self._own_are_sound(record)

            valid = list(threads.map(is_valid, records))
        return {record.name: record for record, is_kept in zip(records, valid, strict=True) if is_kept}

    def discard_damage(self) -> None:
        """Forget the parts whose files no longer have the bytes that were written, and discard the artifacts that hold
        such a file for them."""
        for record in self.read_all(check_files=False).values():
            for file in record.files:
                holder = folder_of(self.folder, file)
                if not is_sound(holder, file):
                    self.remove(record.name)
                    if file.folder is not None:
                        Artifact.discard_damage(holder)

    def remove(self, name: str) -> None:
        """Forget a part."""
        self.folder.remove(_file_name(name))

    def clear(self) -> None:
        """Remove all records, of any source: the stage is done."""
        (self.folder / FOLDER_NAME).clear()

    def _own_are_sound(self, record: PartRecord) -> bool:
        """The checksums of files that another artifact holds are compared when they are read."""
        return all(is_sound(self.folder, file) for file in record.files if file.folder is None)

    def _parse(self, name: str) -> PartRecord | None:
        """The record as written, or None if it is missing, damaged, or of another source."""
        try:
            content = json.loads(self.folder.read_bytes(_file_name(name)))
            return PartRecord.model_validate(content) if content.pop("source") == self.source else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
            return None


def _file_name(name: str) -> str:
    return f"{FOLDER_NAME}/{name}.json"
