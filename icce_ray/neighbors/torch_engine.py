"""The part of a search that touches every pair: queries against the images of one shard, on a CPU or a GPU.

Each block of scores is examined where it was computed, in one pass. The images of a block form groups, and only groups
whose maximum reaches a query's radius are examined further. The k-th highest of the maxima seen so far is a lower bound
of the k-th highest score, so the same pass also finds the radius. Scores may be wrong by up to `error`, 0.002 in the
float16 of a GPU; pairs closer to a border than that are scored again from the float32 rows, in float64. So every device
finds the same neighbours, ties included. From a GPU only pairs that may stay are fetched, since a CPU takes longer to
go through all pairs that reach the radius than the GPU takes for the products.

FAISS has no range search on GPUs, and one radius for all queries on CPUs, so the threshold rule is not built on it.

Legend: D feature dimension, n images of the shard, Q queries, B images of a block, G images of a group, T groups of a
block, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icce_ray.neighbors.adaptive_rule import UNREACHABLE, PairList, Queries, Rule, always_wanted
from icce_ray.runtime.threads import in_threads
from icce_ray.sample.unit_features import RESOLUTION, Ids, UnitFeatures, exact_similarity, in_units

LOADED_ROWS = 16_384
SCORES_PER_BLOCK = {"cuda": 2**28, "cpu": 2**22}
GATHERED_SCORES = 2**24
PAIRS_AT_A_TIME = {"cuda": 2**23, "cpu": 2**20}
RESCORED_ELEMENTS = 2**26
SAFETY = 1.25
MAX_GROUP = 64
GROUPS_PER_RANK = 16
"""More groups for each rank hardly improve the bound: few of the best share a group already."""
MAX_BLOCKS_AT_ONCE = 8
"""More blocks would wait for Python's lock, not for the device."""
BLOCK_BYTES = 2**31
"""Device memory for a block of queries: its scores and the pairs examined."""


class TorchEngine:
    """Holds the rows of a shard, whose ids ascend, on a device in float32, and on a GPU in float16 for the products."""

    blocks_at_once = 1
    """Blocks of queries to search at the same time, each in a thread. On CPUs torch has threads of its own."""

    def __init__(self, unit: UnitFeatures, ids_n: Ids, device: str = "cpu", num_threads: int = 1) -> None:
        dim = unit.shape[1]
        self.ids_n = ids_n
        self.device = torch.device(device)
        self.error = half_precision_error(dim) if self.in_halves else (dim + 2) * 2.0**-23 + 2 * RESOLUTION
        """Bound on the difference between a score and the cosine, `RESOLUTION` included."""
        self._rows_nD = torch.empty((len(ids_n), dim), dtype=torch.float32, device=self.device)

        def load(start: int) -> None:
            block = ids_n[start : start + LOADED_ROWS]
            self._rows_nD[start : start + len(block)] = torch.from_numpy(unit[_as_slice(block)]).to(self.device)

        in_threads(load, range(0, len(ids_n), LOADED_ROWS), num_threads)
        self._scored_nD = self._rows_nD.half() if self.in_halves else self._rows_nD
        self._ids_n = torch.tensor(ids_n, device=self.device)
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            self.blocks_at_once = max(1, min(num_threads, MAX_BLOCKS_AT_ONCE, free // BLOCK_BYTES))
            for _ in range(self.blocks_at_once):
                self._streams.put(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)  # before another stream reads the rows
        # Split sums in float16 would be off by more than `error`.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    @property
    def in_halves(self) -> bool:
        """Whether products are in float16, and the rule is applied on the device."""
        return self.device.type == "cuda"

    def pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        """Pairs of the queries and the shard's images, each at most once, some at a time: all that the rule may keep
        and all that reach its threshold. There are none of queries that `Queries.unsearched` names."""
        # A stream for each block, so that its copies and waits hold up no other block.
        with self._stream():
            yield from self._pairs(queries, rule)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._streams.put(stream)

    def _pairs(self, queries: Queries, rule: Rule) -> Iterator[PairList]:
        features_QD = torch.from_numpy(queries.features).to(self.device)
        scored_QD = features_QD.to(self._scored_nD.dtype)
        ids_Q = torch.tensor(queries.ids_Q, device=self.device)
        unsearched_Q = torch.tensor(queries.unsearched(rule, self.error), device=self.device)
        border = always_wanted(rule, self.error)
        k = rule.min_neighbors + 1  # the image itself may be among them
        best_Qk = torch.empty((len(queries), 0), dtype=scored_QD.dtype, device=self.device)
        found: list[_Pairs] = []
        for start, stop, group in self._image_blocks(len(queries), k):
            scores_QB = scored_QD @ self._scored_nD[start:stop].T
            # Adjacent images fall into different groups, since the collection may be sorted by class.
            scores_QGT = scores_QB.view(len(queries), group, -1)
            maxima_QT = scores_QGT.amax(dim=1)
            best_Qk = _highest(torch.hstack([best_Qk, _highest(maxima_QT, k)]), k)
            if best_Qk.shape[1] < k:
                radius_Q = torch.full((len(queries),), -UNREACHABLE, device=self.device)
            else:
                radius_Q = (best_Qk.amin(dim=1).float() - 2 * self.error).clamp(max=border)
            # If scores are halves, one that reaches the radius also reaches the half nearest to it.
            radius_Q = radius_Q.to(scored_QD.dtype).masked_fill(unsearched_Q, UNREACHABLE)
            for pairs in _reached(scores_QGT, maxima_QT, radius_Q, start):
                found.append(pairs)
                if sum(map(len, found)) > PAIRS_AT_A_TIME[self.device.type]:
                    yield self._kept(_Pairs.join(found), features_QD, ids_Q, rule)
                    found = []
        if found:
            yield self._kept(_Pairs.join(found), features_QD, ids_Q, rule)

    def exact(self, queries: Queries, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        """As :meth:`Queries.exact`, for images of the shard."""
        if not len(rows_P):
            return np.empty(0, np.int64)
        features_QD = torch.from_numpy(queries.features).to(self.device)
        rows, columns = np.asarray(rows_P, np.int64), np.searchsorted(self.ids_n, ids_P)
        units_P = self._units(
            features_QD, torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device)
        )
        units: Ids = units_P.cpu().numpy()
        return units

    def _image_blocks(self, num_queries: int, k: int) -> Iterator[tuple[int, int, int]]:
        """Start and end of each block, and the number of images in its groups. Groups fill a block: the images left
        over start the next one."""
        step = MAX_GROUP * max(1, SCORES_PER_BLOCK[self.device.type] // num_queries // MAX_GROUP)
        start = 0
        while start < len(self.ids_n):
            size = min(step, len(self.ids_n) - start)
            group = min(MAX_GROUP, max(1, size // (GROUPS_PER_RANK * k)))
            stop = start + size - size % group
            yield start, stop, group
            start = stop

    def _kept(self, pairs: _Pairs, features_QD: Tensor, ids_Q: Tensor, rule: Rule) -> PairList:
        """The pairs without those of an image with itself. From a GPU only those that the rule would keep if there were
        no others: the hits, and the nearest of rows with fewer than `min_neighbors` hits."""
        num_queries = len(features_QD)
        ids_P = self._ids_n[pairs.columns_P]
        pairs = pairs.take(ids_P != ids_Q[pairs.rows_P])
        is_hit_P = self._is_hit(pairs, features_QD, rule.threshold)
        if self.in_halves:
            num_hits_Q = torch.bincount(pairs.rows_P[is_hit_P], minlength=num_queries)
            is_kept_P = is_hit_P.clone()
            short_P = _indices((num_hits_Q < rule.min_neighbors)[pairs.rows_P])
            is_kept_P[short_P[self._is_nearest(pairs.take(short_P), features_QD, rule.min_neighbors)]] = True
            kept_P = _indices(is_kept_P)
            pairs, is_hit_P = pairs.take(kept_P), is_hit_P[kept_P]
        return PairList(
            pairs.rows_P.int().cpu().numpy(),
            self._ids_n[pairs.columns_P].cpu().numpy(),
            pairs.scores_P.cpu().numpy(),
            is_hit_P.cpu().numpy(),
        )

    def _is_hit(self, pairs: _Pairs, features_QD: Tensor, threshold: float | None) -> Tensor:
        if threshold is None:
            return torch.zeros(len(pairs), dtype=torch.bool, device=self.device)
        is_hit_P = pairs.scores_P >= threshold
        close_P = _indices((pairs.scores_P - threshold).abs() <= self.error)
        is_hit_P[close_P] = self._units(features_QD, pairs.rows_P[close_P], pairs.columns_P[close_P]) >= in_units(
            threshold
        )
        return is_hit_P

    def _is_nearest(self, pairs: _Pairs, features_QD: Tensor, k: int) -> Tensor:
        """(P,) whether each pair is among the `k` most similar of its row; of ties the lower ids."""
        num_queries = len(features_QD)
        kth_Q = _kth_scores(pairs, num_queries, k)
        # Outside these margins, true similarities are on the same side of the k-th as the scores.
        is_nearest_P = pairs.scores_P > kth_Q[pairs.rows_P] + 2 * self.error
        is_close_P = ~is_nearest_P & (pairs.scores_P >= kth_Q[pairs.rows_P] - 2 * self.error)
        num_open_Q = k - torch.bincount(pairs.rows_P[is_nearest_P], minlength=num_queries)
        close_P = _indices(is_close_P)
        rows_P, columns_P = pairs.rows_P[close_P], pairs.columns_P[close_P]
        units_P = self._units(features_QD, rows_P, columns_P)
        order_P = _sorted_by([rows_P, -units_P, columns_P])
        rank_P = _rank_in_row(rows_P[order_P], num_queries)
        is_nearest_P[close_P[order_P]] = rank_P < num_open_Q[rows_P[order_P]]
        return is_nearest_P

    def _units(self, features_QD: Tensor, rows_P: Tensor, columns_P: Tensor) -> Tensor:
        if not self.in_halves:
            arrays = (tensor.numpy() for tensor in (features_QD, rows_P, self._rows_nD, columns_P))
            return torch.from_numpy(exact_similarity(*arrays))
        units_P = torch.empty(len(rows_P), dtype=torch.int64, device=self.device)
        step = max(1, RESCORED_ELEMENTS // features_QD.shape[1])
        for start in range(0, len(rows_P), step):
            chunk = slice(start, start + step)
            products = features_QD[rows_P[chunk]].double() * self._rows_nD[columns_P[chunk]]
            units_P[chunk] = (products.sum(dim=1) / RESOLUTION).round().long()
        return units_P


@dataclass(frozen=True)
class _Pairs:
    """P pairs of a query (its number, int64) and an image (its place in the shard, int64), with a float32 score."""

    rows_P: Tensor
    columns_P: Tensor
    scores_P: Tensor

    def __len__(self) -> int:
        return len(self.rows_P)

    def take(self, chosen: Tensor) -> _Pairs:
        if chosen.dtype == torch.bool:
            chosen = _indices(chosen)  # once, not for each tensor
        return _Pairs(self.rows_P[chosen], self.columns_P[chosen], self.scores_P[chosen])

    @staticmethod
    def join(lists: list[_Pairs]) -> _Pairs:
        columns = zip(*((pairs.rows_P, pairs.columns_P, pairs.scores_P) for pairs in lists), strict=True)
        return _Pairs(*(torch.hstack(column) for column in columns))


def _reached(scores_QGT: Tensor, maxima_QT: Tensor, radius_Q: Tensor, start: int) -> Iterator[_Pairs]:
    """The pairs whose score reaches the query's radius, some groups at a time. `start` is the place of the block's
    first image in the shard."""
    _, group, num_groups = scores_QGT.shape
    rows_R, groups_R = (maxima_QT >= radius_Q[:, None]).nonzero(as_tuple=True)
    step = max(1, GATHERED_SCORES // group)
    for rows_r, groups_r in zip(torch.split(rows_R, step), torch.split(groups_R, step), strict=True):
        scores_rG = scores_QGT[rows_r, :, groups_r]
        row_P, member_P = (scores_rG >= radius_Q[rows_r, None]).nonzero(as_tuple=True)
        columns_P = start + member_P * num_groups + groups_r[row_P]
        yield _Pairs(rows_r[row_P], columns_P, scores_rG[row_P, member_P].float())


def _highest(values_QT: Tensor, k: int) -> Tensor:
    """(Q, min(k, T)) in any order."""
    return values_QT.topk(min(k, values_QT.shape[1]), dim=1, sorted=False).values


def _kth_scores(pairs: _Pairs, num_rows: int, k: int) -> Tensor:
    """(Q,) the `k`-th highest score of each row, -inf where it has fewer."""
    pairs = pairs.take(_sorted_by([pairs.rows_P, -pairs.scores_P]))
    kth = pairs.take(_rank_in_row(pairs.rows_P, num_rows) == k - 1)
    kth_Q = torch.full((num_rows,), -torch.inf, device=kth.scores_P.device)
    kth_Q[kth.rows_P] = kth.scores_P
    return kth_Q


def _sorted_by(keys: list[Tensor]) -> Tensor:
    """Order by the first key, then the second, and so on."""
    order_P = keys[-1].argsort()
    for key_P in reversed(keys[:-1]):
        order_P = order_P[key_P[order_P].argsort(stable=True)]
    return order_P


def _rank_in_row(sorted_rows_P: Tensor, num_rows: int) -> Tensor:
    """0, 1, 2, ... within each run of equal values."""
    lengths_Q = torch.bincount(sorted_rows_P, minlength=num_rows)
    first_Q = lengths_Q.cumsum(0) - lengths_Q
    return torch.arange(len(sorted_rows_P), device=sorted_rows_P.device) - first_Q[sorted_rows_P]


def _indices(mask_P: Tensor) -> Tensor:
    return mask_P.nonzero(as_tuple=True)[0]


def _as_slice(ids_n: Ids) -> slice | Ids:
    """Consecutive ids as a slice: a memory map then reads them in one go."""
    is_run = int(ids_n[-1] - ids_n[0]) == len(ids_n) - 1
    return slice(int(ids_n[0]), int(ids_n[-1]) + 1) if is_run else ids_n


def half_precision_error(dim: int) -> float:
    """Bound on the error of a float16 product of unit vectors, summed in float32, the result in float16.

    Rounding both factors moves the sum by at most 2^-10 (Cauchy-Schwarz), values too small for float16 by 2^-24 per
    dimension, rounding the sum by 2^-23 per dimension, and rounding the result by 2^-11.
    """
    return SAFETY * (2.0**-10 + 2.0**-11 + dim * (2.0**-23 + 2.0**-24)) + 2 * RESOLUTION
