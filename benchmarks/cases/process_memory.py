"""Memory of a process and all its descendants."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

SAMPLE_S = 0.25


class MemoryWatch:
    """Samples the memory of a process and its descendants while the body of the ``with`` runs."""

    def __init__(self, root: int | None = None) -> None:
        self.root = os.getpid() if root is None else root
        self.seen = [(time.time(), tree_bytes(self.root))]
        """Time and bytes of each sample."""
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._finished.wait(SAMPLE_S):
            self.seen.append((time.time(), tree_bytes(self.root)))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._finished.set()
        self._thread.join()

    def peak(self, since: float = 0.0, until: float = float("inf")) -> int:
        """The largest sample between two times, with the last one before them."""
        before = [used for moment, used in self.seen if moment < since][-1:]
        return max(before + [used for moment, used in self.seen if since <= moment <= until], default=self.seen[0][1])


def tree_bytes(root: int) -> int:
    """Proportional set size (PSS) of the process `root` and its descendants: shared pages count once."""
    return sum(map(pss_bytes, process_tree(root)))


def worker_processes(name: bytes) -> list[int]:
    """The descendants of this process with `name` in their command line, such as the class of a Ray actor."""
    found = []
    for pid in process_tree(os.getpid()):
        try:
            if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def process_tree(root: int) -> list[int]:
    """The process `root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def pss_bytes(pid: int, kind: str = "Pss") -> int:
    """PSS of one process, or its part `Pss_Anon`, which is in no file; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
