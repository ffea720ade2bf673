"""Rows of the graph from the answers of shards. The job does this with shards on other machines.

Rows are made in parts: each shard answers for the part's images (`search_shard`), the answers become rows
(`merge_shards`). Where near-duplicates were found, the rows that they stand in are made a second time, among leaders,
and their own rows are emptied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.duplicates import DuplicatePairs
from icce_ray.neighbors.faiss_engine import Engine
from icce_ray.neighbors.rule import Rule
from icce_ray.neighbors.search import QUERY_BLOCK, Candidates, merge, search
from icce_ray.neighbors.search_memory import MAX_ROWS_PER_PART
from icce_ray.neighbors.unit_features import Ids, PreparedFeatures, Queries
from icce_ray.runtime.threads import in_threads


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of the graph.

    lengths: (rows,) int64; indices: the rows' neighbours one after the other, ascending in each; num_hits: (rows,)
    images above the threshold, before a row was filled up or cut.
    """

    lengths: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    num_hits: npt.NDArray[np.int64]

    @property
    def indptr(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        return Rows(
            np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)]),
            np.concatenate([np.empty(0, np.int32), *(part.indices for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.num_hits for part in parts)]),
        )

    def summary(self, min_neighbors: int) -> dict[str, int]:
        """Figures of these rows that `join_summaries` can add up."""
        has_list = self.lengths > 0
        lengths = self.lengths[has_list]
        return {
            "num_images": len(self.lengths),
            "num_lists": len(lengths),
            "num_edges": int(lengths.sum()),
            "min_neighbors": int(lengths.min(initial=np.iinfo(np.int64).max)),
            "max_neighbors": int(lengths.max(initial=0)),
            "num_at_min": int((self.num_hits[has_list] < min_neighbors).sum()),
        }

    @staticmethod
    def join_summaries(summaries: list[dict[str, int]]) -> dict[str, Any]:
        """Figures of the whole graph from those of its parts; means and shares are of the images that have a list."""
        num_lists = sum(part["num_lists"] for part in summaries)
        num_edges = sum(part["num_edges"] for part in summaries)
        return {
            "num_images": sum(part["num_images"] for part in summaries),
            "num_edges": num_edges,
            "mean_neighbors": round(num_edges / num_lists, 3),
            "min_neighbors": min(part["min_neighbors"] for part in summaries),
            "max_neighbors": max(part["max_neighbors"] for part in summaries),
            "share_at_min": round(sum(part["num_at_min"] for part in summaries) / num_lists, 6),
        }


def part_ranges(num_images: int) -> list[tuple[int, int]]:
    """Row ranges of the graph's parts. They depend on N only, so that any number of workers makes the same parts."""
    per_part = min(MAX_ROWS_PER_PART, QUERY_BLOCK * max(1, round(num_images / 16 / QUERY_BLOCK)))
    return [(start, min(start + per_part, num_images)) for start in range(0, num_images, per_part)]


def shard_ids(num_images: int, shard: int, num_shards: int) -> Ids:
    """The images that the shard holds."""
    return np.arange(num_images * shard // num_shards, num_images * (shard + 1) // num_shards)


def index_dtype(num_images: int) -> np.dtype[np.integer]:
    return np.dtype(np.int32 if num_images <= 2**31 - 1 else np.int64)


def search_shard(
    engine: Engine, prepared: PreparedFeatures, ids: Ids, rule: Rule, leader_N: Ids | None = None
) -> list[Candidates]:
    """What a shard has to say about some images, a block of queries after the other.

    Args:
        engine: the shard.
        prepared: the features of all images.
        ids: the images whose rows are wanted.
        rule: limits of the rows.
        leader_N: of the groups of near-duplicates, when the engine holds only leaders.
    """

    def answer(block: Ids) -> Candidates:
        return search(engine, _queries(prepared, block, leader_N), rule)

    return in_threads(answer, _blocks(ids), engine.blocks_at_once)


def merge_shards(
    answers: Sequence[list[Candidates]],
    prepared: PreparedFeatures,
    ids: Ids,
    rule: Rule,
    leader_N: Ids | None = None,
    num_threads: int = 1,
) -> tuple[Rows, DuplicatePairs]:
    """The rows of `ids`, and their near-duplicates, from the answers of all shards."""
    dtype = index_dtype(len(prepared))

    def rows_of(block_and_answers: tuple[Ids, list[Candidates]]) -> tuple[Rows, DuplicatePairs]:
        block, answers_of_block = block_and_answers
        queries = _queries(prepared, block, leader_N)
        merged = merge(answers_of_block, queries, rule)
        # Sorted as one number, which takes a tenth of the time of sorting by two.
        keys_P = np.sort(merged.pairs.rows_P * np.int64(len(prepared)) + merged.pairs.ids_P)
        lengths_Q = np.bincount(merged.pairs.rows_P, minlength=len(queries)).astype(np.int64)
        indices_P = keys_P - np.repeat(np.arange(len(queries)) * len(prepared), lengths_Q)
        found = merged.duplicates
        duplicates = DuplicatePairs(queries.ids_Q[found.rows_P], found.ids_P, found.units_P)
        return Rows(lengths_Q, indices_P.astype(dtype), merged.num_hits_Q), duplicates

    blocks = [(block, list(found)) for block, *found in zip(_blocks(ids), *answers, strict=True)]
    made = in_threads(rows_of, blocks, num_threads)
    return Rows.join([rows for rows, _ in made]), DuplicatePairs.join([duplicates for _, duplicates in made])


def ids_to_search_again(rows: Rows, start: int, leader_N: Ids) -> Ids:
    """The leaders from `start` on whose rows are not yet those of the rule over leaders. A row in which only leaders
    stand is, whatever the rule left out."""
    is_leader_N = leader_N == np.arange(len(leader_N))
    rows_P = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    num_others = np.bincount(rows_P[~is_leader_N[rows.indices]], minlength=len(rows.lengths))
    ids = np.arange(start, start + len(rows.lengths))
    chosen: Ids = ids[(num_others > 0) & is_leader_N[ids]]
    return chosen


def rows_among_leaders(rows: Rows, start: int, leader_N: Ids, ids: Ids, new: Rows) -> Rows:
    """`rows`, which begin with image `start`, with those of `ids` taken from `new`. Followers have empty
    rows: their leader stands for them."""
    lists = np.split(rows.indices, rows.indptr[1:-1])
    lengths, num_hits = rows.lengths.copy(), rows.num_hits.copy()
    # `np.split` makes one list of no rows at all.
    new_lists = np.split(new.indices, new.indptr[1:-1])[: len(ids)]
    for row, neighbors, hits in zip(ids - start, new_lists, new.num_hits, strict=True):
        lists[row], lengths[row], num_hits[row] = neighbors, len(neighbors), hits
    own = np.arange(start, start + len(lengths))
    for row in np.flatnonzero(leader_N[own] != own):
        lists[row], lengths[row], num_hits[row] = rows.indices[:0], 0, 0
    return Rows(lengths, np.concatenate(lists), num_hits)


def _blocks(ids: Ids) -> list[Ids]:
    return [ids[start : start + QUERY_BLOCK] for start in range(0, len(ids), QUERY_BLOCK)]


def _queries(prepared: PreparedFeatures, ids: Ids, leader_N: Ids | None) -> Queries:
    return Queries.of(prepared, ids, None if leader_N is None else leader_N[ids])
