"""The graph of adaptive neighbours: built in this process or, part by part, from the answers of shards, each of which
answers for the images of a part; and loaded from a finished artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.adaptive_rule import PairList, Queries, Rule, keep, rank_in_row
from icce_ray.neighbors.audit import Audit, audit_features
from icce_ray.neighbors.search import MAX_ROWS_PER_PART, QUERY_BLOCK, Candidates, blocks_of, merge, search
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.runtime.threads import in_threads
from icce_ray.sample.unit_features import Ids, UnitFeatures, prepare
from icce_ray.store import Artifact
from icce_ray.store.cache import cache_entry, is_sealed, locked, replacing, seal

if TYPE_CHECKING:
    from icce_ray.neighbors.torch_engine import TorchEngine

NUM_NEAREST = 10
"""Length of the lists of most similar neighbours."""
NEAREST_SUFFIX = "-nearest.npy"


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


def search_shard(engine: TorchEngine, unit: UnitFeatures, ids: Ids, rule: Rule) -> list[Candidates]:
    """A shard's candidates for the images `ids`, block by block of queries."""
    return in_threads(lambda block: search(engine, Queries(unit, block), rule), blocks_of(ids), engine.blocks_at_once)


def merge_shards(
    answers: Sequence[list[Candidates]], unit: UnitFeatures, ids: Ids, rule: Rule, num_threads: int = 1
) -> Rows:
    """The rows of the images `ids` from the answers of all shards."""
    num_images, dtype = len(unit), np.dtype(np.int32 if len(unit) <= 2**31 - 1 else np.int64)

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

    blocks = [(block, list(found)) for block, *found in zip(blocks_of(ids), *answers, strict=True)]
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


@dataclass(frozen=True)
class NeighborGraph:
    """Directed graph in CSR form; may be memory-mapped.

    indptr: (N+1,) int64; the neighbours of image i are indices[indptr[i]:indptr[i+1]].
    indices: (E,) int32, or int64 above 2^31-1 images; ascending within a row, never i itself.
    nearest_Nk: (N, NUM_NEAREST) the most similar of them, ascending, -1 where there are fewer; None if not loaded.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    nearest_Nk: npt.NDArray[np.integer] | None = None

    @property
    def num_images(self) -> int:
        return len(self.indptr) - 1

    @property
    def degrees(self) -> npt.NDArray[np.int64]:
        """(N,) number of neighbours of each image."""
        return np.diff(self.indptr)

    @property
    def anchors(self) -> npt.NDArray[np.int64]:
        """(A,) ascending, the images that have neighbours: those that an epoch of training visits."""
        return np.flatnonzero(self.degrees)


def build_graph(
    features_ND: npt.NDArray[np.floating],
    config: NeighborsConfig,
    *,
    num_clusters: int,
    seed: int,
    progress: Progress = QUIET,
    device: str = "cpu",
    num_threads: int = 1,
) -> tuple[NeighborGraph, Audit]:
    """Audit the features (N, D) and build the graph in this process: the oracle of the distributed stage. The number of
    clusters bounds the automatic threshold. Raises InputError: features that are not finite, or fewer than two."""
    from icce_ray.neighbors.torch_engine import TorchEngine  # torch takes seconds

    unit = prepare(features_ND, config.center)
    audit = audit_features(unit, config, num_clusters=num_clusters, seed=seed)
    rule = audit.rule(config, seed)
    engine = TorchEngine(unit, np.arange(len(unit)), device, num_threads)
    parts: list[Rows] = []
    for start, stop in part_ranges(len(unit)):
        ids = np.arange(start, stop)
        parts.append(merge_shards([search_shard(engine, unit, ids, rule)], unit, ids, rule, num_threads))
        progress.update(stop, len(unit))
    rows = Rows.join(parts)
    return NeighborGraph(rows.indptr, rows.indices, rows.nearest), audit


@dataclass(frozen=True)
class StoredNearest:
    """The most similar neighbours of each image in a finished `neighbors` artifact: (N, NUM_NEAREST), read by slices.
    Pickles: workers open the files themselves."""

    artifact: Artifact

    @property
    def _names(self) -> list[str]:
        return [name for name in self.artifact.part_names("part-") if name.endswith(NEAREST_SUFFIX)]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.artifact.part(name).rows or 0 for name in self._names), NUM_NEAREST

    def __getitem__(self, rows: slice) -> npt.NDArray[np.integer]:
        start, stop, _ = rows.indices(self.shape[0])
        found, first = [], 0
        for name in self._names:
            num_rows = self.artifact.part(name).rows or 0
            if first < stop and start < first + num_rows:
                found.append(self.artifact.read_array(name)[max(start - first, 0) : stop - first])
            first += num_rows
        return np.concatenate(found)


def load_graph(artifact: Artifact) -> NeighborGraph:
    """The graph of a finished `neighbors` artifact, memory-mapped. Several parts are joined once per machine. Raises
    DamagedArtifactError: a part is missing or its bytes are wrong."""
    names = [name.removesuffix("-indptr.npy") for name in artifact.part_names("part-") if name.endswith("-indptr.npy")]
    if len(names) == 1:
        indptr, indices = (artifact.read_array(f"{names[0]}-{array}.npy") for array in ("indptr", "indices"))
        return NeighborGraph(indptr, indices)
    # The folder is named by the checksums, so that an artifact made anew is not mistaken for its old copy.
    checksums = "".join(artifact.part(f"{name}-indices.npy").sha256 for name in names)
    digest = hashlib.sha256(checksums.encode()).hexdigest()[:16]
    folder = cache_entry(artifact.manifest.stage, f"{artifact.fingerprint}-{digest}")
    indptr_path, indices_path = folder / "indptr.npy", folder / "indices.npy"
    if not (is_sealed(indptr_path) and is_sealed(indices_path)):
        with locked(folder / ".lock"):
            if not (is_sealed(indptr_path) and is_sealed(indices_path)):
                _join_parts(artifact, names, indptr_path, indices_path)
    indptr, indices = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (indptr_path, indices_path))
    return NeighborGraph(indptr, indices)


def _join_parts(artifact: Artifact, names: list[str], indptr_path: Path, indices_path: Path) -> None:
    """Write the pointers and the indices of all parts."""
    num_edges = sum(artifact.part(f"{name}-indices.npy").rows or 0 for name in names)
    dtype = np.dtype(artifact.part(f"{names[0]}-indices.npy").dtype)
    pointers, position = [np.zeros(1, np.int64)], 0
    with replacing(indices_path) as temporary:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(num_edges,))
        for name in names:
            indices = artifact.read_array(f"{name}-indices.npy")
            joined[position : position + len(indices)] = indices
            pointers.append(artifact.read_array(f"{name}-indptr.npy")[1:] + position)
            position += len(indices)
        joined.flush()
    with replacing(indptr_path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate(pointers), allow_pickle=False)
    for path in (indptr_path, indices_path):
        seal(path)
