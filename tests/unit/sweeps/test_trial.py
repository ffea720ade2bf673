"""Trials without Ray: toy stages, planted labels."""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config, build_config
from icce_ray.metrics.label_free_scores import label_free_scores, project_pca, project_umap
from icce_ray.metrics.true_label_scores import normalized_mutual_info
from icce_ray.pipeline.plan import plan
from icce_ray.stage import Stage, StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.sweeps import silhouette_spaces, trial
from icce_ray.sweeps.trial import Listings, RunOutcome


def config_for(tmp_path: Path, **settings: Any) -> Config:
    data = {"embeddings": {"uri": str(tmp_path / "x.npy")}, "num_clusters": 2, "output": str(tmp_path / "out")}
    return build_config(data | settings, "test")


def commit(folder: Path, **parts: Any) -> Artifact:
    writer = ArtifactWriter(Folder.at(folder))
    for name, value in parts.items():
        if isinstance(value, pa.Table):
            writer.write_table(f"{name}.parquet", value)
        else:
            writer.write_array(f"{name}.npy", value)
    return writer.commit(stage="toy", fingerprint="f", inputs={}, config={}, metrics={}, seconds=1.0)


def test_trials_that_need_the_same_stage_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    waiting, two_wait = set[int](), threading.Event()

    def run(config: Config, context: StageContext) -> dict[str, Any]:
        made.append(config.seed)
        assert config.seed == 1 or two_wait.wait(60)
        context.output.write_json("part.json", 1)
        return {"value": 7}

    def wait(seconds: float) -> None:
        waiting.add(threading.get_ident())
        if len(waiting) == 2:
            two_wait.set()
        time.sleep(0.01)

    module = types.ModuleType("toy_slow")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_slow", module)
    monkeypatch.setattr(trial, "time", types.SimpleNamespace(sleep=wait))
    stages = (Stage("toy", "toy_slow", 1, (), lambda config: {"seed": config.seed}),)
    found: list[dict[str, Artifact]] = []

    def one_trial(seed: int) -> None:
        found.append(trial.make(config_for(tmp_path, seed=seed), stages))

    threads = [threading.Thread(target=one_trial, args=(seed,)) for seed in (0, 0, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 1]
    assert [artifacts["toy"].metrics for artifacts in found] == [{"value": 7}] * 4


def test_a_run_is_finished_once_all_its_stages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_quick")
    module.run = lambda config, context: {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_quick", module)
    stages = tuple(Stage(name, "toy_quick", 1, (), lambda config: {"seed": config.seed}) for name in ("toy", "last"))
    monkeypatch.setattr(trial, "trial_stages", lambda config, listings: stages)
    config, seen = config_for(tmp_path, seed=0), list[bool]()
    for num_made in (0, 1, 2):
        if num_made:
            trial.make(config, stages[:num_made])
        seen.append(trial.is_finished(config, Listings()))
    assert seen == [False, False, True]
    assert not trial.is_finished(config_for(tmp_path, seed=1), Listings())


def test_images_are_listed_once_for_each_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), dtype=np.float32))
    listings = Listings()
    first = listings(config_for(tmp_path))
    (tmp_path / "x.npy").unlink()
    assert listings(config_for(tmp_path, num_clusters=3)) == first
    assert trial.full_stages(config_for(tmp_path), listings)[0].settings(config_for(tmp_path)) == first
    with pytest.raises(ValueError, match=r"y\.npy"):
        listings(config_for(tmp_path, embeddings={"uri": str(tmp_path / "y.npy")}))


def test_a_trials_stages_have_the_fingerprints_of_a_run(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), dtype=np.float32))
    config = config_for(tmp_path)
    whole = {step.name: step.fingerprint for step in plan(config)}
    found = {step.name: step.fingerprint for step in plan(config, trial.trial_stages(config, Listings()))}
    assert found.keys() - whole.keys() == {"silhouette_spaces", "trial_scores"}
    shared = ("images", "embed", "sample", "neighbors", "method", "consensus")
    assert {name: found.get(name) for name in shared} == {name: whole[name] for name in shared}


def outcome(folder: Path, seed: int, labels: Any, ids: Any = None, **metrics: float | None) -> RunOutcome:
    image_ids = np.arange(len(labels)) if ids is None else np.array(ids)
    consensus = commit(folder / f"labels-{seed}", labels=np.array(labels), image_ids=image_ids)
    return RunOutcome(seed, metrics, 2, 1.0, {"consensus": consensus})


def test_metrics_of_a_trial_are_means_over_its_seeds(tmp_path: Path) -> None:
    labels = [[0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 2, 2], [0, 0, 0, 1, 2, 2]]
    values = [(0.2, 0.5), (0.4, None), (0.6, 0.5)]
    runs = [
        outcome(tmp_path, seed, labels[seed], anmi=anmi, generalization=score)
        for seed, (anmi, score) in enumerate(values)
    ]
    metrics = trial.combine(runs)
    assert metrics["anmi"] == pytest.approx(0.4)
    assert metrics["anmi_std"] == pytest.approx(np.std([0.2, 0.4, 0.6]))
    assert metrics["generalization"] is None
    assert metrics["generalization_std"] is None
    other = normalized_mutual_info(np.array(labels[0]), np.array(labels[2]))
    assert metrics["stability"] == pytest.approx((1 + 2 * other) / 3)
    assert "stability" not in trial.combine(runs[:1])


def test_seeds_with_samples_of_their_own_are_compared_where_both_look(tmp_path: Path) -> None:
    one = outcome(tmp_path, 0, [0, 0, 1, 1, 5], ids=[1, 3, 4, 6, 7])
    other = outcome(tmp_path, 1, [9, 0, 0, 1, 1], ids=[0, 1, 3, 4, 6])
    assert trial.combine([one, other])["stability"] == pytest.approx(1.0)


def test_metrics_tell_good_clusters_from_bad_and_say_none_where_they_cannot() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 60)
    features = (np.eye(3)[labels] * 6 + generator.normal(size=(180, 3))).astype(np.float32)
    points = {"pca": project_pca(features, 0)}
    good = label_free_scores(features, points, labels, random_state=0)
    bad = label_free_scores(features, points, generator.permutation(labels), random_state=0)
    assert good.keys() == {"generalization", "silhouette_pca"}
    for name in good:
        assert good[name] is not None
        assert bad[name] is not None
        assert good[name] > bad[name] + 0.3  # type: ignore[operator]
    assert label_free_scores(features, points, np.zeros(180, dtype=int), random_state=0) == dict.fromkeys(good)


def test_the_same_sample_is_judged_in_every_trial() -> None:
    assert np.array_equal(silhouette_spaces.sample(100), np.arange(100))
    rows = silhouette_spaces.sample(silhouette_spaces.MAX_IMAGES + 500)
    assert len(rows) == silhouette_spaces.MAX_IMAGES
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, silhouette_spaces.sample(silhouette_spaces.MAX_IMAGES + 500))


def test_spaces_have_at_most_fifty_dimensions() -> None:
    features = np.random.default_rng(0).normal(size=(80, 60)).astype(np.float32)
    assert project_pca(features, 0).shape == (80, 50)
    assert project_pca(features[:20], 0).shape == (20, 20)
    if "umap" in silhouette_spaces.spaces():
        assert project_umap(features, 0).shape == (80, 50)
