"""How well each metric without labels ranks the trials of a sweep by their true ACC, and what pooling brings.

One sweep per feature set, over settings good and bad, each trial with every seed. The table shows Spearman's rank
correlation of each metric (mean over seeds) with the ACC of the trial's consensus (mean over seeds). Then, seed by
seed, the consensus of the heads of the best trials, chosen by the default metric, against the best trial's own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from cases import datasets
from icce_ray import cluster_ensemble, clustering_accuracy
from icce_ray.store import Artifact, Folder
from icce_ray.sweep import run_sweep
from icce_ray.sweeps.settings import SweepConfig, build_sweep

SETTINGS: dict[str, Any] = {
    "datasets": ["digits", "cifar10_mix"],
    "seeds": [0, 1, 2],
    "num_trials": 10,
    "num_pooled": 3,
    "num_heads": 6,
    "num_epochs": {"digits": 30, "cifar10_mix": 10},
    "space": {
        "neighbors.min_neighbors": {"choice": [5, 10, 20, 50, 100]},
        "neighbors.similarity_threshold": {"choice": ["auto", None]},
        "heads.learning_rate": {"loguniform": [1e-4, 3e-3]},
        "heads.student_temperature": {"loguniform": [0.05, 0.3]},
        "heads.max_ce_weight": {"choice": [0.0, 0.3, 1.0]},
        "heads.sinkhorn": {"choice": [True, False]},
    },
}
TOLERANCE = 0.05
"""In rank correlation: ten trials tell no finer."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    default = SweepConfig.model_fields["metric"].default
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    for name in settings["datasets"]:
        data = datasets.load(name)
        if data is None:
            print(f"{name}: left out: its files are not in {datasets.data_folder()}")
            continue
        with tempfile.TemporaryDirectory(prefix="icce_ray-sweep-") as folder:
            figures[name] = measure(name, *data, settings, default, Path(folder))
        pooled, single = (figures[name][key]["acc"] for key in ("pooled", "single"))
        bounds[f"{name}: mean ACC of the pooled heads at or above that of the best trial by {default}"] = (
            pooled >= single
        )
    if figures:
        metrics = list(next(iter(figures.values()))["spearman"])
        means = {metric: float(np.mean([each["spearman"][metric] for each in figures.values()])) for metric in metrics}
        print("mean over sets: " + ", ".join(f"{metric} {mean:+.2f}" for metric, mean in means.items()))
        bounds[f"the default metric, {default}, ranks trials within {TOLERANCE} of the best metric"] = (
            means[default] >= max(means.values()) - TOLERANCE
        )
        figures["mean_spearman"] = means
    return figures, bounds


def measure(
    name: str,
    features: datasets.Floats,
    labels: datasets.Labels,
    settings: dict[str, Any],
    default: str,
    folder: Path,
) -> dict[str, Any]:
    """Rank correlations, and percent: ACC of the best trial and of the pool, by seed and over the seeds."""
    np.save(folder / "features.npy", features)
    np.save(folder / "labels.npy", labels)
    epochs = settings["num_epochs"]
    base = {
        "embeddings": {"uri": str(folder / "features.npy")},
        "evaluate": {"labels": str(folder / "labels.npy")},
        "num_clusters": len(np.unique(labels)),
        "output": str(folder / "out"),
        "heads": {
            "num_heads": settings["num_heads"],
            "num_epochs": epochs[name] if isinstance(epochs, dict) else epochs,
        },
    }
    asked = {"base": base, "space": settings["space"], "num_samples": settings["num_trials"]}
    asked |= {"seeds": settings["seeds"], "metric": default, "ensemble": None}
    result = run_sweep(build_sweep(asked, name))
    table = pq.read_table(result.table)
    table = table.filter(np.array([status == "finished" for status in table["status"].to_pylist()]))
    candidates = ("anmi", "generalization", "silhouette_pca", "silhouette_umap", "stability")
    accuracy = table["acc"].to_numpy()
    spearman = {
        metric: float(spearmanr(table[metric].to_numpy(), accuracy).statistic)
        for metric in candidates
        if metric in table.column_names
    }
    print(
        f"{name}: {len(table)} trials, ACC {100 * accuracy.min():.1f} to {100 * accuracy.max():.1f}; rank correlation:"
    )
    for metric, value in spearman.items():
        chosen = int(np.nanargmax(table[metric].to_numpy()))
        print(f"  {metric:16} {value:+.2f}   ACC of its choice {100 * accuracy[chosen]:.1f}", flush=True)

    order = np.argsort(-table[default].to_numpy(), kind="stable")[: settings["num_pooled"]]
    runs = [table["runs"].to_pylist()[trial] for trial in order]
    single, pooled, everything = [], [], []
    for seed, position in zip(settings["seeds"], range(len(settings["seeds"])), strict=True):
        matrices = [heads_of(folder / "out", names[position]) for names in runs]
        everything += matrices
        for accuracies, heads in ((single, matrices[:1]), (pooled, matrices)):
            consensus = cluster_ensemble(heads, base["num_clusters"], random_state=seed).labels
            accuracies.append(100 * clustering_accuracy(labels, consensus))
    both = cluster_ensemble(everything, base["num_clusters"], random_state=settings["seeds"][0]).labels
    figures = {
        "num_trials": len(table),
        "spearman": spearman,
        "acc_of_trials": [round(100 * value, 2) for value in accuracy],
        "single": {"acc": round(float(np.mean(single)), 2), "accs": [round(acc, 2) for acc in single]},
        "pooled": {"acc": round(float(np.mean(pooled)), 2), "accs": [round(acc, 2) for acc in pooled]},
        "pooled_over_seeds": round(100 * clustering_accuracy(labels, both), 2),
        "seconds": float(np.sum(table["seconds"].to_numpy())),
    }
    for key, what in (("single", "the best trial"), ("pooled", f"the best {len(order)} pooled")):
        by_seed = " ".join(f"{acc:.2f}" for acc in figures[key]["accs"])
        print(f"  ACC of {what:18} {figures[key]['acc']:6.2f}   seeds {by_seed}")
    print(f"  ACC of all their heads, all seeds  {figures['pooled_over_seeds']:.2f}", flush=True)
    return figures


def heads_of(output: Path, run_name: str) -> Any:
    """The label matrix (H, N) of a run."""
    record = json.loads((output / "runs" / f"{run_name}.json").read_text())
    heads = Artifact.find(Folder.at(output / "heads" / record["stages"]["heads"]))
    assert heads is not None
    return np.array(heads.read_array("label_matrix.npy"))
