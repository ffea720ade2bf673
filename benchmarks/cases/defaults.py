"""How the defaults of the trainer were chosen: one setting at a time around them; the ablation in the paper's order.

Few heads, several seeds. The consensus decides, because it is what a run gives: a trick that makes heads unlike each
other may cost each of them, and gain for all. The heads' mean is shown beside it. TEMI and k-means are in the same run.
Runs go side by side, one thread each: few heads do not fill more.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from cases import datasets
from icce_ray.config import HeadsConfig, NeighborsConfig
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.methods import METHODS
from icce_ray.methods.heads.fit import fit
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.neighbors.graph import NeighborGraph, build_graph

Scores = tuple[float, float]
"""Percent: the heads' mean ACC, and the ACC of their consensus."""

SETTINGS: dict[str, Any] = {
    "datasets": list(datasets.NAMES),
    "seeds": [0, 1, 2],
    "num_heads": 4,
    "values": {
        "max_ce_weight": [0.0, 0.1, 0.3, 1.0],
        "teacher_temperature": [0.05, 0.1, 0.2, 0.4],
        "learning_rate": [1e-4, 2.5e-4, 5e-4, 1e-3],
        "num_epochs": [15, 25, 50, 100],
        "input_share": [0.25, 0.5, 0.75, 1.0],
        "balance": [0.0, 0.5, 1.0, "auto"],
    },
    "with_ablation": True,
}
TOLERANCE = 0.5
"""Points of the consensus's mean accuracy by which seeds alone move it: a default may lie this far below the best."""

TEMI_HEADS = METHODS["temi"].settings["heads"]
ABLATION: dict[str, tuple[dict[str, Any], bool]] = {
    "temi": (TEMI_HEADS, False),
    "+ batch norm, rotation": (TEMI_HEADS | {"input_norm": "batch_norm", "rotate": True}, False),
    "+ adaptive neighbours": ({"input_share": 1.0, "sinkhorn": False, "max_ce_weight": 0.0}, True),
    "+ Sinkhorn-Knopp": ({"input_share": 1.0, "max_ce_weight": 0.0, "balance": 1.0}, True),
    "+ cross-entropy": ({"input_share": 1.0, "balance": 1.0}, True),
    "+ a share of the inputs": ({"balance": 1.0}, True),
    "+ a balance of each head (the default)": ({}, True),
}
"""Settings of the heads, and whether neighbours are adaptive."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), start, initializer=functools.partial(threadpool_limits, 1)) as pool:
        started = {}
        for name in settings["datasets"]:
            if datasets.load(name) is None:
                print(f"{name}: left out: its files are not in {datasets.data_folder()}")
            else:
                started[name] = _start(name, settings, pool.submit)
        for name, rows in started.items():
            figures[name] = {}
            for row, futures in rows.items():
                heads, consensus = np.mean([future.result() for future in futures], axis=0)
                figures[name][row] = {"heads": float(heads), "consensus": float(consensus)}
                print(f"{name:12} {row:32} heads {heads:6.2f}   consensus {consensus:6.2f}", flush=True)
    return figures, judge(figures, settings["values"])


def judge(figures: dict[str, dict[str, dict[str, float]]], tried: dict[str, list[Any]]) -> dict[str, bool]:
    """Whether each default is as good as the best of its values, in the mean over sets."""
    bounds = {}
    for key, values in tried.items():
        rows = {value: [results[f"{key}={value}"] for results in figures.values()] for value in values}
        means = {value: float(np.mean([row["consensus"] for row in found])) for value, found in rows.items()}
        default = HeadsConfig().model_dump()[key]
        holds = means[default] >= max(means.values()) - TOLERANCE
        bounds[f"{key}: the default {default} is within {TOLERANCE} points of the best value"] = holds
        print(f"mean over sets, {key}: " + ", ".join(f"{value}: {mean:.2f}" for value, mean in means.items()))
    return bounds


def _start(
    name: str, settings: dict[str, Any], submit: Callable[..., Future[Scores]]
) -> dict[str, list[Future[Scores]]]:
    """By row of the table, a run per seed; rows of equal settings share theirs."""
    ablation = ABLATION if settings["with_ablation"] else {}
    rows = {"k-means": [submit(_k_means, name, seed) for seed in settings["seeds"]]}
    one_by_one = {
        f"{key}={value}": ({key: value}, True) for key, values in settings["values"].items() for value in values
    }
    runs: dict[str, list[Future[Scores]]] = {}
    for row, (heads, adaptive) in itertools.chain(ablation.items(), one_by_one.items()):
        config = HeadsConfig.model_validate({"num_heads": settings["num_heads"]} | heads)
        key = f"{config!r} {adaptive}"
        if key not in runs:
            runs[key] = [submit(_train, name, adaptive, config, seed) for seed in settings["seeds"]]
        rows[row] = runs[key]
    return rows


def _k_means(name: str, seed: int) -> Scores:
    features, labels = _load(name)
    predicted = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(
        normalize(features.astype(np.float32))
    )
    acc = 100 * clustering_accuracy(labels, predicted)
    return acc, acc


def _train(name: str, adaptive: bool, config: HeadsConfig, seed: int) -> Scores:
    features, labels = _load(name)
    num_clusters = len(np.unique(labels))
    graph = _graph(name, adaptive)
    trained = fit(features, graph, config, num_clusters=num_clusters, seed=seed, num_threads=1)
    matrix_HN = trained.labels_HN
    ensemble = cluster_ensemble(matrix_HN, num_clusters, methods=("vote", "mcla"), random_state=seed)
    heads = np.mean([clustering_accuracy(labels, head) for head in matrix_HN])
    return 100 * float(heads), 100 * clustering_accuracy(labels, ensemble.labels)


@functools.cache
def _load(name: str) -> tuple[datasets.Floats, datasets.Labels]:
    data = datasets.load(name)
    assert data is not None
    return data


@functools.cache
def _graph(name: str, adaptive: bool) -> NeighborGraph:
    features, labels = _load(name)
    config = NeighborsConfig() if adaptive else NeighborsConfig.model_validate(METHODS["temi"].settings["neighbors"])
    return build_graph(features, config, num_clusters=len(np.unique(labels)), seed=0)[0]
