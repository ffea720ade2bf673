"""ICCE's consensus against TEMI and k-means on the same features, in the same run.

TEMI gets the same number of heads, epochs, batch size and learning rate. K-means is scikit-learn's with ten starts, on
L2-normalised features.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

from cases import datasets
from icce_ray import ICCE, clustering_accuracy
from icce_ray.metrics.true_label_scores import normalized_mutual_info

SETTINGS: dict[str, Any] = {
    "datasets": list(datasets.NAMES),
    "methods": ["k-means", "temi", "icce"],
    "seeds": [0, 1, 2],
    "num_heads": 16,
    "num_epochs": 100,
    "heads": {},
    "neighbors": {},
}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    print(f"{'set':12} {'method':22} {'ACC':>7} {'NMI':>7} {'s':>7}   seeds {settings['seeds']}")
    for name in settings["datasets"]:
        data = datasets.load(name)
        if data is None:
            print(f"{name:12} left out: its files are not in {datasets.data_folder()}")
            continue
        results = measure(*data, settings)
        figures[name] = results
        for method, result in results.items():
            print(
                f"{name:12} {method:22} {result['acc']:7.2f} {result['nmi']:7.2f} {result['seconds']:7.1f}   "
                f"{' '.join(f'{acc:.2f}' for acc in result['accs'])}",
                flush=True,
            )
        for other in ("k-means", "temi"):
            for metric in ("acc", "nmi"):
                if {"icce", other} <= results.keys():
                    holds = results["icce"][metric] > results[other][metric]
                    bounds[f"{name}: mean {metric.upper()} of icce above {other}"] = holds
    return figures, bounds


def measure(features: datasets.Floats, labels: datasets.Labels, settings: dict[str, Any]) -> dict[str, Any]:
    """ACC and NMI (percent, geometric) per method: the mean over seeds, and each seed's ACC."""
    num_clusters = len(np.unique(labels))
    scores: dict[str, list[tuple[float, float, float]]] = {}

    def score(method: str, predicted: Any, seconds: float) -> None:
        acc, nmi = clustering_accuracy(labels, predicted), normalized_mutual_info(labels, predicted)
        scores.setdefault(method, []).append((100 * acc, 100 * nmi, seconds))

    for seed in settings["seeds"]:
        if "k-means" in settings["methods"]:
            started = time.perf_counter()
            unit = normalize(features.astype(np.float32))
            score("k-means", KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(unit), _since(started))
        for method in (method for method in ("temi", "icce") if method in settings["methods"]):
            started = time.perf_counter()
            estimator = ICCE(
                num_clusters,
                method=method,
                n_heads=settings["num_heads"],
                epochs=settings["num_epochs"],
                heads=settings["heads"],
                neighbors=settings["neighbors"] if method == "icce" else None,
                random_state=seed,
            ).fit(features)
            seconds = _since(started)
            score(method, estimator.labels_, seconds)
            if method == "icce":
                score("icce, best head", estimator.head_labels_[estimator.head_losses_.argmin()], seconds)
                score("icce, classifier", estimator.predict(features), seconds)
    return {
        method: {
            "acc": round(float(np.mean([acc for acc, _, _ in values])), 2),
            "nmi": round(float(np.mean([nmi for _, nmi, _ in values])), 2),
            "seconds": round(float(np.median([seconds for _, _, seconds in values])), 1),
            "accs": [round(acc, 2) for acc, _, _ in values],
            "nmis": [round(nmi, 2) for _, nmi, _ in values],
        }
        for method, values in scores.items()
    }


def _since(started: float) -> float:
    return time.perf_counter() - started
