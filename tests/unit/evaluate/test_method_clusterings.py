"""The methods of a combined run side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.config import Config
from icce_ray.evaluate.method_clusterings import method_clusterings, nmi_matrix, renumber
from icce_ray.methods.clusterings import Clusterings
from icce_ray.store import Artifact, ArtifactWriter, Folder


def clusterings(folder: Path, method: str, labels: Any, losses: Any = None) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    Clusterings(np.array(labels, dtype=np.int32), None if losses is None else np.array(losses)).write(writer)
    config = {"method": method}
    return writer.commit(stage="method", fingerprint=method, inputs={}, config=config, metrics={}, seconds=0)


def test_each_method_has_its_clustering_with_the_lowest_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = clusterings(tmp_path / "a", "icce", [[0, 0, 0, 1], [1, 1, 0, 0]], [0.5, 0.2])
    others = [
        clusterings(tmp_path / "b", "hdbscan", [[-1, 3, 3, 0]]),
        clusterings(tmp_path / "c", "icce", [[2, 2, 2, 2]]),
    ]
    monkeypatch.setattr("icce_ray.evaluate.method_clusterings.find_heads", lambda names, output, own: others)
    config = Config.model_validate({"embeddings": "x.npy", "output": str(tmp_path), "num_clusters": 2})
    consensus = np.array([0, 0, 1, 1], dtype=np.int32)
    assert method_clusterings(config, own, consensus) == {}
    found = method_clusterings(config.with_extra_runs(["b", "c"]), own, consensus)
    assert {name: labels.tolist() for name, labels in found.items()} == {
        "icce": [0, 0, 1, 1], "hdbscan": [-1, 0, 0, 1], "icce (2)": [0, 0, 0, 0]
    }  # fmt: skip


def test_clusters_get_the_numbers_of_those_they_share_most_images_with() -> None:
    like = np.array([0, 0, 0, 1, 1, 2, 2, -1], dtype=np.int32)
    labels = np.array([7, 7, 4, 5, 5, 9, -1, 9], dtype=np.int32)
    assert renumber(labels, like).tolist() == [0, 0, 3, 1, 1, 2, -1, 2]
    assert renumber(np.full(8, -1, dtype=np.int32), like).tolist() == [-1] * 8


def test_nmi_leaves_noise_out_and_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(-1, 4, (2, 300)).astype(np.int32)
    both = (one >= 0) & (other >= 0)
    expected = normalized_mutual_info_score(one[both], other[both], average_method="geometric")
    found = nmi_matrix([one, other, np.full(300, -1, dtype=np.int32)])
    np.testing.assert_allclose(found, [[1, expected, 0], [expected, 1, 0], [0, 0, 1]])
