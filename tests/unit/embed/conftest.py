from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.embed.embedding_parts import part_table, plan_parts
from icce_ray.store import Artifact, ArtifactWriter, Folder

MakeArtifact = Callable[..., Artifact]


@pytest.fixture
def make_embed_artifact(tmp_path: Path) -> MakeArtifact:
    """An embed artifact of given rows, cut into parts; the images in `failed` have no row."""

    def make(
        rows: np.ndarray, rows_per_part: int, failed: tuple[int, ...] = (), name: str = "embed", **metrics: Any
    ) -> Artifact:
        writer = ArtifactWriter(Folder.at(tmp_path / name))
        num_images = len(rows) + len(failed)
        image_ids = np.setdiff1d(np.arange(num_images), failed)
        for part in plan_parts(num_images, rows_per_part):
            inside = (image_ids >= part.start) & (image_ids < part.stop)
            writer.write_table(part.file_name, part_table(image_ids[inside], rows[inside]))
        return writer.commit(stage="embed", fingerprint="0" * 16, inputs={}, config={}, metrics=metrics, seconds=0.0)

    return make
