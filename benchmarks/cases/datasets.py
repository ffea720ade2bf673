"""Real feature sets with labels: scikit-learn's digits, and those of a folder elsewhere (ICCE_TEST_DATA)."""

from __future__ import annotations

import os
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
    "trashnet": ("trashnet_lite2_pca256.npy", "trashnet_labels.npy"),
    "fmnist_2000": ("fmnist_2000_v1.npy", "fmnist_2000_labels.npy"),
}
NAMES = ("digits", "cifar10_mix", "cifar10_v1", "fmnist_2000")
"""Sets that a case measures unless told otherwise."""


def data_folder() -> Path:
    """ICCE_TEST_DATA, else ``shared/data`` beside the repository."""
    given = os.environ.get("ICCE_TEST_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


def load(name: str) -> tuple[Floats, Labels] | None:
    """Features (N, D) float16 and labels (N,), or None if the files do not exist."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        # As read from the demo's PNG files: 8 bits per pixel, scaled to 0..1.
        return (np.round(digits.data * (255 / 16)) / 255).astype(np.float16), digits.target.astype(np.int64)
    features, labels = (data_folder() / file for file in FILES[name])
    if not features.exists() or not labels.exists():
        return None
    return np.load(features), np.load(labels).astype(np.int64)
