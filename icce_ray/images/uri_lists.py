"""Lists of images: a text file with one path or URI per line, or a Parquet file with a column of them."""

import codecs
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.config.section import is_utf8
from icce_ray.errors import InputError
from icce_ray.images.parquet_columns import check_column, find_field, is_string, open_column
from icce_ray.images.uris import is_remote, open_file, resolve
from icce_ray.store.filesystem import open_uri

BATCH_ROWS = 65_536


def read_text_list(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[str]:
    """The entries of a text list, without blank lines and comments. Bytes that are not UTF-8 become surrogates. Raises
    InputError: it cannot be read, or has no entries."""
    found = False
    try:
        with filesystem.open_input_file(path) as file:
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            file.seek(0)
            for line in io.TextIOWrapper(file, encoding, "surrogateescape"):
                entry = line.strip()
                if entry and not entry.startswith("#"):
                    found = True
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"images.uri: the list {uri} cannot be read as text: {error}") from None
    if not found:
        raise InputError(f"images.uri: the list {uri} names no images; write one path or URI per line")


def read_parquet_list(uri: str, column: str) -> Iterator[str]:
    """The entries of a Parquet list, as of a text list; empty text for a null. Raises InputError: no such column, a
    column of another type, or no rows."""
    with open_file(uri) as opened:
        file = open_column(opened, column)
        field = find_field(file.schema_arrow, column, uri, "images.uri_column")
        if not is_string(field.type):
            raise InputError(f"images.uri_column: {column!r} in {uri} is {field.type}, not text")
        if file.metadata.num_rows == 0:
            raise InputError(f"images.uri: the list {uri} has no rows")
        try:
            check_column(file, column)
        except ValueError as error:
            raise InputError(f"images.uri: the list {uri} is not read: {error}") from None
        for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
            shared = batch.column(0)
            values = shared.dictionary.cast(pa.string()).cast(pa.binary()).to_pylist()
            texts = [(value or b"").decode("utf-8", "surrogateescape").strip() for value in values]
            for index in shared.indices.to_pylist():
                yield "" if index is None else texts[index]


def named_images(uri: str, column: str) -> Iterator[str]:
    """The URIs of the images that a list names, in its order: a .parquet file with `column`, or a text file. Raises
    InputError: the list does not exist or cannot be read."""
    filesystem, path = open_uri(uri)
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise InputError(f"embeddings.images: {uri} is no file; give a .txt or .parquet list of the images")
    folder = uri.rpartition("/")[0] if is_remote(uri) else path.rpartition("/")[0] or "/"
    is_parquet = path.lower().endswith((".parquet", ".pq"))
    entries = read_parquet_list(uri, column) if is_parquet else read_text_list(filesystem, path, uri)
    for row, entry in enumerate(entries):
        resolved = resolve(entry, folder)
        if not entry or not is_utf8(resolved):
            raise InputError(f"embeddings.images: {uri}, entry {row}: {'not UTF-8' if entry else 'empty'}")
        yield resolved
