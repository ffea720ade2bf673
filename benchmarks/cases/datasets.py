"""Feature sets with labels: scikit-learn's digits, real ones of a folder elsewhere (ICCE_TEST_DATA), cuts of these with
unequal classes, and planted Gaussian groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]

FILES = {
    "cifar10_mix": ("cifar10_test_mixpca256.npy", "cifar10_test_labels.npy"),
    "cifar10_v1": ("cifar10_test_v1.npy", "cifar10_test_labels.npy"),
    "cifar10_lite2": ("cifar10_lite2_pca256.npy", "cifar10_lite2_labels.npy"),
    "imagenette": ("imagenette_lite2_pca256.npy", "imagenette_labels.npy"),
    "imagenette_raw": ("imagenette_lite2.npy", "imagenette_labels.npy"),
    "trashnet": ("trashnet_lite2_pca256.npy", "trashnet_labels.npy"),
    "trashnet_raw": ("trashnet_lite2.npy", "trashnet_labels.npy"),
    "fmnist_2000": ("fmnist_2000_v1.npy", "fmnist_2000_labels.npy"),
}
NAMES = ("digits", "cifar10_mix", "cifar10_v1", "fmnist_2000")
"""The sets of the cases that choose the trainer's settings."""

CUTS = {
    "digits_1to10": ("digits", 10.0),
    "digits_1to50": ("digits", 50.0),
    "imagenette_1to20": ("imagenette", 20.0),
    "imagenette_halves": ("imagenette", None),
    "cifar10_lite2_1to100": ("cifar10_lite2", 100.0),
    "cifar10_mix_1to20": ("cifar10_mix", 20.0),
}
"""A set, and how many times larger its largest class is than its smallest; None: half of the classes keep a tenth."""

PLANTED: dict[str, tuple[Sequence[int], int, float]] = {
    "planted_5": ((260, 80, 30, 12, 8), 16, 0.95),
    "planted_15": (tuple(np.geomspace(400, 18, 15).astype(int)), 32, 1.1),
    "planted_one_large": ((900, *[60] * 14), 32, 1.1),
    "planted_two_sizes": ((300,) * 4 + (25,) * 6, 24, 1.1),
    "weak_100": (tuple(np.geomspace(200, 4, 100).astype(int)), 48, 0.48),
    "weak_200": ((25,) * 200, 48, 0.62),
}
"""Sizes of the groups, dimensions, and deviation of the groups' centres; that of the images about them is 1."""

BALANCED = ("digits", "imagenette", "cifar10_lite2", "cifar10_mix", "weak_200")
UNEQUAL = ("trashnet", *CUTS, *(name for name in PLANTED if name != "weak_200"))


def data_folder() -> Path:
    """ICCE_TEST_DATA, else ``data`` in the working directory."""
    return Path(os.environ.get("ICCE_TEST_DATA", "data"))


def load(name: str, max_images: int | None = None) -> tuple[Floats, Labels] | None:
    """Features (N, D) and labels (N,), or None if the files do not exist. Larger sets are sampled at random."""
    data = _planted(*PLANTED[name]) if name in PLANTED else _cut(*CUTS[name]) if name in CUTS else _read(name)
    if data is None or max_images is None or len(data[1]) <= max_images:
        return data
    rows = np.sort(np.random.default_rng(0).permutation(len(data[1]))[:max_images])
    return data[0][rows], data[1][rows]


def _read(name: str) -> tuple[Floats, Labels] | None:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        # As read from the demo's PNG files: 8 bits per pixel, scaled to 0..1.
        return (np.round(digits.data * (255 / 16)) / 255).astype(np.float16), digits.target.astype(np.int64)
    features, labels = (data_folder() / file for file in FILES[name])
    if not features.exists() or not labels.exists():
        return None
    return np.load(features), np.load(labels).astype(np.int64)


def _cut(name: str, ratio: float | None) -> tuple[Floats, Labels] | None:
    """A random part of each class, the classes in a random order: sizes fall geometrically, or by a step."""
    data = _read(name)
    if data is None:
        return None
    features, labels = data
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.unique(labels))
    largest = np.bincount(labels).min()
    shares = (
        np.where(np.arange(len(classes)) % 2, 0.1, 1.0) if ratio is None else np.geomspace(1, 1 / ratio, len(classes))
    )
    kept = [
        rng.permutation(np.flatnonzero(labels == label))[: round(share * largest)]
        for label, share in zip(classes, shares, strict=True)
    ]
    rows = np.sort(np.concatenate(kept))
    return features[rows], labels[rows]


def _planted(sizes: Sequence[int], dim: int, spread: float) -> tuple[Floats, Labels]:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = rng.normal(size=(len(sizes), dim)) * spread
    return (centres[labels] + rng.normal(size=(len(labels), dim))).astype(np.float32), labels
