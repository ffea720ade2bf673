"""One part labelled and written, for a run's own images and for new ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.assign.embeddings_to_label import EmbeddingFiles
from icce_ray.assign.exemplars import CANDIDATES_SCHEMA
from icce_ray.assign.part_labeler import SCHEMA, PartLabeler
from icce_ray.classifier.linear import MODEL_NAME, LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig, EmbeddingsConfig
from icce_ray.store import Artifact, ArtifactWriter, Folder

RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 3, 300)
FEATURES = (RNG.normal(size=(300, 5)) + 4 * np.eye(5)[TRUE]).astype(np.float32)
CONSENSUS = np.where(np.arange(300) % 3 == 0, -1, (TRUE + 1) % 3).astype(np.int32)
AGREEMENT = RNG.random(300).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(FEATURES, TRUE, config, num_clusters=3, seed=0, outlier_quantile=0.95)


def commit(folder: Path, **files: Any) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for name, content in files.items():
        if isinstance(content, bytes):
            writer.write_bytes(MODEL_NAME, content)
        else:
            writer.write_array(f"{name}.npy", content)
    return writer.commit(stage=folder.name, fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)


@pytest.fixture
def inputs(tmp_path: Path, classifier: LinearClassifier) -> dict[str, Artifact]:
    np.save(tmp_path / "x.npy", FEATURES)
    return {
        "classifier": commit(tmp_path / "classifier", model=classifier.to_bytes()),
        "consensus": commit(tmp_path / "consensus", labels=CONSENSUS, agreement=AGREEMENT),
    }


def label(tmp_path: Path, inputs: dict[str, Artifact]) -> tuple[pa.Table, Any]:
    """All images as one part, by a labeller that came to its worker as a pickle."""
    source = EmbeddingFiles(EmbeddingsConfig(uri=str(tmp_path / "x.npy")), "uri")
    labeler = PartLabeler(source, Folder.at(tmp_path / "out"), inputs, num_exemplars=2, seed=0)
    (part,) = source.plan()
    assert labeler.classifier.num_clusters == 3  # loaded here, and not sent along
    labeler = pickle.loads(pickle.dumps(labeler))
    files, totals = labeler.label(part)
    assert len(pickle.dumps(labeler)) < 3000
    folders = ["assignments", "candidates", *([] if "consensus" in inputs else ["outliers"])]
    assert [file.name for file in files] == [f"{folder}/part-00000.parquet" for folder in folders]
    assert pq.read_table(tmp_path / "out" / files[1].name).schema == CANDIDATES_SCHEMA
    table = pq.read_table(tmp_path / "out" / files[0].name)
    assert table.schema == SCHEMA
    return table, totals


def test_images_of_the_consensus_keep_its_label_and_noise_stays_noise(
    tmp_path: Path, inputs: dict[str, Artifact], classifier: LinearClassifier
) -> None:
    table, totals = label(tmp_path, inputs)
    alone = classifier.label(FEATURES)
    voted = CONSENSUS >= 0
    assert (table["cluster"].to_numpy() == CONSENSUS).all()
    assert table["agreement"].to_pylist() == [float(AGREEMENT[i]) if voted[i] else None for i in range(300)]
    probability = np.where(voted, classifier.predict_proba(FEATURES)[np.arange(300), CONSENSUS], 0.0)
    np.testing.assert_allclose(table["consensus_probability"].to_numpy(), probability, atol=1e-6)
    assert (table["second_choice"].to_numpy() == alone.cluster)[~voted].all()
    np.testing.assert_array_equal(table["outlier_score"].to_numpy(), alone.outlier_score)
    assert (totals.num_images, totals.num_in_consensus, totals.num_noise) == (300, 300, 100)
    assert totals.cluster_sizes.tolist() == np.bincount(CONSENSUS[voted]).tolist()
    assert totals.probability_counts.sum() == 200
    assert totals.num_outliers == alone.is_outlier.sum() > 5
    assert totals.mean_consensus_probability == pytest.approx(probability[voted].mean())
    candidates = pq.read_table(tmp_path / "out" / "candidates" / "part-00000.parquet")["cluster"].to_numpy()
    assert set(candidates) == {0, 1, 2}


def test_of_a_sample_only_the_sampled_images_have_a_consensus_label(
    tmp_path: Path, inputs: dict[str, Artifact], classifier: LinearClassifier
) -> None:
    sampled = np.arange(2, 300, 7)
    inputs["consensus"] = commit(tmp_path / "sampled", labels=(TRUE[sampled] + 1) % 3, agreement=AGREEMENT[sampled])
    inputs["sample"] = commit(tmp_path / "sample", image_ids=sampled)
    table, totals = label(tmp_path, inputs)
    expected = classifier.label(FEATURES).cluster
    expected[sampled] = (TRUE[sampled] + 1) % 3
    assert (table["cluster"].to_numpy() == expected).all()
    assert np.flatnonzero(table["agreement"].is_valid()).tolist() == sampled.tolist()
    assert (table["agreement"].drop_null().to_numpy() == AGREEMENT[sampled]).all()
    assert totals.num_in_consensus == len(sampled)


def test_new_images_get_the_classifiers_labels_and_no_agreement(
    tmp_path: Path, inputs: dict[str, Artifact], classifier: LinearClassifier
) -> None:
    table, totals = label(tmp_path, {"classifier": inputs["classifier"]})
    alone = classifier.label(FEATURES)
    for name in ("cluster", "consensus_probability", "second_choice", "outlier_score", "is_outlier"):
        assert (table[name].to_numpy() == getattr(alone, name)).all()
    assert table["agreement"].null_count == 300
    assert totals.num_in_consensus == 0
    outliers = pq.read_table(tmp_path / "out/outliers/part-00000.parquet")
    assert outliers["image_id"].to_pylist() == np.flatnonzero(alone.is_outlier).tolist()
    assert len(outliers) > 0
