"""Files that are too large for memory, written from start to end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from icce_ray.store import Folder
from icce_ray.store.cache import replacing


@contextmanager
def written_whole(folder: Folder, name: str) -> Iterator[Any]:
    """A file object to write `name` with. On a local disk the file appears when it is whole; elsewhere an unfinished
    one may be seen until it is written again."""
    if folder.local_path is None:
        with folder.filesystem.open_output_stream(f"{folder.path}/{name}") as file:
            yield file
        return
    path = folder.local_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file
