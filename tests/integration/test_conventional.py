"""Scikit-learn's clusterers as the method of a run: noise, and numbers of clusters that the method finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray import run_pipeline
from icce_ray.cli import main
from icce_ray.config import Config, build_config
from icce_ray.methods.conventional import scikit_clusterers
from icce_ray.pipeline.plan import finished_artifacts, is_complete, plan, plan_other_methods
from icce_ray.pipeline.result import Result
from icce_ray.store.run_records import read_records
from icce_ray.sweeps import trial

pytestmark = pytest.mark.slow

TRUE = np.arange(240) % 4
NOISE = np.arange(0, 240, 16)
"""Images far from all others."""
SETTINGS: dict[str, Any] = {
    "conventional": {"normalize": False, "representation": "raw"},
    "classifier": {"num_iterations": 60, "learning_rates": [0.01, 0.1]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conventional")
    generator = np.random.default_rng(0)
    features = (10 * np.eye(8)[TRUE] + generator.normal(size=(240, 8))).astype(np.float32)
    features[NOISE] = generator.normal(size=(len(NOISE), 8)) * 100
    np.save(folder / "x.npy", features)
    np.save(folder / "y.npy", TRUE)
    return folder


def config_for(folder: Path, method: Any = "hdbscan", **changes: Any) -> Config:
    base = {
        "embeddings": {"uri": str(folder / "x.npy")},
        "evaluate": {"labels": str(folder / "y.npy")},
        "output": str(folder / "out"),
        "method": method,
        "num_clusters": "auto",
    }
    return build_config(base | SETTINGS | changes, "test")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Config, Result, str]:
    """A run of HDBSCAN, and what it said."""
    config = config_for(folder)
    assert [step.name for step in plan(config)][-1] == "method"
    assert not is_complete(plan(config))
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("sys.stderr.write", said.append)
        result = run_pipeline(config)
    return config, result, "".join(said)


def table_of(result: Result) -> pa.Table:
    return pq.read_table(result.assignments).sort_by("image_id")


def test_the_number_that_the_method_finds_is_the_runs(finished: tuple[Config, Result, str]) -> None:
    config, result, said = finished
    assert (result.num_clusters, result.num_clusters_range) == (4, None)
    assert "4 clusters" in said
    stages = [step.name for step in plan(config)]
    assert stages == list(result.seconds)
    assert not {"cluster_count", "neighbors"} & set(stages)
    assert is_complete(plan(config))
    (record,) = read_records(config.output)
    assert (record["run"], Config.model_validate(record["config"]).is_auto) == (result.run, True)
    again = run_pipeline(config, quiet=True)
    assert (again.run, set(again.finished_before)) == (result.run, set(stages))


def test_noise_stays_without_a_cluster_and_is_counted(finished: tuple[Config, Result, str], tmp_path: Path) -> None:
    config, result, said = finished
    table = table_of(result)
    cluster, probability = table["cluster"].to_numpy(), table["consensus_probability"].to_numpy()
    is_noise = np.isin(np.arange(240), NOISE)
    np.testing.assert_array_equal(cluster < 0, is_noise)
    assert (probability[is_noise] == 0).all()
    assert (probability[~is_noise] > 0.25).all()
    assert np.isin(table["second_choice"].to_numpy()[is_noise], range(4)).all()
    assert table["agreement"].to_pylist() == [None if noise else 1.0 for noise in is_noise]
    artifacts = finished_artifacts(plan(config))
    for sizes in (artifacts["classifier"].read_json("classifier.json"), artifacts["assign"].metrics):
        assert sum(sizes["cluster_sizes"]) == 225, "the classifier learns without the noise"
    exemplars = pq.read_table(artifacts["assign"].folder.path + "/exemplars.parquet")
    assert not set(exemplars["image_id"].to_pylist()) & set(NOISE.tolist())
    assert (result.num_noise, result.metrics["num_noise"]) == (15, 15)
    assert result.metrics["acc"] == pytest.approx(225 / 240)
    assert result.metrics["acc_without_noise"] == 1.0
    assert "15 of 240 images are noise" in said
    assert "15 images without a cluster" in said
    assert '"noise":15' in Path(result.report).read_text()
    assert (
        main(
            [
                "cut",
                f"{config.output}/runs/{result.run}.json",
                "--clusters",
                "2",
                "--output",
                str(tmp_path / "g.parquet"),
            ]
        )
        == 0
    )
    groups = pq.read_table(tmp_path / "g.parquet")["group"].to_numpy()
    np.testing.assert_array_equal(groups < 0, is_noise)


def test_above_the_limit_a_sample_is_clustered_and_the_classifier_labels_the_rest(folder: Path) -> None:
    asked = {"max_images": 160, "duplicate_threshold": None}
    config = config_for(folder, "agglomerative", num_clusters=6, sample=asked)
    result = run_pipeline(config, quiet=True)
    artifacts = finished_artifacts(plan(config))
    assert artifacts["method"].read_array("label_matrix.npy").shape == (1, 160)
    assert artifacts["assign"].metrics["num_in_consensus"] == 160
    assert len(table_of(result)) == 240
    assert config_for(folder, "agglomerative", num_clusters=6).sample.max_images == 20_000


def test_agglomerative_finds_the_number_by_its_threshold(folder: Path) -> None:
    settings = SETTINGS["conventional"] | {"distance_threshold": 60.0}
    config = config_for(folder, "agglomerative", conventional=settings)
    result = run_pipeline(config, quiet=True)
    found = table_of(result)["cluster"].to_numpy()
    assert result.num_clusters == len(np.unique(found)) > 4
    with pytest.raises(Exception, match=r"num_clusters is 4.*distance_threshold: 60"):
        config_for(folder, "agglomerative", num_clusters=4, conventional=settings)
    with pytest.raises(Exception, match=r"num_clusters is 4, but method: hdbscan finds the number itself"):
        config_for(folder, num_clusters=4)


def test_a_trial_of_a_sweep_scores_the_clusters_that_were_found(folder: Path) -> None:
    config = config_for(folder, "affinity_propagation", conventional=SETTINGS["conventional"] | {"preference": -3e3})
    listings = trial.Listings()
    artifacts = trial.make(config, trial.trial_stages(config, listings))
    outcome = trial.run(config, listings)
    assert outcome.num_clusters_used == artifacts["method"].metrics["num_clusters"] > 4
    assert outcome.metrics["silhouette_pca"] > 0.5


def test_combined_with_others_a_method_still_finds_its_own_number_and_noise_is_what_none_labels(folder: Path) -> None:
    config = config_for(folder, method=["hdbscan", "agglomerative"], num_clusters=6)
    result = run_pipeline(config, quiet=True)
    assert (result.num_clusters, result.num_noise) == (6, 0)
    others = plan_other_methods(config, plan(config))
    rows = [finished_artifacts(steps)["method"] for steps in (plan(config), *(steps for _, steps in others))]
    assert [row.metrics["num_clusters"] for row in rows] == [4, 6]


def test_memory_that_is_missing_is_said_before_the_clustering(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text(
        json.dumps(config_for(folder, "spectral", num_clusters=4).model_dump(exclude_unset=True))
    )
    monkeypatch.setattr(scikit_clusterers, "available_memory_bytes", lambda: 1000)
    assert main(["run", str(folder / "run.yaml"), "--set", "seed=7"]) == 2
    assert "method spectral: 240 images" in capsys.readouterr().err
