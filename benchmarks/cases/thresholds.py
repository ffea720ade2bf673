"""The automatic threshold against fixed ones: the share of neighbours with the image's label, and the consensus's ACC.

Labels are only used to score. With a low fixed threshold, lists hold most images and are cut at `max_neighbors`. High
thresholds all give the `min_neighbors` most similar images, hence the same graph, which is trained on once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from cases import datasets
from icce_ray import ICCE, clustering_accuracy
from icce_ray.config import NeighborsConfig
from icce_ray.neighbors.graph import build_graph

SETTINGS: dict[str, Any] = {
    "datasets": list(datasets.NAMES),
    "thresholds": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "seeds": [0],
    "num_heads": 8,
    "num_epochs": 30,
    "with_accuracy": True,
}
MAX_PRECISION_LOSS = 0.03
MAX_ACCURACY_LOSS = 0.01


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    for name in settings["datasets"]:
        data = datasets.load(name)
        if data is None:
            print(f"{name:12} left out: its files are not in {datasets.data_folder()}")
            continue
        known: dict[str, float] = {}
        rows = {
            str(threshold): measure(*data, threshold, settings, known)
            for threshold in ["auto", *settings["thresholds"]]
        }
        figures[name] = rows
        auto, fixed = rows["auto"], [row for threshold, row in rows.items() if threshold != "auto"]
        longer = [row["precision"] for row in fixed if row["mean_neighbors"] >= auto["mean_neighbors"]]
        bounds[f"{name}: precision at most 3 points below the best fixed threshold's with as many neighbours"] = (
            auto["precision"] >= max(longer, default=0.0) - MAX_PRECISION_LOSS
        )
        if settings["with_accuracy"]:
            bounds[f"{name}: ACC within 1 point of the best fixed threshold's"] = (
                auto["acc"] >= max(row["acc"] for row in fixed) - MAX_ACCURACY_LOSS
            )
    return figures, bounds


def measure(
    features: datasets.Floats,
    labels: datasets.Labels,
    threshold: Any,
    settings: dict[str, Any],
    known: dict[str, float],
) -> dict[str, float]:
    """The mean length of the graph's rows, the mean share of neighbours with the image's label, and the ACC, which
    `known` keeps by the graph's digest."""
    num_clusters = len(np.unique(labels))
    config = NeighborsConfig(similarity_threshold=threshold)
    graph, audit = build_graph(features, config, num_clusters=num_clusters, seed=settings["seeds"][0])
    rows_E = np.repeat(np.arange(graph.num_images), graph.degrees)
    is_same_E = labels[rows_E] == labels[graph.indices]
    result = {
        "threshold": audit.similarity_threshold,
        "mean_neighbors": float(graph.degrees.mean()),
        "precision": float((np.bincount(rows_E, is_same_E) / graph.degrees).mean()),
    }
    if settings["with_accuracy"]:
        digest = hashlib.sha256(graph.indptr.tobytes() + graph.indices.tobytes()).hexdigest()
        if digest not in known:
            known[digest] = accuracy(features, labels, threshold, settings)
        result["acc"] = known[digest]
    print(
        f"{threshold!s:>5} {audit.similarity_threshold:7.4f} {result['mean_neighbors']:8.1f} neighbours, "
        f"{result['precision']:6.1%} with the image's label"
        + (f", ACC {result['acc']:6.2%}" if "acc" in result else ""),
        flush=True,
    )
    return result


def accuracy(features: datasets.Floats, labels: datasets.Labels, threshold: Any, settings: dict[str, Any]) -> float:
    """Mean ACC of the consensus over the seeds."""
    found = []
    for seed in settings["seeds"]:
        model = ICCE(
            len(np.unique(labels)),
            n_heads=settings["num_heads"],
            epochs=settings["num_epochs"],
            similarity_threshold=threshold,
            classifier={"num_iterations": 20},
            random_state=seed,
        )
        found.append(clustering_accuracy(labels, model.fit(features).labels_))
    return float(np.mean(found))
