"""The job as its users run it: in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_job(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run it in `folder`. Returns its JSON result."""
    command = [sys.executable, "-m", "icce_ray.run", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
