"""DESIGN rule 1: Ray only where it may be. Each check runs in a fresh process: here, other tests have imported it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import icce_ray

PACKAGE = Path(icce_ray.__file__).parent
MAY_IMPORT_RAY = {"icce_ray.runtime.ray_cluster", "icce_ray.sweeps.sweep"}


def module_names() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def may_import_ray(name: str) -> bool:
    return name.startswith("icce_ray.runtime") or name.endswith(".job") or name == "icce_ray.sweeps.sweep"


def imported_after(statements: str, wanted: set[str]) -> set[str]:
    code = f"import sys\n{statements}\nprint(*({wanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_ray_is_imported_only_by_jobs_and_the_runtime() -> None:
    names = [name for name in module_names() if not may_import_ray(name)]
    assert len(names) > 20
    assert imported_after("\n".join(f"import {name}" for name in names), {"ray"}) == set()


def test_every_module_that_names_ray_is_one_that_may() -> None:
    for name in module_names():
        path = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
        if path.exists() and not may_import_ray(name):
            lines = path.read_text().splitlines()
            assert not [line for line in lines if line.strip().startswith(("import ray", "from ray"))], name


@pytest.mark.parametrize("module", ["icce_ray", "icce_ray.pipeline.run", "icce_ray.cli", "icce_ray.run"])
def test_the_entrance_is_light(module: str) -> None:
    assert imported_after(f"import {module}", {"ray", "torch", "timm", "faiss", "sklearn"}) == set()
