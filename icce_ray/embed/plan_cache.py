"""Plans of networks, kept on this machine. Making one imports timm, which takes seconds. A command that finds all
finished, or a driver whose workers hold the network, doesn't need timm otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from icce_ray.store import Folder, fingerprint
from icce_ray.store.cache import cache_folder

VERSION = 1
T = TypeVar("T")


def remembered(kind: type[T], asked: dict[str, Any], find_out: Callable[[], T]) -> T:
    """What `find_out` returned for the same `asked` with this version of timm; otherwise what it returns now.

    Args:
        kind: the dataclass that it returns.
        asked: everything that the answer depends on, JSON-able.
        find_out: takes seconds. Its exceptions are not remembered.
    """
    name = f"{fingerprint('backbone', VERSION, asked | {'timm': version('timm')}, {})}.json"
    adapter = TypeAdapter(kind)
    folder = Folder.at(cache_folder() / "backbones")
    with suppress(OSError, ValidationError):
        return adapter.validate_json(folder.read_bytes(name))
    found = find_out()
    with suppress(OSError):  # a full or read-only cache costs seconds the next time
        folder.write_bytes(name, adapter.dump_json(found))
    return found
