"""Where images lie on the map, and the choice between UMAP and principal components."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config import Config
from icce_ray.errors import ResourceError
from icce_ray.report.image_columns import lay_out
from icce_ray.report.stage import REPORT
from icce_ray.runtime.machine import has_umap

FEATURES = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


class FakeUMAP:
    """Puts the images on a line, in their order."""

    asked: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        FakeUMAP.asked = settings

    def fit_transform(self, points: np.ndarray) -> np.ndarray:
        return np.stack([np.arange(len(points)), np.zeros(len(points))], axis=1).astype(np.float32)


@pytest.fixture
def umap(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("umap")
    module.UMAP = FakeUMAP  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("umap", None, origin="umap/__init__.py")
    monkeypatch.setitem(sys.modules, "umap", module)


@pytest.mark.parametrize("how", ["umap", "auto"])
def test_umap_lays_out_the_map_where_it_is_installed(how: str, umap: None) -> None:
    places, components, name = lay_out(FEATURES, how)
    assert name == "umap"
    assert (np.diff(places[:, 0].astype(int)) >= 0).all()
    assert places[0, 0] < 4000 < 61000 < places[-1, 0], "the line fills the map"
    assert components.shape == (40, 6)
    assert (FakeUMAP.asked["n_components"], FakeUMAP.asked["min_dist"]) == (2, 0.1)


def test_principal_components_stay_a_choice_and_stand_in_for_few_images(umap: None) -> None:
    places, components, name = lay_out(FEATURES, "pca")
    assert name == "pca"
    assert (np.argsort(places[:, 0], kind="stable")[[0, -1]] == np.argsort(components[:, 0])[[0, -1]]).all()
    assert lay_out(FEATURES[:5], "auto")[2] == "pca"
    assert lay_out(FEATURES[:0], "auto")[0].shape == (0, 2)
    assert lay_out(FEATURES[:1], "auto")[0].tolist() == [[32768, 32768]]


def test_a_folder_that_is_called_umap_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "umap").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # as `python -m` has the working directory in it
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    assert importlib.util.find_spec("umap") is not None
    assert not has_umap()


def test_umap_that_is_missing_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    config = Config.model_validate({"images": "/i", "num_clusters": 2, "output": "o", "report": {"map": "umap"}})
    assert lay_out(FEATURES, "auto")[2] == "pca"
    assert REPORT.check is not None
    with pytest.raises(ResourceError, match=r"report\.map: umap needs the package umap-learn: pip install"):
        REPORT.check(config)
