"""The benchmark cases."""

from __future__ import annotations


def show_aim(what: str, before: str, now: str, aim: str) -> None:
    """Print a line of the table in docs/benchmarks.md, "A hundred million images, a billion"."""
    print(f"{what}: before {before} -> now {now} (aim: {aim})", flush=True)
