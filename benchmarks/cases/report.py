"""The page of a run: time to make it, its size, and how it works in a real Chromium.

Planted embeddings are clustered by k-means; the images that they name are a few hundred small JPEGs under many names.
`shown` is `report.max_images`: above it, the page shows a sample of each cluster. The frame time is that of zooming
into the map, drawn by the CPU, without waiting for the screen.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cases.process_memory import MemoryWatch, tree_bytes
from icce_ray.config import Config
from icce_ray.pipeline.run import run_pipeline

SETTINGS: dict[str, Any] = {
    "sizes": [[100, 20_000], [10_000, 20_000], [100_000, 100_000]],
    "dim": 32,
    "num_clusters": 50,
    "pictures": 500,
}
MAX_FRAME_MS, MAX_READY_S = 50.0, 5.0
FRAMES = """async () => {
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect(), spent = [];
  for (let i = 0; i < 60; i++) {
    const began = performance.now();
    canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: i < 30 ? -20 : 20, cancelable: true,
      clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}));
    await new Promise(requestAnimationFrame);
    spent.push(performance.now() - began);
  }
  return spent.sort((a, b) => a - b);
}"""

FIRST_PICTURE = """async () => {
  let address = null;
  while (!address) {
    await new Promise(requestAnimationFrame);
    address = document.querySelector(".picture[style]")?.style.backgroundImage.slice(5, -2);
  }
  const image = new Image();
  image.src = address;
  await image.decode();
}"""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    figures: dict[str, Any] = {}
    for num_images, shown in settings["sizes"]:
        with tempfile.TemporaryDirectory(prefix="icce_ray-report-") as place:
            page, made = make_page(Path(place), num_images, shown, settings)
            found = {"num_images": num_images, **made, **in_browser(page)}
        print(", ".join(f"{name} {value:g}" for name, value in found.items()), flush=True)
        figures[f"{num_images}"] = found
    frame, ready = (max(found[name] for found in figures.values()) for name in ("frame_ms", "ready_s"))
    return figures, {
        f"the map is drawn in {MAX_FRAME_MS:g} ms (slowest: {frame:.0f})": frame <= MAX_FRAME_MS,
        f"the page opens in {MAX_READY_S:g} s (slowest: {ready:.1f})": ready <= MAX_READY_S,
    }


def make_page(place: Path, num_images: int, shown: int, settings: dict[str, Any]) -> tuple[Path, dict[str, float]]:
    """The page, and what it took to make it."""
    rng = np.random.default_rng(0)
    pictures = min(settings["pictures"], num_images)
    (place / "originals").mkdir()
    (place / "images").mkdir()
    for number in range(pictures):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(place / "originals" / f"{number}.jpg")
    uris = [str(place / "images" / f"{number:07d}.jpg") for number in range(num_images)]
    for number, uri in enumerate(uris):
        os.link(place / "originals" / f"{number % pictures}.jpg", uri)
    num_clusters = min(settings["num_clusters"], num_images // 10)
    centres = rng.normal(0, 1, (num_clusters, settings["dim"]))
    features = centres[rng.integers(0, num_clusters, num_images)] + rng.normal(0, 0.7, (num_images, settings["dim"]))
    column = pa.FixedSizeListArray.from_arrays(features.astype(np.float32).ravel(), settings["dim"])
    pq.write_table(pa.table({"embedding": column, "uri": uris}), place / "features.parquet")
    config = Config.model_validate({
        "embeddings": {"uri": str(place / "features.parquet")},
        "num_clusters": num_clusters,
        "method": "kmeans",
        "sample": {"max_images": 20_000, "duplicate_threshold": None},
        "classifier": {"num_iterations": 100},
        "report": {"max_images": shown, "map": "pca"},
        "output": str(place / "out"),
    })  # fmt: skip
    with MemoryWatch() as memory:
        result = run_pipeline(config, quiet=True)
    page = Path(result.report.removeprefix("file://"))
    sizes = [file.stat().st_size for file in page.parent.rglob("*") if file.name != "manifest.json"]
    return page, {
        "shown": min(shown, num_images),
        "report_s": result.seconds["report"],
        "peak_mb": round(memory.peak() / 1e6),
        "run_s": round(sum(result.seconds.values()), 1),
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "folder_mb": round(sum(sizes) / 1e6, 1),
        "files": len(sizes),
    }


def in_browser(page: Path) -> dict[str, float]:
    """How fast the page opens and draws its map, and the memory that it takes."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-frame-rate-limit", "--disable-gpu-vsync"]
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        tab = browser.new_context(viewport={"width": 1400, "height": 900}, bypass_csp=True).new_page()
        tab.set_default_timeout(120_000)
        began = time.monotonic()
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]")
        ready_s = time.monotonic() - began
        tab.evaluate(FIRST_PICTURE)
        picture_s = time.monotonic() - began
        began = time.monotonic()
        tab.evaluate("location.hash = 'map'")
        tab.wait_for_function("document.querySelector('canvas')?.width > 300")
        map_s = time.monotonic() - began
        frames = tab.evaluate(FRAMES)
        heap = tab.context.new_cdp_session(tab).send("Runtime.getHeapUsage")
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        renderers = [process["id"] for process in processes if process["type"] == "renderer"]
        memory = sum(tree_bytes(pid) for pid in renderers)
        browser.close()
    return {
        "ready_s": round(ready_s, 2),
        "picture_s": round(picture_s, 2),
        "map_s": round(map_s, 2),
        "frame_ms": round(float(np.median(frames)), 1),
        "worst_frame_ms": round(float(frames[-1]), 1),
        "heap_mb": round((heap["usedSize"] + heap.get("backingStorageSize", 0)) / 1e6, 1),
        "renderer_mb": round(memory / 1e6),
    }
