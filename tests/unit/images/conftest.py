from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.images import list_images
from icce_ray.images.listing import Listing
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder


@pytest.fixture
def listed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], pa.Table]:
    """Runs the stage and returns the whole listing."""

    def run(config: Config) -> pa.Table:
        writer = ArtifactWriter(Folder.at(tmp_path_factory.mktemp("listing")))
        metrics = list_images.run(config, StageContext(writer, {}, Progress("images", quiet=True)))
        artifact = writer.commit(stage="images", fingerprint="0", inputs={}, config={}, metrics=metrics, seconds=0.0)
        return Listing(artifact).table(0, metrics["num_images"]).combine_chunks()

    return run
