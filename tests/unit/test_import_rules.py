"""How the package hangs together: who may import whom, and Ray only where it may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import icce_ray

PACKAGE = Path(icce_ray.__file__).parent
ROOT = PACKAGE.parent

ROOMS = (
    "errors", "interrupt", "random_numbers", "methods", "config", "store", "runtime", "stage", "metrics", "images",
    "embed", "sample", "neighbors", "methods.*", "consensus", "corrections", "classifier", "assign", "evaluate",
    "count", "report", "pipeline",
)  # fmt: skip
"""Imports run from right to left. `methods` is the table of methods, `methods.*` are the methods."""
COMMANDS = {
    "__init__",
    "__main__",
    "apply",
    "assign.new_images",
    "cli",
    "collect_garbage",
    "demo",
    "estimator",
    "estimator_base",
    "export",
    "forget",
    "forget_parts",
    "kmeans_estimator",
    "photos",
    "run",
    "sweeps",
    "turtle_estimator",
}
"""Commands build on all rooms, and no room imports them."""


def module_files() -> dict[str, Path]:
    """Every module of the package by its name without ``icce_ray.``."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


MODULES = module_files()


@cache
def imported_by(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    return named_in(ast.walk(ast.parse(path.read_text())))


@cache
def imported_with(path: Path) -> set[str]:
    """Modules of the package that are imported when the module of this file is."""
    return named_in(run_on_import(ast.parse(path.read_text())))


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module but for those inside functions and those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_on_import(node)


def named_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules of the package that import statements among the nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "icce_ray":
            base = (node.module or "").removeprefix("icce_ray").removeprefix(".")
            longer = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name if name in MODULES else base for name in longer}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "icce_ray"]
            found |= {name.removeprefix("icce_ray").removeprefix(".") for name in names}
    return found - {""}


def is_command(name: str) -> bool:
    return bool({name, name.split(".")[0]} & COMMANDS)


def room_of(name: str) -> int:
    if name.startswith("methods."):
        return ROOMS.index("methods.*")
    return ROOMS.index(name.split(".")[0])


def test_imports_run_down_the_flow_and_never_back() -> None:
    back = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        if not is_command(name)
        for other in imported_by(path)
        if is_command(other) or room_of(other) > room_of(name)
    ]
    assert back == []


def test_there_is_no_import_circle() -> None:
    graph = {name: imported_by(path) for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def may_import_ray(name: str) -> bool:
    return name.startswith("runtime.") or name.endswith(".job")


def imported_after(statements: str, wanted: set[str]) -> set[str]:
    code = f"import sys\n{statements}\nprint(*({wanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_ray_is_imported_with_jobs_and_the_runtime_alone() -> None:
    """Others may import these inside functions. They name Ray nowhere: see the next test."""
    with_ray = {
        name for name, path in MODULES.items() if re.search("^(import|from) ray", path.read_text(), re.MULTILINE)
    }
    assert {"runtime.ray_train", "sweeps.job"} <= with_ray
    names = [name for name in MODULES if not may_import_ray(name)]
    assert len(names) > 20
    for name in names:
        found = [name]
        for module in found:
            packages = {module.rpartition(".")[0]} & MODULES.keys()
            found += sorted((imported_with(MODULES[module]) | packages) - set(found))
        assert not with_ray & set(found), name


def test_every_module_that_names_ray_is_one_that_may() -> None:
    for name, path in MODULES.items():
        if not may_import_ray(name):
            lines = path.read_text().splitlines()
            assert not [line for line in lines if line.strip().startswith(("import ray", "from ray"))], name


def test_the_entrances_are_light() -> None:
    entrances = "import icce_ray, icce_ray.pipeline.run, icce_ray.pipeline.plan, icce_ray.cli, icce_ray.run"
    assert imported_after(entrances, {"ray", "torch", "timm", "faiss", "sklearn"}) == set()
    assert imported_after("import icce_ray.run", {"numpy", "pyarrow"}) == set()
    finished = "import icce_ray.pipeline.run, icce_ray.images.list_images, icce_ray.embed.backbone_plan"
    # A run that finds everything finished decodes, downloads and distributes nothing.
    assert imported_after(finished, {"PIL.Image", "urllib.request", "icce_ray.images.job"}) == set()


def test_no_two_modules_have_the_same_name() -> None:
    stems = [path.stem for path in MODULES.values() if path.stem not in ("__init__", "job", "stage", "run")]
    assert sorted(stems) == sorted(set(stems))


def test_every_reference_to_the_method_names_a_heading_of_its_page() -> None:
    headings = set(re.findall(r"^#+ (.+)$", (ROOT / "docs/METHOD.md").read_text(), flags=re.MULTILINE))
    cited = []
    for path in MODULES.values():
        text = re.sub(r"\s+(# )?", " ", path.read_text())
        assert not re.search(r"METHOD(,? section|,? \d)", text), f"{path}: cite a heading of docs/METHOD.md"
        cited += re.findall(r'METHOD\.md, "([^"]+)"', text)
    assert len(cited) > 20
    assert set(cited) <= headings, set(cited) - headings
