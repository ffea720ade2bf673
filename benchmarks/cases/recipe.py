"""Whether the defaults still stand: one setting at a time around them, on one half of the sets; the other half reports.

A run is the whole of `accuracy`'s icce: neighbours, heads, consensus with its choice on the graph. SEARCHED are the
sets that constants were chosen on, but for the weak ones; REPORTED decides nothing, and is measured for the default and
for the values in `reported`. Sets with equal classes count by ACC, the others by ARI. With `results`, a file of JSON
lines, a run goes on where another one stopped.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cases import accuracy, datasets
from icce_ray.config import HeadsConfig, NeighborsConfig

SEARCHED = tuple(name for name in accuracy.CHOSEN_ON if not name.startswith("weak"))
REPORTED = tuple(name for name in accuracy.SETTINGS["datasets"] if name not in accuracy.CHOSEN_ON)

SETTINGS: dict[str, Any] = {
    "max_images": 1000,
    "num_heads": 8,
    "num_epochs": 30,
    "seeds": [0, 1],
    "values": {
        "num_epochs": [15, 60],
        "num_heads": [4, 16],
        "learning_rate": [1.5e-4, 1.5e-3],
        "min_neighbors": [10, 40],
        "similarity_threshold": [None],
        "input_share": [0.25, 1.0],
    },
    "reported": [],
    "results": None,
}
"""`values`: what is tried beside the default. `reported`: rows, such as `num_heads=16`, for the other half too."""

DEFAULT = "default"
NOISE = 2.0
"""Standard errors of the mean gain by which a value must be better to become the default."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    kept = Path(settings["results"]) if settings["results"] else None
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    found = {(one["row"], one["set"], one["seed"]): one for one in map(json.loads, lines)}
    tried = {f"{key}={value}": {key: value} for key, values in settings["values"].items() for value in values}
    rows = {DEFAULT: {}} | tried
    todo = [*product(settings["seeds"], rows, SEARCHED)]
    todo += product(settings["seeds"], [DEFAULT, *settings["reported"]], REPORTED)
    for seed, row, name in todo:
        data = datasets.load(name, settings["max_images"])
        if data is None:
            print(f"{name:21} left out: its files are not in {datasets.data_folder()}")
        elif (row, name, seed) not in found:
            scores = found.get((DEFAULT, name, seed)) if _same_inputs(rows[row], data[0].shape[1]) else None
            scores = scores or _measure(*data, rows[row], seed, settings)
            found[row, name, seed] = scores | {"row": row, "set": name, "seed": seed}
            print(f"  seed {seed} {row:26} {name:21} {scores['acc']:5.1f} {scores['ari']:5.1f}", flush=True)
            if kept:
                with kept.open("a") as file:
                    file.write(json.dumps(found[row, name, seed]) + "\n")
    return report(found, rows)


def _measure(
    features: datasets.Floats, labels: datasets.Labels, given: dict[str, Any], seed: int, settings: dict[str, Any]
) -> dict[str, float]:
    heads = {key: value for key, value in given.items() if key in HeadsConfig.model_fields}
    numbers = {key: heads.pop(key) for key in ("num_heads", "num_epochs") if key in heads}
    neighbors = {key: value for key, value in given.items() if key in NeighborsConfig.model_fields}
    with_value = settings | numbers | {"heads": heads, "neighbors": neighbors}
    return accuracy.measure(features, labels, "icce", seed, with_value)["icce"]


def _same_inputs(given: dict[str, Any], dim: int) -> bool:
    """Whether the share of inputs is the default's in effect: a head sees at least 32 dimensions."""
    share = given.get("input_share")
    return share is not None and HeadsConfig(input_share=share).num_inputs(dim) == HeadsConfig().num_inputs(dim)


def report(
    found: dict[tuple[str, str, int], dict[str, Any]], rows: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Per row and half: the mean over sets, and the gain on the default over the runs that both have."""
    figures: dict[str, Any] = {}
    bounds = {}
    for half, names in (("searched", SEARCHED), ("reported", REPORTED)):
        print(f"{half}: {', '.join(names)}")
        for row in rows:
            gains = {
                (name, seed): _score(one) - _score(found[DEFAULT, name, seed])
                for (one_row, name, seed), one in found.items()
                if one_row == row and name in names and (DEFAULT, name, seed) in found
            }
            if not gains:
                continue
            sets = {name: [gain for (of, _), gain in gains.items() if of == name] for name in names}
            means = {name: float(np.mean(values)) for name, values in sets.items() if values}
            seconds = sum(found[row, name, seed]["seconds"] for name, seed in gains)
            of_default = sum(found[DEFAULT, name, seed]["seconds"] for name, seed in gains)
            mean = float(np.mean([_score(found[row, name, seed]) for name, seed in gains]))
            # The error of a difference by the spread of the default over seeds: sets differ by more, but they are not
            # drawn.
            of_seeds = {n: [_score(one) for (r, of, _), one in found.items() if (r, of) == (DEFAULT, n)] for n in means}
            spread = [2 * np.var(of_seeds[name], ddof=1) / len(sets[name]) for name in means]
            error = float(np.sqrt(np.sum(spread)) / len(means))
            gain = float(np.mean(list(means.values())))
            figures[f"{half}, {row}"] = {
                "mean": mean, "gain": gain, "error": error, "by_set": means, "runs": len(gains),
                "time": seconds / of_default,
            }  # fmt: skip
            each = " ".join(f"{name} {value:+.1f}" for name, value in means.items()) if row != DEFAULT else ""
            print(
                f"  {row:26} {mean:6.2f} {gain:+6.2f} ±{error:4.2f}, {len(gains):2} runs, "
                f"time x{seconds / of_default:4.2f}  {each}"
            )
            if half == "searched" and row != DEFAULT:
                bounds[f"{row} is not better than the default beyond the noise ({gain:+.2f} ±{error:.2f})"] = not (
                    gain > NOISE * error
                )
    return figures, bounds


def _score(one: dict[str, Any]) -> float:
    return float(one["acc"] if one["set"] in datasets.BALANCED else one["ari"])
