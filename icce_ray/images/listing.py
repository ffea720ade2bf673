"""The ``images`` stage: every image once, with a dense id in the order of the sorted files, in shards of Parquet.

What is listed are files (:mod:`icce_ray.images.sources`), images in containers (:mod:`icce_ray.images.containers`), or
the rows of ready-made embeddings. Images are not opened here: one that turns out to be unreadable costs a row of the
``embed`` stage's errors table.

A listing is a snapshot. Object storage is listed once per output, so that a run which is resumed means the same
images; with `images.refresh` what is new since then is added behind the known ids. All of it is streamed: what one
process holds does not grow with the collection.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config import Config
from icce_ray.embed.ready_made import open_embeddings
from icce_ray.errors import InputError
from icce_ray.images.containers import file_of, locate, members
from icce_ray.images.file_table import FileTable
from icce_ray.images.reading import REMOVED, ListedImage
from icce_ray.images.sources import IMAGE_ENDINGS, File, is_remote, iter_files, local_path, local_uri
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder
from icce_ray.store.filesystem import open_uri

__all__ = ["IMAGE_ENDINGS", "Listing", "list_images", "local_path", "local_uri", "open_uri", "run", "source_digest"]

SHARD_PREFIX = "images"
SHARD_ROWS = 65536
SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])

Row = tuple[str, int | None, str | None]
"""URI, size in bytes, etag (local files: the time of the last change in ns; of a container's image the container's)."""


class Listing:
    """Reads a finished listing by image id; keeps one shard in memory.

    Usage: ``Listing(context.inputs["images"]).rows(0, 512)``
    """

    def __init__(self, images: Artifact) -> None:
        self._images = images
        self._names = images.part_names(SHARD_PREFIX)
        noted = [images.part(name).rows for name in self._names]
        rows = [
            len(images.read_table(name)) if count is None else count
            for name, count in zip(self._names, noted, strict=True)
        ]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._loaded: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def table(self, start: int, stop: int) -> pa.Table:
        """The rows ``start <= image_id < stop``.

        Raises:
            DamagedArtifactError: a shard is missing or damaged.
        """
        tables = []
        while start < stop:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            if index >= len(self._names):
                break
            end = min(stop, int(self._starts[index + 1]))
            tables.append(self._shard(index).slice(start - int(self._starts[index]), end - start))
            start = end
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def rows(self, start: int, stop: int) -> list[ListedImage]:
        """As :meth:`table`, as tuples."""
        columns = [self.table(start, stop)[name].to_pylist() for name in ListedImage._fields]
        return [ListedImage(*row) for row in zip(*columns, strict=True)]

    def uri(self, image_id: int) -> str:
        uri: str = self.table(image_id, image_id + 1)["uri"][0].as_py()
        return uri

    def _shard(self, index: int) -> pa.Table:
        if self._loaded is None or self._loaded[0] != index:
            table = self._images.read_table(self._names[index])
            missing = [field for field in SCHEMA if field.name not in table.column_names]
            for field in missing:
                table = table.append_column(field, pa.nulls(len(table), field.type))
            self._loaded = index, table.select(SCHEMA.names)
        return self._loaded[1]


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write the shards ``images-*.parquet``.

    Returns:
        Metrics: num_images, size_bytes (None where unknown), list_s; digest, files and listed_at, which say what this
        listing is a snapshot of; after a refresh num_removed and base, the fingerprint of the listing it was made from.

    Raises:
        InputError: as :func:`list_images`.
    """
    started = time.monotonic()
    snapshot = _Snapshot(config, _take_planned(config))
    num_images, size_bytes, num_removed = 0, 0, 0
    for index, shard in enumerate(_shards(snapshot.rows())):
        context.output.write_table(f"{SHARD_PREFIX}-{index:05d}.parquet", shard)
        num_images += len(shard)
        size_bytes += pc.sum(shard["size_bytes"]).as_py() or 0
        num_removed += pc.sum(pc.equal(shard["etag"], REMOVED)).as_py() or 0
        context.progress.update(num_images, num_images)
    _check_count(num_images - num_removed, config)
    return {
        "num_images": num_images,
        "size_bytes": size_bytes or None,
        "num_removed": num_removed,
        "list_s": round(time.monotonic() - started, 3),
        "digest": snapshot.digest,
        "files": snapshot.files_digest,
        "base": None if snapshot.base is None else snapshot.base.fingerprint,
        "listed_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def list_images(config: Config) -> pa.Table:
    """All images of `config` in one table: image_id int64 (0..M-1), uri string, size_bytes int64 and etag string (null
    if unknown). For small collections: the stage writes the same rows shard by shard.

    Sorted by file (bytes of the URI's UTF-8), within a container in its order. A file that is named twice counts once;
    a local file of a list that does not exist is listed too, and becomes an error row of the ``embed`` stage.
    Ready-made embeddings keep the order of their rows, URIs that repeat included.

    Raises:
        InputError: nothing there, no images, a list or container that cannot be read, or fewer images than
            `num_clusters`.
    """
    snapshot = _Snapshot(config, None)
    table = pa.concat_tables([SCHEMA.empty_table(), *_shards(snapshot.rows())]).combine_chunks()
    _check_count(len(table), config)
    return table


def source_digest(config: Config) -> str:
    """64 hex digits that name the listing which a run of `config` uses: an earlier one where it still holds, else the
    one that would be made now. They change when the input does: an image added, removed or changed (size, time).

    Images are not opened; of ready-made embeddings only the files' sizes and times are read.

    Raises:
        InputError: as :func:`list_images`.
    """
    if config.embeddings.uri is None and not config.images.refresh and any(map(is_remote, config.images.uris)):
        last = _last_listing(config)
        if last is not None:
            return str(last.metrics["digest"])
    snapshot = _Snapshot(config, None)
    if snapshot.table is not None:
        if not snapshot.table.has_containers and snapshot.base is None:
            _check_count(len(snapshot.table), config)
        _planned[:] = [(_key(config), snapshot.table)]
    return snapshot.digest


class _Snapshot:
    """What a listing made now would hold.

    Args:
        config: the run's.
        table: the files, where they have been listed already.
    """

    def __init__(self, config: Config, table: FileTable | None) -> None:
        self._config = config
        self.base: Artifact | None = None
        self.table = table
        if config.embeddings.uri is not None:
            self.files_digest = self.digest = _embeddings_digest(config)
            return
        if self.table is None:
            self.table = FileTable(iter_files(config.images), _output_prefix(config))
        self.files_digest = self.table.digest()
        self.digest = self.files_digest
        last = _last_listing(config)
        if last is not None and last.metrics["files"] == self.files_digest:
            self.digest = str(last.metrics["digest"])
            self.base = _listing_named(config, last.metrics["base"])
        elif last is not None and config.images.refresh:
            self.base = last
            self.digest = hashlib.sha256(f"{last.metrics['digest']}\0{self.files_digest}".encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        if self.table is None:
            embeddings = open_embeddings(self._config.embeddings)
            for uri in embeddings.uris(self._config.images.uri_column):
                yield uri.as_py(), None, None
            return
        if self.base is not None:
            yield from self._known_rows(Listing(self.base))
        yield from self._expanded(self.table.unknown())

    def _known_rows(self, base: Listing) -> Iterator[Row]:
        """The rows of the base, which keep their ids, as they are now."""
        assert self.table is not None
        current: tuple[str, str | None, bool] = "", None, False
        for start in range(0, len(base), SHARD_ROWS):
            for row in base.rows(start, start + SHARD_ROWS):
                file_uri, in_container = file_of(row.uri), locate(row.uri) is not None
                if not in_container:
                    found = self.table.find_again(file_uri, row.etag, is_container=False)
                    yield (row.uri, found.size_bytes, found.etag) if found else (row.uri, None, REMOVED)
                    continue
                if current[:2] != (file_uri, row.etag):
                    again = self.table.find_again(file_uri, row.etag, is_container=True)
                    current = file_uri, row.etag, again is not None
                yield (row.uri, row.size_bytes, row.etag) if current[2] else (row.uri, None, REMOVED)

    def _expanded(self, files: Iterable[File]) -> Iterator[Row]:
        for file in files:
            if not file.is_container:
                yield file.uri, file.size_bytes, file.etag
                continue
            for uri, size_bytes in members(file, self._config.images):
                yield uri, size_bytes, file.etag


def _shards(rows: Iterator[Row]) -> Iterator[pa.Table]:
    start, columns = 0, _columns()
    for uri, size_bytes, etag in rows:
        for column, value in zip(columns, (uri, size_bytes, etag), strict=True):
            column.append(value)
        if len(columns[0]) == SHARD_ROWS:
            yield _shard(start, columns)
            start, columns = start + SHARD_ROWS, _columns()
    if columns[0] or start == 0:
        yield _shard(start, columns)


def _columns() -> tuple[list[Any], list[Any], list[Any]]:
    return [], [], []


def _shard(start: int, columns: tuple[list[Any], list[Any], list[Any]]) -> pa.Table:
    ids = np.arange(start, start + len(columns[0]), dtype=np.int64)
    arrays = [
        pa.array(ids),
        *(pa.array(column, field.type) for column, field in zip(columns, list(SCHEMA)[1:], strict=True)),
    ]
    return pa.table(arrays, schema=SCHEMA)


_planned: list[tuple[str, FileTable]] = []
"""The files that planning listed last: the stage that follows in the same process does not list them again."""


def _take_planned(config: Config) -> FileTable | None:
    found = _planned.pop() if _planned else None
    return found[1] if found is not None and found[0] == _key(config) else None


def _key(config: Config) -> str:
    return f"{config.output}\0{config.images.model_dump_json()}"


def _last_listing(config: Config) -> Artifact | None:
    """The newest finished listing of the same sources under this output."""
    root = Folder.at(config.output) / "images"
    wanted = _source_settings(config.images.model_dump(mode="json"))
    found = [
        artifact
        for name in root.folder_names()
        if (artifact := Artifact.find(root / name)) is not None
        and _source_settings(artifact.manifest.config.get("images", {})) == wanted
        and "listed_at" in artifact.metrics
    ]
    return max(found, key=lambda artifact: str(artifact.metrics["listed_at"]), default=None)


def _listing_named(config: Config, fingerprint: str | None) -> Artifact | None:
    return None if fingerprint is None else Artifact.find(Folder.at(config.output) / "images" / fingerprint)


def _source_settings(images: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in images.items() if key != "refresh"}


def _embeddings_digest(config: Config) -> str:
    embeddings = open_embeddings(config.embeddings)
    _check_count(embeddings.num_rows, config)
    digest = hashlib.sha256()
    for file in embeddings.files:
        digest.update(f"{file.uri}\0{file.size_bytes}\0{file.mtime_ns}\n".encode())
    digest.update(config.images.uri_column.encode())
    return digest.hexdigest()


def _output_prefix(config: Config) -> str | None:
    """The report's pictures are no images of the collection."""
    results = _place(config.output)
    for uri in config.images.uris:
        if _place(uri) == results:
            raise InputError(
                f"output: {config.output} is the folder of the images; name another, for example {uri}-clusters"
            )
    return local_uri(results) + "/"


def _place(uri: str) -> str:
    return uri.rstrip("/") if "://" in uri else Folder.at(uri).uri


def _check_count(num_images: int, config: Config) -> None:
    needed, needed_by = config.needed_images
    if num_images < needed:
        named = config.embeddings.uri is not None
        setting, uri = ("embeddings.uri", config.embeddings.uri) if named else ("images.uri", _join(config.images.uris))
        raise InputError(
            f"{setting}: {uri} holds {num_images} images, fewer than {needed_by} ({needed}): "
            f"lower {needed_by}, or add images"
        )


def _join(uris: tuple[str, ...]) -> str:
    return ", ".join(uris)
