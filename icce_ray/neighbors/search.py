"""Cosine search by the adaptive rule, exact to the last tie, shard by shard.

A shard answers each query by the rule applied to its own images: all that are similar enough, or, where they are
fewer than `min_neighbors`, its most similar. Whatever belongs into a row of the graph is in some shard's answer, so
applying the rule once more to the union of the answers gives the row. The result does not depend on shards, blocks,
threads or engine.

Legend: D feature dimension, Q queries, P pairs, k list length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icce_ray.neighbors.faiss_engine import Engine, FaissEngine, exact_similarity, in_units, is_unsearched
from icce_ray.neighbors.rule import DuplicateList, Exact, PairList, Rule, keep
from icce_ray.neighbors.unit_features import Floats, Ids, PreparedFeatures, Queries
from icce_ray.runtime.threads import in_threads, threads_within

QUERY_BLOCK = 1024
PAIRS_HELD = 8_000_000
"""Pairs of a block of queries that are held before what cannot stay is thrown out."""
CHUNK_ELEMENTS = 16_000_000
CHUNK_BYTES = 8 * CHUNK_ELEMENTS
"""Of a chunk of images: float32, and what is found among them."""


@dataclass(frozen=True)
class Candidates:
    """What a shard, or several together, have to say about Q queries.

    num_hits_Q: images that reach the threshold, before any cut.
    pairs: the rule applied to the shard's images.
    error: bound on the error of the scores.
    """

    num_hits_Q: Ids
    pairs: PairList
    duplicates: DuplicateList
    error: float


def search(engine: Engine, queries: Queries, rule: Rule) -> Candidates:
    """What a shard has to say about `queries` (some `QUERY_BLOCK`: memory grows with their number)."""
    num_queries, error = len(queries), engine.error
    num_hits_Q = np.zeros(num_queries, np.int64)
    held: list[PairList] = []
    duplicates: list[DuplicateList] = []
    if not len(engine.ids_n):
        return Candidates(num_hits_Q, PairList.join([]), DuplicateList.join([]), error)

    def exact(rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        return engine.exact(queries, rows_P, ids_P)

    unsearched = np.flatnonzero(is_unsearched(queries, rule, error))
    held.append(_lowest_ids(engine.ids_n, unsearched, queries.excluded_Q, rule.min_neighbors))
    for found in engine.pairs(queries, rule):
        num_hits_Q += np.bincount(found.rows_P[found.is_hit_P], minlength=num_queries)
        duplicates.append(_duplicates(rule, queries, found, error, exact))
        held.append(found)
        if sum(map(len, held)) > PAIRS_HELD:
            held = [keep(PairList.join(held), num_hits_Q, queries.ids_Q, rule, error, exact)]
    pairs = keep(PairList.join(held), num_hits_Q, queries.ids_Q, rule, error, exact)
    return Candidates(num_hits_Q, pairs, DuplicateList.join(duplicates), error)


def merge(answers: Sequence[Candidates], queries: Queries, rule: Rule) -> Candidates:
    """The answer of the images of several shards together, from the shards' answers."""
    if len(answers) == 1:
        return answers[0]
    num_hits_Q = np.sum([answer.num_hits_Q for answer in answers], axis=0)
    error = max(answer.error for answer in answers)

    def exact(rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        return exact_similarity(queries.features, rows_P, queries.prepared, ids_P)

    pairs = PairList.join([answer.pairs for answer in answers])
    pairs = keep(pairs, num_hits_Q, queries.ids_Q, rule, error, exact)
    return Candidates(num_hits_Q, pairs, DuplicateList.join([answer.duplicates for answer in answers]), error)


def most_similar(prepared: PreparedFeatures, ids_Q: Ids, k: int) -> tuple[Floats, Ids]:
    """The `k` most similar images of each of some images, itself left out, by looking at all a chunk at a time.

    Args:
        prepared: the features of N images.
        ids_Q: the query images.
        k: list length; at most N - 1 are returned.

    Returns:
        similarities (Q, min(k, N-1)) float32 (good to float32) and ids (same shape) int64, the most similar first.
        Which ids are in is exact; where similarities tie at the end of the list, the lower ids are in.
    """
    num_images, dim = prepared.shape
    k = min(k, num_images - 1)
    rule = Rule(None, k, None, seed=0)
    blocks = [ids_Q[start : start + QUERY_BLOCK] for start in range(0, len(ids_Q), QUERY_BLOCK)]
    chunk = max(k + 1, CHUNK_ELEMENTS // dim)

    def answers_of_chunk(start: int) -> list[Candidates]:
        engine = FaissEngine(prepared, np.arange(start, min(start + chunk, num_images)))
        return [search(engine, Queries.of(prepared, block), rule) for block in blocks]

    starts, num_threads = range(0, num_images, chunk), threads_within(CHUNK_BYTES)
    # Few chunks would leave threads idle: then FAISS uses them, within each.
    of_chunks = in_threads(answers_of_chunk, starts, num_threads if len(starts) >= num_threads else 1)
    similarities_Qk, ids_Qk = np.empty((len(ids_Q), k), np.float32), np.empty((len(ids_Q), k), np.int64)
    for number, block in enumerate(blocks):
        pairs = merge([answers[number] for answers in of_chunks], Queries.of(prepared, block), rule).pairs
        order_P = np.lexsort((pairs.ids_P, -pairs.scores_P, pairs.rows_P))
        place = slice(number * QUERY_BLOCK, number * QUERY_BLOCK + len(block))
        similarities_Qk[place] = pairs.scores_P[order_P].reshape(len(block), k)
        ids_Qk[place] = pairs.ids_P[order_P].reshape(len(block), k)
    return similarities_Qk, ids_Qk


def _duplicates(rule: Rule, queries: Queries, found: PairList, error: float, exact: Exact) -> DuplicateList:
    if rule.duplicate_threshold is None:
        return DuplicateList.join([])
    near_P = np.flatnonzero(found.scores_P >= rule.duplicate_threshold - error)
    near_P = near_P[found.ids_P[near_P] < queries.ids_Q[found.rows_P[near_P]]]
    rows_P, ids_P = found.rows_P[near_P], found.ids_P[near_P]
    units_P = exact(rows_P, ids_P)
    is_near_P = units_P >= in_units(rule.duplicate_threshold)
    return DuplicateList.join([DuplicateList(rows_P[is_near_P], ids_P[is_near_P], units_P[is_near_P])])


def _lowest_ids(ids_n: Ids, rows: Ids, excluded_Q: Ids, k: int) -> PairList:
    """For each of `rows` the `k` lowest ids but the excluded one, at similarity 0."""
    lists = [lowest[lowest != excluded_Q[row]][:k] for row in rows for lowest in [ids_n[: k + 1]]]
    ids_P = np.concatenate([np.empty(0, np.int64), *lists])
    rows_P = np.repeat(rows, [len(ids) for ids in lists]).astype(np.int32)
    return PairList(rows_P, ids_P, np.zeros(len(ids_P), np.float32), np.zeros(len(ids_P), bool))
