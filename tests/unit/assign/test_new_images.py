"""Which run is meant, without Ray: the mistakes that are found before any work starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import icce_ray
from icce_ray.errors import InputError
from icce_ray.store import ArtifactWriter, Folder


def write_run(output: Path, name: str, classifier: str, *, finished: bool = True) -> str:
    """The record of a run, and as much of its model as is needed to be refused embeddings of another width."""
    record = {"run": name, "stages": {"classifier": classifier}, "config": {"assign": {}}, "result": None}
    Folder.at(output / "runs").write_bytes(f"{name}.json", json.dumps(record).encode())
    if finished:
        writer = ArtifactWriter(Folder.at(output / "classifier" / classifier))
        writer.write_json("classifier.json", {"num_clusters": 2, "num_dims": 7, "seed": 0})
        settings = {"images": {}, "embeddings": {}, "assign": {}}
        writer.commit(stage="classifier", fingerprint=classifier, inputs={}, config=settings, metrics={}, seconds=0)
    return str(output / "runs" / f"{name}.json")


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.zeros((4, 3), dtype=np.float32))
    return tmp_path / "x.npy"


def test_runs_that_share_a_model_are_no_question_and_others_are(tmp_path: Path, embeddings: Path) -> None:
    output = tmp_path / "out"
    write_run(output, "one", "a")
    write_run(output, "two", "a")
    write_run(output, "unfinished", "c", finished=False)
    with pytest.raises(InputError, match="has 3 dimensions; the model takes 7"):
        icce_ray.assign_images(output, embeddings=embeddings)
    third = write_run(output, "three", "b")
    with pytest.raises(InputError, match=r"several models: give the record of one run \(.*runs/one\.json"):
        icce_ray.assign_images(output, embeddings=embeddings)
    with pytest.raises(InputError, match="the model takes 7"):
        icce_ray.assign_images(third, embeddings=embeddings)


def test_a_run_without_a_classifier_and_a_place_without_a_run_are_named(tmp_path: Path, embeddings: Path) -> None:
    write_run(tmp_path / "out", "one", "a", finished=False)
    with pytest.raises(InputError, match="has no classifier yet"):
        icce_ray.assign_images(tmp_path / "out", embeddings=embeddings)
    with pytest.raises(InputError, match="no model there"):
        icce_ray.assign_images(tmp_path / "elsewhere", embeddings=embeddings)


def test_a_model_by_itself_needs_a_place_for_the_results(tmp_path: Path, embeddings: Path) -> None:
    write_run(tmp_path / "out", "one", "a")
    with pytest.raises(InputError, match="give output"):
        icce_ray.assign_images(tmp_path / "out" / "classifier" / "a", embeddings=embeddings)
    with pytest.raises(InputError, match="either images or embeddings"):
        icce_ray.assign_images(tmp_path / "out", output=tmp_path / "results")
