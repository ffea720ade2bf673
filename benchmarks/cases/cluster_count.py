"""The number of clusters that `auto` chooses, and the range it gives, on planted data and on real features.

Planted data are Gaussians in 32 dimensions. Their centres are drawn with a standard deviation of `spread`: the smaller
it is, the more they overlap (the accuracy of a classifier that knows the centres is printed). `sizes` are equal, or
drawn from a Dirichlet distribution, so that some clusters are many times larger than others. `unequal` names sets of
`accuracy` whose sizes differ most. `draws` are small sets whose groups' number, sizes and overlap are drawn, too;
they chose no constant. The true number of a real set is that of its labels, which need not be what the features hold.
Each choice is compared with the one before small groups are searched.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cases import datasets
from icce_ray.config import ClusterCountConfig
from icce_ray.count.choice import choose
from icce_ray.count.clustering import count_clusters
from icce_ray.runtime.progress import Progress

SETTINGS: dict[str, Any] = {
    "planted": [
        {"clusters": clusters, "images": images, "spread": spread, "sizes": sizes}
        for clusters, images in ((7, 1400), (20, 2000), (60, 3000))
        for spread, sizes in ((0.6, "equal"), (0.8, "equal"), (0.8, "unequal"))
    ],
    "unequal": ["planted_15", "planted_two_sizes", "planted_one_large", "planted_5"],
    "draws": {"unequal": 40, "equal": 20, "one group": 10},
    "datasets": [
        *("digits", "trashnet", "imagenette", "cifar10_mix", "fmnist_2000"),
        *("digits_1to10", "digits_1to50", "imagenette_1to20", "imagenette_halves"),
    ],
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
        found = measure(features, asked["clusters"], settings) | {"best_possible_accuracy": share}
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
        figures[name] = found = measure(data[0], true, settings)
        say(name, found)
        if name in settings["unequal"]:
            bounds[f"{name}: within {UNEQUAL_TOLERANCE:.0%}"] = is_near(found["num_clusters"], true)
        elif name in RANGES:
            low, high = found["range"]
            bounds[f"{name}: the range holds the number"] = low <= true <= high
    for kind, number in settings["draws"].items():
        found = [measure(*draw(kind, one), settings, has_curve=False) for one in range(number)]
        figures[f"draws, {kind}"] = found
        right, before = (sum(is_near(one[key], one["true"]) for one in found) for key in ("num_clusters", "before"))
        changed = [one for one in found if one["num_clusters"] != one["before"]]
        texts = [f"{one['before']} to {one['num_clusters']} (true {one['true']})" for one in changed]
        print(
            f"{number} draws, {kind}: {right} within {UNEQUAL_TOLERANCE:.0%}, {before} before small groups are searched"
        )
        print(f"    the search changes {', '.join(texts) or 'none'}", flush=True)
        if kind == "one group":
            bounds[f"draws, {kind}: the search for small groups changes none"] = not changed
        else:
            bounds[f"draws, {kind}: as many within {UNEQUAL_TOLERANCE:.0%} as before the search"] = right >= before
    return figures, bounds


def is_near(num_clusters: int, true: int) -> bool:
    return abs(num_clusters - true) <= UNEQUAL_TOLERANCE * true


def draw(kind: str, number: int) -> tuple[Any, int]:
    """Features of 200 to 650 images in 16 dimensions, and the number of groups."""
    rng = np.random.default_rng([number, len(kind)])
    sizes = np.zeros(0, int)
    while not 200 <= sizes.sum() <= 650:
        groups = 1 if kind == "one group" else rng.integers(3, 11)
        sizes = np.exp(rng.uniform(np.log(8), np.log(300), groups)).astype(int)
        if kind != "unequal":
            sizes = np.full(groups, rng.integers(200, 651) // groups)
    centres = rng.normal(size=(len(sizes), 16)) * rng.uniform(0.85, 1.3)
    features = np.repeat(centres, sizes, axis=0) + rng.normal(size=(sizes.sum(), 16))
    return features.astype(np.float32), len(sizes)


def plant(clusters: int, images: int, spread: float, sizes: str, seed: int) -> tuple[Any, Any, float]:
    """Features (N, DIM), labels (N,), and the share that the nearest true centre gets right."""
    rng = np.random.default_rng([seed, clusters])
    centres = rng.normal(size=(clusters, DIM)) * spread
    shares = np.full(clusters, 1 / clusters) if sizes == "equal" else rng.dirichlet(np.full(clusters, CONCENTRATION))
    labels = rng.choice(clusters, images, p=shares)
    features = (centres[labels] + rng.normal(size=(images, DIM))).astype(np.float32)
    nearest = ((features[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    return features, labels, round(float((nearest == labels).mean()), 3)


def measure(features: Any, true: int, settings: dict[str, Any], has_curve: bool = True) -> dict[str, Any]:
    """The choice, its range, the choice before small groups are searched (`before`), and the curves."""
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
    columns = ("num_clusters", "score", "silhouette", "gap", "recurring")
    found = {
        "true": true,
        "num_clusters": choice.num_clusters,
        "range": [choice.low, choice.high],
        "before": choose(choice.curve, kept_share=lambda coarse, fine: 0.0).num_clusters,
        "seconds": round(time.monotonic() - began, 1),
    }
    curve = {"curve": [[round(row[column], 4) for column in columns] for row in choice.by_count().to_pylist()]}
    return found | (curve if has_curve else {})


def say(name: str, found: dict[str, Any]) -> None:
    low, high = found["range"]
    text = f"{name:38} true {found['true']:3}   chosen {found['num_clusters']:3}   range {low} to {high}"
    share = found.get("best_possible_accuracy")
    text += f"   nearest true centre right: {share:.1%}" if share is not None else ""
    text += f"   before the search: {found['before']}" if found["before"] != found["num_clusters"] else ""
    text += f"   sizes {found['smallest']} to {found['largest']}" if "smallest" in found else ""
    print(f"{text}   {found['seconds']:.0f} s", flush=True)
