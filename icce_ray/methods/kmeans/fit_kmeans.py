"""K-means from several starts over shards (docs/METHOD.md, "K-means"). This module only adds up the results of shards,
wherever they are.

Legend: N images, n images of a shard, D feature dimension, d dimensions of the rows, K clusters, H starts.
"""

import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import KMeansConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.kmeans.assignment import Labels, Sums
from icce_ray.methods.kmeans.kmeans_shard import Far, KMeansShard, sample_size, unit_length
from icce_ray.methods.kmeans.projection import Doubles, Floats, Projection, make_projection
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.store import ArtifactWriter
from icce_ray.store.part_records import PartRecords

MODEL_NAME = "kmeans.npz"
CHECKPOINT_INTERVAL_S = 60.0
PROJECTION = "projection"


class Shards:
    """The shards of one collection, in this process."""

    def __init__(self, shards: Sequence[KMeansShard]) -> None:
        self.shards = shards

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Results of a method of `KMeansShard` for every shard, in their order."""
        return [getattr(shard, method)(*arguments) for shard in self.shards]

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Results of the method for each tuple of arguments, computed by any shards."""
        return [getattr(shard, method)(*each) for shard, each in zip(cycle(self.shards), arguments, strict=False)]


@dataclass(frozen=True)
class Start:
    """A clustering from one start, finished or under way."""

    centroids_Kd: Doubles
    counts_K: npt.NDArray[np.int64]
    """With mini-batches: rows that each centroid is the mean of."""
    step: int = 0
    """Iterations or epochs so far."""
    inertias: tuple[float, ...] = ()
    """With Lloyd's algorithm: the inertia at the beginning of each iteration."""
    is_converged: bool = False
    labels_N: Labels | None = None
    """Set with the final inertia when it is finished."""
    inertia: float = math.nan


@dataclass(frozen=True)
class FittedKMeans:
    """The clusterings from all starts."""

    projection: Projection
    starts: tuple[Start, ...]

    @property
    def best(self) -> int:
        """The start with the lowest inertia."""
        return int(np.argmin([start.inertia for start in self.starts]))

    def clusterings(self, num_images: int) -> Clusterings:
        """The result of the method. kmeans.npz has `centroids` (H, K, d), and the projection: `mean` (D,),
        `components` (D, d), empty if all are kept, and `spherical`."""
        best = self.starts[self.best]
        centroids_HKd = np.stack([start.centroids_Kd for start in self.starts]).astype(np.float32)
        return Clusterings(
            np.stack([start.labels_N for start in self.starts if start.labels_N is not None]),
            np.array([start.inertia for start in self.starts]),
            files={MODEL_NAME: self.projection.to_bytes(centroids=centroids_HKd)},
            history=[{"epoch": step + 1, "loss": inertia / num_images} for step, inertia in enumerate(best.inertias)],
            notes={"steps": [start.step for start in self.starts]},
        )

    def metrics(self) -> dict[str, Any]:
        """Figures for the manifest and the log."""
        best = self.starts[self.best]
        return {
            "num_starts": len(self.starts),
            "best_start": self.best,
            "inertia": best.inertia,
            "highest_inertia": max(start.inertia for start in self.starts),
            "num_iterations": best.step,
            "converged": best.is_converged,
            "num_components": self.projection.dim,
        }


def fit_kmeans(
    shards: Shards,
    settings: KMeansConfig,
    *,
    num_images: int,
    dim: int,
    num_clusters: int,
    seed: int,
    progress: Progress = QUIET,
    records: PartRecords | None = None,
) -> FittedKMeans:
    """Cluster the images of the shards from `num_starts` starts. The number of shards doesn't change the result.
    Finished starts and, every `CHECKPOINT_INTERVAL_S`, those under way are kept in `records`, and resumed from there.
    Raises InputError: features that are not finite, or fewer dimensions than components."""
    limit = settings.num_iterations if settings.algorithm == "lloyd" else settings.num_epochs
    if records is None or not records.read_all():
        progress.update(0, settings.num_starts * limit, "prepares the rows")
    projection = _projection(shards, settings, num_images, dim, records)
    squares = math.fsum(each for of_shard in shards.all("prepare", projection) for each in of_shard)
    run = KMeansRun(shards, settings, projection, squares, num_images, num_clusters, seed, progress, records)
    fit = run.lloyd if settings.algorithm == "lloyd" else run.mini_batches
    return FittedKMeans(projection, tuple(fit()))


@dataclass
class KMeansRun:
    """All starts of one clustering."""

    shards: Shards
    settings: KMeansConfig
    projection: Projection
    squares: float
    """Sum of the squares of all rows."""
    num_images: int
    num_clusters: int
    seed: int
    progress: Progress
    records: PartRecords | None
    last_saved: float = field(default_factory=time.monotonic)

    def lloyd(self) -> list[Start]:
        return [self.lloyd_from(number) for number in range(self.settings.num_starts)]

    def mini_batches(self) -> list[Start]:
        """Mini-batches, all starts side by side, epoch by epoch."""
        states = [self._read(number) or self.begin(number) for number in range(self.settings.num_starts)]
        batch_size = self.settings.images_per_batch(self.num_clusters)
        for epoch in range(self.settings.num_epochs):
            due = [number for number, state in enumerate(states) if state.step == epoch and state.labels_N is None]
            if not due:
                continue
            seeds = [_seed(self.seed, number, epoch + 1) for number in due]
            arguments = [
                (self.projection, states[number].centroids_Kd, states[number].counts_K, seed, batch_size)
                for number, seed in zip(due, seeds, strict=True)
            ]
            moved = self.shards.each("mini_batch_epoch", arguments)
            for number, (centroids_Kd, counts_K) in zip(due, moved, strict=True):
                states[number] = Start(centroids_Kd, counts_K, epoch + 1)
            self.progress.update(len(states) * (epoch + 1), len(states) * self.settings.num_epochs)
            if self._is_due():
                for number in due:
                    self._write(number, states[number])
        return [self._finish(number, state) for number, state in enumerate(states)]

    def lloyd_from(self, number: int) -> Start:
        """One start: full iterations from its last checkpoint to the end."""
        state = self._read(number) or self.begin(number)
        limit = self.settings.num_iterations
        while state.step < limit and not state.is_converged:
            state = self.iterate(state)
            self.progress.update(
                number * limit + state.step, self.settings.num_starts * limit,
                f"start {number + 1}, inertia {state.inertias[-1] / self.num_images:.5g} per image",
            )  # fmt: skip
            if self._is_due():
                self._write(number, state)
        return self._finish(number, state)

    def iterate(self, state: Start) -> Start:
        """One iteration of Lloyd's algorithm."""
        centroids_Kd = state.centroids_Kd.astype(np.float32)
        sums = Sums.join(self.shards.all("sums", self.projection, centroids_Kd))
        inertia = inertia_of(self.squares, sums, centroids_Kd)
        moved_Kd = self._means(sums, centroids_Kd)
        before = state.inertias[-1] if state.inertias else math.inf
        has_empty = bool((sums.counts_K == 0).any())
        is_converged = not has_empty and before - inertia <= self.settings.tolerance * inertia
        is_converged |= np.array_equal(moved_Kd.astype(np.float32), centroids_Kd)
        return Start(moved_Kd, sums.counts_K, state.step + 1, (*state.inertias, inertia), is_converged)

    def _means(self, sums: Sums, centroids_Kd: Floats) -> Doubles:
        """The new centroids. Empty clusters start again from the rows that are farthest from their centroids."""
        counts_K1 = sums.counts_K[:, None]
        moved_Kd = np.where(counts_K1 > 0, sums.rows_Kd / np.maximum(counts_K1, 1), centroids_Kd)
        empty = np.flatnonzero(sums.counts_K == 0)
        if len(empty):
            of_shards: list[list[Far]] = self.shards.all("farthest", self.projection, centroids_Kd, len(empty))
            found = sorted(chain.from_iterable(of_shards), key=lambda far: far[:2])
            for cluster, far in zip(empty, found, strict=False):
                moved_Kd[cluster] = far.row_d
        return unit_length(moved_Kd) if self.projection.spherical else moved_Kd

    def begin(self, number: int) -> Start:
        """The starting centroids, by k-means++ on a sample."""
        size = min(self.num_images, sample_size(self.num_clusters))
        seed = _seed(self.seed, number, 0)
        sample = np.random.default_rng(seed).choice(self.num_images, size, replace=False, shuffle=False)
        rows_nd = np.concatenate(self.shards.all("pick", self.projection, np.sort(sample)))
        (centroids_Kd,) = self.shards.each("seed", [(rows_nd, self.num_clusters, seed)])
        return Start(centroids_Kd.astype(np.float64), np.zeros(self.num_clusters, np.int64))

    def _finish(self, number: int, state: Start) -> Start:
        if state.labels_N is not None:
            return state
        centroids_Kd = state.centroids_Kd.astype(np.float32)
        labels, sums = zip(*self.shards.all("label", self.projection, centroids_Kd), strict=True)
        inertia = inertia_of(self.squares, Sums.join(sums), centroids_Kd)
        finished = replace(state, labels_N=np.concatenate(labels), inertia=inertia)
        self._write(number, finished)
        return finished

    def _is_due(self) -> bool:
        if time.monotonic() - self.last_saved < CHECKPOINT_INTERVAL_S:
            return False
        self.last_saved = time.monotonic()
        return True

    def _write(self, number: int, state: Start) -> None:
        if self.records is None:
            return
        writer, name = ArtifactWriter(self.records.folder), f"start-{number:04d}"
        arrays: dict[str, npt.NDArray[Any]] = {"centroids": state.centroids_Kd, "counts": state.counts_K}
        if state.labels_N is not None:
            arrays["labels"] = state.labels_N
        files = [writer.write_array(f"{name}-{state.step:05d}-{what}.npy", array) for what, array in arrays.items()]
        inertia = 0.0 if state.labels_N is None else state.inertia
        values = {"step": state.step, "inertias": state.inertias, "converged": state.is_converged, "inertia": inertia}
        self.records.write(name, files, values)
        kept = {file.name for file in files}
        for file_name in self.records.folder.names():
            if file_name.startswith(f"{name}-") and file_name not in kept:
                self.records.folder.remove(file_name)

    def _read(self, number: int) -> Start | None:
        if self.records is None or (record := self.records.read(f"start-{number:04d}")) is None:
            return None
        folder, metrics = self.records.folder, record.metrics
        arrays = [np.load(io.BytesIO(folder.read_bytes(file.name)), allow_pickle=False) for file in record.files]
        return Start(
            arrays[0], arrays[1], metrics["step"], tuple(metrics["inertias"]), metrics["converged"],
            arrays[2] if len(arrays) > 2 else None, metrics["inertia"],
        )  # fmt: skip


def inertia_of(squares: float, sums: Sums, centroids_Kd: Floats) -> float:
    """Sum of squared distances of the rows from their centroids, from exact sums: it doesn't depend on any order."""
    double_Kd = centroids_Kd.astype(np.float64)
    crossed_K = np.einsum("kd,kd->k", double_Kd, sums.rows_Kd)
    squares_K = sums.counts_K * np.einsum("kd,kd->k", double_Kd, double_Kd)
    return max(0.0, math.fsum([squares, *(-2 * crossed_K), *squares_K]))


def _projection(
    shards: Shards, settings: KMeansConfig, num_images: int, dim: int, records: PartRecords | None
) -> Projection:
    if records is not None and (record := records.read(PROJECTION)) is not None:
        return Projection.from_bytes(records.folder.read_bytes(record.files[0].name))
    found = shards.all("measure", settings.num_components is not None)
    moments = dict(each for of_shard in found for each in of_shard)
    (shift_D,) = shards.each("shift", [()])
    projection = make_projection(
        [moments[number] for number in range(len(moments))], shift_D, num_images, settings.num_components,
        settings.spherical,
    )  # fmt: skip
    if records is not None:
        # Stored, since another machine might round differently.
        file = ArtifactWriter(records.folder).write_bytes(f"{PROJECTION}.npz", projection.to_bytes())
        records.write(PROJECTION, [file], {})
    return projection


def _seed(seed: int, start: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, start, step]).generate_state(1)[0])
