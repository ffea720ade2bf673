"""The ``images`` stage: list every image once, with dense ids in the order of the sorted files.

An image is a file, a member of a container, or a row of ready-made embeddings. Images are not opened here: the
``embed`` stage finds out which are unreadable.

A listing is a snapshot. Object storage is listed once per output, so that a resumed run means the same images. A
refresh lists it again and appends new images behind the known ids. Everything is streamed: memory does not grow with
the collection.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.images.bucket_listing import ALL
from icce_ray.images.containers import file_of, locate
from icce_ray.images.embedding_files import open_embedding_sets, open_embeddings
from icce_ray.images.file_kinds import describe
from icce_ray.images.file_shards import File, FileShards
from icce_ray.images.forgotten import without_forgotten
from icce_ray.images.image_files import list_files
from icce_ray.images.listing import (
    ENTRY_SCHEMA,
    LISTING_PREFIX,
    REMOVED,
    Entry,
    ListedImage,
    Listing,
    entry_tables,
    numbered,
)
from icce_ray.images.uris import is_remote, named_images
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Claim, Folder, fingerprint
from icce_ray.store.filesystem import open_uri
from icce_ray.store.part_records import FOLDER_NAME as RECORDS_FOLDER
from icce_ray.store.part_records import PartRecord, PartRecords

PART_ROWS = 65_536
Tables = Iterable[pa.Table]


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write the parts ``images-*.parquet``. Returns metrics: num_images, num_removed, skipped (what lies there and is
    not taken, by ending or kind), size_bytes (None if unknown), list_s; digest and files_digest, which identify the
    snapshot; generation, 1 more than that of the listing before. Raises InputError: nothing there, no images, or a list
    or container that cannot be read."""
    if config.embeddings.uri is not None:
        digests = dict.fromkeys(("digest", "files_digest"), _embeddings_digest(config))
        return _write(entry_tables(_entries_of_rows(config)), context, Counter(), digests)
    last = _last_listing(config)
    planned = _planned.pop(_key(config), None)
    digest, files = planned or _list(config, context.progress, last)
    return _write_files(files, config, context, digest, last)


def source_digest(config: Config, progress: Progress | None = None) -> str:
    """Identify the listing that a run uses by 64 hex digits: an earlier one if it still holds, else the one that would
    be made now. They change when an image, or a file of embeddings, is added, removed or changed (size, time); none is
    opened. Raises InputError: as :func:`run`."""
    if (fresh := _listed_now.pop(_key(config), None)) is not None:
        return fresh
    if config.embeddings.uri is not None:
        return _embeddings_digest(config)
    last = _last_listing(config)
    if last is not None and any(map(is_remote, config.images.uris)):
        return str(last.metrics["digest"])
    digest, files = _list(config, progress or Progress("images", "files"), last)
    _planned.clear()
    if last is not None and digest == last.metrics["digest"]:
        files.folder.clear()
    else:
        _planned[_key(config)] = digest, files
    return digest


def list_now(config: Config, progress: Progress) -> None:
    """Ask for the digest now, so that :func:`source_digest` need not list the images when it is asked next."""
    _listed_now[_key(config)] = source_digest(config, progress)


def last_digest(config: Config) -> str | None:
    """The digest of the last listing, without a look at the images; None if there is none yet."""
    if config.embeddings.uri is not None:
        return _embeddings_digest(config)
    return str(last.metrics["digest"]) if (last := _last_listing(config)) is not None else None


@dataclass(frozen=True)
class Refresh:
    """A new listing of sources that have changed since the listing `base`: known images keep their ids, new ones get
    the next."""

    base: Artifact
    files: FileShards
    digest: str
    """The source digest of the new listing."""

    def run(self, config: Config, context: StageContext) -> dict[str, Any]:
        """Write the new listing. Metrics as :func:`run`, and `continues`, the listings whose ids it keeps."""
        continues = [*self.base.metrics.get("continues", ()), self.base.fingerprint]
        metrics = _write_files(self.files, config, context, self.digest, self.base, self._known())
        return metrics | {"continues": continues}

    def _known(self) -> Iterator[pa.Table]:
        base = Listing(self.base)
        for start in range(0, len(base), PART_ROWS):
            rows = base.rows(start, start + PART_ROWS)
            wanted = [(file_of(row.uri), row.etag, locate(row.uri) is not None) for row in rows]
            yield from entry_tables(map(_entry_again, rows, self.files.find_again(wanted)))


def _entry_again(row: ListedImage, file: File | None) -> Entry:
    if file is None:
        return Entry(row.uri, problem=REMOVED)
    if file.is_container:
        return Entry(row.uri, row.size_bytes, file.etag, None if row.problem == REMOVED else row.problem)
    return Entry(row.uri, file.size_bytes, file.etag, file.problem)


def find_changes(config: Config, progress: Progress) -> Refresh | None:
    """List the sources again. None if there is no listing under the output yet, or nothing has changed since the last.
    Raises InputError: as :func:`run`."""
    if (last := _last_listing(config)) is None:
        return None
    sources = _sources_folder(config)
    for name in sources.folder_names():
        if (sources / name).exists(f"{RECORDS_FOLDER}/{ALL}.json"):
            (sources / name).clear()  # of a refresh that was killed after it had listed the bucket
    digest, files = _list(config, progress, last)
    if digest == last.metrics["digest"]:
        files.folder.clear()
        return None
    return Refresh(last, files, hashlib.sha256(f"{last.metrics['digest']}\0{files.digest}".encode()).hexdigest())


def _write_files(
    files: FileShards, config: Config, context: StageContext, digest: str, last: Artifact | None, known: Tables = ()
) -> dict[str, Any]:
    """Write the listing of `known` images and of all files that these leave."""
    from icce_ray.images.job import open_containers

    opened = list[PartRecord]()

    def entries() -> Iterator[pa.Table]:
        yield from known
        tables = (table.filter(table["is_container"]) for table in files.unknown())
        containers = [File(*row.values()) for table in tables for row in table.to_pylist()]
        opened.extend(open_containers(containers, config, context.output, context.progress))
        for record in opened:
            files.skipped.update(record.metrics["skipped"])
        yield from _with_members(files.unknown(), opened, context.output.folder)

    with Claim(files.folder) if files.is_on_storage else nullcontext():
        wanted = without_forgotten(entries(), config.output, files.skipped)
        metrics = _write(wanted, context, files.skipped, {"digest": digest, "files_digest": files.digest}, last)
    for record in opened:
        for part in record.files:
            context.output.folder.remove(part.name)
    PartRecords(context.output.folder, "").clear()
    files.folder.clear()
    return metrics


def _with_members(files: Tables, opened: Sequence[PartRecord], folder: Folder) -> Iterator[pa.Table]:
    """The images of `files` in order: each file that is one, and the members of each container."""
    members = _member_tables(opened, folder)
    for table in files:
        containers, images = table["is_container"].to_numpy(), table.select(ENTRY_SCHEMA.names)
        for start, stop in pairwise([-1, *np.flatnonzero(containers).tolist(), len(table)]):
            yield images.slice(start + 1, stop - start - 1)
            if stop < len(table):
                yield next(members)


def _member_tables(opened: Sequence[PartRecord], folder: Folder) -> Iterator[pa.Table]:
    for record in opened:
        (part,) = record.files
        table, start = pq.read_table(pa.BufferReader(folder.read_bytes(part.name, part.num_bytes))), 0
        for num_rows in record.metrics["rows"]:
            yield table.slice(start, num_rows)
            start += num_rows


def _write(
    entries: Tables, context: StageContext, skipped: Counter[str], digests: dict[str, str], last: Artifact | None = None
) -> dict[str, Any]:
    started = time.monotonic()
    num_images, size_bytes, num_removed = 0, 0, 0
    for index, part in enumerate(_parts(entries)):
        context.output.write_table(f"{LISTING_PREFIX}-{index:05d}.parquet", part)
        num_images += len(part)
        size_bytes += pc.sum(part["size_bytes"]).as_py() or 0
        num_removed += pc.sum(pc.equal(part["problem"], REMOVED)).as_py() or 0
        context.progress.update(num_images, None)
    if skipped:
        context.progress.note(f"not taken: {describe(skipped)}")
    return {
        "num_images": num_images,
        "num_removed": num_removed,
        "skipped": dict(skipped),
        "size_bytes": size_bytes or None,
        "list_s": round(time.monotonic() - started, 3),
        **digests,
        "generation": 1 + (0 if last is None else _generation(last)),
    }


def _parts(tables: Tables) -> Iterator[pa.Table]:
    """The entries, numbered, in tables of PART_ROWS; at least one table."""
    start, held, num_held = 0, [ENTRY_SCHEMA.empty_table()], 0
    for table in tables:
        held.append(table)
        num_held += len(table)
        while num_held >= PART_ROWS:
            joined = pa.concat_tables(held)
            yield numbered(joined.slice(0, PART_ROWS), start)
            held, num_held, start = [joined.slice(PART_ROWS)], num_held - PART_ROWS, start + PART_ROWS
    if num_held or start == 0:
        yield numbered(pa.concat_tables(held), start)


_listed_now: dict[str, str] = {}
"""Digests of :func:`list_now`, each for the next plan."""
_planned: dict[str, tuple[str, FileShards]] = {}
"""The digest and files that planning listed last, so that the stage in the same process does not list them again."""


def _key(config: Config) -> str:
    return fingerprint("files", 1, {"images": config.images.model_dump(mode="json")}, {"output": config.output})


def _sources_folder(config: Config) -> Folder:
    return Folder.at(config.output) / "images" / _key(config)


def _last_listing(config: Config) -> Artifact | None:
    """The newest finished listing of the same sources under this output. Not by time: the clocks of machines differ."""
    root, wanted = Folder.at(config.output) / "images", config.images.model_dump(mode="json")
    found = [
        artifact
        for name in root.folder_names()
        if (artifact := Artifact.find(root / name)) is not None
        and artifact.manifest.config.get("images") == wanted
        and "files_digest" in artifact.metrics
    ]
    return max(found, key=lambda artifact: (_generation(artifact), artifact.fingerprint), default=None)


def _generation(listing: Artifact) -> int:
    return int(listing.metrics.get("generation", 0))


def _entries_of_rows(config: Config) -> Iterator[Entry]:
    """The image of each row of ready-made embeddings. Raises InputError: `embeddings.images` cannot be read, or has
    another number of images."""
    embeddings, column = config.embeddings, config.images.uri_column
    opened, num_images = open_embeddings(embeddings), 0
    if embeddings.images is None:
        yield from (Entry(uri.as_py()) for uri in opened.uris(column))
        return
    for uri in named_images(embeddings.images, column):
        num_images += 1
        if num_images <= opened.num_rows:
            yield Entry(uri)
    if num_images != opened.num_rows:
        raise InputError(
            f"embeddings.images: {embeddings.images} names {num_images:,} images, but there are {opened.num_rows:,} "
            "embeddings; it must name the image of each row, in order"
        )


def _embeddings_digest(config: Config) -> str:
    files = [file for found in open_embedding_sets(config.embeddings) for file in found.files]
    text = "".join(f"{file.uri}\0{file.size_bytes}\0{file.mtime_ns}\n" for file in files) + config.images.uri_column
    if (images := config.embeddings.images) is not None:
        filesystem, path = open_uri(images)
        info = filesystem.get_file_info(path)
        text += f"{images}\0{info.size}\0{info.mtime_ns}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def _list(config: Config, progress: Progress, last: Artifact | None = None) -> tuple[str, FileShards]:
    """The files that are there now, and the digest of their listing: that of the `last` one if they are the same."""
    files = list_files(config, _sources_folder(config), progress)
    if last is not None and last.metrics["files_digest"] == files.digest:
        return str(last.metrics["digest"]), files
    return files.digest, files
