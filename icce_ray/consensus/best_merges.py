"""Merges of items, two at a time, always the two with the highest value. Each item keeps its best partner, so that a
merge looks at few rows of the values again.

Shape letters: X items, x those that are left besides the two that are merged.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MergedValues = Callable[[int, int, npt.NDArray[np.int64]], Floats]


def best_merges(values_XX: Floats, num_merges: int, merged_values: MergedValues) -> Iterator[tuple[int, int, float]]:
    """Yield the two items of each merge and their value. The lower item comes first, and stands for both from then on.
    Ties go to the pair with the lowest items.

    Args:
        values_XX: exactly symmetric; changed in place.
        merged_values: called with two items and all that are left besides them, before the two are yielded: the values
            (x,) of both together with each of these.
    """
    np.fill_diagonal(values_XX, -np.inf)
    alive_X = np.ones(len(values_XX), dtype=bool)
    partner_X, best_X = values_XX.argmax(axis=1), values_XX.max(axis=1)
    for _ in range(num_merges):
        low = int(best_X.argmax())
        high, value = int(partner_X[low]), float(best_X[low])
        assert low < high
        alive_X[[low, high]] = False
        others = np.flatnonzero(alive_X)
        alive_X[low] = True
        values_x = merged_values(low, high, others)
        values_XX[high], values_XX[:, high], best_X[high] = -np.inf, -np.inf, -np.inf
        values_XX[low, others] = values_XX[others, low] = values_x
        # Items whose partner was one of the two search again. For all others, the two together are at most as good as
        # the better one was, except for rounding, and may tie with a partner of a higher number.
        stale = np.append(others[np.isin(partner_X[others], (low, high))], low)
        partner_X[stale], best_X[stale] = values_XX[stale].argmax(axis=1), values_XX[stale].max(axis=1)
        is_nearer_x = (values_x > best_X[others]) | ((values_x == best_X[others]) & (low < partner_X[others]))
        partner_X[others[is_nearer_x]], best_X[others[is_nearer_x]] = low, values_x[is_nearer_x]
        yield low, high, value
