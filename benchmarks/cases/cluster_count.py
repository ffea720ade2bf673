"""The number of clusters that `auto` chooses, and the range it gives, on planted data and on real features.

Planted data are Gaussians in 32 dimensions. Their centres are drawn with a standard deviation of `spread`: the smaller
it is, the more they overlap (the accuracy of a classifier that knows the centres is printed). `sizes` are equal, or
drawn from a Dirichlet distribution, so that some clusters are many times larger than others. `unequal` names sets of
`accuracy` whose sizes differ most. The true number of a real set is that of its labels, which need not be what the
features hold.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cases import datasets
from icce_ray.config import ClusterCountConfig
from icce_ray.count.clustering import count_clusters
from icce_ray.runtime.progress import Progress

SETTINGS: dict[str, Any] = {
    "planted": [
        {"clusters": clusters, "images": images, "spread": spread, "sizes": sizes}
        for clusters, images in ((7, 1400), (20, 2000), (60, 3000))
        for spread, sizes in ((0.6, "equal"), (0.8, "equal"), (0.8, "unequal"))
    ],
    "unequal": ["planted_15", "planted_two_sizes", "planted_one_large", "planted_5"],
    "datasets": ["digits", "trashnet", "imagenette", "cifar10_mix", "fmnist_2000"],
    "seed": 0,
    "cluster_count": {},
}
DIM = 32
CONCENTRATION = 4.0
TOLERANCE, UNEQUAL_TOLERANCE = 0.15, 0.2
RANGES = ("digits", "trashnet", "imagenette")
"""Real sets whose range has to hold the true number."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    bounds: dict[str, bool] = {}
    for asked in settings["planted"]:
        features, labels, share = plant(**asked, seed=settings["seed"])
        name = f"{asked['clusters']} planted, spread {asked['spread']}, {asked['sizes']}"
        found = measure(features, settings) | {"true": asked["clusters"], "best_possible_accuracy": share}
        if asked["sizes"] == "unequal":
            sizes = np.bincount(labels)
            found |= {"smallest": int(sizes.min()), "largest": int(sizes.max())}
        figures[name] = found
        say(name, found)
        if asked["sizes"] == "equal":
            bounds[f"{name}: within {TOLERANCE:.0%}"] = (
                abs(found["num_clusters"] - asked["clusters"]) <= TOLERANCE * asked["clusters"]
            )
    for name in (*settings["unequal"], *settings["datasets"]):
        data = datasets.load(name)
        if data is None:
            print(f"{name}: left out: its files are not in {datasets.data_folder()}")
            continue
        true = len(np.unique(data[1]))
        figures[name] = found = measure(data[0], settings) | {"true": true}
        say(name, found)
        if name in settings["unequal"]:
            is_near = abs(found["num_clusters"] - true) <= UNEQUAL_TOLERANCE * true
            bounds[f"{name}: within {UNEQUAL_TOLERANCE:.0%}"] = is_near
        elif name in RANGES:
            low, high = found["range"]
            bounds[f"{name}: the range holds the number"] = low <= true <= high
    return figures, bounds


def plant(clusters: int, images: int, spread: float, sizes: str, seed: int) -> tuple[Any, Any, float]:
    """Features (N, DIM), labels (N,), and the share that the nearest true centre gets right."""
    rng = np.random.default_rng([seed, clusters])
    centres = rng.normal(size=(clusters, DIM)) * spread
    shares = np.full(clusters, 1 / clusters) if sizes == "equal" else rng.dirichlet(np.full(clusters, CONCENTRATION))
    labels = rng.choice(clusters, images, p=shares)
    features = (centres[labels] + rng.normal(size=(images, DIM))).astype(np.float32)
    nearest = ((features[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    return features, labels, round(float((nearest == labels).mean()), 3)


def measure(features: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The choice, its range, and the curves."""
    asked = ClusterCountConfig(**settings["cluster_count"])
    began = time.monotonic()
    progress = Progress("cluster_count", quiet=True)
    choice = count_clusters(
        features,
        asked,
        center=True,
        seed=settings["seed"],
        progress=progress,
    )
    columns = ("num_clusters", "score", "silhouette", "gap")
    return {
        "num_clusters": choice.num_clusters,
        "range": [choice.low, choice.high],
        "seconds": round(time.monotonic() - began, 1),
        "curve": [[round(row[column], 4) for column in columns] for row in choice.by_count().to_pylist()],
    }


def say(name: str, found: dict[str, Any]) -> None:
    low, high = found["range"]
    text = f"{name:38} true {found['true']:3}   chosen {found['num_clusters']:3}   range {low} to {high}"
    share = found.get("best_possible_accuracy")
    text += f"   nearest true centre right: {share:.1%}" if share is not None else ""
    text += f"   sizes {found['smallest']} to {found['largest']}" if "smallest" in found else ""
    print(f"{text}   {found['seconds']:.0f} s", flush=True)
