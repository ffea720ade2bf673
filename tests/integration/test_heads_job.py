"""Training that is asked for what does not fit. When its workers die: test_many_nodes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config import Config
from icce_ray.errors import ResourceError
from icce_ray.methods.heads import job
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

from .stages import run_until


def make_config(folder: Path, **changes: Any) -> Config:
    return Config.model_validate(
        {"embeddings": {"uri": str(folder / "features.npy")}, "num_clusters": 5, "output": str(folder / "out")}
        | changes
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Embeddings and neighbours, as the pipeline makes them."""
    folder = tmp_path_factory.mktemp("inputs")
    np.save(folder / "features.npy", np.random.default_rng(4).normal(size=(200, 24)).astype(np.float32))
    return run_until("neighbors", make_config(folder))


def run_heads(inputs: dict[str, Artifact], folder: Path, **changes: Any) -> None:
    writer = ArtifactWriter(Folder.at(folder))
    job.run(make_config(folder, **changes), StageContext(writer, inputs, Progress("heads", quiet=True)))


def test_more_workers_than_heads_are_refused_before_any_starts(inputs, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"5 workers for 4 heads; .* at most 4 can work"):
        run_heads(inputs, tmp_path, heads={"num_heads": 4}, resources={"method": {"num_workers": 5}})


def test_heads_that_do_not_fit_are_refused_before_they_are_made(inputs, tmp_path: Path) -> None:
    heads = {"num_heads": 400, "hidden_dim": 200_000, "bottleneck_dim": 100_000}
    with pytest.raises(ResourceError, match=r"^heads: 400 heads .* GB are free"):
        run_heads(inputs, tmp_path, heads=heads)
