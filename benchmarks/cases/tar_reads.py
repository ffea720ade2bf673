"""Requests and bytes of 1,000 images in tar shards on object storage, counted with a stub of the S3 client: opening the
shards, then reading the images in parts, together and one by one."""

from __future__ import annotations

import io
import tarfile
from types import SimpleNamespace
from typing import Any

import numpy as np

from cases import show_aim

SETTINGS: dict[str, Any] = {
    "num_shards": 4,
    "images_per_shard": 250,
    "image_bytes": 100_000,
    "images_per_part": 512,
    "max_requests": 20,
}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    from icce_ray.images import tar_shards
    from icce_ray.images.containers import Span
    from icce_ray.images.listing import ListedImage
    from icce_ray.images.read_images import read_image, read_images
    from icce_ray.store import s3

    store = _Store(settings)
    s3.client = lambda *_, **__: store  # type: ignore[assignment]
    rows: list[ListedImage] = []
    for key, data in store.shards.items():
        file = SimpleNamespace(read_at=lambda num_bytes, start, data=data: store.count(data[start : start + num_bytes]))
        for found in tar_shards.walk(tar_shards.RemoteHeaders(file), len(data)):
            assert isinstance(found, tar_shards.Member)
            uri = Span(f"s3://photos/{key}", found.start, found.num_bytes).uri(found.name)
            rows.append(ListedImage(len(rows), uri, found.num_bytes, None))
    figures = {"opening": store.take()}
    one_by_one = [read_image(row.uri, row.size_bytes) for row in rows]
    figures["one by one"] = store.take()
    together: dict[int, bytes | str] = {}
    for start in range(0, len(rows), settings["images_per_part"]):
        found_images = read_images(rows[start : start + settings["images_per_part"]])
        together |= {row.image_id: data for row, data in found_images}
    figures["together"] = store.take()
    image_bytes = sum(row.size_bytes or 0 for row in rows)
    for name, (requests, num_bytes) in figures.items():
        print(f"{name:<11} {requests:6,} requests, {num_bytes / image_bytes:.3f} times the images' bytes", flush=True)
    counts = (f"{figures[name][0]:,}" for name in ("one by one", "together"))
    show_aim(f"requests for {len(rows):,} images", *counts, f"at most {settings['max_requests']}")
    bounds = {
        f"{len(rows):,} images are read in at most {settings['max_requests']} requests": figures["together"][0]
        <= settings["max_requests"],
        "each byte once, and headers": figures["together"][1] <= 1.02 * image_bytes,
        "the same bytes as one by one": [together[number] for number in range(len(rows))] == one_by_one,
    }
    return {name: {"requests": counted[0], "bytes": counted[1]} for name, counted in figures.items()}, bounds


class _Store:
    """Stands for boto3's client, and counts."""

    def __init__(self, settings: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        self.shards: dict[str, bytes] = {}
        for shard in range(settings["num_shards"]):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode="w") as tar:
                for number in range(settings["images_per_shard"]):
                    member = tarfile.TarInfo(f"{number:06d}.jpg")
                    member.size = int(settings["image_bytes"] * rng.uniform(0.5, 1.5))
                    tar.addfile(member, io.BytesIO(rng.bytes(member.size)))
            self.shards[f"{shard}.tar"] = sink.getvalue()
        self.take()

    def take(self) -> tuple[int, int]:
        """(requests, bytes) since the last call."""
        counted = getattr(self, "counted", (0, 0))
        self.counted = (0, 0)
        return counted

    def count(self, data: bytes) -> bytes:
        self.counted = self.counted[0] + 1, self.counted[1] + len(data)
        return data

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, Any]:
        start, _, last = Range.removeprefix("bytes=").partition("-")
        data = self.count(self.shards[Key][int(start) : int(last) + 1])
        return {"ContentLength": len(data), "Body": _Body(data)}


class _Body:
    def __init__(self, data: bytes) -> None:
        self._raw_stream = io.BytesIO(data)

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        pass
