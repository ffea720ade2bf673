from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest

from icce_ray.report import pictures
from icce_ray.report.pictures import IMAGES_PER_PROCESS, MAX_IMAGE_PIXELS, MAX_PARALLEL_PIXELS, load_thumbnails


def test_large_images_are_decoded_one_at_a_time_and_enormous_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first large image takes until another process has found one too large to be decoded beside others, and a
    moment more, in which none may begin."""
    over_limit, large = itertools.count(1), itertools.count(1)
    two_over_limit, second_begun = threading.Event(), threading.Event()
    limits: list[int] = []

    class Decoder:
        def decode(self, data: bytes, preprocessing: Any, *, max_pixels: int) -> Any:
            limits.append(max_pixels)
            if data == b"enormous" or (data == b"large" and max_pixels == MAX_PARALLEL_PIXELS):
                if max_pixels == MAX_PARALLEL_PIXELS and next(over_limit) == 2:
                    two_over_limit.set()
                return f"over the limit of {max_pixels} pixels"
            if data == b"small":
                return np.zeros((1, 1, 3), np.uint8)
            if next(large) > 1:
                second_begun.set()
            else:
                assert two_over_limit.wait(60)
                assert not second_begun.wait(0.1)
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
    assert second_begun.is_set()
    assert set(limits) == {MAX_PARALLEL_PIXELS, MAX_IMAGE_PIXELS}
