"""The methods on the same features, in the same run: sets with equal and with unequal classes, several seeds.

Larger sets are sampled down to `max_images`. k-means has ten starts, on centred, normalised features; spectral
clustering cuts the graph of ten nearest neighbours of these; agglomerative clustering is Ward's. TURTLE has five runs,
of which the generalisation score chooses one. The combination is the consensus of the heads of icce, TURTLE's runs and
ten starts of k-means, each with the same weight, judged by the same graph as in a run of `method: [icce, turtle,
kmeans]`. TEMI gets a search of its own over learning rate and epochs: the
values that are best on the sets that our constants were chosen on. A method is a line of METHODS.

All sets are measured with one seed before the next seed begins. With `results`, a file of JSON lines, each result is
kept as it comes: a run goes on where another one stopped, and prints the results of both.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn.cluster
from sklearn.cluster import AgglomerativeClustering, SpectralClustering
from sklearn.neighbors import NearestNeighbors, kneighbors_graph
from sklearn.preprocessing import normalize

from cases import datasets
from icce_ray import ICCE, TURTLE, KMeans, cluster_ensemble
from icce_ray.metrics.true_label_scores import evaluate_clustering

BEFORE = "icce, equal clusters, no graph"
"""The engine without what it does for unequal clusters: heads that balance them, and a consensus by ANMI alone."""

SETTINGS: dict[str, Any] = {
    "datasets": [*datasets.BALANCED, *datasets.UNEQUAL],
    "max_images": 2500,
    "methods": [
        "k-means",
        "agglomerative",
        "spectral",
        "turtle",
        "scan",
        "paper",
        "temi",
        BEFORE,
        "icce, equal clusters",
        "icce",
        "combination",
    ],
    "seeds": [0, 1, 2],
    "num_heads": 16,
    "num_epochs": 50,
    "heads": {},
    "neighbors": {},
    "temi_search": [[1, 1]],
    "results": None,
}
"""`temi_search`: factors of the learning rate and of the epochs."""

CHOSEN_ON = (
    "planted_5", "planted_two_sizes", "digits_1to10", "imagenette_1to20", "trashnet", "digits", "cifar10_mix",
    "weak_100", "weak_200",
)  # fmt: skip
"""The sets that our constants were chosen on. All others are only reported."""

Rows = dict[str, npt.NDArray[np.integer[Any]]]
"""Labels of one method, and of parts of it, by their names in the table."""


def icce(features: datasets.Floats, num_clusters: int, seed: int, settings: dict[str, Any], **options: Any) -> ICCE:
    """A fitted estimator. The classifier changes no label here, so that it gets one step."""
    defaults: dict[str, Any] = {"epochs": settings["num_epochs"], "classifier": {"num_iterations": 1}}
    return ICCE(num_clusters, n_heads=settings["num_heads"], random_state=seed, **defaults | options).fit(features)


FITTED: dict[tuple[bytes, int], ICCE] = {}
"""The run of icce that was made last, by its features and seed: the combination takes its heads."""


def our_defaults(features: datasets.Floats, num_clusters: int, seed: int, settings: dict[str, Any]) -> Rows:
    fitted = icce(features, num_clusters, seed, settings, heads=settings["heads"], neighbors=settings["neighbors"])
    FITTED.clear()
    FITTED[features.tobytes(), seed] = fitted
    lowest_loss = fitted.label_matrix_[fitted.head_losses_.argmin()]
    return {"icce": fitted.labels_, "icce, lowest loss": lowest_loss, "icce, heads": fitted.label_matrix_}


def combination(features: datasets.Floats, num_clusters: int, seed: int, settings: dict[str, Any]) -> Rows:
    if (features.tobytes(), seed) not in FITTED:
        our_defaults(features, num_clusters, seed, settings)
    rows = [
        FITTED[features.tobytes(), seed].label_matrix_,
        TURTLE(num_clusters, random_state=seed).fit(features).label_matrix_,
        KMeans(num_clusters, random_state=seed).fit(features).label_matrix_,
    ]
    nearest = NearestNeighbors(n_neighbors=10).fit(unit(features)).kneighbors(return_distance=False)
    made = cluster_ensemble(rows, num_clusters, neighbors=nearest, features=features, random_state=seed)
    return {"combination": made.labels}


def temi(features: datasets.Floats, num_clusters: int, seed: int, settings: dict[str, Any]) -> Rows:
    rows = {}
    for rate, epochs in settings["temi_search"]:
        num_epochs = round(settings["num_epochs"] * epochs)
        heads = {"learning_rate": 5e-4 * rate}
        fitted = icce(features, num_clusters, seed, settings, method="temi", epochs=num_epochs, heads=heads)
        rows[f"temi, rate {5e-4 * rate:g}, {num_epochs} epochs"] = fitted.labels_
    return rows


METHODS: dict[str, Callable[..., Rows]] = {
    "k-means": lambda x, k, seed, _: {
        "k-means": sklearn.cluster.KMeans(k, n_init=10, random_state=seed).fit_predict(unit(x))
    },
    "agglomerative": lambda x, k, seed, _: {"agglomerative": AgglomerativeClustering(k).fit_predict(unit(x))},
    "turtle": lambda x, k, seed, _: {"turtle": TURTLE(k, random_state=seed).fit_predict(x)},
    "spectral": lambda x, k, seed, _: {"spectral": spectral(x, k, seed)},
    "scan": lambda x, k, seed, s: {"scan": icce(x, k, seed, s, method="scan").labels_},
    "paper": lambda x, k, seed, s: {"paper": icce(x, k, seed, s, preset="paper").labels_},
    "temi": temi,
    "icce, equal clusters": lambda x, k, seed, s: {
        "icce, equal clusters": icce(
            x, k, seed, s, heads=s["heads"] | {"balance": 1.0}, neighbors=s["neighbors"]
        ).labels_
    },
    BEFORE: lambda x, k, seed, s: {
        BEFORE: icce(
            x,
            k,
            seed,
            s,
            heads=s["heads"] | {"balance": 1.0},
            neighbors=s["neighbors"],
            consensus={"recombine": False, "relabel": False},
        ).labels_
    },
    "icce": our_defaults,
    "combination": combination,
}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    kept = Path(settings["results"]) if settings["results"] else None
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    done = {(result["set"], result["method"], result["seed"]) for result in results}
    for seed, name, method in product(settings["seeds"], settings["datasets"], settings["methods"]):
        data = datasets.load(name, settings["max_images"] if not name.startswith("weak") else None)
        if data is None:
            print(f"{name:21} left out: its files are not in {datasets.data_folder()}")
        elif (name, method, seed) not in done:
            results.append(
                {"set": name, "method": method, "seed": seed, "rows": measure(*data, method, seed, settings)}
            )
            print(f"  seed {seed} {name:21} {method}", flush=True)
            if kept:
                with kept.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    figures = collect(results)
    print(f"{'set':21} {'method':28} {'ACC':>12} {'NMI':>12} {'ARI':>12} {'s':>6} {'used':>5} seeds")
    for name, rows in figures.items():
        for row, scores in rows.items():
            texts = [f"{scores[key][0]:6.2f} ±{scores[key][1]:4.1f}" for key in ("acc", "nmi", "ari")]
            print(
                f"{name:21} {row:28} {' '.join(texts)} {scores['seconds']:6.1f} {scores['used']:5.1f} {scores['seeds']}"
            )
    return figures, judge(figures)


def measure(
    features: datasets.Floats, labels: datasets.Labels, method: str, seed: int, settings: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """By row: ACC, NMI and ARI (percent), CPU seconds, and the share of clusters that are used (percent). Of heads, the
    means. The seconds of a combination are without those of heads that icce has trained."""
    num_clusters = len(np.unique(labels))
    started = time.process_time()
    rows = METHODS[method](features, num_clusters, seed, settings)
    seconds = time.process_time() - started
    found = {}
    for row, predicted in rows.items():
        scores = [evaluate_clustering(labels, one) for one in np.atleast_2d(predicted)]
        used = 100 * np.mean([len(np.unique(one)) for one in np.atleast_2d(predicted)]) / num_clusters
        means = {key: float(100 * np.mean([score[key] for score in scores])) for key in ("acc", "nmi", "ari")}
        found[row] = means | {"seconds": seconds, "used": float(used)}
    return found


def collect(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By set and row: mean and deviation over seeds of ACC, NMI and ARI, the median CPU seconds, the clusters used."""
    figures: dict[str, Any] = {}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for result in results:
        for row, scores in result["rows"].items():
            found.setdefault((result["set"], row), []).append(scores)
    for (name, row), seeds in found.items():
        values = {key: [scores[key] for scores in seeds] for key in seeds[0]}
        figures.setdefault(name, {})[row] = {
            key: [round(float(np.mean(values[key])), 2), round(float(np.std(values[key])), 2)]
            for key in ("acc", "nmi", "ari")
        } | {
            "seconds": round(float(np.median(values["seconds"])), 1),
            "used": round(float(np.mean(values["used"])), 1),
            "seeds": len(seeds),
        }
    return figures


def judge(figures: dict[str, Any]) -> dict[str, bool]:
    """The bounds that the measured sets and rows allow to check. ACC decides on equal classes, ARI on unequal ones."""
    bounds: dict[str, bool] = {}
    for names, metric, lead in ((datasets.BALANCED, "acc", 3.0), (datasets.UNEQUAL, "ari", 8.0)):
        sets = [name for name in names if "icce" in figures.get(name, {})]
        kind = "equal" if metric == "acc" else "unequal"
        for other in ("k-means", best_temi(figures), "spectral"):
            found = {
                n: figures[n]["icce"][metric][0] - figures[n][other][metric][0] for n in sets if other in figures[n]
            }
            if found:
                mean = float(np.mean(list(found.values())))
                least = lead if other != "spectral" else 0.0
                bounds[f"{kind} classes: {metric.upper()} {least:g} points above {other} in the mean ({mean:+.1f})"] = (
                    mean >= least
                )
                below = {name: round(gap, 1) for name, gap in found.items() if gap < 0}
                bounds[f"{kind} classes: {metric.upper()} below {other} on no set ({below or 'none'})"] = not below
        for name in sets:
            rows = figures[name]
            if BEFORE in rows:
                gain = rows["icce"][metric][0] - rows[BEFORE][metric][0]
                least = -0.5 if metric == "acc" else 6.0
                text = f"{name}: {metric.upper()} at least {least:+g} from what {BEFORE} gives ({gain:+.1f})"
                bounds[text] = gain >= least
            gap = rows["icce"]["acc"][0] - rows["icce, lowest loss"]["acc"][0]
            bounds[f"{name}: consensus at most 0.5 ACC below the lowest-loss head ({gap:+.1f})"] = gap >= -0.5
            if name.startswith("weak"):
                used = rows["icce, heads"]["used"]
                bounds[f"{name}: heads use 90% of the clusters ({used:.0f}%)"] = used >= 90
    return bounds


def best_temi(figures: dict[str, Any]) -> str:
    """The row of TEMI that is best on the sets that our constants were chosen on, or on all. Rows that were measured on
    fewer sets than another don't count."""
    counts = Counter(row for found in figures.values() for row in found if row.startswith("temi"))
    rows = [row for row, count in counts.items() if count == max(counts.values())]
    sets = [name for name in figures if name in CHOSEN_ON] or list(figures)
    return max(
        rows,
        key=lambda row: np.mean([figures[name][row]["acc"][0] for name in sets if row in figures[name]] or [0]),
        default="",
    )


def unit(features: datasets.Floats) -> datasets.Floats:
    centred = features.astype(np.float32)
    return normalize(centred - centred.mean(axis=0))


def spectral(features: datasets.Floats, num_clusters: int, seed: int) -> Any:
    graph = kneighbors_graph(unit(features), 10, metric="cosine")
    clusterer = SpectralClustering(num_clusters, affinity="precomputed", random_state=seed)
    return clusterer.fit_predict((graph + graph.T) / 2)
