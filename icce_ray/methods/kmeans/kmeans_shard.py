"""One shard of the images: passes over its rows, without Ray.

The rows are prepared once and held in a file that is memory-mapped and has no name, so it is gone with the process.
Where memory is short, the operating system reads them from disk in each pass. Work goes in fixed blocks, each by one
thread, so that a row's label doesn't depend on the number of shards and threads.

Legend: N images, n images of the shard, D feature dimension, d dimensions of the rows, K clusters.
"""

import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController, threadpool_limits

from icce_ray.errors import ResourceError
from icce_ray.methods.kmeans.assignment import Labels, Sums, TorchAssigner, nearest, squared_distances
from icce_ray.methods.kmeans.projection import (
    Doubles,
    Features,
    Floats,
    Moments,
    Projection,
    measure,
    part_bounds,
    read_rows,
    shift_of,
)
from icce_ray.runtime.threads import in_threads
from icce_ray.store.cache import cache_folder

BLOCK_ELEMENTS = 2**21
MIN_BLOCK_ROWS = 256
BLOCKS_WANTED = 64
"""A small collection has smaller blocks, so that several workers have something to do."""

SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER = 20_000, 10
"""Images that k-means++ chooses the starts from."""

Ids = npt.NDArray[np.int64]
R = TypeVar("R")


class Far(NamedTuple):
    """A row that is far from its centroid. Sorts by distance, the farthest first, then by image."""

    minus_distance: float
    image: int
    row_d: Floats


@dataclass(repr=False, eq=False)
class KMeansShard:
    """Holds a share of the blocks. It can be made again from its arguments, and then does the same."""

    load: Callable[[], Features]
    """Returns the features (N, D) of all images, memory-mapped or in memory."""
    shard: int = 0
    num_shards: int = 1
    num_threads: int = 1
    device: str | None = None
    """Torch device of the assignment; None: numpy on the CPU."""
    on_disk: bool = False
    """Whether the rows are held in a file in this machine's cache folder, or in memory."""
    _rows_nd: Floats | None = None

    def __repr__(self) -> str:
        """The name in Ray's dashboard and in front of log lines."""
        return f"k-means: shard {self.shard + 1} of {self.num_shards}"

    # These are not made in the constructor: an error there reaches the driver as a dead actor, without its message.
    @cached_property
    def features(self) -> Features:
        """(N, D)."""
        return self.load()

    @cached_property
    def assigner(self) -> TorchAssigner:
        assert self.device is not None
        return TorchAssigner(self.device)

    @cached_property
    def blas(self) -> ThreadpoolController:
        """Limits the threads of matrix products, on which their rounding depends. Finding the libraries takes 10 ms, as
        long as a pass over a small collection."""
        return ThreadpoolController()

    def measure(self, with_products: bool) -> list[tuple[int, Moments]]:
        """The moments of every `num_shards`-th part, with its number."""
        num_images, dim = self.features.shape
        parts = part_bounds(num_images, dim, with_products)
        numbers = range(self.shard, len(parts), self.num_shards)

        def of_part(number: int) -> Moments:
            start, stop = parts[number]
            return measure(self.features, start, stop, with_products)

        moments = self._in_threads(of_part, numbers)
        return list(zip(numbers, moments, strict=True))

    def shift(self) -> Doubles:
        """The point that the moments are about."""
        return shift_of(self.features)

    def prepare(self, projection: Projection) -> list[float]:
        """Prepare the rows. Returns the sum of squares of each block."""
        rows_nd, squares = self._rows(projection), list[float]()
        for start, stop in self._blocks(projection):
            block = rows_nd[start - self.start : stop - self.start].astype(np.float64)
            squares.append(float(np.einsum("nd,nd->", block, block)))
        return squares

    def pick(self, projection: Projection, images: Ids) -> Floats:
        """The rows of those of the images (ascending) that are in this shard."""
        rows_nd = self._rows(projection)
        mine = images[slice(*np.searchsorted(images, [self.start, self.start + len(rows_nd)]))]
        return rows_nd[mine - self.start]

    def seed(self, rows_nd: Floats, num_clusters: int, seed: int) -> Floats:
        """Starts among the rows by greedy k-means++, (K, d)."""
        # Imported here, because it takes 85 MB, and one shard needs it.
        from sklearn.cluster import kmeans_plusplus

        with threadpool_limits(1):  # several threads may round a product differently
            centroids_Kd, _ = kmeans_plusplus(rows_nd.astype(np.float64), num_clusters, random_state=seed)
        return np.asarray(centroids_Kd, dtype=np.float32)

    def sums(self, projection: Projection, centroids_Kd: Floats) -> Sums:
        """Sums of the rows by their nearest centroid."""
        return self.label(projection, centroids_Kd)[1]

    def farthest(self, projection: Projection, centroids_Kd: Floats, number: int) -> list[Far]:
        """The rows farthest from their centroids, at most `number`, without those that equal their centroid."""
        labels_n, _ = self.label(projection, centroids_Kd)
        rows_nd = self._rows(projection)

        def of_block(bounds: tuple[int, int]) -> list[Far]:
            place = slice(bounds[0] - self.start, bounds[1] - self.start)
            distances = squared_distances(rows_nd[place], centroids_Kd, labels_n[place])
            order = np.argsort(-distances, kind="stable")[:number]
            far = [(float(-distances[each]), bounds[0] + int(each)) for each in order if distances[each] > 0]
            return [Far(minus, image, rows_nd[image - self.start].copy()) for minus, image in far]

        found = self._in_threads(of_block, self._blocks(projection))
        return sorted((far for block in found for far in block), key=lambda far: far[:2])[:number]

    def mini_batch_epoch(
        self, projection: Projection, centroids_Kd: Doubles, counts_K: Ids, seed: int, batch_size: int
    ) -> tuple[Doubles, Ids]:
        """One pass over all images in random order, batch by batch. Each batch moves the centroids to the mean of all
        rows that they were ever assigned, whose number is in `counts_K`. Returns both."""
        centroids_Kd, counts_K = centroids_Kd.copy(), counts_K.copy()
        order_N = np.random.default_rng(seed).permutation(len(self.features))
        with self.blas.limit(limits=1):
            for start in range(0, len(order_N), batch_size):
                images = np.sort(order_N[start : start + batch_size])
                rows_nd = projection(self.features[images])
                batch = Sums.zeros(*centroids_Kd.shape)
                batch.add(rows_nd, nearest(rows_nd, centroids_Kd.astype(np.float32)))
                used_U = np.flatnonzero(batch.counts_K)
                before_U1 = counts_K[used_U, None]
                counts_K[used_U] += batch.counts_K[used_U]
                sums_Ud = centroids_Kd[used_U] * before_U1 + batch.rows_Kd[used_U]
                centroids_Kd[used_U] = sums_Ud / counts_K[used_U, None]
                if projection.spherical:
                    centroids_Kd[used_U] = unit_length(centroids_Kd[used_U])
            unused_U = np.flatnonzero(counts_K == 0)  # they start again from images of this epoch
            again = np.sort(order_N[: len(unused_U)])
            centroids_Kd[unused_U[: len(again)]] = projection(self.features[again])
        return centroids_Kd, counts_K

    @property
    def start(self) -> int:
        """The first image of the shard."""
        return self._image(self.shard)

    def _image(self, shard: int) -> int:
        """The first image of a shard: it begins with a block."""
        num_images = len(self.features)
        num_blocks = -(-num_images // self._block_rows)
        return min(num_images, num_blocks * shard // self.num_shards * self._block_rows)

    @property
    def _block_rows(self) -> int:
        num_images, dim = (int(size) for size in self.features.shape)
        return max(1, min(BLOCK_ELEMENTS // dim, max(MIN_BLOCK_ROWS, -(-num_images // BLOCKS_WANTED))))

    def _blocks(self, projection: Projection) -> list[tuple[int, int]]:
        """(first image, end) of each block of the shard."""
        stop = self.start + len(self._rows(projection))
        return [(first, min(first + self._block_rows, stop)) for first in range(self.start, stop, self._block_rows)]

    def _rows(self, projection: Projection) -> Floats:
        if self._rows_nd is None:
            start, stop = self.start, self._image(self.shard + 1)
            rows_nd = _allocate((stop - start, projection.dim), self.on_disk)

            def fill(first: int) -> None:
                end = min(first + self._block_rows, stop)
                rows_nd[first - start : end - start] = projection(read_rows(self.features, first, end))

            self._in_threads(fill, range(start, stop, self._block_rows))
            self._rows_nd = rows_nd
        return self._rows_nd

    def label(self, projection: Projection, centroids_Kd: Floats) -> tuple[Labels, Sums]:
        """The nearest centroid of each image (n,), and the sums of their rows."""
        rows_nd, start = self._rows(projection), self.start
        blocks = self._blocks(projection)

        def rows_of(bounds: tuple[int, int]) -> Floats:
            return rows_nd[bounds[0] - start : bounds[1] - start]

        if self.device is not None:
            labels, sums = self.assigner.assign(((each[0], rows_of(each)) for each in blocks), centroids_Kd)
            return np.concatenate([np.empty(0, np.int32), *labels]), sums
        labels_n = np.empty(len(rows_nd), np.int32)

        def assign_blocks(numbers: range) -> Sums:
            sums = Sums.zeros(*centroids_Kd.shape)
            for number in numbers:
                rows, first = rows_of(blocks[number]), blocks[number][0] - start
                labels_n[first : first + len(rows)] = nearest(rows, centroids_Kd)
                sums.add(rows, labels_n[first : first + len(rows)])
            return sums

        # Each thread adds up its own blocks: sums of all blocks at a time would not fit into memory.
        threads = range(self.num_threads)
        return labels_n, Sums.join(
            self._in_threads(assign_blocks, [range(each, len(blocks), self.num_threads) for each in threads])
        )

    def _in_threads(self, function: Callable[[Any], R], items: Any) -> list[R]:
        with self.blas.limit(limits=1):
            return in_threads(function, items, self.num_threads)


def sample_size(num_clusters: int) -> int:
    """Number of images that k-means++ chooses K starts from."""
    return max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * num_clusters)


def unit_length(vectors_Kd: Doubles) -> Doubles:
    """The vectors at unit length; zero stays zero."""
    length_K1 = np.linalg.norm(vectors_Kd, axis=1, keepdims=True)
    return vectors_Kd / np.where(length_K1 == 0.0, 1.0, length_K1)


def _allocate(shape: tuple[int, int], on_disk: bool) -> Floats:
    """An array in memory or in an unnamed file."""
    num_bytes = 4 * shape[0] * shape[1]
    if not on_disk or num_bytes == 0:
        return np.empty(shape, np.float32)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                file.truncate(num_bytes)
        except OSError as error:
            raise ResourceError(
                f"kmeans: {shape[0]:,} images x {shape[1]} dimensions need {num_bytes / 1e9:.1f} GB in {folder}: "
                f"{error.strerror}. Free space there, set ICCE_CACHE to another folder, use more machines, or set "
                "kmeans.num_components"
            ) from None
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), np.float32).reshape(shape)
