"""The ``images`` stage: list every image once, with dense ids in the order of the sorted files.

An image is a file (:mod:`icce_ray.images.image_files`), a member of a container (:mod:`icce_ray.images.containers`), or
a row of ready-made embeddings (:mod:`icce_ray.images.embedding_files`). Images are not opened here: the ``embed`` stage
finds out which are unreadable.

A listing is a snapshot. Object storage is listed once per output, so that a resumed run means the same images. A
refresh lists it again and appends new images behind the known ids. Everything is streamed: memory does not grow with
the collection.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config import Config, EmbeddingsConfig, ImagesConfig
from icce_ray.errors import InputError
from icce_ray.images.containers import file_of, locate, members
from icce_ray.images.embedding_files import open_embedding_sets, open_embeddings
from icce_ray.images.file_table import File, FileTable
from icce_ray.images.image_files import iter_files
from icce_ray.images.listing import LISTING_PREFIX, REMOVED, Entry, Listing, number_entries
from icce_ray.images.skipped_files import describe
from icce_ray.images.uri_lists import named_images
from icce_ray.images.uris import is_remote
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder
from icce_ray.store.filesystem import open_uri

PART_ROWS = 65_536


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write the parts ``images-*.parquet``.

    Returns:
        Metrics: num_images, num_removed, skipped (what lies there and is not taken, by ending or kind), size_bytes
        (None if unknown), list_s; digest and files_digest, which identify the snapshot; generation, 1 more than that
        of the listing before.

    Raises:
        InputError: nothing there, no images, or a list or container that cannot be read.
    """
    images, embeddings, output = config.images, config.embeddings, config.output
    if embeddings.uri is not None:
        digest = _embeddings_digest(embeddings, images)
        return _write(_entries_of_rows(embeddings, images), context, digest, digest, Counter(), None)
    planned = _planned.pop(_key(images, output), None)
    digest, files = planned or (source_digest(images, embeddings, output), _list_files(images, output))
    last = _last_listing(images, output)
    return _write(_entries(files, images, files.skipped), context, digest, files.digest(), files.skipped, last)


def source_digest(images: ImagesConfig, embeddings: EmbeddingsConfig, output: str) -> str:
    """Identify the listing that a run uses: an earlier one if it still holds, else the one that would be made now.

    The digest changes when an image is added, removed or changed (size, time). Images are not opened; of ready-made
    embeddings only the files' sizes and times are read.

    Returns:
        64 hex digits.

    Raises:
        InputError: as :func:`run`.
    """
    if embeddings.uri is not None:
        return _embeddings_digest(embeddings, images)
    last = _last_listing(images, output)
    if last is not None and any(map(is_remote, images.uris)):
        return str(last.metrics["digest"])
    files = _list_files(images, output)
    digest = files.digest()
    if last is not None and last.metrics["files_digest"] == digest:
        digest = str(last.metrics["digest"])
    _planned.clear()
    _planned[_key(images, output)] = digest, files
    return digest


@dataclass(frozen=True)
class Refresh:
    """A new listing of sources that have changed: known images keep their ids, new ones get the next."""

    base: Artifact
    """The latest listing so far."""
    files: FileTable
    """What is there now."""
    digest: str
    """The source digest of the new listing."""

    def run(self, config: Config, context: StageContext) -> dict[str, Any]:
        """Write the new listing. Metrics as :func:`run`, and `continues`, the listings whose ids it keeps."""
        entries = self._entries(config.images)
        continues = [*self.base.metrics.get("continues", ()), self.base.fingerprint]
        metrics = _write(entries, context, self.digest, self.files.digest(), self.files.skipped, self.base)
        return metrics | {"continues": continues}

    def _entries(self, images: ImagesConfig) -> Iterator[Entry]:
        base = Listing(self.base)
        find_again = lru_cache(maxsize=1)(self.files.find_again)  # the images of a container are neighbours
        for start in range(0, len(base), PART_ROWS):
            for row in base.rows(start, start + PART_ROWS):
                is_member = locate(row.uri) is not None
                file = find_again(file_of(row.uri), row.etag, is_member)
                if file is None:
                    yield Entry(row.uri, problem=REMOVED)
                elif is_member:
                    problem = None if row.problem == REMOVED else row.problem
                    yield Entry(row.uri, row.size_bytes, file.etag, problem)
                else:
                    yield Entry(row.uri, file.size_bytes, file.etag, file.problem)
        yield from _entries(self.files.unknown(), images, self.files.skipped)


def find_changes(images: ImagesConfig, output: str) -> Refresh | None:
    """List the sources again. None if there is no listing under `output` yet, or nothing has changed since the last.

    Raises:
        InputError: as :func:`run`.
    """
    last = _last_listing(images, output)
    if last is None:
        return None
    files = _list_files(images, output)
    files_digest = files.digest()
    if last.metrics["files_digest"] == files_digest:
        return None
    digest = hashlib.sha256(f"{last.metrics['digest']}\0{files_digest}".encode()).hexdigest()
    return Refresh(last, files, digest)


def _write(
    entries: Iterator[Entry],
    context: StageContext,
    digest: str,
    files_digest: str,
    skipped: Counter[str],
    last: Artifact | None,
) -> dict[str, Any]:
    started = time.monotonic()
    num_images, size_bytes, num_removed = 0, 0, 0
    for index, part in enumerate(_parts(entries)):
        context.output.write_table(f"{LISTING_PREFIX}-{index:05d}.parquet", part)
        num_images += len(part)
        size_bytes += pc.sum(part["size_bytes"]).as_py() or 0
        num_removed += pc.sum(pc.equal(part["problem"], REMOVED)).as_py() or 0
        context.progress.update(num_images, num_images)
    if skipped:
        context.progress.note(f"not taken: {describe(skipped)}")
    return {
        "num_images": num_images,
        "num_removed": num_removed,
        "skipped": dict(skipped),
        "size_bytes": size_bytes or None,
        "list_s": round(time.monotonic() - started, 3),
        "digest": digest,
        "files_digest": files_digest,
        "generation": 1 + (_generation(last) if last is not None else 0),
    }


def _entries(files: Iterable[File], images: ImagesConfig, skipped: Counter[str]) -> Iterator[Entry]:
    """The images of `files`: each file that is one, each member of a container."""
    for file in files:
        if file.is_container:
            yield from members(file, images, skipped)
        else:
            yield Entry(file.uri, file.size_bytes, file.etag, file.problem)


def _parts(entries: Iterator[Entry]) -> Iterator[pa.Table]:
    """The entries, numbered, in tables of PART_ROWS; at least one table."""
    start = 0
    while (batch := list(islice(entries, PART_ROWS))) or start == 0:
        yield number_entries(batch, start)
        start += PART_ROWS


_planned: dict[str, tuple[str, FileTable]] = {}
"""The digest and files that planning listed last, so that the stage in the same process does not list them again."""


def _key(images: ImagesConfig, output: str) -> str:
    return f"{output}\0{images.model_dump_json()}"


def _last_listing(images: ImagesConfig, output: str) -> Artifact | None:
    """The newest finished listing of the same sources under this output. Not by time: the clocks of machines differ."""
    root = Folder.at(output) / "images"
    wanted = images.model_dump(mode="json")
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


def _entries_of_rows(embeddings: EmbeddingsConfig, images: ImagesConfig) -> Iterator[Entry]:
    """The image of each row of ready-made embeddings.

    Raises:
        InputError: `embeddings.images` cannot be read, or has another number of images.
    """
    opened = open_embeddings(embeddings)
    if embeddings.images is None:
        yield from (Entry(uri.as_py()) for uri in opened.uris(images.uri_column))
        return
    num_images = 0
    for uri in named_images(embeddings.images, images.uri_column):
        num_images += 1
        if num_images <= opened.num_rows:
            yield Entry(uri)
    if num_images != opened.num_rows:
        raise InputError(
            f"embeddings.images: {embeddings.images} names {num_images:,} images, but there are {opened.num_rows:,} "
            "embeddings; it must name the image of each row, in order"
        )


def _embeddings_digest(embeddings: EmbeddingsConfig, images: ImagesConfig) -> str:
    digest = hashlib.sha256()
    for file in chain.from_iterable(found.files for found in open_embedding_sets(embeddings)):
        digest.update(f"{file.uri}\0{file.size_bytes}\0{file.mtime_ns}\n".encode())
    digest.update(images.uri_column.encode())
    if embeddings.images is not None:
        filesystem, path = open_uri(embeddings.images)
        info = filesystem.get_file_info(path)
        digest.update(f"{embeddings.images}\0{info.size}\0{info.mtime_ns}\n".encode())
    return digest.hexdigest()


def _list_files(images: ImagesConfig, output: str) -> FileTable:
    skipped: Counter[str] = Counter()
    return FileTable(iter_files(images, output, skipped), skipped)
