"""Rows of the graph from the answers of shards, part by part: each shard answers for the images of a part
(`search_shard`), and the answers become rows (`merge_shards`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.adaptive_rule import PairList, Rule, keep, rank_in_row
from icce_ray.neighbors.queries import Queries
from icce_ray.neighbors.search import QUERY_BLOCK, Candidates, merge, search
from icce_ray.neighbors.search_memory import MAX_ROWS_PER_PART
from icce_ray.runtime.threads import in_threads
from icce_ray.sample.unit_features import Ids, UnitFeatures

if TYPE_CHECKING:
    from icce_ray.neighbors.torch_engine import TorchEngine

NUM_NEAREST = 10
"""Length of the lists of most similar neighbours."""


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of the graph.

    lengths: (rows,) int64. indices: the neighbours, row by row, ascending in each. num_hits: (rows,) number of images
    above the threshold, before a row was filled up or cut. nearest: (rows, NUM_NEAREST) the most similar of a row's
    neighbours, ascending; -1 after the last one if there are fewer.
    """

    lengths: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    num_hits: npt.NDArray[np.int64]
    nearest: npt.NDArray[np.integer]

    @property
    def indptr(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        columns = zip(*((part.lengths, part.indices, part.num_hits, part.nearest) for part in parts), strict=True)
        return Rows(*map(np.concatenate, columns))

    def summary(self, min_neighbors: int) -> dict[str, int]:
        """Figures of these rows, which `join_summaries` adds up."""
        return {
            "num_images": len(self.lengths),
            "num_edges": int(self.lengths.sum()),
            "min_neighbors": int(self.lengths.min()),
            "max_neighbors": int(self.lengths.max()),
            "num_at_min": int((self.num_hits < min_neighbors).sum()),
        }

    @staticmethod
    def join_summaries(summaries: list[dict[str, int]]) -> dict[str, Any]:
        """Figures of the whole graph from those of its parts."""
        num_images, num_edges, num_at_min = (
            sum(part[name] for part in summaries) for name in ("num_images", "num_edges", "num_at_min")
        )
        return {
            "num_images": num_images,
            "num_edges": num_edges,
            "mean_neighbors": round(num_edges / num_images, 3),
            "min_neighbors": min(part["min_neighbors"] for part in summaries),
            "max_neighbors": max(part["max_neighbors"] for part in summaries),
            "share_at_min": round(num_at_min / num_images, 6),
        }


def part_ranges(num_images: int) -> list[tuple[int, int]]:
    """Row ranges of the graph's parts. They only depend on N, so any number of workers makes the same parts."""
    per_part = min(MAX_ROWS_PER_PART, QUERY_BLOCK * max(1, round(num_images / 16 / QUERY_BLOCK)))
    return [(start, min(start + per_part, num_images)) for start in range(0, num_images, per_part)]


def index_dtype(num_images: int) -> np.dtype[np.integer]:
    return np.dtype(np.int32 if num_images <= 2**31 - 1 else np.int64)


def search_shard(engine: TorchEngine, unit: UnitFeatures, ids: Ids, rule: Rule) -> list[Candidates]:
    """A shard's candidates for the images `ids`, block by block of queries."""
    return in_threads(lambda block: search(engine, Queries(unit, block), rule), _blocks(ids), engine.blocks_at_once)


def merge_shards(
    answers: Sequence[list[Candidates]], unit: UnitFeatures, ids: Ids, rule: Rule, num_threads: int = 1
) -> Rows:
    """The rows of the images `ids` from the answers of all shards."""
    num_images, dtype = len(unit), index_dtype(len(unit))

    def rows_of(block_and_answers: tuple[Ids, list[Candidates]]) -> Rows:
        block, answers_of_block = block_and_answers
        queries = Queries(unit, block)
        merged = merge(answers_of_block, queries, rule)
        lengths_Q, indices_P = _sorted_rows(merged.pairs, len(block), num_images)
        nearest_lengths_Q, nearest_P = _sorted_rows(_most_similar(merged, queries), len(block), num_images)
        rows_P = np.repeat(np.arange(len(block)), nearest_lengths_Q)
        nearest_Qk = np.full((len(block), NUM_NEAREST), -1, dtype)
        nearest_Qk[rows_P, rank_in_row(rows_P)] = nearest_P
        return Rows(lengths_Q, indices_P.astype(dtype), merged.num_hits_Q, nearest_Qk)

    blocks = [(block, list(found)) for block, *found in zip(_blocks(ids), *answers, strict=True)]
    return Rows.join(in_threads(rows_of, blocks, num_threads))


def _most_similar(merged: Candidates, queries: Queries) -> PairList:
    """The pairs of each row's most similar neighbours, of ties the lower ids."""
    none_Q, rule = np.zeros(len(queries), np.int64), Rule(None, NUM_NEAREST, None, 0)
    return keep(merged.pairs, none_Q, queries.ids_Q, rule, merged.error, queries.exact)


def _sorted_rows(pairs: PairList, num_rows: int, num_images: int) -> tuple[Ids, Ids]:
    """Length of each row, and its images, ascending, row after row."""
    # Sorted as one number, which takes a tenth of the time of sorting by two.
    keys_P = np.sort(pairs.rows_P * np.int64(num_images) + pairs.ids_P)
    lengths_Q = np.bincount(pairs.rows_P, minlength=num_rows).astype(np.int64)
    return lengths_Q, keys_P - np.repeat(np.arange(num_rows) * num_images, lengths_Q)


def _blocks(ids: Ids) -> list[Ids]:
    return [ids[start : start + QUERY_BLOCK] for start in range(0, len(ids), QUERY_BLOCK)]
