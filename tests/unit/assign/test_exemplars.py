from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from icce_ray.assign.exemplars import (
    CANDIDATES_SCHEMA,
    EXEMPLARS_SCHEMA,
    MARGIN,
    NUM_PROJECTED_DIMS,
    SAMPLE_PER_EXEMPLAR,
    candidates_table,
    choose_exemplars,
    farthest_first,
)
from icce_ray.assign.part_labeler import assignments_table
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig
from icce_ray.random_numbers import id_hashes

NUM_IMAGES, NUM_EXEMPLARS = 6000, 3
RNG = np.random.default_rng(0)
LABELS = RNG.choice(4, NUM_IMAGES, p=[0.7, 0.2, 0.09, 0.01])
FEATURES = (RNG.normal(size=(NUM_IMAGES, 8)) + 6 * np.eye(8)[LABELS]).astype(np.float32)
NO_AGREEMENT = np.full(NUM_IMAGES, np.nan, dtype=np.float32)
ALL = np.arange(NUM_IMAGES)

Rows = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def candidates() -> Callable[..., pa.Table]:
    config = ClassifierConfig(num_iterations=300)
    classifier = fit_classifier(FEATURES, LABELS, config, num_clusters=5, seed=0, outlier_quantile=0.99)

    def make(
        rows: Rows = ALL, agreement: npt.NDArray[np.float32] = NO_AGREEMENT, outliers: Rows | None = None, seed: int = 5
    ) -> pa.Table:
        prediction = classifier.label(FEATURES[rows], LABELS[rows])
        if outliers is not None:
            prediction = replace(prediction, is_outlier=np.isin(rows, outliers))
        assignments = assignments_table(rows, [f"/{row}.png" for row in rows], prediction, agreement[rows])
        return candidates_table(
            assignments,
            FEATURES[rows],
            prediction,
            classifier,
            num_images=NUM_IMAGES,
            num_exemplars=NUM_EXEMPLARS,
            seed=seed,
        )

    make.classifier = classifier  # type: ignore[attr-defined]
    return make


def ids(exemplars: pa.Table) -> list[int]:
    found: list[int] = exemplars["image_id"].to_pylist()
    return found


def test_exemplars_are_the_same_however_the_images_are_divided_and_ordered(candidates: Callable[..., pa.Table]) -> None:
    whole = choose_exemplars(candidates(), NUM_EXEMPLARS)
    assert whole.schema == EXEMPLARS_SCHEMA
    assert whole["cluster"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert whole["rank"].to_pylist() == [0, 1, 2] * 4
    assert whole["uri"].to_pylist() == [f"/{row}.png" for row in ids(whole)]
    assert (LABELS[ids(whole)] == whole["cluster"].to_numpy()).all()
    for num_parts in (3, 50):
        parts = np.array_split(np.random.default_rng(num_parts).permutation(NUM_IMAGES), num_parts)
        assert choose_exemplars(pa.concat_tables(candidates(part) for part in parts), NUM_EXEMPLARS) == whole
    assert ids(choose_exemplars(candidates(seed=6), NUM_EXEMPLARS)) != ids(whole)


def test_candidates_are_few_and_hold_the_sample_of_each_cluster(candidates: Callable[..., pa.Table]) -> None:
    kept = candidates()
    sizes = np.bincount(kept["cluster"].to_numpy(), minlength=5)
    wanted = SAMPLE_PER_EXEMPLAR * NUM_EXEMPLARS
    assert (sizes <= 1.5 * MARGIN * wanted).all()
    is_outlier = candidates.classifier.label(FEATURES).is_outlier  # type: ignore[attr-defined]
    order = np.argsort(id_hashes(ALL, 5))
    for cluster in range(4):
        lowest = [row for row in order if LABELS[row] == cluster and not is_outlier[row]][:wanted]
        assert set(lowest) <= set(ids(kept))


def test_outliers_are_never_exemplars(candidates: Callable[..., pa.Table]) -> None:
    before = ids(choose_exemplars(candidates(), NUM_EXEMPLARS))
    after = ids(choose_exemplars(candidates(outliers=np.array(before)), NUM_EXEMPLARS))
    assert len(after) == len(before)
    assert not set(before) & set(after)
    everyone = np.flatnonzero(LABELS == 2)
    assert 2 not in choose_exemplars(candidates(outliers=everyone), NUM_EXEMPLARS)["cluster"].to_pylist()


def test_exemplars_are_central(candidates: Callable[..., pa.Table]) -> None:
    exemplars = choose_exemplars(candidates(), NUM_EXEMPLARS)
    scores = candidates.classifier.label(FEATURES, LABELS).outlier_score  # type: ignore[attr-defined]
    for cluster in range(3):
        own = np.array(ids(exemplars.filter(pa.array(exemplars["cluster"].to_numpy() == cluster))))
        assert (scores[own] < np.quantile(scores[cluster == LABELS], 0.7)).all()


def test_exemplars_are_unlike_each_other() -> None:
    """Twenty images look alike, one is different, one is different again but far from the centre of the cluster."""
    points = np.zeros((22, NUM_PROJECTED_DIMS), dtype=np.float32)
    points[:20, 0] = np.linspace(0, 0.01, 20)
    points[20, 1], points[21, 1] = 3, 9
    table = {
        "cluster": np.zeros(22, np.int32),
        "image_id": np.arange(22),
        "uri": ["x"] * 22,
        "consensus_probability": np.ones(22, np.float32),
        "agreement": pa.nulls(22, pa.float32()),
        "outlier_score": np.array([1.0] * 20 + [0.5, 5.0], dtype=np.float32),
        "priority": np.arange(22, dtype=np.uint64),
        "projection": pa.FixedSizeListArray.from_arrays(pa.array(points.ravel()), NUM_PROJECTED_DIMS),
    }
    planted = pa.table(table, schema=CANDIDATES_SCHEMA)
    first, second = ids(choose_exemplars(planted, 2))
    assert first < 20
    assert second == 20
    assert ids(choose_exemplars(planted, 22))[1:3] == [21, 20]


@pytest.mark.parametrize("levels", [[0, 0, 0, 0, 0, 1, 2], [0, 1, 1, 1, 1, 2, 2]])
def test_images_of_high_agreement_come_first_and_those_without_any_last(
    levels: list[int], candidates: Callable[..., pa.Table]
) -> None:
    """Half of each cluster's sample is kept. 0: high agreement, 1: low, 2: none."""
    wanted = SAMPLE_PER_EXEMPLAR * NUM_EXEMPLARS
    level = np.array(levels)[ALL % 7]
    table = candidates(agreement=np.array([0.9, 0.2, np.nan], np.float32)[level])
    chosen = np.array(ids(choose_exemplars(table, NUM_EXEMPLARS)))
    for cluster in range(3):
        mine = table.filter(pa.array(table["cluster"].to_numpy() == cluster)).sort_by("priority")[:wanted]
        kept = set(np.sort(level[ids(mine)])[: wanted // 2])
        assert set(level[chosen[LABELS[chosen] == cluster]]) <= kept
        assert 2 not in kept


def test_a_small_cluster_gives_all_it_has(candidates: Callable[..., pa.Table]) -> None:
    few = np.flatnonzero(LABELS == 3)[:2]
    assert sorted(ids(choose_exemplars(candidates(few), NUM_EXEMPLARS))) == few.tolist()


def test_farthest_first_starts_in_the_middle_and_goes_to_the_ends() -> None:
    line = np.array([[0.0], [5.1], [10.0], [4.8], [5.0]], dtype=np.float32)
    assert farthest_first(line, 3).tolist() == [4, 0, 2]
    assert sorted(farthest_first(line, 9)) == [0, 1, 2, 3, 4]
    assert sorted(farthest_first(np.zeros((3, 2), dtype=np.float32), 3)) == [0, 1, 2]


def test_priorities_are_uniform_and_change_with_the_seed() -> None:
    drawn = id_hashes(np.arange(10_000), 0) / 2.0**64
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 1000).max() < 150
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05
    assert len(set(drawn)) == 10_000
    assert abs(np.corrcoef(drawn, id_hashes(np.arange(10_000), 1) / 2.0**64)[0, 1]) < 0.05


def test_no_images_have_no_exemplars() -> None:
    assert choose_exemplars(CANDIDATES_SCHEMA.empty_table(), 3) == EXEMPLARS_SCHEMA.empty_table()
