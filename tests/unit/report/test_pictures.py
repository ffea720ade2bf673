from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from icce_ray.report import pictures
from icce_ray.report.pictures import IMAGES_PER_PROCESS, MAX_IMAGE_PIXELS, MAX_PARALLEL_PIXELS, load_thumbnails


def test_large_images_are_decoded_one_at_a_time_and_enormous_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    limits: list[int] = []

    class Decoder:
        def decode(self, data: bytes, preprocessing: Any, *, max_pixels: int) -> Any:
            nonlocal running, most
            limits.append(max_pixels)
            if data == b"enormous" or (data == b"large" and max_pixels == MAX_PARALLEL_PIXELS):
                return f"over the limit of {max_pixels} pixels"
            if data == b"small":
                return np.zeros((1, 1, 3), np.uint8)
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1
            return np.ones((1, 1, 3), np.uint8)

        def close(self) -> None:
            pass

    monkeypatch.setattr(pictures, "DecodingProcess", Decoder)
    monkeypatch.setattr(pictures, "usable_cpus", lambda: 4)
    monkeypatch.setattr(pictures, "read_image", lambda uri: uri.partition(".")[0].encode())
    uris = ["small.png", "large.png", "large.png", "enormous.png", "large.png", "row#1"] * 2
    uris += ["small.png"] * IMAGES_PER_PROCESS  # so that there are several processes
    found = [picture for batch in load_thumbnails(uris) for picture in batch]
    assert [None if picture is None else int(picture.max()) for picture in found[:6]] == [0, 1, 1, None, 1, None]
    assert (most, set(limits)) == (1, {MAX_PARALLEL_PIXELS, MAX_IMAGE_PIXELS})
