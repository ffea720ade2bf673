"""The files of the page: ``report.html``, and a folder of data files and sheets beside it.

A page that is opened from a disk may not fetch files, but it may load scripts and pictures. So each data file is a
script that hands over one value. As long as everything is small, it is kept in the page itself and there is no folder.
"""

import base64
import importlib.resources
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.store import ArtifactWriter

PAGE_NAME = "report.html"
DATA_FOLDER = "report_data"
MAX_INLINE_BYTES = 12_000_000
"""Up to this size, the page is a single file."""
SCRIPTS = ("data.js", "state.js", "pictures.js", "viewer.js", "grid.js", "wall.js", "map.js", "plots.js", "methods.js",
           "lists.js", "edits.js", "page.js")  # fmt: skip
"""In the order in which they are put into the page."""


class PageFiles:
    """Collects the data of the page, and writes it into a folder of `output` once it is too large to be kept in the
    page."""

    def __init__(self, output: ArtifactWriter) -> None:
        self._output = output
        self._room = MAX_INLINE_BYTES
        self._inline: dict[str, bytes] | None = {}

    def add_json(self, name: str, value: Any) -> None:
        """Data that the page loads as `name` when it needs it."""
        self.add(f"{name}.js", f"receive({to_script(name)}, {to_script(value)});\n".encode())

    def finish(self, core: dict[str, Any]) -> int:
        """Write the page itself, with `core` in it. Returns its size in bytes."""
        inline = self._inline or {}
        core = core | {"folder": DATA_FOLDER if self._inline is None else None}
        scripts = ['"use strict";', f"const CORE = {to_script(core)};"]
        scripts += [read_web(name) for name in SCRIPTS[:1]]
        sheets = {
            name.removesuffix(".jpg"): base64.b64encode(data).decode()
            for name, data in inline.items()
            if name.endswith(".jpg")
        }
        scripts.append(f"Object.assign(INLINE_SHEETS, {to_script(sheets)});")
        scripts += [data.decode() for name, data in inline.items() if name.endswith(".js")]
        scripts += [read_web(name) for name in SCRIPTS[1:]]
        page = read_web("page.html")
        for place, text in (("/*style*/", read_web("page.css")), ("/*scripts*/", "\n".join(scripts))):
            before, after = page.split(place)
            page = before + text + after
        data = page.encode("utf-8", errors="replace")
        self._output.write_bytes(PAGE_NAME, data)
        return len(data)

    def add(self, name: str, data: bytes) -> None:
        """A file of the page."""
        if self._inline is not None:
            self._inline[name] = data
            self._room -= len(data)
            if self._room >= 0:
                return
            kept, self._inline = self._inline, None
            for earlier, content in kept.items():
                self._output.write_bytes(f"{DATA_FOLDER}/{earlier}", content)
            return
        self._output.write_bytes(f"{DATA_FOLDER}/{name}", data)


def read_web(name: str) -> str:
    """A file of the folder ``web``."""
    return importlib.resources.files("icce_ray.report").joinpath("web", name).read_text(encoding="utf-8")


def to_script(value: Any) -> str:
    """JSON that can stand inside a script of a page: no name of a file can end the script."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(values: npt.NDArray[Any]) -> str:
    """An array as base64 of its little-endian bytes."""
    return base64.b64encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).decode()
