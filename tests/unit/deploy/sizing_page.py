"""benchmarks/sizing.py, which is a script and in no package, as a module."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import sizing  # noqa: E402

__all__ = ["ROOT", "sizing"]
