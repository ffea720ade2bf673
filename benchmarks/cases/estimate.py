"""What ``icce-ray estimate`` says of time, memory and storage of every stage, against the run that follows it.

Both are commands of their own, as for a user. The memory is that of the run's processes together, sampled; a stage gets
the samples of its time. By default on the demo; a config of your own: ``--set config=FILE``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cases.process_memory import MemoryWatch
from icce_ray.config import load_config
from icce_ray.demo import demo_config, write_demo_images
from icce_ray.pipeline.plan import finished_artifacts, plan

SETTINGS: dict[str, Any] = {"config": None, "max_ratio": 2.0, "small_s": 3.0, "small_bytes": 1_000_000}
"""Stages that take less than `small_s` or `small_bytes` are shown, but bound only as part of the sum."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    with tempfile.TemporaryDirectory(prefix="icce_ray-estimate-") as folder:
        rows = compare(settings["config"] or write_demo(Path(folder)))
    together = {
        what: [total(row[what][side] for row in rows.values()) for side in (0, 1)]
        for what, total in (("seconds", sum), ("memory_mb", max), ("disk_mb", sum))
    }
    small = {"seconds": settings["small_s"], "disk_mb": settings["small_bytes"] / 1e6, "memory_mb": 0.0}
    worst = dict.fromkeys(small, ("", 1.0))
    print("| stage | seconds: said / taken | MB of memory | MB of storage |\n|---|---|---|---|")
    for name, row in {**rows, "together": together}.items():
        print(
            f"| {name} | " + " | ".join(f"{said:.3g} / {taken:.3g}" for said, taken in row.values()) + " |", flush=True
        )
        for what, (expected, taken) in row.items():
            if max(expected, taken) >= small[what]:
                ratio = max(expected, taken) / max(min(expected, taken), 1e-9)
                worst[what] = max(worst[what], (name, ratio), key=lambda pair: pair[1])
    return {"stages": rows, "together": together}, {
        f"{what} within a factor of {settings['max_ratio']:g} (worst: {name}, {ratio:.2f})": ratio
        <= settings["max_ratio"]
        for what, (name, ratio) in worst.items()
    }


def compare(file: str) -> dict[str, dict[str, list[float]]]:
    """By stage: seconds, memory and storage, each as said and as taken."""
    said = json.loads(command("icce_ray", "estimate", file, "--json").splitlines()[-1])
    with MemoryWatch() as memory:
        command("icce_ray", "run", file)
    own = memory.seen[0][1]  # the benchmark's
    artifacts = finished_artifacts(plan(load_config(file)))
    rows: dict[str, dict[str, list[float]]] = {}
    for stage in said["stages"]:
        if stage["stage"] == "images":  # the run finds the listing that the estimate made
            continue
        artifact = artifacts[stage["stage"]]
        assert artifact.folder.local_path is not None
        ended = (artifact.folder.local_path / "manifest.json").stat().st_mtime
        taken = artifact.manifest.seconds
        rows[stage["stage"]] = {
            "seconds": [stage["seconds"], taken],
            "memory_mb": [stage["memory_bytes"] / 1e6, (memory.peak(ended - taken, ended) - own) / 1e6],
            "disk_mb": [stage["disk_bytes"] / 1e6, artifact.num_bytes() / 1e6],
        }
    return rows


def write_demo(folder: Path) -> str:
    write_demo_images(folder / "images")
    config = {**demo_config(), "images": {"uri": str(folder / "images")}, "output": str(folder / "output")}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


def command(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout
