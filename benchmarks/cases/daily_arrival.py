"""Tomorrow's images: the bytes of the base that are read, and the bytes that are written for each new one, counted.

A run over a base of digits; then a day's images are added to the folder and the listing is refreshed (images and
embeddings only), and other days are labelled with the model. Every read and write of the output goes through `Folder`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits

from cases import show_aim
from icce_ray.assign.new_images import assign_images
from icce_ray.config import Config
from icce_ray.embed.stage import EMBED
from icce_ray.images.stage import IMAGES
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import finished_artifacts, refresh_listing, run_pipeline, run_stages
from icce_ray.store import Artifact, Folder

SETTINGS: dict[str, Any] = {"base": 1040, "refreshed": 250, "day": 250, "small_day": 8}
MAX_READ, MAX_REFRESH_READ, MAX_WRITTEN = 20.0, 60.0, 2.0
"""Bytes for each image of the base (8 of its hash, or all 32 too, and checksums), and for each byte of a new image's
embedding and assignment."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    images = iter((load_digits().images * 15.9).astype(np.uint8))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="icce_ray-daily-") as place:
        folder = Path(place)
        config = Config.model_validate(
            {
                "images": {"uri": str(folder / "images")},
                "num_clusters": 10,
                "output": str(folder / "out"),
                "method": "kmeans",
                "embed": {"backbone": "pixels", "image_size": 24, "grayscale": True},
                "classifier": {"num_iterations": 200},
            }
        )
        write(folder / "images", images, settings["base"], "base")
        run_pipeline(config, quiet=True)
        base = finished_artifacts(plan(config))
        for name in ("day", "small_day"):
            write(folder / name, images, settings[name], name)
            with counted() as (read, written):
                assign_images(folder / "out", images=folder / name, quiet=True)
            figures |= of_day(name, read, written, base, settings["base"])
        write(folder / "images", images, settings["refreshed"], "later")
        refresh_listing(config, quiet=True)
        stages = plan(config, (IMAGES, EMBED))
        artifacts = finished_artifacts(stages)
        with counted() as (read, written):
            run_stages(config, stages, artifacts, quiet=True)
        figures |= of_day("refresh", read, written, base, settings["base"])
        table = pd.read_parquet(folder / "out" / "latest" / "all_images")
        figures["rows_of_all_images"], figures["ids_of_all_images"] = len(table), table["image_id"].nunique()
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}", flush=True)
    show_aim("bytes of the base that a small day reads", "all", f"{figures['small_day_read']:.3g} an image", "0")
    show_aim(
        "bytes that a day writes for each new one",
        "not known",
        f"{figures['day_written']:.2f}",
        f"at most {MAX_WRITTEN:g}",
    )
    days = settings["day"] + settings["small_day"]
    return figures, {
        "a small day reads nothing of the base": figures["small_day_read"] == 0,
        f"another reads the ends of its hashes, at most {MAX_READ:g} bytes an image": figures["day_read"] <= MAX_READ,
        f"a refresh reads at most {MAX_REFRESH_READ:g}": figures["refresh_read"] <= MAX_REFRESH_READ,
        f"a day writes at most {MAX_WRITTEN:g} bytes for each new one": figures["day_written"] <= MAX_WRITTEN,
        f"a refresh writes at most {MAX_WRITTEN:g}": figures["refresh_written"] <= MAX_WRITTEN,
        "one table has all images": figures["rows_of_all_images"] == settings["base"] + days,
        "each has an id of its own": figures["ids_of_all_images"] == figures["rows_of_all_images"],
    }


def write(folder: Path, images: Iterator[Any], number: int, name: str) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        Image.fromarray(next(images)).resize((24, 24)).save(folder / f"{name}-{index:04d}.png")


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Bytes read and written by file."""
    read, written = Counter[str](), Counter[str]()
    read_bytes, read_start, write_bytes = Folder.read_bytes, Folder.read_start, Folder.write_bytes

    def reading(call: Any) -> Any:
        def read_and_count(folder: Folder, name: str, *arguments: Any) -> bytes:
            data: bytes = call(folder, name, *arguments)
            read[f"{folder.path}/{name}"] += len(data)
            return data

        return read_and_count

    def writing(folder: Folder, name: str, data: bytes | memoryview, **options: Any) -> None:
        written[f"{folder.path}/{name}"] += len(data)
        write_bytes(folder, name, data, **options)

    Folder.read_bytes, Folder.read_start = reading(read_bytes), reading(read_start)  # type: ignore[method-assign]
    Folder.write_bytes = writing  # type: ignore[method-assign]
    try:
        yield read, written
    finally:
        Folder.read_bytes, Folder.read_start = read_bytes, read_start  # type: ignore[method-assign]
        Folder.write_bytes = write_bytes  # type: ignore[method-assign]


def of_day(
    name: str, read: Counter[str], written: Counter[str], base: dict[str, Artifact], num_base: int
) -> dict[str, float]:
    """The bytes read for each image of the base, and those written for each byte of new embeddings and assignments."""
    places = tuple(f"{base[stage].folder.path}/" for stage in ("embed", "assign"))
    of_base = {path: num_bytes for path, num_bytes in read.items() if path.startswith(places)}
    data = [num for path, num in of_base.items() if not path.endswith("manifest.json") and "/parts-" not in path]
    new = sum(num_bytes for path, num_bytes in written.items() if "/part-" in path and path.endswith(".parquet"))
    new -= sum(num_bytes for path, num_bytes in written.items() if "/candidates/" in path or "/outliers/" in path)
    return {f"{name}_read": sum(data) / num_base, f"{name}_written": sum(written.values()) / new}
