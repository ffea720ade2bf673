"""The graph of adaptive neighbours, built in this process or loaded from a finished artifact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.audit import Audit, audit_features
from icce_ray.neighbors.graph_rows import NUM_NEAREST, Rows, merge_shards, part_ranges, search_shard
from icce_ray.runtime.progress import Progress
from icce_ray.sample.unit_features import prepare
from icce_ray.store import Artifact
from icce_ray.store.cache import cache_entry, is_sealed, seal
from icce_ray.store.local_files import locked, replacing

NEAREST_SUFFIX = "-nearest.npy"


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


def build_graph(
    features_ND: npt.NDArray[np.floating],
    config: NeighborsConfig,
    *,
    num_clusters: int,
    seed: int,
    progress: Progress | None = None,
    device: str = "cpu",
    num_threads: int = 1,
) -> tuple[NeighborGraph, Audit]:
    """Audit the features and build the graph in this process: the oracle of the distributed stage. Raises InputError:
    features that are not finite, or fewer than two.

    Args:
        features_ND: (N, D) floating point.
        num_clusters: K; bounds the automatic threshold.
    """
    from icce_ray.neighbors.torch_engine import TorchEngine  # torch takes seconds

    unit = prepare(features_ND, config.center)
    audit = audit_features(unit, config, num_clusters=num_clusters, seed=seed)
    rule = audit.rule(config, seed)
    engine = TorchEngine(unit, np.arange(len(unit)), device, num_threads)
    parts: list[Rows] = []
    for start, stop in part_ranges(len(unit)):
        ids = np.arange(start, stop)
        parts.append(merge_shards([search_shard(engine, unit, ids, rule)], unit, ids, rule, num_threads))
        if progress is not None:
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
