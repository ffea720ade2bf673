"""The package as it is installed: the files of its wheel, in a folder of their own, without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import icce_ray
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the repository stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "icce_ray", "pyproject.toml", "README.md", "LICENSE"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = subprocess.run(["git", "ls-files", "icce_ray"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(files.stdout.splitlines()) - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


@pytest.mark.slow
def test_the_installed_package_clusters(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    features[:30] += 6
    np.save(tmp_path / "x.npy", features)
    settings = {
        "embeddings": {"uri": "x.npy"},
        "num_clusters": 2,
        "output": "out",
        "heads": {"num_heads": 2, "num_epochs": 2, "batch_size": 16},
        "classifier": {"num_iterations": 20},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout

    assert run("-c", "import icce_ray; print(icce_ray.__file__)").startswith(str(target))
    assert run("-m", "icce_ray", "--version") == f"icce_ray {icce_ray.__version__}\n"
    assert json.loads(run("-m", "icce_ray", "run", "run.yaml", "--json"))["num_images"] == 60
    assert (tmp_path / "out" / "latest" / "report" / "report.html").exists()
