"""What a person installs: version, licence, notebook, pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import icce_ray
from icce_ray import cli
from tests.conftest import REPOSITORY

SETTINGS: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"icce_ray {icce_ray.__version__}\n"
    assert f"## {icce_ray.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_windows_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'; import icce_ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: icce_ray runs on Linux and macOS")


def test_nothing_but_the_package_is_needed_to_search_neighbours() -> None:
    names = {re.split(r"[\[>]", line)[0] for line in SETTINGS["project"]["dependencies"]}
    assert {"faiss-cpu", "torch", "timm"} <= names


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer heads and epochs, so that it takes seconds."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "docs" / "first_clusters.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("n_heads=8, epochs=30", "n_heads=3, epochs=4")
            exec(compile(source, cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert float(re.search(r"accuracy ([\d.]+)", said)[1]) > 0.5  # type: ignore[index]
    assert len(names["together"].labels) == 1797


def test_the_pages_of_the_site_exist_and_their_names_can_be_imported() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    pages = re.findall(r": ([\w-]+\.md)$", text, flags=re.MULTILINE)
    assert len(pages) > 15
    assert {page for page in pages if not (REPOSITORY / "docs" / page).exists()} == set()
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} == set(pages)
    named = re.findall(r"^::: ([\w.]+)$", (REPOSITORY / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    exported = {icce_ray._MODULES[name] + f".{name}" for name in icce_ray.__all__ if name != "Config"}
    assert exported <= set(named)
