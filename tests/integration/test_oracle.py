"""The pipeline gives what the estimator gives. On Ray it gives what it gives in one process: test_many_nodes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from icce_ray import ICCE, run_pipeline
from icce_ray.config import Config, SampleConfig
from icce_ray.methods.clusterings import read_losses
from icce_ray.sample.training_set import choose_rows
from icce_ray.store import Artifact, Folder

pytestmark = pytest.mark.slow

SECTIONS: dict[str, Any] = {
    "neighbors": {"min_neighbors": 10},
    "heads": {
        "num_heads": 5,
        "num_epochs": 12,
        "hidden_dim": 64,
        "bottleneck_dim": 32,
        "learning_rate": 2e-3,
        "precision": "float32",
    },
    "classifier": {"num_iterations": 200},
}


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Overlapping clusters, so that heads disagree and labels at the borders show every difference. The last 30 rows
    are copies of the first 30."""
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(6, 24)) * 0.9
    rows = (centres[generator.integers(0, 6, 700)] + generator.normal(size=(700, 24))).astype(np.float32)
    rows[670:] = rows[:30]
    return rows


def fit_estimator(features: np.ndarray, **sample: object) -> ICCE:
    heads = dict(SECTIONS["heads"])
    return ICCE(
        6,
        n_heads=heads.pop("num_heads"),
        epochs=heads.pop("num_epochs"),
        heads=heads,
        sample=sample,
        neighbors=SECTIONS["neighbors"],
        classifier=SECTIONS["classifier"],
        random_state=3,
    ).fit(features)


def make_config(features: np.ndarray, folder: Path, **sample: object) -> Config:
    np.save(folder / "features.npy", features)
    return Config.model_validate(
        SECTIONS
        | {
            "embeddings": {"uri": str(folder / "features.npy")},
            "num_clusters": 6,
            "output": str(folder / "out"),
            "seed": 3,
            "sample": sample,
        }
    )


def run(config: Config, folder: Path) -> tuple[dict[str, Artifact], list[int]]:
    """Artifacts by stage, and the clusters that the assignments give."""
    result = run_pipeline(config, quiet=True)
    artifacts = {}
    for stage in ("neighbors", "method", "consensus"):
        (path,) = (folder / "out" / stage).iterdir()
        found = Artifact.find(Folder.at(path))
        assert found is not None
        artifacts[stage] = found
    return artifacts, pq.read_table(result.assignments).sort_by("image_id")["cluster"].to_pylist()


def test_the_pipeline_gives_the_labels_of_the_estimator(features, tmp_path: Path) -> None:
    artifacts, clusters = run(make_config(features, tmp_path), tmp_path)
    estimator = fit_estimator(features)
    assert artifacts["neighbors"].metrics["similarity_threshold"] == estimator.similarity_threshold_
    assert np.array_equal(artifacts["method"].read_array("label_matrix.npy"), estimator.label_matrix_[:, :670])
    assert read_losses(artifacts["method"]).tolist() == estimator.head_losses_.tolist()
    assert np.array_equal(artifacts["consensus"].read_array("labels.npy"), estimator.labels_[:670])
    assert clusters == estimator.labels_.tolist()
    assert clusters[670:] == clusters[:30]


def test_with_a_sample_the_pipeline_gives_the_labels_of_the_estimator(features, tmp_path: Path) -> None:
    """With `max_images` both draw the same sample, train on it, and label the others by the classifier."""
    artifacts, clusters = run(make_config(features, tmp_path, max_images=400), tmp_path)
    estimator = fit_estimator(features, max_images=400)
    assert artifacts["neighbors"].metrics["similarity_threshold"] == estimator.similarity_threshold_
    training = choose_rows(features, SampleConfig(max_images=400), seed=3)
    assert training is not None
    took_part = training.image_ids_n
    labels = artifacts["method"].read_array("label_matrix.npy")
    assert 370 < len(took_part) < 400
    assert labels.shape == (5, len(took_part))
    assert np.array_equal(labels, estimator.label_matrix_[:, took_part])
    assert read_losses(artifacts["method"]).tolist() == estimator.head_losses_.tolist()
    assert clusters == estimator.labels_.tolist()
