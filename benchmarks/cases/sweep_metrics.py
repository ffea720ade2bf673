"""How well each metric without labels ranks the trials of a sweep by their true ACC, and what pooling gains.

There is one sweep per feature set, over good and bad settings, and each trial has every seed. The table shows
Spearman's rank correlation of each metric (mean over seeds) with the ACC of the trial's consensus (mean over seeds).
Then, for each seed, the consensus of the best trials by each metric is compared with that of the best trial alone. If
`output` names a folder, everything is kept there, and a second call finds what is finished.
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
from icce_ray.sweeps.sweep import run_sweep
from icce_ray.sweeps.sweep_config import EnsembleConfig, SweepConfig, build_sweep

SETTINGS: dict[str, Any] = {
    "datasets": ["digits", "cifar10_mix"],
    "seeds": [0, 1, 2],
    "num_trials": 10,
    "num_pooled": [3, 5],
    "num_heads": 6,
    "output": None,
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
"""In rank correlation: ten trials cannot show smaller differences."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    default = SweepConfig(base={}, space={}, seeds=settings["seeds"]).metric
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    for name in settings["datasets"]:
        data = datasets.load(name)
        if data is None:
            print(f"{name}: left out: its files are not in {datasets.data_folder()}")
            continue
        with tempfile.TemporaryDirectory(prefix="icce_ray-sweep-") as temporary:
            folder = Path(settings["output"] or temporary).absolute() / name
            folder.mkdir(parents=True, exist_ok=True)
            figures[name] = measure(name, *data, settings, default, folder)
        by_size = {int(size): found["acc"] for size, found in figures[name]["pooled"][default].items()}
        top = EnsembleConfig().top
        if top not in by_size:
            continue
        bounds[f"{name}: mean ACC of the best {top} pooled at or above that of the best trial, by {default}"] = (
            by_size[top] >= by_size[1]
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
    """Rank correlations, and the ACC in percent of the best trial and of the pools, by seed and in the mean."""
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

    figures = {
        "num_trials": len(table),
        "spearman": spearman,
        "acc_of_trials": [round(100 * value, 2) for value in accuracy],
        "seconds": float(np.sum(table["seconds"].to_numpy())),
    }
    names = table["runs"].to_pylist()
    for metric in spearman:
        order = np.argsort(-table[metric].to_numpy(), kind="stable")
        for size in (1, *settings["num_pooled"]):
            accuracies = []
            for position, seed in enumerate(settings["seeds"]):
                heads = [heads_of(folder / "out", names[trial][position]) for trial in order[:size]]
                consensus = cluster_ensemble(heads, base["num_clusters"], random_state=seed).labels
                accuracies.append(round(100 * clustering_accuracy(labels, consensus), 2))
            mean = round(float(np.mean(accuracies)), 2)
            figures.setdefault("pooled", {}).setdefault(metric, {})[str(size)] = {"acc": mean, "accs": accuracies}
            by_seed = " ".join(f"{acc:.2f}" for acc in accuracies)
            print(f"  ACC of the best {size} by {metric:16} {mean:6.2f}   seeds {by_seed}", flush=True)
    return figures


def heads_of(output: Path, run_name: str) -> Any:
    """The label matrix (H, N) of a run."""
    record = json.loads((output / "runs" / f"{run_name}.json").read_text())
    heads = Artifact.find(Folder.at(output / "method" / record["stages"]["method"]))
    assert heads is not None
    return np.array(heads.read_array("label_matrix.npy"))
