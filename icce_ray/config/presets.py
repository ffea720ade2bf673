"""Presets: settings by section that fill in what a config leaves open."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # ICCE as published (arXiv 2511.16213; docs/METHOD.md, "Paper recipe and defaults").
    "paper": {
        "sample": {"duplicate_threshold": None},
        "neighbors": {
            "similarity_threshold": 0.3,
            "min_neighbors": 50,
            "max_neighbors": None,
            "center": False,
        },
        "heads": {
            "num_heads": 50,
            "num_epochs": 400,
            "batch_size": 1024,
            "learning_rate": 1e-4,
            "warmup_epochs": 20,
            "input_norm": "batch_norm",
            "rotate": False,
            "input_share": 1.0,
            "balance": 1.0,
            "teacher_momentum": 0.996,
        },
        "consensus": {"methods": ("mcla", "cspa"), "refine": False, "recombine": False},
    },
}
