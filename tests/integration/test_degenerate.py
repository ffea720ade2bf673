"""Whole runs on collections that hardly have anything to cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Artifact, Folder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("num_images", "num_different"), [(2, 2), (12, 1)], ids=["as many clusters as images", "all images alike"]
)
def test_a_degenerate_collection_has_a_result(tmp_path: Path, num_images: int, num_different: int) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(num_images):
        pixels = np.random.default_rng(number % num_different).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    config = Config(
        images={"uri": str(tmp_path / "photos")},
        num_clusters=2,
        output=str(tmp_path / "out"),
        embed={"backbone": "pixels", "image_size": 8},
        heads={"num_heads": 2, "num_epochs": 2, "warmup_epochs": 1},
        consensus={"methods": ["vote"]},
        classifier={"num_iterations": 20},
    )
    result = run_pipeline(config, quiet=True)
    assert (result.num_images, result.num_errors) == (num_images, 0)
    (folder,) = (tmp_path / "out" / "assign").iterdir()
    assign = Artifact.find(Folder.at(folder))
    assert assign is not None
    rows = [row for name in assign.part_names("assignments/") for row in assign.read_table(name).to_pylist()]
    assert sorted(row["image_id"] for row in rows) == list(range(num_images))
    assert all(np.isfinite(row["consensus_probability"]) and np.isfinite(row["outlier_score"]) for row in rows)
