from __future__ import annotations

import numpy as np

from icce_ray.neighbors.adaptive_rule import PairList, Rule, keep

ERROR = 0.01


def nearest(scores: list[float], exact: list[float], k: int) -> tuple[list[int], list[int]]:
    """The images that a single query keeps as its `k` nearest, and those whose exact cosine was asked for."""
    ids_P, asked = np.arange(len(scores)), list[int]()

    def exact_units(rows_P, ids_P):
        asked.extend(ids_P.tolist())
        return np.rint(1e6 * np.array(exact)[ids_P]).astype(np.int64)

    pairs = PairList(
        np.zeros(len(ids_P), np.int32), ids_P, np.array(scores, np.float32), np.zeros(len(ids_P), dtype=bool)
    )
    rule = Rule(threshold=None, min_neighbors=k, max_neighbors=None, seed=0)
    kept = keep(pairs, np.zeros(1, np.int64), np.array([99]), rule, ERROR, exact_units)
    return sorted(kept.ids_P.tolist()), sorted(asked)


def test_scores_that_are_wrong_by_their_whole_error_do_not_change_the_nearest() -> None:
    """One pair was scored too high, the other too low. Together that is nearly twice the error."""
    assert nearest([0.509, 0.4905, 0.3], [0.4995, 0.5, 0.3], k=1) == ([1], [0, 1])
    # Here the pair that was scored too high is above the k-th score, and not the k-th itself.
    assert nearest([0.509, 0.4915, 0.491, 0.3], [0.4995, 0.501, 0.5, 0.3], k=2) == ([1, 2], [0, 1, 2])


def test_scores_that_are_clear_are_not_computed_again() -> None:
    assert nearest([0.6, 0.5, 0.4, 0.3], [0.6, 0.5, 0.4, 0.3], k=2) == ([0, 1], [])


def test_ties_go_to_the_lower_id() -> None:
    assert nearest([0.5, 0.501, 0.499, 0.502], [0.5, 0.5, 0.5, 0.5], k=2) == ([0, 1], [0, 1, 2, 3])
