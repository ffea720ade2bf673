"""`num_clusters: auto`: the choice, what it is made of, and that the run is that of the number chosen; and the same
measurements by tasks of a real Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from icce_ray import ICCE, cut_hierarchy, run_pipeline
from icce_ray.cli import main
from icce_ray.config import Config, build_config
from icce_ray.count import job
from icce_ray.errors import InputError
from icce_ray.pipeline.plan import is_complete, plan, stages_of
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder
from tests.integration.stages import artifact, run_until, without_ray

pytestmark = pytest.mark.slow

NUM_IMAGES, NUM_CLUSTERS = 240, 4
SECTIONS: dict[str, Any] = {
    "cluster_count": {"max_clusters": 9, "num_seeds": 2},
    "neighbors": {"min_neighbors": 10},
    "heads": {"num_heads": 3, "num_epochs": 8, "hidden_dim": 32, "bottleneck_dim": 16, "learning_rate": 4e-3},
    "consensus": {"methods": ["vote"]},
    "classifier": {"num_iterations": 60, "learning_rates": [0.01, 0.1]},
}


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(NUM_CLUSTERS, 12)) * 1.5
    labels = np.arange(NUM_IMAGES) % NUM_CLUSTERS
    return (centres[labels] + generator.normal(size=(NUM_IMAGES, 12))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, features: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    np.save(folder / "x.npy", features)
    return folder


def config_for(folder: Path, **changes: Any) -> Config:
    base = {"embeddings": {"uri": str(folder / "x.npy")}, "output": str(folder / "out"), "num_clusters": "auto"}
    return build_config(base | SECTIONS | changes, "test")


def test_a_run_chooses_and_is_then_the_run_of_that_number(
    folder: Path, features: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(folder)
    assert not is_complete(plan(config))
    result = run_pipeline(config)
    said = capsys.readouterr().err
    assert result.num_clusters == NUM_CLUSTERS
    assert result.num_clusters_range is not None
    low, high = result.num_clusters_range
    assert low <= NUM_CLUSTERS <= high
    assert f"{NUM_CLUSTERS} clusters were chosen, tried 2 to 9" in said
    assert json.loads(json.dumps(result.to_json()))["num_clusters_range"] == [low, high]
    page = Path(result.report).read_text()
    assert artifact(config, "cluster_count").metrics["choice"] in page
    assert f"chosen: {NUM_CLUSTERS}" in page

    again = run_pipeline(config, quiet=True)
    assert (
        set(again.finished_before)
        == {step.name for step in plan(config)}
        == {stage.name for stage in stages_of(config)}
    )
    assert (again.run, again.num_clusters_range) == (result.run, (low, high))
    explicit = run_pipeline(config_for(folder, num_clusters=NUM_CLUSTERS), quiet=True)
    assert set(explicit.finished_before) == {stage.name for stage in stages_of(config)} - {"cluster_count", "report"}
    assert explicit.assignments == result.assignments
    assert f"chosen: {NUM_CLUSTERS}" not in Path(explicit.report).read_text()

    record = json.loads((folder / "out" / "runs" / f"{result.run}.json").read_text())
    assert (record["config"]["num_clusters"], record["result"]["num_clusters"]) == ("auto", NUM_CLUSTERS)
    assert "cluster_count" in record["stages"]
    (folder / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    assert main(["status", str(folder / "run.yaml")]) == 0
    assert f"run {result.run} in" in capsys.readouterr().out

    # The estimator: the same table, the same choice, the same labels.
    sections = {name: dict(settings) for name, settings in SECTIONS.items()}
    heads = sections.pop("heads")
    sizes = {"n_heads": heads.pop("num_heads"), "epochs": heads.pop("num_epochs")}
    estimator = ICCE("auto", random_state=0, heads=heads, **sizes, **sections).fit(features)
    assert estimator.n_clusters_ == NUM_CLUSTERS
    assert (estimator.cluster_count_.low, estimator.cluster_count_.high) == (low, high)
    counted = artifact(config, "cluster_count")
    there, here = counted.read_table("by_seed.parquet").to_pandas(), estimator.cluster_count_.by_seed().to_pandas()
    np.testing.assert_allclose(there, here, atol=1e-5)
    clusters = pq.read_table(result.assignments).sort_by("image_id")["cluster"].to_numpy()
    np.testing.assert_array_equal(clusters, estimator.labels_)

    # The run's clusters, merged.
    groups = cut_hierarchy(result, 2)
    np.testing.assert_array_equal(groups, estimator.hierarchy_.cut(2))
    record_place = folder / "out" / "runs" / f"{result.run}.json"
    assert main(["cut", str(record_place), "--clusters", "2", "--output", str(folder / "cut.parquet")]) == 0
    table = pq.read_table(folder / "cut.parquet")
    assert table.column_names == ["image_id", "uri", "cluster", "group"]
    np.testing.assert_array_equal(table["group"].to_numpy(), groups[table["cluster"].to_numpy()])
    assert len(table) == NUM_IMAGES
    for number in ("0", "5"):
        assert main(["cut", str(folder / "run.yaml"), "--clusters", number, "--output", str(folder / "no")]) == 2
        assert f"{number} groups asked for; the hierarchy has 4 clusters" in capsys.readouterr().err


class Recorded(Progress):
    def __init__(self, killed_at: int | None = None) -> None:
        super().__init__("test", quiet=True)
        self.seen: list[tuple[int, int]] = []
        self.killed_at = killed_at

    def update(self, done: int, total: int, note: str = "") -> None:
        self.seen.append((done, total))
        if done == self.killed_at:
            raise KeyboardInterrupt


def test_what_a_killed_run_had_clustered_is_not_done_again(
    ray_cluster: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(folder, cluster_count=SECTIONS["cluster_count"] | {"max_clusters": 5})
    with without_ray():
        inputs = run_until("sample", config)

    def count(name: str, progress: Progress) -> dict[str, Any]:
        return job.run(config, StageContext(ArtifactWriter(Folder.at(tmp_path / name)), inputs, progress))

    with without_ray(), pytest.raises(KeyboardInterrupt):
        count("count", Recorded(killed_at=1))
    assert [path.name for path in (tmp_path / "count" / "records").iterdir()] == ["0.json"]

    made: list[Any] = []
    run_tasks = job.run_tasks

    def watched(stage: str, function: Any, items: Any, *rest: Any, **settings: Any) -> Any:
        made.extend(items)
        return run_tasks(stage, function, items, *rest, **settings)

    monkeypatch.setattr(job, "run_tasks", watched)
    progress = Recorded()
    metrics = count("count", progress)
    assert made == [1]
    assert progress.seen[-1] == (2, 2)
    assert sorted(path.name for path in (tmp_path / "count").iterdir() if path.is_file()) == [
        "by_count.parquet",
        "by_seed.parquet",
    ]
    table = pq.read_table(tmp_path / "count" / "by_count.parquet")
    assert table["num_clusters"].to_pylist() == [2, 3, 4, 5]
    assert table.filter(table["chosen"])["num_clusters"].to_pylist() == [metrics["num_clusters"]]

    with without_ray():
        assert count("here", Recorded()) == metrics
    assert pq.read_table(tmp_path / "here" / "by_count.parquet").equals(table)


def test_more_clusters_than_images_are_refused_when_the_images_are_listed(folder: Path) -> None:
    asked = SECTIONS["cluster_count"] | {"max_clusters": 241}
    config = config_for(folder, cluster_count=asked, output=str(folder / "other"))
    with pytest.raises(InputError, match=r"max_clusters: 241 clusters asked for, but there are only 240 images"):
        run_pipeline(config, quiet=True)
