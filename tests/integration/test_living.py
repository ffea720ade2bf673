"""A collection that lives: a refit after a refresh keeps the numbers of the clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Artifact

COLORS = {"red": (220, 40, 30), "green": (40, 190, 60), "blue": (30, 60, 210), "grey": (120, 120, 120)}
pytestmark = pytest.mark.slow


def write_images(folder: Path, colors: list[str], numbers: range, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in colors:
        for number in numbers:
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}-{name}.png")


def settings(folder: Path, num_clusters: int = 3, seed: int = 0) -> Config:
    return Config.model_validate(
        {
            "images": {"uri": str(folder / "images")},
            "num_clusters": num_clusters,
            "seed": seed,
            "output": str(folder / "out"),
            "method": "kmeans",
            "embed": {"backbone": "pixels", "image_size": 4},
            "classifier": {"num_iterations": 100},
        }
    )


def artifact(config: Config, stage: str) -> Artifact:
    found = next(step.artifact for step in plan(config) if step.name == stage)
    assert found is not None
    return found


def clusters(config: Config) -> dict[str, int]:
    assign = artifact(config, "assign")
    table = pa.concat_tables([assign.read_table(name) for name in assign.part_names("assignments/")])
    names = [uri.rpartition("/")[2] for uri in table["uri"].to_pylist()]
    return dict(zip(names, table["cluster"].to_pylist(), strict=True))


@pytest.mark.parametrize("refresh", [True, False])
def test_a_refit_keeps_the_numbers_and_names_the_new_cluster(tmp_path: Path, refresh: bool) -> None:
    write_images(tmp_path / "images", ["red", "green", "blue"], range(10, 30))
    config = settings(tmp_path)
    first = run_pipeline(config, quiet=True)
    before = clusters(config)
    assert "numbers" not in artifact(config, "consensus").metrics
    # Names that sort first: without a refresh, all ids change.
    write_images(tmp_path / "images", ["grey"], range(8), seed=1)
    grown = settings(tmp_path, num_clusters=4)
    second = run_pipeline(grown, refresh=refresh, quiet=True)
    after = clusters(grown)
    assert {name: after[name] for name in before} == before
    assert {after[f"{number:02d}-grey.png"] for number in range(8)} == {3}
    changes = artifact(grown, "consensus").metrics["numbers"]
    assert changes["run"] == first.run
    assert changes["num_kept"] == 3
    assert changes["new"] == [3]
    # The same again is the same run.
    again = run_pipeline(grown, quiet=True)
    assert again.run == second.run
    assert len(again.finished_before) == len(again.seconds)
