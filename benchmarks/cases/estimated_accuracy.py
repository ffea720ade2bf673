"""The accuracy that a run estimates without labels, and its three views, against the true one, on real features."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases import datasets
from icce_ray import ICCE, clustering_accuracy
from icce_ray.evaluate.estimated_accuracy import estimate_accuracy

SETTINGS: dict[str, Any] = {
    "datasets": ["digits", *datasets.FILES, *datasets.CUTS],
    "max_images": 1500,
    "num_heads": 8,
    "num_epochs": 30,
    "seed": 0,
    "max_error": 10.0,
}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    print("| features | accuracy | estimate | error | neighbours | Ward | average linkage |")
    print("|---|---|---|---|---|---|---|")
    for name in settings["datasets"]:
        data = datasets.load(name, settings["max_images"])
        if data is None:
            print(f"{name}: no data")
            continue
        features, labels = data
        clusters = ICCE(
            len(np.unique(labels)),
            n_heads=settings["num_heads"],
            epochs=settings["num_epochs"],
            random_state=settings["seed"],
            classifier={"num_iterations": 1},
        ).fit_predict(features)
        found = estimate_accuracy(features, clusters, seed=settings["seed"])
        assert found is not None
        accuracy, estimate = 100 * clustering_accuracy(labels, clusters), 100 * found[0]
        views = {view: 100 * share for view, share in found[1].items()}
        figures[name] = {"accuracy": accuracy, "estimate": estimate, "error": estimate - accuracy, **views}
        cells = [
            f"{accuracy:.1f}",
            f"{estimate:.1f}",
            f"{estimate - accuracy:+.1f}",
            *(f"{x:.1f}" for x in views.values()),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    limit = settings["max_error"]
    far = [name for name, row in figures.items() if abs(row["error"]) > limit]
    return figures, {f"within {limit:g} points (not: {', '.join(far) or 'none'})": not far}
