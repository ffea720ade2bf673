"""The built-in demo: scikit-learn's 1,797 handwritten digits (8 x 8 pixels) as PNG files, and a config for them."""

import os
from pathlib import Path
from typing import Any

import numpy as np

DEMO_IMAGES = "demo/images"
DEMO_OUTPUT = "demo/output"
DIGITS_MAX = 16.0


def demo_config() -> dict[str, Any]:
    """The demo's settings. Folders are relative to the working directory; the labels are for evaluation only."""
    return {
        "images": {"uri": DEMO_IMAGES},
        "num_clusters": 10,
        "output": DEMO_OUTPUT,
        "embed": {"backbone": "pixels", "image_size": 8, "grayscale": True},
        "heads": {"num_heads": 16, "num_epochs": 75},
        "evaluate": {"labels": "folder"},
        "report": {"title": "Handwritten digits"},
    }


def write_demo_images(folder: str | Path) -> int:
    """Write the digits as ``<folder>/<digit>/<number>.png``, 8-bit grey. Existing files are kept. Returns the number of
    images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255.0 / DIGITS_MAX)).astype(np.uint8)
    for digit in range(10):
        (Path(folder) / str(digit)).mkdir(parents=True, exist_ok=True)
    for number, (image, digit) in enumerate(zip(levels, digits.target, strict=True)):
        path = Path(folder) / str(digit) / f"{number:04d}.png"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            Image.fromarray(image).save(unfinished, format="PNG")
            unfinished.replace(path)
    return len(levels)
