"""How backbones want their images. Several that want different sizes share one decoding
(:mod:`icce_ray.images.decoding`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone wants its images: the short side scaled to `scale_size`, then cropped to the central square."""

    size: int
    """Side of the square result in pixels."""
    scale_size: int
    """Short side in pixels before the crop."""
    interpolation: Interpolation = "bilinear"
    """Pillow's filter, with antialiasing."""
    squash: bool = False
    """Scale both sides to `scale_size` instead, ignoring the aspect ratio."""
    grayscale: bool = False
    """One channel (luma) instead of three."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size, 1 if self.grayscale else 3

    @property
    def views(self) -> tuple[Preprocessing, ...]:
        return (self,)


@dataclass(frozen=True)
class SeveralViews:
    """Views of each image for backbones with different preprocessing; their pixels are concatenated (P)."""

    views: tuple[Preprocessing, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(math.prod(view.shape) for view in self.views),)

    def split(self, pixels_BP: Pixels) -> list[Pixels]:
        """(B, P) -> (B, H, W, C) of each view."""
        ends = np.cumsum([math.prod(view.shape) for view in self.views])
        flat = np.split(pixels_BP, ends[:-1], axis=1)
        return [pixels.reshape(-1, *view.shape) for pixels, view in zip(flat, self.views, strict=True)]


def common_preprocessing(views: Sequence[Preprocessing]) -> Preprocessing | SeveralViews:
    """A preprocessing that serves all of `views`: each different one once."""
    different = tuple(dict.fromkeys(views))
    return different[0] if len(different) == 1 else SeveralViews(different)
