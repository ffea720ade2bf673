"""What each preset sets where the config leaves it open."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "icce": {},
    "temi": {
        "neighbors": {
            "similarity_threshold": None,
            "min_neighbors": 50,
            "max_neighbors": 50,
            "duplicate_threshold": None,
        },
        "heads": {
            "input_norm": "standardize",
            "rotate": False,
            "input_share": 1.0,
            "sinkhorn": False,
            "max_ce_weight": 0.0,
        },
        "consensus": {"methods": ("best_head",), "refine": False},
    },
    "scan": {
        "neighbors": {
            "similarity_threshold": None,
            "min_neighbors": 20,
            "max_neighbors": 20,
            "duplicate_threshold": None,
        },
        "heads": {"loss": "scan", "input_norm": "standardize", "rotate": False, "input_share": 1.0},
        "consensus": {"methods": ("best_head",), "refine": False},
    },
}
"""What a preset sets, by section; everything else is the default. `temi` is arXiv 2303.17896, `scan` the loss of arXiv
2005.12320 on frozen features."""
