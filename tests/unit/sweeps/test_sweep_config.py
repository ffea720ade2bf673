from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from icce_ray.errors import ConfigError
from icce_ray.sweeps.sweep_config import Sweep, build_sweep, load_sweep

BASE: dict[str, Any] = {"embeddings": {"uri": "x.npy"}, "num_clusters": 5, "output": "out"}


def sweep_of(space: dict[str, Any], **settings: Any) -> Sweep:
    base = BASE | settings.pop("base", {})
    return build_sweep({"base": base, "space": space} | settings, "sweep.yaml")


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ({}, {}, "space is empty"),
        ({"heads.num_head": [1]}, {}, r"space: heads.num_head: unknown setting; did you mean num_heads"),
        ({"heads.num_heads": [8, -1]}, {}, r"space: heads.num_heads: -1 is not usable"),
        ({"heads.beta": {"uniform": [0.5, 1.5]}}, {}, "heads.beta: 1.5 is not usable"),
        ({"heads.num_heads": 8}, {}, "space.heads.num_heads: 8 is not a search space; give a list"),
        ({"heads.num_heads": {"normal": [1, 2]}}, {}, "is not a search space.*loguniform"),
        ({"heads.num_heads": []}, {}, "needs a list of at least one value"),
        ({"heads.num_heads": {"randint": [4, 4]}}, {}, "the first must be below the second"),
        ({"heads.num_heads": {"randint": [1.5, "a"]}}, {}, "needs two whole numbers"),
        ({"heads.learning_rate": {"loguniform": [0, 1]}}, {}, "must start above 0"),
        ({"output": ["a", "b"]}, {}, "space.output: a sweep cannot vary this: all trials share one output"),
        ({"resources.method.num_workers": [1, 2]}, {}, "cannot vary this: it changes no result"),
        ({"classifier.momentum": [0.5]}, {}, "no metric of a sweep depends on it"),
        ({"seed": [0, 1]}, {"seeds": [0, 1]}, "the seed is in the space and in seeds"),
        ({"seed": [0, 1]}, {"seeds": [2, 2]}, "name at least one, and each once"),
        ({"num_clusters": [3]}, {"metric": "stability"}, r"give at least two, such as seeds: \[0, 1\]"),
        ({"num_clusters": [3]}, {"asha": {}}, "asha: unknown setting"),
        ({"num_clusters": [3]}, {"metric": "acc"}, "metric: 'acc' is not usable"),
        ({"num_clusters": [3]}, {"num_sample": 3}, "num_sample: unknown setting; did you mean num_samples"),
        ({"num_clusters": [3]}, {"searcher": "optuna"}, r"takes no list; write \{choice"),
        ({"num_clusters": [3]}, {"ensemble": {"top": 5, "quantile": 0.8}}, "give either top or quantile"),
        (
            {"num_clusters": {"choice": [3]}},
            {"searcher": "optuna", "metric": "peers"},
            "a searcher needs another metric",
        ),
        ({"num_clusters": [3]}, {"searcher": "bohb"}, "searcher: 'bohb' is not usable"),
        ({"method": ["icce", "magic"]}, {}, "space: method: 'magic' is unknown"),
        ({"num_clusters": [3]}, {"base": {"preset": "other"}}, "sweep.yaml: base: preset"),
        (
            {"num_clusters": [3]},
            {"base": {"num_clusters": "auto"}},
            "base: num_clusters: a sweep cannot compare",
        ),
        ({"num_clusters": ["auto", 3]}, {}, "space: num_clusters: a sweep cannot compare 'auto'.*give a number"),
    ],
)
def test_a_mistake_is_said_before_anything_starts(space: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(space, **settings)


def test_a_number_that_the_method_finds_may_be_left_to_it() -> None:
    base = {"method": "hdbscan", "num_clusters": "auto"}
    assert sweep_of({"conventional.min_cluster_size": [5, 10]}, base=base).base_config.finds_num_clusters


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({}, "silhouette_pca"),
        ({"seeds": [4]}, "silhouette_pca"),
        ({"seeds": [4, 5]}, "stability"),
        ({"seeds": [4, 5], "metric": "anmi"}, "anmi"),
        ({"seeds": [4, 5], "base": {"method": "temi"}}, "stability"),
        ({"seeds": [4, 5], "base": {"method": "gmm"}}, "peers"),
        ({"base": {"method": "gmm"}, "seeds": [4, 5], "searcher": "optuna"}, "stability"),
        ({"seeds": [4, 5], "space": {"method": {"choice": ["icce", "gmm"]}}}, "peers"),
    ],
)
def test_trials_are_judged_by_what_ranks_best_where_it_can_be_told(settings: dict[str, Any], metric: str) -> None:
    space = settings.pop("space", {"num_clusters": {"choice": [3]}})
    assert sweep_of(space, **settings).config.metric == metric


def test_values_of_a_trial_go_over_the_base_and_each_seed_is_a_run() -> None:
    asked = sweep_of(
        {"heads.num_heads": [8, 16], "neighbors.similarity_threshold": ["auto", 0.4]},
        base={"heads": {"num_epochs": 7}, "seed": 9},
        seeds=[3, 4],
    )
    runs = asked.runs({"heads.num_heads": 16, "neighbors.similarity_threshold": 0.4})
    assert [run.seed for run in runs] == [3, 4]
    assert all((run.heads.num_heads, run.heads.num_epochs) == (16, 7) for run in runs)
    assert runs[0].neighbors.similarity_threshold == 0.4
    assert asked.base == BASE | {"heads": {"num_epochs": 7}, "seed": 9}, "the base is not written to"
    assert [run.seed for run in sweep_of({"num_clusters": [3]}, base={"seed": 9}).runs({})] == [9]


def test_values_that_fail_only_together_are_left_to_the_trial() -> None:
    asked = sweep_of({"neighbors.min_neighbors": [10, 80], "neighbors.max_neighbors": [50, 100]})
    with pytest.raises(ConfigError, match="max_neighbors is 50, below min_neighbors 80"):
        asked.runs({"neighbors.min_neighbors": 80, "neighbors.max_neighbors": 50})


def test_a_base_file_lies_beside_the_sweep_and_overrides_reach_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "sweep.yaml").write_text("base: run.yaml\nspace: {heads.learning_rate: {loguniform: [1e-4, 1e-2]}}\n")
    asked = load_sweep(tmp_path / "sweep.yaml", ["base.heads.num_heads=4", "num_samples=2"])
    assert asked.base_config.heads.num_heads == 4
    assert asked.config.num_samples == 2
    assert asked.dimensions[0].values == (1e-4, 1e-2)
    (tmp_path / "run.yaml").unlink()
    with pytest.raises(ConfigError, match=r"run\.yaml: there is no such config file"):
        load_sweep(tmp_path / "sweep.yaml")


def test_what_changes_no_trial_changes_no_identity() -> None:
    def identity(**settings: Any) -> Any:
        return sweep_of({"num_clusters": [3, 4]}, **settings).settings()

    same = identity(cpus_per_run=0.5, base={"resources": {"num_cpus": 2}})
    assert same == identity()
    others = [identity(base={"heads": {"num_heads": 3}}), identity(seeds=[1]), identity(metric="anmi")]
    assert all(other != identity() for other in others)
