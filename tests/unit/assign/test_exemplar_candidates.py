from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from icce_ray.assign import exemplar_candidates as candidates
from icce_ray.assign.exemplar_candidates import candidates_table, choose_exemplars, cutoffs, priorities
from icce_ray.assign.exemplars import CANDIDATES_PER_EXEMPLAR
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig

NUM_IMAGES, NUM_EXEMPLARS = 6000, 3
RNG = np.random.default_rng(0)
LABELS = RNG.choice(4, NUM_IMAGES, p=[0.7, 0.2, 0.09, 0.01])
FEATURES = (RNG.normal(size=(NUM_IMAGES, 8)) + 6 * np.eye(8)[LABELS]).astype(np.float32)


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    config = ClassifierConfig(num_iterations=300)
    return fit_classifier(FEATURES, LABELS, config, num_clusters=5, seed=0, outlier_quantile=0.99)


def shortlist(classifier: LinearClassifier, rows: npt.NDArray[np.int64]) -> pa.Table:
    return candidates_table(
        rows,
        pa.chunked_array([[f"/{row}.png" for row in rows]]),
        FEATURES[rows],
        classifier.label(FEATURES[rows]),
        classifier,
        cutoffs(classifier, NUM_IMAGES, NUM_EXEMPLARS),
        seed=5,
    )


def test_exemplars_do_not_depend_on_how_the_images_are_cut_or_ordered(classifier: LinearClassifier) -> None:
    whole = choose_exemplars(shortlist(classifier, np.arange(NUM_IMAGES)), NUM_EXEMPLARS)
    assert whole["cluster"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert whole["rank"].to_pylist() == [0, 1, 2] * 4
    for num_parts in (3, 50):
        parts = np.array_split(np.random.default_rng(num_parts).permutation(NUM_IMAGES), num_parts)
        joined = pa.concat_tables(shortlist(classifier, part) for part in parts)
        again = choose_exemplars(joined, NUM_EXEMPLARS)
        assert again["image_id"].to_pylist() == whole["image_id"].to_pylist()
        assert again["uri"].to_pylist() == [f"/{row}.png" for row in again["image_id"].to_pylist()]


def test_as_few_images_are_kept_as_are_enough(classifier: LinearClassifier) -> None:
    kept = shortlist(classifier, np.arange(NUM_IMAGES))
    sizes = np.bincount(kept["cluster"].to_numpy(), minlength=5)
    wanted = CANDIDATES_PER_EXEMPLAR * NUM_EXEMPLARS
    assert (sizes[:3] >= wanted).all()
    assert (sizes <= 2 * candidates.MARGIN * wanted).all()
    # Those with the lowest priorities of each cluster are all there.
    found = classifier.label(FEATURES)
    order = np.argsort(priorities(np.arange(NUM_IMAGES), 5))
    for cluster in range(4):
        lowest = [row for row in order if found.cluster[row] == cluster and not found.is_outlier[row]][:wanted]
        assert set(lowest) <= set(kept["image_id"].to_numpy())


def test_exemplars_are_central_unlike_each_other_and_no_outliers(classifier: LinearClassifier) -> None:
    exemplars = choose_exemplars(shortlist(classifier, np.arange(NUM_IMAGES)), NUM_EXEMPLARS)
    found = classifier.label(FEATURES)
    rows, clusters = exemplars["image_id"].to_numpy(), exemplars["cluster"].to_numpy()
    assert not found.is_outlier[rows].any()
    for cluster in range(3):
        own = rows[clusters == cluster]
        members = np.flatnonzero(found.cluster == cluster)
        assert (found.outlier_score[own] < np.quantile(found.outlier_score[members], 0.7)).all()
        gaps = np.linalg.norm(FEATURES[own][:, None] - FEATURES[own], axis=2)[np.triu_indices(len(own), 1)]
        some = RNG.choice(members, 200)
        usual = np.linalg.norm(FEATURES[some][:, None] - FEATURES[some], axis=2)
        assert gaps.min() > np.quantile(usual, 0.1)


def test_priorities_are_uniform_and_change_with_the_seed() -> None:
    drawn = priorities(np.arange(10_000), 0) / 2.0**64
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 1000).max() < 150
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05
    assert len(set(drawn)) == 10_000
    assert abs(np.corrcoef(drawn, priorities(np.arange(10_000), 1) / 2.0**64)[0, 1]) < 0.05


def test_no_images_have_no_exemplars() -> None:
    table = choose_exemplars(candidates.SCHEMA.empty_table(), 3)
    assert (table.num_rows, table.schema) == (0, candidates.EXEMPLARS_SCHEMA)
