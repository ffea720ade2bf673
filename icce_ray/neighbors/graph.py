"""The neighbour graph: who is whose neighbour, by the adaptive rule of METHOD section 1.

N(i) = all images at least `threshold` similar to i; fewer than `min_neighbors` of them: the `min_neighbors` most
similar; more than `max_neighbors`: a uniform random subset. The subset is drawn by a hash of (seed, i, j), so it does
not depend on how the work is cut. Where there are near-duplicates, the rule is that over the leaders of their groups.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.audit import Audit, audit_prepared
from icce_ray.neighbors.duplicates import DuplicatePairs, leaders
from icce_ray.neighbors.faiss_engine import Engine, FaissEngine
from icce_ray.neighbors.graph_rows import (
    Rows,
    ids_to_search_again,
    merge_shards,
    part_ranges,
    rows_among_leaders,
    search_shard,
)
from icce_ray.neighbors.rule import Rule
from icce_ray.neighbors.unit_features import Ids, PreparedFeatures, prepare
from icce_ray.runtime.progress import Progress
from icce_ray.store import Artifact
from icce_ray.store.artifact import cache_folder


@dataclass(frozen=True)
class NeighborGraph:
    """Directed graph in CSR form; may be memory-mapped.

    indptr: (N+1,) int64; the neighbours of image i are indices[indptr[i]:indptr[i+1]].
    indices: (E,) int32, or int64 above 2^31-1 images; ascending within a row, never i itself.
    A near-duplicate of another image, its leader, has no neighbours and is nobody's: it does not take part in training.
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

    @property
    def anchors(self) -> npt.NDArray[np.int64]:
        """(A,) ascending, the images that have neighbours: those that an epoch of training visits."""
        return np.flatnonzero(self.degrees)

    def neighbors_of(self, image: int) -> npt.NDArray[np.integer]:
        return self.indices[self.indptr[image] : self.indptr[image + 1]]


@dataclass(frozen=True)
class BuiltGraph:
    """A graph and what was learnt on the way; leader_N as `duplicates.leaders` returns it."""

    graph: NeighborGraph
    audit: Audit
    duplicates: DuplicatePairs
    leader_N: Ids | None


def rule_of(config: NeighborsConfig, audit: Audit, seed: int) -> Rule:
    """The rule that the audit leads to."""
    return Rule(
        audit.similarity_threshold,
        min(config.min_neighbors, audit.num_images - 1),
        config.max_neighbors,
        seed,
        audit.duplicate_threshold,
    )


def make_engine(prepared: PreparedFeatures, ids_n: Ids, device: str | None, num_threads: int) -> Engine:
    """A shard of the images `ids_n`: on the CPU by FAISS, or on a torch device."""
    if device is None:
        return FaissEngine(prepared, ids_n)
    from icce_ray.neighbors.torch_engine import TorchEngine

    return TorchEngine(prepared, ids_n, device, num_threads)


def build_graph(
    features_ND: npt.NDArray[np.floating],
    config: NeighborsConfig,
    *,
    num_clusters: int,
    seed: int,
    progress: Progress | None = None,
    device: str | None = None,
    num_threads: int = 1,
) -> tuple[NeighborGraph, Audit]:
    """The graph and the audit of `build`."""
    built = build(
        features_ND, config, num_clusters=num_clusters, seed=seed, progress=progress, device=device,
        num_threads=num_threads,
    )  # fmt: skip
    return built.graph, built.audit


def build(
    features_ND: npt.NDArray[np.floating],
    config: NeighborsConfig,
    *,
    num_clusters: int,
    seed: int,
    progress: Progress | None = None,
    device: str | None = None,
    num_threads: int = 1,
) -> BuiltGraph:
    """Audit the features and build the graph in this process: the oracle of the distributed stage.

    Args:
        features_ND: (N, D) floating point.
        config: threshold, limits and centring.
        num_clusters: K; bounds the automatic threshold.
        seed: of the audit's samples and of the random subsets.
        progress: told of finished rows.
        device: a torch device to search on, with `num_threads` of the CPU; None: the CPU, by FAISS.

    Raises:
        InputError: features that are not finite, or fewer than two.
    """
    prepared = prepare(features_ND, config.center)
    num_images = len(prepared)
    audit = audit_prepared(prepared, config, num_clusters=num_clusters, seed=seed)
    rule = rule_of(config, audit, seed)
    engine = make_engine(prepared, np.arange(num_images), device, num_threads)
    parts: list[Rows] = []
    pairs: list[DuplicatePairs] = []
    for start, stop in part_ranges(num_images):
        ids = np.arange(start, stop)
        rows, duplicates = merge_shards(
            [search_shard(engine, prepared, ids, rule)], prepared, ids, rule, num_threads=num_threads
        )
        parts.append(rows)
        pairs.append(duplicates)
        if progress is not None:
            progress.update(stop, num_images)
    duplicates = DuplicatePairs.join(pairs)
    leader_N = leaders(num_images, duplicates, min_leaders=rule.min_neighbors + 1)
    if leader_N is not None:
        rule = replace(rule, duplicate_threshold=None)
        del engine  # its memory goes before the next one's comes
        engine = make_engine(prepared, np.flatnonzero(leader_N == np.arange(num_images)), device, num_threads)
        for number, (start, _) in enumerate(part_ranges(num_images)):
            ids = ids_to_search_again(parts[number], start, leader_N)
            answer = search_shard(engine, prepared, ids, rule, leader_N)
            new, _ = merge_shards([answer], prepared, ids, rule, leader_N, num_threads)
            parts[number] = rows_among_leaders(parts[number], start, leader_N, ids, new)
    rows = Rows.join(parts)
    return BuiltGraph(NeighborGraph(rows.indptr, rows.indices), audit, duplicates, leader_N)


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
