"""Corrections from the file that the page saves to new assignments, a new classifier, a new page and the next run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import icce_ray
from icce_ray.apply import apply_corrections
from icce_ray.config import Config
from icce_ray.errors import InputError
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_pipeline
from tests.integration.stages import artifact

COLORS = {"red": (220, 40, 30), "green": (40, 190, 60), "blue": (30, 60, 210)}
pytestmark = pytest.mark.slow


def write_images(folder: Path, numbers: range, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            pixels = np.clip(np.array(color) + rng.normal(0, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")


def settings(folder: Path) -> Config:
    return Config.model_validate(
        {
            "images": {"uri": str(folder / "images")},
            "num_clusters": 3,
            "output": str(folder / "out"),
            "embed": {"backbone": "pixels", "image_size": 4},
            "sample": {"duplicate_threshold": None},
            "neighbors": {"min_neighbors": 5},
            "heads": {"num_heads": 3, "num_epochs": 8, "hidden_dim": 16, "bottleneck_dim": 8, "learning_rate": 5e-3},
            "consensus": {"methods": ["vote"]},
            "classifier": {"num_iterations": 200},
        }
    )


def clusters(config: Config) -> dict[str, int]:
    assign = artifact(config, "assign")
    table = pa.concat_tables([assign.read_table(name) for name in assign.part_names("assignments/")])
    return {
        uri.split("images/")[1]: k
        for uri, k in zip(table["uri"].to_pylist(), table["cluster"].to_pylist(), strict=True)
    }


def saved(config: Config, changes: dict[str, Any], path: Path) -> Path:
    core = next(
        line
        for line in (artifact(config, "report").folder.read_bytes("report.html").decode().splitlines())
        if line.startswith("const CORE = ")
    )
    made_for = json.loads(core.removeprefix("const CORE = ").rstrip(";"))["made_for"]
    path.write_text(json.dumps({"format": 1, "made_for": made_for, **changes}))
    return path


def test_corrections_make_a_new_result_that_the_next_run_keeps(tmp_path: Path) -> None:
    write_images(tmp_path / "images", range(20))
    config = settings(tmp_path)
    run_pipeline(config, quiet=True)
    before = clusters(config)
    of = {name: before[f"{name}/05.png"] for name in COLORS}
    assert len(set(of.values())) == 3
    prefix = str(tmp_path / "images")
    changes = {
        "clusters": [{"cluster": of["red"], "merge_into": of["green"]}, {"cluster": of["green"], "name": "warm"},
                     {"cluster": 3, "is_new": True}],
        "images": [{"uri": f"{prefix}/blue/{n:02d}.png", "cluster": 3} for n in range(8)]
        + [{"uri": f"{prefix}/red/01.png", "cluster": None}, {"uri": "/gone.png", "cluster": 0}],
    }  # fmt: skip
    file = saved(config, changes, tmp_path / "corrections.json")
    old = {stage: artifact(config, stage).fingerprint for stage in ("consensus", "classifier", "assign", "report")}
    result = apply_corrections(tmp_path / "out", file, quiet=True)

    after = clusters(config)
    assert {after[f"red/{n:02d}.png"] for n in range(20) if n != 1} == {of["green"]}
    assert after["red/01.png"] == -1
    assert {after[f"blue/{n:02d}.png"] for n in range(8)} == {3}
    assert {after[f"blue/{n:02d}.png"] for n in range(8, 20)} == {of["blue"]}
    corrected = artifact(config, "corrections")
    assert {name: corrected.metrics[name] for name in ("num_moved", "num_dropped", "num_merged", "num_new")} == {
        "num_moved": 8, "num_dropped": 1, "num_merged": 1, "num_new": 1
    }  # fmt: skip
    assert corrected.metrics["num_unknown"] == 1
    for stage in ("classifier", "assign", "report"):
        made = artifact(config, stage)
        assert made.fingerprint != old[stage]
        assert made.manifest.inputs["corrections"] == corrected.fingerprint
    assert artifact(config, "consensus").fingerprint == old["consensus"]
    model = icce_ray.load(result.model)
    found = model.predict([f"{prefix}/red/03.png", f"{prefix}/green/03.png"])
    assert found.cluster.tolist() == [of["green"]] * 2
    assert result.report.startswith(artifact(config, "report").folder.uri)

    # The same command again makes nothing.
    again = run_pipeline(config, quiet=True)
    assert set(again.finished_before) == set(again.seconds)

    # New images: another clustering with other numbers, in which the corrections follow their images.
    write_images(tmp_path / "images", range(20, 26), seed=1)
    run_pipeline(config, quiet=True)
    newest = clusters(config)
    assert artifact(config, "consensus").fingerprint != old["consensus"]
    assert artifact(config, "corrections").metrics["not_kept"] == []
    warm = newest["green/05.png"]
    assert {
        newest[f"{name}/{n:02d}.png"] for name in ("red", "green") for n in range(26) if (name, n) != ("red", 1)
    } == {warm}
    assert newest["red/01.png"] == -1
    assert {newest[f"blue/{n:02d}.png"] for n in range(8)} == {3}
    # Corrections of a run with other settings are not taken.
    assert [step.name for step in plan(config.with_num_clusters(4))].count("corrections") == 0
    assert [step.name for step in plan(config.model_copy(update={"corrections": "none"}))].count("corrections") == 0


def test_a_run_without_a_consensus_cannot_be_corrected(tmp_path: Path) -> None:
    file = tmp_path / "corrections.json"
    file.write_text(json.dumps({"format": 1, "made_for": {"consensus": "c", "num_clusters": 2}}))
    with pytest.raises(InputError, match="there is no such run"):
        apply_corrections(tmp_path, file, quiet=True)
