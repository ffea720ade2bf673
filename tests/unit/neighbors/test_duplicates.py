from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from icce_ray import ICCE
from icce_ray.config import NeighborsConfig
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.neighbors import graph_rows as rows_module
from icce_ray.neighbors.duplicates import DuplicatePairs, auto_threshold, group_table, leaders, pair_table
from icce_ray.neighbors.faiss_engine import RESOLUTION
from icce_ray.neighbors.graph import BuiltGraph, build
from icce_ray.neighbors.unit_features import prepare

from . import reference


def build_with(features: npt.NDArray[np.floating], **settings: object) -> BuiltGraph:
    config = NeighborsConfig(**{"similarity_threshold": 0.5, "min_neighbors": 8, "max_neighbors": None} | settings)  # type: ignore[arg-type]
    return build(features, config, num_clusters=5, seed=3)


def plain_leaders(units: npt.NDArray[np.int64], threshold: float) -> list[int]:
    found: list[int] = []
    for image in range(len(units)):
        near = [lower for lower in range(image) if units[image, lower] >= round(threshold / RESOLUTION)]
        found.append(next((lower for lower in near if found[lower] == lower), image))
    return found


def plain_lists(base: npt.NDArray[np.floating], threshold: float, k: int, leader: list[int]) -> list[list[int]]:
    """The adaptive rule over leaders, image by image; nothing for who follows a leader."""
    units = reference.similarity_units(base)
    lists: list[list[int]] = []
    for image in range(len(base)):
        if leader[image] != image:
            lists.append([])
            continue
        others = [j for j in range(len(base)) if leader[j] == j and j != image]
        hits = [j for j in others if units[image, j] >= round(threshold / RESOLUTION)]
        if len(hits) < k:
            hits = sorted(others, key=lambda j: (-units[image, j], j))[:k]
        lists.append(sorted(hits))
    return lists


@pytest.mark.parametrize("duplicate_threshold", [0.97, 0.9999])
def test_the_graph_with_near_duplicates_is_the_plain_rule_over_leaders(
    duplicate_threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "QUERY_BLOCK", 40)
    monkeypatch.setattr(rows_module, "MAX_ROWS_PER_PART", 80)
    features = reference.awkward_features(250, 5)
    base = prepare(features, center=True)[:]
    leader = plain_leaders(reference.similarity_units(base), duplicate_threshold)
    assert 5 < sum(image != first for image, first in enumerate(leader)) < 200
    built = build_with(features, duplicate_threshold=duplicate_threshold)
    assert built.leader_N is not None
    assert built.leader_N.tolist() == leader
    assert reference.lists_of(built.graph) == plain_lists(base, 0.5, 8, leader)


def test_every_pair_of_near_duplicates_is_listed_with_its_similarity() -> None:
    features = reference.awkward_features(150, 5)
    units = reference.similarity_units(prepare(features, center=True)[:])
    found = build_with(features, duplicate_threshold=0.98).duplicates
    expected = np.argwhere(np.tril(units >= round(0.98 / RESOLUTION), -1)).tolist()
    assert np.column_stack([found.higher_P, found.lower_P]).tolist() == expected
    assert np.array_equal(found.units_P, units[found.higher_P, found.lower_P])


def test_groups_do_not_chain_images_that_differ() -> None:
    # Steps of 4 degrees along an arc: each is near the next, the ends are not near each other.
    angle = np.radians(np.arange(0, 40, 4))
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    others = np.random.default_rng(0).standard_normal((50, 2)) * [0.1, 1] - [5, 0]
    built = build_with(
        np.vstack([arc, others]), center=False, duplicate_threshold=float(np.cos(np.radians(6))), min_neighbors=2
    )
    assert built.leader_N is not None
    assert built.leader_N[:10].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_originals_are_each_others_neighbours_and_copies_nobodys() -> None:
    rng = np.random.default_rng(0)
    originals = rng.standard_normal((200, 32))
    copies = np.concatenate([np.repeat(np.arange(10), 12), [50]])
    features = np.concatenate([originals, originals[copies]]).astype(np.float16)
    built = build_with(features, similarity_threshold=None, min_neighbors=10)
    assert built.audit.duplicate_threshold is not None
    lists = reference.lists_of(built.graph)
    assert all(len(neighbors) == 10 and max(neighbors) < 200 for neighbors in lists[:200])
    assert not any(lists[200:])
    assert built.graph.anchors.tolist() == list(range(200))


def test_a_collection_of_one_picture_keeps_its_lists() -> None:
    features = np.tile(np.array([[1.0, 2.0, 3.0]], np.float32), (60, 1))
    built = build_with(features, center=False, duplicate_threshold=0.99)
    assert built.leader_N is None
    assert (built.graph.degrees == 59).all()


@pytest.mark.parametrize(("duplicate_threshold", "message"), [(0.3, "not above similarity"), (1.5, "up to 1")])
def test_a_threshold_that_makes_no_sense_is_refused(duplicate_threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborsConfig(similarity_threshold=0.4, duplicate_threshold=duplicate_threshold)


def test_the_automatic_threshold_lies_far_above_neighbours_and_gives_up_where_all_are_alike() -> None:
    assert auto_threshold(np.array([0.2, 0.5, 0.9])) == pytest.approx(0.995)
    assert auto_threshold(np.full(5, 0.99999)) is None


def test_tables_name_images_by_their_ids() -> None:
    pairs = DuplicatePairs(np.array([2, 3]), np.array([0, 2]), np.array([1 / RESOLUTION, 0.5 / RESOLUTION], np.int64))
    image_ids = np.array([10, 11, 13, 17])
    assert pair_table(pairs, image_ids).to_pylist() == [
        {"image_id": 13, "duplicate_of": 10, "similarity": 1.0},
        {"image_id": 17, "duplicate_of": 13, "similarity": 0.5},
    ]
    leader = leaders(4, pairs, min_leaders=1)
    assert group_table(leader, image_ids).to_pylist() == [
        {"image_id": 10, "leader": 10},
        {"image_id": 13, "leader": 10},
    ]
    assert group_table(None, image_ids).num_rows == 0
    assert leaders(4, pairs, min_leaders=4) is None


@pytest.mark.slow
def test_thirty_percent_of_planted_duplicates_cost_less_than_a_point_of_accuracy() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    features, targets = (digits.data[:1000] / 16).astype(np.float32), digits.target[:1000]
    rng = np.random.default_rng(0)
    # 30% of the larger collection are copies, slightly changed, ten each of few originals.
    originals = rng.choice(len(features), 43, replace=False)
    copied = np.repeat(originals, 10)
    copies = features[copied] + rng.normal(0, 0.002, (len(copied), 64)).astype(np.float32)
    planted = np.concatenate([features, copies])

    def accuracy(rows: npt.NDArray[np.float32], seed: int) -> float:
        model = ICCE(10, n_heads=4, epochs=20, classifier={"num_iterations": 100}, random_state=seed)
        return clustering_accuracy(targets, model.fit(rows).labels_[: len(features)])

    # One seed says little: with so few heads the same features range over five points.
    loss = [accuracy(features, seed) - accuracy(planted, seed) for seed in range(3)]
    assert np.mean(loss) < 0.01
