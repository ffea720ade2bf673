from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.sweeps import sweep
from icce_ray.sweeps.sweep_config import Sweep, build_sweep
from icce_ray.sweeps.trial import Listings


def test_a_sweep_with_failed_trials_is_searched_again_and_a_complete_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), dtype=np.float32))
    num_failed = iter([1, 0])

    def search(asked: Sweep, listings: Listings, folder: Folder, name: str, quiet: bool) -> Artifact:
        metrics: dict[str, Any] = {
            "num_trials": 2, "num_failed": next(num_failed), "metric": "anmi", "best_value": 0.5, "best_trial": 0,
            "best_parameters": {},
        }  # fmt: skip
        writer = ArtifactWriter(folder)
        return writer.commit(stage="sweep", fingerprint=name, inputs={}, config={}, metrics=metrics, seconds=0.0)

    monkeypatch.setattr(sweep, "_check", lambda asked: None)
    monkeypatch.setattr(sweep, "_search", search)
    base = {"embeddings": {"uri": str(tmp_path / "x.npy")}, "num_clusters": 2, "output": str(tmp_path / "out")}
    asked = build_sweep({"base": base, "space": {"num_clusters": [2, 3]}, "ensemble": None}, "sweep.yaml")
    assert [sweep.run_sweep(asked, quiet=True).num_failed for _ in range(3)] == [1, 0, 0]
