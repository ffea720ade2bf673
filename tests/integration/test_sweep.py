"""Sweeps on a real Ray: what trials share is made once, failures stay their own, a killed sweep goes on."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from icce_ray import ICCE, KMeans, cli
from icce_ray.config import build_config
from icce_ray.errors import ResourceError
from icce_ray.metrics.true_label_scores import normalized_mutual_info
from icce_ray.pipeline import run as pipeline
from icce_ray.runtime import ray_cluster as connection
from icce_ray.store import Artifact, Folder
from icce_ray.sweeps.job import draw, make_searcher
from icce_ray.sweeps.sweep import SweepResult, run_sweep
from icce_ray.sweeps.sweep_config import Sweep, build_sweep, load_sweep

NUM_IMAGES, NUM_CLUSTERS = 160, 4
SHARED = ("images", "embed", "sample", "neighbors", "silhouette_spaces")
HEADS = {"num_heads": 2, "num_epochs": 4, "hidden_dim": 16, "bottleneck_dim": 8, "batch_size": 32, "warmup_epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def _as_if_sweeps_had_started_ray(ray_cluster: None) -> Iterator[None]:
    """Shared stages and the job of the ensemble, which are small, then run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_started_here", True)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    labels = np.arange(NUM_IMAGES) % NUM_CLUSTERS
    centres = generator.normal(size=(NUM_CLUSTERS, 12)) * 1.2
    np.save(folder / "x.npy", (centres[labels] + generator.normal(size=(NUM_IMAGES, 12))).astype(np.float32))
    np.save(folder / "y.npy", labels)
    return folder


def sweep_of(data: Path, output: Path, space: dict[str, Any], **settings: Any) -> dict[str, Any]:
    base = {
        "embeddings": {"uri": str(data / "x.npy")},
        "num_clusters": NUM_CLUSTERS,
        "output": str(output),
        "evaluate": {"labels": str(data / "y.npy")},
        "neighbors": {"min_neighbors": 8},
        "heads": HEADS,
        "consensus": {"methods": ["vote"]},
        "classifier": {"num_iterations": 50, "learning_rates": [0.01, 0.1]},
    }
    changes = settings.pop("base", {})
    # Two trials at a time, on four CPUs: more would start more processes.
    return {"base": base | changes, "space": space, "metric": "anmi", "ensemble": None, "cpus_per_run": 2} | settings


def finished(output: Path, stage: str) -> list[Artifact]:
    found = [Artifact.find(Folder.at(folder)) for folder in sorted((output / stage).iterdir())]
    return [artifact for artifact in found if artifact is not None]


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, str, Path]:
    """A sweep with trials that finish, that fail by themselves, and that fail before they start; what it printed; and
    its output."""
    out = tmp_path_factory.mktemp("first") / "out"
    space = {"consensus.refine": [True, False], "heads.learning_rate": [3e-3, 1e30], "num_clusters": [4, 500]}
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        result = run_sweep(build_sweep(sweep_of(data, out, space, ensemble={"top": 2}), "sweep.yaml"))
    return result, printed.getvalue(), out


def with_shared_stages(first: tuple[SweepResult, str, Path], output: Path) -> Path:
    """An output where the stages that trials share are finished."""
    for stage in SHARED:
        shutil.copytree(first[2] / stage, output / stage)
    return output


@pytest.mark.slow
def test_shared_stages_are_made_once_failures_stay_their_own_and_the_best_are_pooled(
    first: tuple[SweepResult, str, Path],
) -> None:
    result, printed, out = first
    rows = pq.read_table(result.table).to_pylist()
    assert (result.num_trials, result.num_failed) == (8, 6)
    for row in rows:
        if row["num_clusters"] == 500:
            assert "500 clusters asked for, but only 160 images" in row["error"]
        elif row["heads.learning_rate"] == 1e30:
            assert "is not finite" in row["error"]
        else:
            assert (row["status"], row["error"]) == ("finished", None)
            assert row["acc"] > 0.5
    finished_rows = [row for row in rows if row["status"] == "finished"]
    assert len(finished_rows) == 2
    assert result.best_value == max(row["anmi"] for row in finished_rows)
    # The finished trials differ in their consensus only: one training between them, one graph, one embedding.
    once = (*SHARED, "method")
    assert {stage: len(finished(out, stage)) for stage in once} == dict.fromkeys(once, 1)
    assert len(finished(out, "trial_scores")) == 2
    assert printed.count("neighbors: done") == 1

    assert result.ensemble is not None
    assert result.ensemble.metrics["acc"] > 0.5
    config = build_config(yaml.safe_load(Path(str(result.ensemble_config)).read_text()), "ensemble")
    assert len(config.consensus.extra_runs) == 1


def test_more_cpus_than_a_machine_has_are_refused(data: Path, tmp_path: Path) -> None:
    asked = build_sweep(sweep_of(data, tmp_path / "out", {"num_clusters": [4]}, cpus_per_run=5), "s")
    with pytest.raises(ResourceError, match="cpus_per_run: 5 CPUs asked for, but the largest machine has 4"):
        run_sweep(asked, quiet=True)


@pytest.mark.slow
def test_a_trial_has_the_labels_of_the_estimator(first: tuple[SweepResult, str, Path], data: Path) -> None:
    result, _, out = first
    settings = yaml.safe_load(Path(result.best_config).read_text())
    heads = settings["heads"]
    estimator = ICCE(
        NUM_CLUSTERS,
        n_heads=heads.pop("num_heads"),
        epochs=heads.pop("num_epochs"),
        heads=heads,
        neighbors=settings["neighbors"],
        consensus=settings["consensus"],
        classifier=settings["classifier"],
        random_state=settings.get("seed", 0),
    ).fit(np.load(data / "x.npy"))
    name = next(row["runs"][0] for row in pq.read_table(result.table).to_pylist() if row["is_best"])
    stages = json.loads((out / "runs" / f"{name}.json").read_text())["stages"]
    method, consensus = (Artifact.find(Folder.at(out / stage / stages[stage])) for stage in ("method", "consensus"))
    assert method is not None
    assert consensus is not None
    np.testing.assert_array_equal(method.read_array("label_matrix.npy"), estimator.label_matrix_)
    np.testing.assert_array_equal(consensus.read_array("labels.npy"), estimator.labels_)
    config = build_config(yaml.safe_load(Path(result.best_config).read_text()), "best")
    assert pipeline.run_name(pipeline.plan(config)) == name


def shards_so_far() -> set[str]:
    """The actors that hold a shard of the features for k-means, dead or alive."""
    from ray._private import state

    return {name for name, actor in state.actors().items() if actor["ActorClassName"] == "KMeansShard"}


@pytest.mark.slow
def test_a_trial_on_workers_has_the_labels_of_one_process(
    first: tuple[SweepResult, str, Path], data: Path, tmp_path: Path
) -> None:
    base = {"method": "kmeans", "kmeans": {"num_starts": 2}}
    on_workers = base | {"resources": {"method": {"num_workers": 2, "cpus_per_worker": 1}}}
    output = with_shared_stages(first, tmp_path / "out")
    swept = sweep_of(data, output, {"num_clusters": [NUM_CLUSTERS]}, base=on_workers)
    before = shards_so_far()
    assert run_sweep(build_sweep(swept, "s"), quiet=True).num_failed == 0
    assert len(shards_so_far() - before) == 2
    (method,) = finished(output, "method")
    found = KMeans(NUM_CLUSTERS, n_init=2, random_state=0).fit(np.load(data / "x.npy"))
    np.testing.assert_array_equal(method.read_array("label_matrix.npy"), found.label_matrix_)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_by_the_same_command_and_leaves_what_was_finished(
    first: tuple[SweepResult, str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = with_shared_stages(first, tmp_path / "out")
    address = ray.get_runtime_context().gcs_address
    base = {"heads": HEADS | {"num_epochs": 60}, "resources": {"ray_address": address}}
    # With all CPUs for a run, the seeds run one after the other.
    swept = sweep_of(data, out, {"heads.learning_rate": [3e-3]}, base=base, seeds=[0, 1], cpus_per_run=4)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(swept))
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "icce_ray", *command], start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list(out.glob("trial_scores/*/manifest.json")):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/manifest.json")}
    assert len([path for path in before if path.parts[-3] == "trial_scores"]) == 1

    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num_trials"], result["num_failed"]) == (1, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [len(finished(out, stage)) for stage in ("method", "trial_scores")] == [2, 2]
    labels = [artifact.read_array("labels.npy") for artifact in finished(out, "consensus")]
    assert pq.read_table(result["table"])["stability"].to_pylist() == [pytest.approx(normalized_mutual_info(*labels))]

    assert asdict(run_sweep(load_sweep(tmp_path / "sweep.yaml"), quiet=True)) == result
    assert {path: path.stat().st_mtime_ns for path in before} == before


def asked_of(space: dict[str, Any], **settings: Any) -> Sweep:
    base = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}
    return build_sweep({"base": base, "space": space} | settings, "sweep.yaml")


def test_grids_are_crossed_and_draws_are_within_their_range_and_repeat() -> None:
    grid = draw(asked_of({"heads.num_heads": [8, 16], "neighbors.similarity_threshold": ["auto", None]}))
    assert grid is not None
    assert {(trial["heads.num_heads"], trial["neighbors.similarity_threshold"]) for trial in grid} == {
        (8, "auto"), (8, None), (16, "auto"), (16, None),
    }  # fmt: skip
    assert len(grid) == 4
    space = {
        "num_clusters": {"randint": [3, 4]},
        "heads.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "heads.num_heads": [8, 16],
    }
    drawn = draw(asked_of(space, num_samples=20))
    assert drawn is not None
    assert len(drawn) == 40
    assert {trial["num_clusters"] for trial in drawn} == {3, 4}, "both ends are included"
    assert all(1e-4 <= trial["heads.learning_rate"] <= 1e-2 for trial in drawn)
    assert np.median([trial["heads.learning_rate"] for trial in drawn]) < 4e-3, "the logarithm is uniform"
    assert draw(asked_of(space, num_samples=20)) == drawn
    assert draw(asked_of(space, num_samples=20, seed=1)) != drawn
    assert json.loads(json.dumps(drawn)) == drawn, "plain values"
    assert len(draw(asked_of({"heads.num_heads": {"choice": [8, 16]}}, num_samples=50)) or []) == 2, "none twice"


def test_a_searcher_without_its_package_is_refused_with_what_to_install() -> None:
    with pytest.raises(ResourceError, match=r"searcher: hebo cannot be used: .*Install its package"):
        make_searcher("hebo", 0, [])


@pytest.mark.slow
def test_methods_are_compared_by_how_alike_their_clusters_are(data: Path, tmp_path: Path) -> None:
    methods = ["agglomerative", "gmm", "spectral", "hdbscan"]
    asked = sweep_of(data, tmp_path / "out", {"method": methods}, cpus_per_run=4)
    del asked["metric"]
    result = run_sweep(build_sweep(asked, "sweep.yaml"), quiet=True)
    rows = pq.read_table(result.table).to_pylist()
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["num_clusters_used"] for row in rows[:3]] == [4.0] * 3
    assert 2 <= rows[3]["num_clusters_used"] != 4, "HDBSCAN finds its own number"
    assert (result.metric, result.best_value) == ("peers", max(row["peers"] for row in rows))
    assert rows[result.best_trial]["is_best"]
    assert min(row["silhouette_pca"] for row in rows[:3]) > 0
