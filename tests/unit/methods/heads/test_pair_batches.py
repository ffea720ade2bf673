from __future__ import annotations

import numpy as np
import pytest

from icce_ray.methods.heads.pair_batches import choose_batch_size, epoch_batches, num_steps_per_epoch
from icce_ray.neighbors.graph import NeighborGraph


def batches_of(graph: NeighborGraph, epoch: int = 0, m: int = 1):
    return list(epoch_batches(graph, 64, m, seed=5, epoch=epoch))


def test_an_epoch_shows_every_image_once_with_one_of_its_neighbours(planted) -> None:
    _, graph, _ = planted
    rows = np.concatenate(batches_of(graph), axis=1)
    assert sorted(rows[0]) == list(range(graph.num_images))
    neighbors = np.split(graph.indices, graph.indptr[1:-1])
    for image, neighbor in rows.T:
        assert neighbor in neighbors[image]


def test_an_epoch_visits_only_images_with_neighbours() -> None:
    # Images 1, 2 and 5 follow leaders.
    graph = NeighborGraph(np.array([0, 2, 2, 2, 4, 5, 5]), np.array([3, 4, 0, 4, 3], np.int32))
    rows = np.concatenate(batches_of(graph, m=2), axis=1)
    assert sorted(rows[0]) == [0, 3, 4]
    for image, *neighbors in rows.T:
        assert set(neighbors) <= set(np.split(graph.indices, graph.indptr[1:-1])[image])


def test_neighbours_are_drawn_uniformly(planted) -> None:
    _, graph, _ = planted
    drawn = np.concatenate([rows for epoch in range(400) for rows in batches_of(graph, epoch=epoch)], axis=1)
    partners = drawn[1][drawn[0] == 6]
    own = np.split(graph.indices, graph.indptr[1:-1])[6]
    counts = np.array([(partners == neighbor).sum() for neighbor in own])
    expected = 400 / len(own)
    assert len(own) > 5
    assert ((counts - expected) ** 2 / expected).sum() < 35  # chi-squared, 10 degrees of freedom: p < 0.0002


def test_batches_are_of_nearly_equal_size(planted) -> None:
    _, graph, _ = planted
    sizes = [rows.shape[1] for rows in batches_of(graph)]
    assert len(sizes) == num_steps_per_epoch(200, 64) == 3
    assert max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_repeat_exactly(planted) -> None:
    _, graph, _ = planted
    first, again, second = batches_of(graph), batches_of(graph), batches_of(graph, epoch=1)
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize(("num_images", "expected"), [(50, 64), (1797, 256), (10_000, 1024), (10**9, 1024)])
def test_the_automatic_batch_gives_small_collections_about_eight_steps(num_images: int, expected: int) -> None:
    assert choose_batch_size(num_images, "auto") == expected
    assert choose_batch_size(num_images, 100) == 100
