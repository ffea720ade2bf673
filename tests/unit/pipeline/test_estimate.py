from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icce_ray.config import Config, build_config
from icce_ray.pipeline import estimate, estimate_sample
from icce_ray.pipeline.pilot import PilotRun
from icce_ray.report.pictures import contact_sheet, load_thumbnails, sheet


def test_the_rate_is_that_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start for 7 s, then embed 8 images per second."""
    times = iter([100.0, 109.0, 110.0, 112.0])
    monkeypatch.setattr(estimate_sample.time, "monotonic", lambda: next(times))
    clock = estimate_sample._Clock(quiet=True)
    for done in (16, 24, 40):
        clock.update(done, 40)
    assert clock.figures() == (7.0, 8.0)


def test_of_a_single_part_only_the_whole_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(estimate_sample.time, "monotonic", lambda: next(times))
    clock = estimate_sample._Clock(quiet=True)
    clock.update(40, 40)
    assert clock.figures() == (0.0, 4.0)
    clock.update(40, 40)  # nothing more was done since
    assert clock.figures() == (0.0, 2.0)


class Pilot:
    """Stands for the pilot: says what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def __call__(self, config: Config, features_nD: Any, **options: Any) -> PilotRun:
        self.asked = {"shape": features_nD.shape, **options}
        seconds = {"sample": 1.0, "neighbors": 2.0, "method": 4 * 3600.0, "assign": 3.0, "report": 1.0}
        return PilotRun(50, 3, seconds, {"neighbors": 1000, "assign": 10}, mean_neighbors=7.0)


def test_every_stage_is_estimated_for_ready_made_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pilot = Pilot()
    monkeypatch.setattr(estimate, "run_pilot", pilot)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32))
    settings = {"embeddings": {"uri": str(tmp_path / "x.npy")}, "num_clusters": 3, "output": str(tmp_path / "out")}
    found = estimate.estimate(build_config(settings, "run.yaml"), num_samples=40, quiet=True)
    assert pilot.asked["shape"] == (40, 8)
    assert pilot.asked["num_images"] == 90
    stages = {stage.stage: stage for stage in found.stages}
    assert list(stages) == ["images", "embed", "sample", "neighbors", "method", "assign", "report"]
    assert stages["embed"].disk_bytes == 90 * 8 * 4
    assert stages["neighbors"].memory_bytes > stages["assign"].memory_bytes > 0
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))
    on_ray = settings | {"resources": {"method": {"num_workers": 2}}}
    larger = estimate.estimate(build_config(on_ray, "run.yaml"), num_samples=40, quiet=True)
    more = {stage.stage: stage.memory_bytes - stages[stage.stage].memory_bytes for stage in larger.stages}
    assert more["method"] - more["neighbors"] == pytest.approx(estimate.WORKER_BYTES, rel=0.2), "another worker"
    assert more["report"] < estimate.WORKER_BYTES / 10
    (hint,) = found.shortcuts
    assert hint.startswith("method takes long. Shorter: fewer heads (heads.num_heads, now 50)")
    text = "\n".join(found.lines())
    assert "40 of 90 images embedded, 0 failed" in text
    assert re.search(r"^method +4 h 0 min ", text, flags=re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images"]


def test_the_page_is_as_large_as_its_thumbnails(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(20):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02d}.png")
    settings = {"images": {"uri": str(tmp_path / "photos")}, "num_clusters": 3, "output": str(tmp_path / "out")}
    config = build_config(settings, "run.yaml")
    listed = estimate.run_stage(config, estimate.plan(config, (estimate.IMAGES,))[0], {}, quiet=True)
    (pictures,) = load_thumbnails([str(path) for path in sorted((tmp_path / "photos").iterdir())])
    row = contact_sheet([("", [picture for picture in pictures if picture is not None][:12])])
    expected = len(sheet(pictures) or b"") + 3 * len(row or b"")
    pilot = PilotRun(20, 3, {}, {}, mean_neighbors=0.0)
    seconds, num_bytes = estimate._page_pictures(estimate.Listing(listed), config, pilot)
    assert num_bytes == expected
    assert seconds > 0
