"""CPU seconds of a whole run over a small folder, all its processes together, and of the same command again.

40 digits, by their pixels, with 4 heads: what is measured is mostly the start of processes and their imports. With
``--set other=FOLDER``, a checkout of other code runs in turn with this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SETTINGS: dict[str, Any] = {"rounds": 3, "num_images": 40, "other": None, "processes": False}
HERE = Path(__file__).resolve().parents[2]
MARK = "ICCE_BENCHMARK_RUN"
"""Environment variable by which the processes of a run are known: they inherit it, whoever their parent is."""
POLL_S = 0.03
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MAX_CPU_SECONDS, MAX_CPU_SECONDS_AGAIN = 15.0, 1.0


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    checkouts = {"this": HERE} | ({"other": Path(settings["other"])} if settings["other"] else {})
    cost: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    labels = set()
    with tempfile.TemporaryDirectory(prefix="icce_ray-small-") as place:
        write_images(Path(place), settings["num_images"])
        for number in range(settings["rounds"]):
            for name, checkout in checkouts.items():
                config = write_config(Path(place), f"{name}-{number}")
                first, again = run_job(checkout, config), run_job(checkout, config)
                cost[name].append([first.cpu_seconds, first.wall_seconds, len(first.cpu_s), again.cpu_seconds])
                print(
                    f"{name:6} {first.cpu_seconds:6.1f} CPU s in {len(first.cpu_s)} processes, "
                    f"{first.wall_seconds:5.1f} s; again {again.cpu_seconds:5.2f} CPU s",
                    flush=True,
                )
                if settings["processes"]:
                    first.print_processes()
                (found,) = Path(place).glob(f"{name}-{number}/consensus/*/labels.npy")
                labels.add(found.read_bytes())
    figures = {}
    for name, runs in cost.items():
        medians = np.median(runs, axis=0).round(2).tolist()
        keys = ("cpu_seconds", "wall_seconds", "num_processes", "cpu_seconds_again")
        figures |= {f"{name}_{key}": value for key, value in zip(keys, medians, strict=True)}
    return figures, {
        f"below {MAX_CPU_SECONDS:g} CPU seconds": figures["this_cpu_seconds"] < MAX_CPU_SECONDS,
        f"below {MAX_CPU_SECONDS_AGAIN:g} CPU second again": figures["this_cpu_seconds_again"] < MAX_CPU_SECONDS_AGAIN,
        "equal labels": len(labels) == 1,
    }


def write_images(folder: Path, num_images: int) -> None:
    digits = load_digits(n_class=4)
    for number, (image, digit) in enumerate(zip(digits.images[:num_images], digits.target, strict=False)):
        path = folder / "images" / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)


def write_config(folder: Path, name: str) -> Path:
    config = {
        "images": {"uri": str(folder / "images")},
        "num_clusters": 4,
        "output": str(folder / name),
        "embed": {"backbone": "pixels", "image_size": 8, "grayscale": True},
        "heads": {"num_heads": 4, "num_epochs": 5},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


@dataclass
class Cost:
    """CPU seconds of each process of one run, by what it is and its id."""

    cpu_s: dict[tuple[str, int], float] = field(default_factory=dict)
    wall_seconds: float = 0.0

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu_s.values())

    def print_processes(self) -> None:
        for (name, _), seconds in sorted(self.cpu_s.items(), key=lambda item: -item[1]):
            print(f"       {seconds:6.2f} {name}")


def run_job(checkout: Path, config: Path) -> Cost:
    """Run the job in a process of its own and add up its processes until the last one is gone."""
    cost, mark = Cost(), uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(checkout)}
    environment.pop("RAY_ADDRESS", None)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_S):
            measure(cost, mark)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    command = [sys.executable, "-m", "icce_ray.run", str(config), "--quiet"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    cost.wall_seconds = time.monotonic() - began
    deadline = began + cost.wall_seconds + 10
    while measure(cost, mark) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    finished.set()
    watcher.join()
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr}")
    return cost


_marks: dict[tuple[int, str], str | None] = {}
"""Mark in the environment of each process, by its id and start time."""


def measure(cost: Cost, mark: str) -> int:
    """Note what the run's processes have used so far; how many there are."""
    alive = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (path / "stat").read_text().rpartition(")")
            values = rest.split()
            key = (int(path.name), values[19])
            if _marks.get(key) is None:
                environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                _marks[key] = next((line[len(MARK) + 1 :] for line in environment if line.startswith(f"{MARK}=")), None)
            if _marks[key] != mark:
                continue
            process = (name_of(path) or name.partition("(")[2], int(path.name))
        except (OSError, IndexError):
            continue
        alive += values[0] != "Z"
        same = next((key for key in cost.cpu_s if key[1] == process[1]), process)
        cost.cpu_s[same] = (int(values[11]) + int(values[12])) * TICK_S
    return alive


def name_of(path: Path) -> str:
    """What a process is, shortly."""
    words = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    return " ".join(word.rpartition("/")[2] for word in words[:3])[:100]
