"""Sweeps on a real Ray: what trials share is made once, failures stay their own, a killed sweep goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from icce_ray import ICCE
from icce_ray.config import build_config
from icce_ray.errors import ResourceError
from icce_ray.pipeline import run as pipeline
from icce_ray.store import Artifact, Folder
from icce_ray.sweeps.job import draw, make_searcher
from icce_ray.sweeps.sweep import run_sweep, state_folder
from icce_ray.sweeps.sweep_config import Sweep, build_sweep, load_sweep

NUM_IMAGES, NUM_CLUSTERS = 160, 4
HEADS = {"num_heads": 2, "num_epochs": 4, "hidden_dim": 16, "bottleneck_dim": 8, "batch_size": 32, "warmup_epochs": 1}


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
    return {"base": base | changes, "space": space, "metric": "anmi", "ensemble": None} | settings


def finished(output: Path, stage: str) -> list[Artifact]:
    found = [Artifact.find(Folder.at(folder)) for folder in sorted((output / stage).iterdir())]
    return [artifact for artifact in found if artifact is not None]


@pytest.mark.slow
def test_shared_stages_are_made_once_failures_stay_their_own_and_the_best_are_pooled(
    ray_cluster: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"consensus.refine": [True, False], "num_clusters": [4, 500]}
    asked = build_sweep(sweep_of(data, tmp_path / "out", space, ensemble={"top": 2}), "sweep.yaml")
    result = run_sweep(asked)
    said = capsys.readouterr().err
    out = tmp_path / "out"

    rows = pq.read_table(result.table).to_pylist()
    assert (result.num_trials, result.num_failed) == (4, 2)
    for row in rows:
        if row["num_clusters"] == 500:
            assert row["status"] == "failed"
            assert "500 clusters asked for, but there are only 160" in row["error"]
        else:
            assert (row["status"], row["error"]) == ("finished", None)
            assert 0 < row["anmi"] <= 1
            assert 0 < row["acc"] <= 1
    # Both finished trials differ in their consensus only: one training between them, one graph, one embedding.
    counts = {stage: len(finished(out, stage)) for stage in ("images", "embed", "neighbors", "projection", "method")}
    assert set(counts.values()) == {1}, counts
    assert len(finished(out, "proxies")) == 2
    assert said.count("neighbors: done") == 1

    assert result.ensemble is not None
    assert result.ensemble.metrics["acc"] > 0.5
    config = build_config(yaml.safe_load(Path(str(result.ensemble_config)).read_text()), "ensemble")
    assert len(config.consensus.extra_runs) == 1


def test_more_cpus_than_a_machine_has_are_refused(ray_cluster: None, data: Path, tmp_path: Path) -> None:
    asked = build_sweep(sweep_of(data, tmp_path / "out", {"num_clusters": [4]}, cpus_per_run=5), "s")
    with pytest.raises(ResourceError, match="cpus_per_run: 5 CPUs asked for, but the largest machine has 4"):
        run_sweep(asked, quiet=True)


@pytest.mark.slow
def test_a_trial_gives_what_the_estimator_gives_in_one_process_or_on_ray_train(
    ray_cluster: None, data: Path, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    result = run_sweep(build_sweep(sweep_of(data, small, {"heads.num_heads": [3]}), "s"), quiet=True)
    workers = {"resources": {"method": {"num_workers": 2, "cpus_per_worker": 1}}}
    asked = build_sweep(sweep_of(data, large, {"heads.num_heads": [3]}, base=workers), "s")
    assert run_sweep(asked, quiet=True).num_failed == 0

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
    (here,), (there,) = finished(small, "method"), finished(large, "method")
    assert (here.metrics["num_workers"], there.metrics["num_workers"]) == (1, 2)
    assert here.fingerprint == there.fingerprint
    np.testing.assert_array_equal(here.read_array("label_matrix.npy"), estimator.head_labels_)
    assert (there.read_array("label_matrix.npy") == estimator.head_labels_).mean() > 0.98
    (consensus,) = finished(small, "consensus")
    np.testing.assert_array_equal(consensus.read_array("labels.npy"), estimator.labels_)

    name = pq.read_table(result.table)["runs"].to_pylist()[0][0]
    assert json.loads((small / "runs" / f"{name}.json").read_text())["stages"]["method"] == here.fingerprint
    config = build_config(yaml.safe_load(Path(result.best_config).read_text()), "best")
    assert pipeline.run_name(pipeline.plan(config)) == name


def test_the_state_of_a_search_does_not_go_to_remote_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune writes down how it reaches its storage, credentials included."""
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))
    local = Folder.at(tmp_path / "out" / "sweep" / "abc")
    assert state_folder(local).local_path == tmp_path / "out" / "sweep" / "abc" / "tune"
    remote = Folder(pafs.SubTreeFileSystem("/bucket", pafs.LocalFileSystem()), "sweep/abc", "s3://bucket/sweep/abc")
    assert state_folder(remote).local_path == tmp_path / "cache" / "sweep" / "abc" / "tune"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_by_the_same_command_and_leaves_what_was_finished(
    ray_cluster: None, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    space = {"heads.learning_rate": [1e-3, 3e-3]}
    address = ray.get_runtime_context().gcs_address
    base = {"heads": HEADS | {"num_epochs": 30}, "resources": {"ray_address": address}}
    swept = sweep_of(data, out, space, base=base, seeds=[0, 1], max_concurrent=1)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(swept))
    command = [sys.executable, "-m", "icce_ray.cli", "sweep", str(tmp_path / "sweep.yaml"), "--json"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(out.glob("proxies/*/manifest.json"))) < 2:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/manifest.json")}
    assert 2 <= len([path for path in before if path.parts[-3] == "proxies"]) < 4

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["num_trials"], result["num_failed"]) == (2, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {stage: len(finished(out, stage)) for stage in ("method", "proxies")} == {"method": 4, "proxies": 4}
    rows = pq.read_table(result["table"]).to_pylist()
    assert all(row["status"] == "finished" and 0 <= row["stability"] <= 1 for row in rows)

    assert run_sweep(load_sweep(tmp_path / "sweep.yaml"), quiet=True).to_json() == result
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
        make_searcher("hebo", 0)
