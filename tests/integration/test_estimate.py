"""The command that estimates what a run will take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.cli import main


@pytest.mark.slow
def test_an_estimate_embeds_a_sample_and_leaves_only_the_listing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(90):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    settings = {
        "images": {"uri": str(tmp_path / "photos")},
        "output": str(tmp_path / "out"),
        "num_clusters": 2,
        "embed": {"backbone": "pixels", "image_size": 8},
        "heads": {"num_heads": 4},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["estimate", str(tmp_path / "run.yaml"), "--samples", "40", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert (found["num_images"], found["num_sampled"], found["sampled_errors"]) == (90, 40, 0)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages)[:3] == ["images", "embed", "sample"]
    assert {"neighbors", "method", "consensus", "classifier", "assign", "report"} <= set(stages)
    assert min(stage["seconds"] for stage in stages.values()) > 0
    assert stages["embed"]["seconds"] > 90 / found["images_per_s"]
    assert stages["embed"]["disk_bytes"] == pytest.approx(90 * 3 * 8 * 8 * 2, rel=0.1)
    memory = {name: stage["memory_bytes"] for name, stage in stages.items()}
    # If an earlier test has raised the peak memory of this process, the embedding adds nothing to it.
    assert memory["images"] <= memory["embed"] < memory["assign"] < min(memory["method"], memory["neighbors"])
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert said.startswith("40 of 90 images embedded, 0 failed")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images"]
