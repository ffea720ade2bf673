from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from icce_ray.config import KMeansConfig
from icce_ray.errors import InputError, ResourceError
from icce_ray.methods.kmeans import fit_kmeans as module
from icce_ray.methods.kmeans import kmeans_shard
from icce_ray.methods.kmeans.assignment import Sums, TorchAssigner, nearest
from icce_ray.methods.kmeans.fit_kmeans import FittedKMeans, Shards, fit_kmeans
from icce_ray.methods.kmeans.kmeans_shard import KMeansShard
from icce_ray.methods.kmeans.projection import Projection, make_projection, measure, part_bounds, read_rows, shift_of
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords


class InProcess(Shards):
    """Several shards that write down what they are asked."""

    def __init__(self, features: np.ndarray, num_shards: int, **settings: Any) -> None:
        super().__init__([KMeansShard(lambda: features, shard, num_shards, **settings) for shard in range(num_shards)])
        self.calls: list[str] = []

    def all(self, method: str, *arguments: Any) -> list[Any]:
        self.calls.append(method)
        return super().all(method, *arguments)

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.calls.append(method)
        return super().each(method, arguments)


def blobs(num_images: int = 1500, dim: int = 12, num_clusters: int = 6, noise: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = 2 * rng.standard_normal((num_clusters, dim))
    rows = centres[rng.integers(0, num_clusters, num_images)] + noise * rng.standard_normal((num_images, dim))
    return (rows + 5).astype(np.float16)


def fit(features: np.ndarray, num_shards: int = 1, num_clusters: int = 6, **settings: Any) -> FittedKMeans:
    options = {name: settings.pop(name) for name in ("num_threads", "on_disk") if name in settings}
    records, progress = settings.pop("records", None), settings.pop("progress", QUIET)
    return fit_kmeans(
        InProcess(features, num_shards, **options), KMeansConfig(**{"num_starts": 2} | settings),
        num_images=len(features), dim=features.shape[1], num_clusters=num_clusters, seed=3, records=records,
        progress=progress,
    )  # fmt: skip


def plain_lloyd(rows: np.ndarray, centroids: np.ndarray, num_iterations: int, spherical: bool) -> Any:
    rows, centroids = rows.astype(np.float64), centroids.astype(np.float64)
    for _ in range(num_iterations):
        labels = np.square(rows[:, None] - centroids[None]).sum(axis=2).argmin(axis=1)
        centroids = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(len(centroids))])
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    distances = np.square(rows[:, None] - centroids[None]).sum(axis=2)
    return centroids, distances.argmin(axis=1), distances.min(axis=1).sum()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("num_components", [None, 5])
def test_iterations_are_those_of_plain_lloyd(spherical: bool, num_components: int | None) -> None:
    features = blobs(noise=2.5)
    settings = {"spherical": spherical, "num_components": num_components, "tolerance": 0.0, "num_starts": 1}
    start = fit(features, num_iterations=1, **settings)
    fitted = fit(features, num_iterations=8, **settings)
    rows = fitted.projection(features)
    first = start.starts[0].centroids_Kd
    centroids, labels, inertia = plain_lloyd(rows, first, fitted.starts[0].step - 1, spherical)
    np.testing.assert_allclose(fitted.starts[0].centroids_Kd, centroids, rtol=1e-5, atol=1e-6)
    assert np.array_equal(fitted.starts[0].labels_N, labels)
    assert fitted.starts[0].inertia == pytest.approx(inertia, rel=1e-6)
    assert fitted.starts[0].step > 3
    assert list(fitted.starts[0].inertias) == sorted(fitted.starts[0].inertias, reverse=True)


@pytest.mark.parametrize(
    "settings", [{}, {"spherical": True, "num_components": 7}, {"algorithm": "mini_batch", "num_epochs": 2}]
)
def test_any_number_of_shards_and_threads_gives_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path))
    features = blobs()
    alone = fit(features, **settings)
    for num_shards in (2, 3, 7):
        divided = fit(features, num_shards, num_threads=num_shards - 1, on_disk=True, **settings)
        assert divided.projection.to_bytes() == alone.projection.to_bytes()
        for one, other in zip(alone.starts, divided.starts, strict=True):
            assert np.array_equal(one.labels_N, other.labels_N)
            assert one.centroids_Kd.tobytes() == other.centroids_Kd.tobytes()
            assert (one.inertia, one.inertias, one.step) == (other.inertia, other.inertias, other.step)
    assert not list(tmp_path.iterdir())  # the rows' files have no names


def test_sums_are_exact_in_any_order() -> None:
    features = blobs(700).astype(np.float32) * np.pi
    features[3] *= 1e6  # extreme images, so that float64 sums of rows that are not rounded are not exact
    features[4] = -features[3]
    projection = _projection(features)
    rows = projection(features)
    labels = np.arange(700, dtype=np.int32) % 4
    order = np.random.default_rng(0).permutation(700)
    forward, shuffled = Sums.zeros(4, 12), Sums.zeros(4, 12)
    forward.add(rows, labels)
    for some in np.array_split(order, 9):
        shuffled.add(rows[some], labels[some])
    assert forward.rows_Kd.tobytes() == shuffled.rows_Kd.tobytes()
    assert projection.grid < 1e-4
    exact = features - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(rows, exact, rtol=1e-6, atol=projection.grid)


def _projection(features: np.ndarray, num_components: int | None = None, spherical: bool = False) -> Projection:
    bounds = part_bounds(*features.shape, num_components is not None)
    parts = [measure(features, *each, num_components is not None) for each in bounds]
    return make_projection(parts, shift_of(features), len(features), num_components, spherical)


@pytest.mark.parametrize("num_components", [4, 12])
def test_the_principal_components_are_those_of_the_svd(num_components: int) -> None:
    features = blobs(1000).astype(np.float64) @ np.diag(np.arange(1, 13))
    projection = _projection(features, num_components)
    expected = PCA(num_components, svd_solver="full").fit(features)
    np.testing.assert_allclose(projection.mean_D, expected.mean_, rtol=1e-12)
    assert projection.components_Dd is not None
    sign = np.sign(np.einsum("dc,cd->c", projection.components_Dd, expected.components_))
    np.testing.assert_allclose(projection.components_Dd * sign, expected.components_.T, atol=1e-8)
    np.testing.assert_allclose(projection(features) * sign, expected.transform(features), rtol=1e-5, atol=1e-4)


def test_keeping_all_components_changes_no_label() -> None:
    features = blobs()
    rotated, centred = fit(features, num_components=12), fit(features)
    assert rotated.projection.components_Dd is not None
    for one, other in zip(rotated.starts, centred.starts, strict=True):
        assert np.mean(one.labels_N == other.labels_N) > 0.999
        assert one.inertia == pytest.approx(other.inertia, rel=1e-4)


def test_spherical_rows_have_unit_length_and_the_mean_stays_zero() -> None:
    features = blobs(300).astype(np.float32)
    projection = _projection(features, spherical=True)
    rows = projection(np.vstack([features, projection.mean_D]))
    np.testing.assert_allclose(np.linalg.norm(rows[:-1], axis=1), 1.0, rtol=1e-6)
    assert not rows[-1].any()


def test_an_empty_cluster_starts_again_from_the_farthest_row() -> None:
    features = np.zeros((600, 2), np.float32)
    features[:, 0] = np.linspace(0, 1, 600)
    features[17] = [3, 4]
    features[500] = [-2, 6]
    starts = np.array([[0.2, 0], [0.8, 0], [90, 90], [95, 95]], np.float32)
    for num_shards in (1, 3):
        shards = InProcess(features, num_shards)
        run = module.KMeansRun(shards, KMeansConfig(), _projection(features), 0.0, 600, 4, 0, None, None)
        mean = run.projection.mean_D.astype(np.float32)
        state = run.iterate(module.Start(starts - mean, np.zeros(4, np.int64)))
        assert not state.is_converged
        np.testing.assert_allclose(state.centroids_Kd[2:] + mean, [[-2, 6], [3, 4]], atol=1e-5)


def test_more_clusters_than_different_images_still_end() -> None:
    features = np.repeat(np.eye(4, dtype=np.float32), 100, axis=0)
    fitted = fit(features, num_clusters=6, num_starts=1)
    assert fitted.starts[0].inertia == pytest.approx(0.0, abs=1e-5)
    assert len(np.unique(fitted.starts[0].labels_N)) == 4


def test_a_mini_batch_moves_centroids_as_scikit_learn_does() -> None:
    features = blobs(512).astype(np.float32)
    projection = _projection(features)
    rows = projection(features)
    starts = rows[:5].astype(np.float64)
    order = np.random.default_rng(4).permutation(512)
    reference = MiniBatchKMeans(5, init=rows[:5], n_init=1, batch_size=100, reassignment_ratio=0.0)
    for start in range(0, 512, 100):
        reference.partial_fit(rows[np.sort(order[start : start + 100])])
    centroids, counts = KMeansShard(lambda: features).mini_batch_epoch(
        projection, starts, np.zeros(5, np.int64), seed=4, batch_size=100
    )
    np.testing.assert_allclose(centroids, reference.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert counts.sum() == 512


def test_mini_batches_come_close_to_lloyd_and_follow_the_seed() -> None:
    features = blobs(noise=2.0)
    settings: dict[str, Any] = {"algorithm": "mini_batch", "num_epochs": 5, "batch_size": 200, "num_starts": 3}
    fitted, again, exact = fit(features, **settings), fit(features, **settings), fit(features)
    inertias = [start.inertia for start in fitted.starts]
    assert inertias == [start.inertia for start in again.starts]
    assert len(set(inertias)) > 1
    assert min(inertias) < 1.05 * exact.starts[exact.best].inertia
    random = np.random.default_rng(0).integers(0, 6, len(features))
    rows = fitted.projection(features)
    scattered = sum(np.square(rows[random == each] - rows[random == each].mean(axis=0)).sum() for each in range(6))
    assert max(inertias) < 0.75 * scattered


def test_the_gpu_engine_gives_the_labels_and_the_sums_of_the_cpu() -> None:
    rows = _projection(blobs())(blobs())
    centroids = rows[::100]
    labels, sums = TorchAssigner("cpu").assign([(0, rows[:700]), (700, rows[700:])], centroids)
    expected = Sums.zeros(*centroids.shape)
    expected.add(rows, nearest(rows, centroids))
    assert np.array_equal(np.concatenate(labels), nearest(rows, centroids))
    assert sums.rows_Kd.tobytes() == expected.rows_Kd.tobytes()
    assert np.array_equal(sums.counts_K, expected.counts_K)


class EndAfter(Progress):
    """Ends the run after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__("method", quiet=True)
        self.steps = steps
        self.said: list[int] = []

    def update(self, done: int, total: int, note: str = "", num_errors: int = 0) -> None:
        self.said += [done] * (done > 0)
        if len(self.said) > self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", ["lloyd", "mini_batch"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = blobs(noise=2.5)
    settings: dict[str, Any] = {"algorithm": algorithm, "num_epochs": 6, "num_iterations": 12, "tolerance": 0.0}
    expected = fit(features, **settings)
    monkeypatch.setattr(module, "CHECKPOINT_INTERVAL_S", 0.0)
    records = PartRecords(Folder.at(tmp_path), "source")
    steps = 15 if algorithm == "lloyd" else 3
    with pytest.raises(KeyboardInterrupt):
        fit(features, records=records, progress=EndAfter(steps), **settings)
    kept = {f.name for name, r in records.read_all().items() if name.startswith("start-") for f in r.files}
    assert {name for name in records.folder.names() if name.startswith("start-")} == kept
    resumed = EndAfter(1000)
    fitted = fit(features, num_shards=3, records=records, progress=resumed, **settings)
    total = expected.starts[0].step + expected.starts[1].step if algorithm == "lloyd" else 6
    assert 0 < len(resumed.said) <= total - steps + 1
    for one, other in zip(expected.starts, fitted.starts, strict=True):
        assert np.array_equal(one.labels_N, other.labels_N)
        assert one.centroids_Kd.tobytes() == other.centroids_Kd.tobytes()
        assert (one.inertia, one.inertias, one.step) == (other.inertia, other.inertias, other.step)


def test_a_full_disk_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        ResourceError, match=r"1,500 images x 12 dimensions need 0\.0 GB in .*: No space left.*ICCE_CACHE"
    ):
        fit(blobs(), on_disk=True)


def test_features_that_are_not_finite_and_too_many_components_are_refused() -> None:
    features = blobs()
    with pytest.raises(InputError, match=r"num_components is 40, but the features have 12 dimensions"):
        fit(features, num_components=40)
    features[77, 3] = np.inf
    with pytest.raises(InputError, match="the feature of row 77 is not finite"):
        fit(features)


def test_the_auto_batch_is_the_papers() -> None:
    assert KMeansConfig().images_per_batch(1000) == 2048
    assert KMeansConfig().images_per_batch(2049) == 4096
    assert KMeansConfig(batch_size=100).images_per_batch(1000) == 100


def test_rows_of_a_memory_map_are_read_without_mapping_them(tmp_path: Path) -> None:
    features = blobs()
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    for start, stop in ((0, 1500), (7, 300), (1400, 2000)):
        rows = read_rows(mapped, start, stop)
        assert np.array_equal(rows, features[start:stop])
        assert not np.shares_memory(rows, mapped)
    expected, found = fit(features), fit(mapped, 2)
    assert np.array_equal(found.starts[1].labels_N, expected.starts[1].labels_N)


def test_blocks_are_the_same_for_any_number_of_shards() -> None:
    features = np.zeros((70_000, 64), np.float16)
    projection = _projection(features)
    found = []
    for num_shards in (1, 5):
        shards = [KMeansShard(lambda: features, each, num_shards) for each in range(num_shards)]
        found.append([block for shard in shards for block in shard._blocks(projection)])
    assert found[0] == found[1]
    assert [start for start, _ in found[0][1:]] == [stop for _, stop in found[0][:-1]]
    assert kmeans_shard.MIN_BLOCK_ROWS <= found[0][0][1] <= kmeans_shard.BLOCK_ELEMENTS // 64
