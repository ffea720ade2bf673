"""The neighbour graph: who is whose neighbour, by the adaptive rule of METHOD section 1.

N(i) = all images at least `threshold` similar to i; fewer than `min_neighbors` of them: the `min_neighbors` most
similar; more than `max_neighbors`: a uniform random subset. The subset is drawn by a hash of (seed, i, j), so it does
not depend on how the work is cut. A row of the graph depends on nothing but the features: `build_rows` is what gets
distributed.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.audit import Audit, audit_prepared
from icce_ray.neighbors.memory import MAX_ROWS_PER_PART, PAIRS_HELD
from icce_ray.neighbors.search import QUERY_BLOCK, Floats, Ids, most_similar, pairs_above, prepare
from icce_ray.progress import Progress
from icce_ray.store import Artifact
from icce_ray.store.artifact import cache_folder


@dataclass(frozen=True)
class NeighborGraph:
    """Directed graph in CSR form; may be memory-mapped.

    indptr: (N+1,) int64; the neighbours of image i are indices[indptr[i]:indptr[i+1]].
    indices: (E,) int32, or int64 above 2^31-1 images; ascending within a row, never i itself.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]

    @property
    def num_images(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        return int(self.indptr[-1])

    @property
    def degrees(self) -> npt.NDArray[np.int64]:
        """(N,) number of neighbours of each image."""
        return np.diff(self.indptr)

    def neighbors_of(self, image: int) -> npt.NDArray[np.integer]:
        return self.indices[self.indptr[image] : self.indptr[image + 1]]


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of the graph.

    lengths: (rows,) int64; indices: the rows' neighbours one after the other; num_fallback: rows with fewer than
    `min_neighbors` images above the threshold.
    """

    lengths: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    num_fallback: int

    @property
    def indptr(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def summary(self) -> dict[str, int]:
        """Figures of these rows that `join_summaries` can add up."""
        return {
            "num_images": len(self.lengths),
            "num_edges": int(self.lengths.sum()),
            "min_neighbors": int(self.lengths.min()),
            "max_neighbors": int(self.lengths.max()),
            "num_fallback": self.num_fallback,
        }

    @staticmethod
    def join_summaries(summaries: list[dict[str, int]]) -> dict[str, Any]:
        """Figures of the whole graph from those of its parts."""
        num_images = sum(part["num_images"] for part in summaries)
        num_edges = sum(part["num_edges"] for part in summaries)
        return {
            "num_images": num_images,
            "num_edges": num_edges,
            "mean_neighbors": round(num_edges / num_images, 3),
            "min_neighbors": min(part["min_neighbors"] for part in summaries),
            "max_neighbors": max(part["max_neighbors"] for part in summaries),
            "share_at_min": round(sum(part["num_fallback"] for part in summaries) / num_images, 6),
        }


def part_ranges(num_images: int) -> list[tuple[int, int]]:
    """Row ranges of the graph's parts. They depend on N only, so that any number of workers makes the same parts."""
    per_part = min(MAX_ROWS_PER_PART, QUERY_BLOCK * max(1, round(num_images / 64 / QUERY_BLOCK)))
    return [(start, min(start + per_part, num_images)) for start in range(0, num_images, per_part)]


def index_dtype(num_images: int) -> np.dtype[np.integer]:
    return np.dtype(np.int32 if num_images <= 2**31 - 1 else np.int64)


def build_rows(
    base_ND: Floats,
    start: int,
    stop: int,
    *,
    threshold: float | None,
    min_neighbors: int,
    max_neighbors: int | None,
    seed: int,
) -> Rows:
    """Rows `start` to `stop` of the graph.

    Args:
        base_ND: (N, D) float32 as `search.prepare` returns it.
        threshold: floor on the cosine; None: exactly `min_neighbors` each.
        min_neighbors, max_neighbors: limits on a row's length; there are never more than N-1 others.
        seed: of the random subset of rows longer than `max_neighbors`.
    """
    num_images = len(base_ND)
    dtype = index_dtype(num_images)
    floor = min(min_neighbors, num_images - 1)
    blocks: list[Rows] = []
    for block_start in range(start, stop, QUERY_BLOCK):
        block_stop = min(block_start + QUERY_BLOCK, stop)
        rows_P, columns_P, degrees_Q = _rows_above(base_ND, block_start, block_stop, threshold, max_neighbors, seed)
        short_Q = np.flatnonzero(degrees_Q < floor)
        if len(short_Q):
            keep_P = degrees_Q[rows_P - block_start] >= floor
            _, ids_Qk = most_similar(base_ND, short_Q + block_start, floor)
            rows_P = np.concatenate([rows_P[keep_P], np.repeat(short_Q + block_start, floor)])
            columns_P = np.concatenate([columns_P[keep_P], ids_Qk.ravel()])
        order_P = np.lexsort((columns_P, rows_P))
        lengths_Q = np.bincount(rows_P - block_start, minlength=block_stop - block_start)
        blocks.append(Rows(lengths_Q.astype(np.int64), columns_P[order_P].astype(dtype), len(short_Q)))
    return Rows(
        np.concatenate([block.lengths for block in blocks]),
        np.concatenate([block.indices for block in blocks]),
        sum(block.num_fallback for block in blocks),
    )


def _rows_above(
    base_ND: Floats, start: int, stop: int, threshold: float | None, max_neighbors: int | None, seed: int
) -> tuple[Ids, Ids, Ids]:
    """Pairs above the threshold, rows cut to `max_neighbors`, and the rows' lengths before the cut (stop-start,)."""
    degrees_Q = np.zeros(stop - start, np.int64)
    rows_P, columns_P = np.empty(0, np.int64), np.empty(0, np.int64)
    if threshold is None:
        return rows_P, columns_P, degrees_Q
    held: list[tuple[Ids, Ids]] = []
    num_held = 0
    for more_rows_P, more_columns_P in pairs_above(base_ND, start, stop, threshold):
        degrees_Q += np.bincount(more_rows_P - start, minlength=stop - start)
        held.append((more_rows_P, more_columns_P))
        num_held += len(more_rows_P)
        # A low threshold on many images finds more than memory holds; what the subset leaves out can go at once.
        if max_neighbors is not None and num_held > PAIRS_HELD:
            held = [_random_subset(*_joined(held), max_neighbors, seed)]
            num_held = len(held[0][0])
    rows_P, columns_P = _joined(held)
    if max_neighbors is not None and (degrees_Q > max_neighbors).any():
        rows_P, columns_P = _random_subset(rows_P, columns_P, max_neighbors, seed)
    return rows_P, columns_P, degrees_Q


def _joined(pairs: list[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    return np.concatenate([rows for rows, _ in pairs]), np.concatenate([columns for _, columns in pairs])


def _random_subset(rows_P: Ids, columns_P: Ids, max_neighbors: int, seed: int) -> tuple[Ids, Ids]:
    """Of each row the `max_neighbors` pairs with the smallest hash: uniform, and applying it twice changes nothing."""
    order_P = np.lexsort((columns_P, pair_hash(seed, rows_P, columns_P), rows_P))
    sorted_rows_P = rows_P[order_P]
    rank_P = np.arange(len(rows_P)) - np.searchsorted(sorted_rows_P, sorted_rows_P, side="left")
    kept = order_P[rank_P < max_neighbors]
    return rows_P[kept], columns_P[kept]


def pair_hash(seed: int, rows_P: Ids, columns_P: Ids) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number for each (seed, row, column), by SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        row_state_P = _splitmix64(_splitmix64(np.array([seed], np.uint64)) ^ rows_P.astype(np.uint64))
        return _splitmix64(row_state_P ^ columns_P.astype(np.uint64))


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def build_graph(
    features_ND: npt.NDArray[np.floating],
    config: NeighborsConfig,
    *,
    num_clusters: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[NeighborGraph, Audit]:
    """Audit the features and build the graph in this process: the oracle of the distributed stage.

    Args:
        features_ND: (N, D) floating point.
        config: threshold, limits and centring.
        num_clusters: K; bounds the automatic threshold.
        seed: of the audit's samples and of the random subsets.
        progress: told of finished rows.

    Raises:
        InputError: features that are not finite, or fewer than two.
    """
    base_ND = prepare(features_ND, config.center)
    audit = audit_prepared(base_ND, config, num_clusters=num_clusters, seed=seed)
    parts: list[Rows] = []
    for start, stop in part_ranges(len(base_ND)):
        parts.append(
            build_rows(
                base_ND,
                start,
                stop,
                threshold=audit.similarity_threshold,
                min_neighbors=config.min_neighbors,
                max_neighbors=config.max_neighbors,
                seed=seed,
            )
        )
        if progress is not None:
            progress.update(stop, len(base_ND))
    lengths = np.concatenate([part.lengths for part in parts])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return NeighborGraph(indptr, np.concatenate([part.indices for part in parts])), audit


def load_graph(artifact: Artifact) -> NeighborGraph:
    """The graph of a finished `neighbors` artifact, memory-mapped; several parts are joined once per machine.

    Raises:
        DamagedArtifactError: a part is missing or its bytes are wrong.
    """
    names = [name.removesuffix("-indptr.npy") for name in artifact.part_names("part-") if name.endswith("-indptr.npy")]
    if len(names) == 1:
        indptr, indices = (artifact.read_array(f"{names[0]}-{array}.npy") for array in ("indptr", "indices"))
        return NeighborGraph(indptr, indices)
    # The checksums are in the folder's name: an artifact that was made anew is not mistaken for its old copy.
    digest = _digest_of_parts(artifact, names)
    folder = cache_folder() / "neighbors" / f"{artifact.fingerprint}-{digest}"
    if not (folder / "indptr.npy").exists():
        _join_parts(artifact, names, folder)
    return NeighborGraph(
        np.load(folder / "indptr.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "indices.npy", mmap_mode="r", allow_pickle=False),
    )


def _digest_of_parts(artifact: Artifact, names: list[str]) -> str:
    digests = "".join(artifact.part(f"{name}-indices.npy").sha256 for name in names)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def _join_parts(artifact: Artifact, names: list[str], folder: Path) -> None:
    """Write indices.npy, then indptr.npy: the last one's presence means that both are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    num_edges = sum(artifact.part(f"{name}-indices.npy").rows or 0 for name in names)
    dtype = np.dtype(artifact.part(f"{names[0]}-indices.npy").dtype)
    temporary = folder / f".{uuid.uuid4().hex}.npy"
    try:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(num_edges,))
        pointers = [np.zeros(1, np.int64)]
        position = 0
        for name in names:
            indices = artifact.read_array(f"{name}-indices.npy")
            joined[position : position + len(indices)] = indices
            pointers.append(artifact.read_array(f"{name}-indptr.npy")[1:] + position)
            position += len(indices)
        joined.flush()
        del joined
        os.replace(temporary, folder / "indices.npy")
        np.save(temporary, np.concatenate(pointers), allow_pickle=False)
        os.replace(temporary, folder / "indptr.npy")
    finally:
        temporary.unlink(missing_ok=True)
