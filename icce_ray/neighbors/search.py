"""Search by the adaptive rule, exact to the last tie, shard by shard; and the memory that it needs.

A shard applies the rule to its own images: its answer to a query has all that are similar enough or, if they are fewer
than `min_neighbors`, its most similar. Every neighbour is in some shard's answer, so applying the rule again to all
answers gives the row of the graph. Shards, blocks, threads and devices don't change the result.

Legend: D feature dimension, n images of the shard, Q queries, P pairs, k list length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from icce_ray.neighbors.adaptive_rule import PairList, Queries, Rule, keep
from icce_ray.runtime.threads import in_threads, threads_within
from icce_ray.sample.unit_features import Floats, Ids, UnitFeatures

if TYPE_CHECKING:
    from icce_ray.neighbors.torch_engine import TorchEngine

QUERY_BLOCK = 1024
PAIRS_HELD = 8_000_000
"""Pairs of a block of queries that are held before those that cannot stay are dropped."""
CHUNK_ELEMENTS = 16_000_000
CHUNK_BYTES = 8 * CHUNK_ELEMENTS
"""Memory for a chunk of images in float32 and what is found among them."""
MAX_ROWS_PER_PART = 16_384
"""A part is built in memory, then written."""
TORCH_BYTES = 550_000_000
"""Memory of a process that has imported torch, of which 250 MB are libraries that processes of a machine share."""
SCORED_PAIRS = 2**24
HIT_BYTES = 40
"""A pair as it is found, and its row, column and flags."""
PAIR_BYTES = 48
"""A held pair, and its hash and order while rows are cut."""


@dataclass(frozen=True)
class Candidates:
    """Candidates of one shard, or of several together, for Q queries.

    num_hits_Q: number of images that reach the threshold, before any cut.
    pairs: the rule applied to the images of the shard.
    error: bound on the error of the scores.
    """

    num_hits_Q: Ids
    pairs: PairList
    error: float


def search(engine: TorchEngine, queries: Queries, rule: Rule) -> Candidates:
    """Search a shard. Memory grows with the number of queries: about `QUERY_BLOCK` at a time."""
    num_queries, error = len(queries), engine.error
    num_hits_Q = np.zeros(num_queries, np.int64)
    if not len(engine.ids_n):
        return Candidates(num_hits_Q, PairList.join([]), error)
    exact = partial(engine.exact, queries)
    unsearched = np.flatnonzero(queries.unsearched(rule, error))
    held = [_lowest_ids(engine.ids_n, unsearched, queries.ids_Q, rule.min_neighbors)]
    for found in engine.pairs(queries, rule):
        num_hits_Q += np.bincount(found.rows_P[found.is_hit_P], minlength=num_queries)
        held.append(found)
        if sum(map(len, held)) > PAIRS_HELD:
            held = [keep(PairList.join(held), num_hits_Q, queries.ids_Q, rule, error, exact)]
    pairs = keep(PairList.join(held), num_hits_Q, queries.ids_Q, rule, error, exact)
    return Candidates(num_hits_Q, pairs, error)


def merge(answers: Sequence[Candidates], queries: Queries, rule: Rule) -> Candidates:
    """The answer of several shards together, from the answers of each."""
    if len(answers) == 1:
        return answers[0]
    num_hits_Q = np.sum([answer.num_hits_Q for answer in answers], axis=0)
    error = max(answer.error for answer in answers)
    pairs = PairList.join([answer.pairs for answer in answers])
    return Candidates(num_hits_Q, keep(pairs, num_hits_Q, queries.ids_Q, rule, error, queries.exact), error)


def blocks_of(ids_Q: Ids) -> list[Ids]:
    """The queries in the blocks that they are searched in."""
    return [ids_Q[start : start + QUERY_BLOCK] for start in range(0, len(ids_Q), QUERY_BLOCK)]


def most_similar(unit: UnitFeatures, ids_Q: Ids, k: int) -> tuple[Floats, Ids]:
    """The `k` most similar images of each of some images, without itself, by a search of all, a chunk at a time.
    Returns similarities (Q, min(k, N-1)) float32 (accurate to float32) and ids (same shape) int64, the most similar
    first. The set of ids is exact; if similarities tie at the end of the list, the lower ids are in."""
    from icce_ray.neighbors.torch_engine import TorchEngine  # torch takes seconds

    num_images, dim = unit.shape
    k = min(k, num_images - 1)
    rule = Rule(None, k, None, seed=0)
    blocks = blocks_of(ids_Q)
    chunk = max(k + 1, CHUNK_ELEMENTS // dim)

    def answers_of_chunk(start: int) -> list[Candidates]:
        engine = TorchEngine(unit, np.arange(start, min(start + chunk, num_images)))
        return [search(engine, Queries(unit, block), rule) for block in blocks]

    starts, num_threads = range(0, num_images, chunk), threads_within(CHUNK_BYTES)
    # Few chunks would leave threads idle: then torch uses them, within each chunk.
    of_chunks = in_threads(answers_of_chunk, starts, num_threads if len(starts) >= num_threads else 1)
    similarities_Qk, ids_Qk = np.empty((len(ids_Q), k), np.float32), np.empty((len(ids_Q), k), np.int64)
    for number, block in enumerate(blocks):
        pairs = merge([answers[number] for answers in of_chunks], Queries(unit, block), rule).pairs
        order_P = np.lexsort((pairs.ids_P, -pairs.scores_P, pairs.rows_P))
        place = slice(number * QUERY_BLOCK, number * QUERY_BLOCK + len(block))
        similarities_Qk[place] = pairs.scores_P[order_P].reshape(len(block), k)
        ids_Qk[place] = pairs.ids_P[order_P].reshape(len(block), k)
    return similarities_Qk, ids_Qk


def _lowest_ids(ids_n: Ids, rows: Ids, ids_Q: Ids, k: int) -> PairList:
    """For each of the query numbers `rows` the `k` lowest ids but its own, at similarity 0."""
    lists = [lowest[lowest != ids_Q[row]][:k] for row in rows for lowest in [ids_n[: k + 1]]]
    ids_P = np.concatenate([np.empty(0, np.int64), *lists])
    rows_P = np.repeat(rows, [len(ids) for ids in lists]).astype(np.int32)
    return PairList(rows_P, ids_P, np.zeros(len(ids_P), np.float32), np.zeros(len(ids_P), bool))


def shard_bytes(num_images: int, dim: int) -> int:
    """Memory of the features of N images in a shard, float32, and of their ids."""
    return num_images * (dim * 4 + 8)


def worker_bytes(num_images: int, dim: int, mean_neighbors: float) -> int:
    """Memory of one worker besides the features of its shard, at worst."""
    queries, rows = (min(num_images, most) for most in (QUERY_BLOCK, MAX_ROWS_PER_PART))
    hits = min(SCORED_PAIRS, num_images**2) * HIT_BYTES + min(PAIRS_HELD, num_images**2) * PAIR_BYTES
    return TORCH_BYTES + hits + int(rows * mean_neighbors * 3 * 8) + (queries + rows) * dim * 4


def needed_bytes(base_bytes: int, worker_bytes: int, num_here: int, num_workers: int) -> int:
    """Memory of a machine with `num_here` of `num_workers` workers, each with its share of the features."""
    return math.ceil(num_here * (base_bytes / num_workers + worker_bytes))
