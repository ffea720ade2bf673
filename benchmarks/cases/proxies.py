"""How well scores without labels rank clusterings by their true AMI and ACC: the question of arXiv 2406.02465.

For each feature set there is one clustering for each method, representation and setting: numbers of clusters around the
true one, HDBSCAN's cluster sizes, affinity propagation's preferences, linkages, covariances. The table shows
Spearman's rank correlation of each score with the true AMI and ACC over the clusterings of a set, and the AMI of the
clustering that has the highest score.

Two scores need a second clustering. `stability` is that of a sweep: the NMI with the clustering of another seed, which
is 1 for a method without a seed. `resampled` is the NMI of the clusterings of two random samples of 80% of the images,
over those in both. `peers` is the mean NMI with all other clusterings of the set. Features of more than 256 dimensions
are cut to 256 principal components.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_mutual_info_score

from cases import datasets
from icce_ray.config import ConventionalConfig, HeadsConfig, NeighborsConfig
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.errors import InputError
from icce_ray.methods.conventional.scikit_clusterers import CLUSTERERS, represent
from icce_ray.methods.heads.fit import fit as fit_heads
from icce_ray.metrics.label_free_scores import generalization_score, silhouette
from icce_ray.metrics.true_label_scores import evaluate_with_noise, normalized_mutual_info
from icce_ray.neighbors.graph import build_graph
from icce_ray.sweeps.sweep_config import SweepConfig

SETTINGS: dict[str, Any] = {
    "datasets": ["digits", "cifar10_mix", "cifar10_v1", "cifar10_lite2", "imagenette", "trashnet", "fmnist_2000"],
    "num_images": 600,
    "num_heads": 4,
    "num_epochs": 15,
}
SPACES = ("raw", "pca", "umap")
SHARE = 0.8
MAX_DIMS = 256
PROXIES = (
    "silhouette_umap", "silhouette_pca", "silhouette_raw", "generalization", "stability", "resampled", "peers",
)  # fmt: skip

Labels = datasets.Labels


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    for name in settings["datasets"]:
        data = datasets.load(name)
        if data is None:
            print(f"{name}: left out: its files are not in {datasets.data_folder()}")
            continue
        began = time.monotonic()
        figures[name] = measure(name, *data, settings)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"{'mean over sets':16}" + "".join(f"{what:>24}" for what in ("AMI", "ACC", "AMI chosen")))
    means = {}
    for proxy in PROXIES:
        means[proxy] = {
            what: float(np.mean([each[what][proxy] for each in figures.values()])) for what in ("ami", "acc", "chosen")
        }
        print(f"{proxy:16}" + "".join(f"{value:24.2f}" for value in means[proxy].values()), flush=True)
    default = SweepConfig(base={}, space={"method": []}).metric
    best = max(PROXIES, key=lambda proxy: means[proxy]["ami"])
    bound = f"the default metric of sweeps over several methods, {default}, is the best in the mean ({best})"
    return figures | {"mean": means}, {bound: default == best}


def measure(name: str, features: datasets.Floats, classes: Labels, settings: dict[str, Any]) -> dict[str, Any]:
    """Rank correlations over the clusterings of a feature set, and the AMI of the choice of each proxy."""
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(features))[: settings["num_images"]])
    features_ND, classes = features[rows].astype(np.float32), classes[rows]
    if features_ND.shape[1] > MAX_DIMS:  # the generalisation score would take most of the time
        features_ND = PCA(MAX_DIMS, random_state=0).fit_transform(features_ND)
    samples = [np.sort(generator.permutation(len(rows))[: int(SHARE * len(rows))]) for _ in range(2)]
    shared = np.intersect1d(*samples)
    parts = [np.arange(len(rows)), *samples]
    spaces = [{space: represented(features_ND[part], space) for space in SPACES} for part in parts]
    num_classes = len(np.unique(classes))
    table = []
    for what, cluster in clusterers(num_classes, settings):
        try:
            labels_N, again_N = (cluster(features_ND, spaces[0], seed) for seed in (0, 1))
            first, second = (
                dict(zip(part, cluster(features_ND[part], space, 0), strict=True))
                for part, space in zip(samples, spaces[1:], strict=True)
            )
        except (InputError, ValueError) as error:
            print(f"  {what}: left out: {str(error)[:90]}")
            continue
        table.append(
            {
                "what": what,
                "labels": labels_N,
                "ami": adjusted_mutual_info_score(classes, labels_N),
                "acc": evaluate_with_noise(classes, labels_N)["acc"],
                "stability": normalized_mutual_info(labels_N, again_N),
                "resampled": normalized_mutual_info(*(np.array([one[i] for i in shared]) for one in (first, second))),
                "generalization": generalization_score(features_ND, labels_N, random_state=0),
                **{f"silhouette_{space}": silhouette(spaces[0][space], labels_N) for space in SPACES},
            }
        )
    for row in table:
        others = [normalized_mutual_info(row["labels"], other["labels"]) for other in table if other is not row]
        row["peers"] = float(np.mean(others))
    return summarize(name, table)


def clusterers(num_classes: int, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A name, and a function of features, their representations and a seed that returns labels."""
    numbers = sorted({max(2, round(num_classes * factor)) for factor in (0.5, 1, 2)})
    for space, number in product(SPACES, numbers):
        yield f"kmeans {space} {number}", _scikit(space, lambda seed, k=number: KMeans(k, n_init=5, random_state=seed))
        for linkage in ("ward", "average"):
            yield f"{linkage} {space} {number}", _conventional("agglomerative", space, number, linkage=linkage)
    for space, number in product(("raw", "umap"), numbers):
        yield f"spectral {space} {number}", _conventional("spectral", space, number)
    for space, number in product(("pca", "umap"), numbers):
        yield f"gmm {space} {number}", _conventional("gmm", space, number)
    for space, size in product(("pca", "umap"), (5, 10, 20, 40)):
        yield f"hdbscan {space} {size}", _conventional("hdbscan", space, None, min_cluster_size=size)
    for preference in (None, -5.0, -20.0):
        yield f"affinity pca {preference}", _conventional("affinity_propagation", "pca", None, preference=preference)
    yield "affinity umap", _conventional("affinity_propagation", "umap", None)
    for number in numbers:
        yield f"icce {number}", _icce(number, settings)


def represented(features_ND: datasets.Floats, space: str) -> datasets.Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return represent(features_ND, ConventionalConfig(representation=space), 0)


def _scikit(space: str, make: Any) -> Any:
    def cluster(features_ND: datasets.Floats, spaces: dict[str, datasets.Floats], seed: int) -> Labels:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels: Labels = make(seed).fit_predict(spaces[space])
        if len(np.unique(labels[labels >= 0])) < 2:
            raise InputError("fewer than two clusters")
        return labels

    return cluster


def _conventional(method: str, space: str, number: int | None, **changes: Any) -> Any:
    settings = ConventionalConfig.model_validate(changes)
    return _scikit(space, lambda seed: CLUSTERERS[method].make(settings, number, seed))


def _icce(number: int, settings: dict[str, Any]) -> Any:
    heads = HeadsConfig(num_heads=settings["num_heads"], num_epochs=settings["num_epochs"])

    def cluster(features_ND: datasets.Floats, spaces: dict[str, datasets.Floats], seed: int) -> Labels:
        graph, _ = build_graph(features_ND, NeighborsConfig(), num_clusters=number, seed=seed)
        made = fit_heads(features_ND, graph, heads, num_clusters=number, seed=seed)
        return cluster_ensemble(made.labels_HN, number, random_state=seed).labels.astype(np.int64)

    return cluster


def summarize(name: str, table: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a feature set, printed as well."""
    ami, acc = (np.array([row[what] for row in table]) for what in ("ami", "acc"))
    best = table[int(ami.argmax())]
    print(f"{name}: {len(table)} clusterings; best AMI {100 * ami.max():.1f} ({best['what']})")
    figures: dict[str, Any] = {"num_clusterings": len(table), "best_ami": float(ami.max()), "ami": {}, "acc": {}}
    figures["chosen"] = {}
    for proxy in PROXIES:
        values = np.array([np.nan if row[proxy] is None else row[proxy] for row in table])
        known = np.isfinite(values)
        for what, true in (("ami", ami), ("acc", acc)):
            figures[what][proxy] = float(spearmanr(values[known], true[known]).statistic)
        chosen = int(np.where(known, values, -np.inf).argmax())
        figures["chosen"][proxy] = round(100 * float(ami[chosen]), 2)
        print(
            f"  {proxy:16} AMI {figures['ami'][proxy]:+.2f}  ACC {figures['acc'][proxy]:+.2f}  chooses "
            f"{table[chosen]['what']}, AMI {100 * ami[chosen]:.1f}",
            flush=True,
        )
    columns = ("ami", "acc", *PROXIES)
    figures["clusterings"] = [
        [row["what"], *(None if row[column] is None else round(float(row[column]), 4) for column in columns)]
        for row in table
    ]
    return figures
