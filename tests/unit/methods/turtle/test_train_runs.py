"""Runs divided over workers, killed and resumed; their scores; and the memory they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config import TurtleConfig
from icce_ray.errors import ResourceError
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.turtle import train_runs as module
from icce_ray.methods.turtle.run_block import RunBlock
from icce_ray.methods.turtle.train_runs import clusterings_of, read_runs, train_runs
from icce_ray.metrics.label_free_scores import generalization_score
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.store import Folder
from icce_ray.store.part_records import PartRecords

BLOCKS = [range(2), range(2, 3), range(3, 4)]
SETTINGS = TurtleConfig(num_runs=4, num_steps=20, inner_steps=5, batch_size=200, learning_rate=0.05)


def records_at(path: Path, source: str = "features") -> PartRecords:
    return PartRecords(Folder.at(path), source)


def train(
    sets: Any, blocks: Any = BLOCKS, records: PartRecords | None = None, settings: TurtleConfig = SETTINGS
) -> Any:
    return train_runs(sets, settings, blocks, num_clusters=4, seed=3, num_threads=1, records=records)


def assert_same(one: Clusterings, other: Clusterings) -> None:
    assert np.array_equal(one.labels_HN, other.labels_HN)
    assert one.losses_H is not None
    assert np.array_equal(one.losses_H, other.losses_H)
    assert one.history == other.history
    assert one.notes == other.notes
    assert one.files == other.files


@pytest.fixture(scope="module")
def alone(planted) -> Clusterings:
    return clusterings_of(train(planted[0][:2]))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_runs_of_one_process(planted, alone, tmp_path: Path, num_workers: int) -> None:
    for rank in reversed(range(num_workers)):
        train(planted[0][:2], BLOCKS[rank::num_workers], records_at(tmp_path))
    found = [read_runs(records_at(tmp_path), runs) for runs in BLOCKS]
    assert_same(clusterings_of([runs for runs in found if runs is not None]), alone)


def test_a_killed_run_goes_on_from_its_checkpoint(planted, alone, tmp_path: Path, monkeypatch) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_interval_s": 1e-9})
    steps: list[int] = []
    train_step = RunBlock.train_step

    def dying(block: RunBlock) -> Any:
        steps.append(block.step)
        if len(steps) == 36:
            raise KeyboardInterrupt
        return train_step(block)

    monkeypatch.setattr(RunBlock, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(planted[0][:2], BLOCKS, records_at(tmp_path), settings)
    found = train(planted[0][:2], BLOCKS, records_at(tmp_path), settings)
    assert steps[35] == steps[36] == 15, "the first block is kept, and the second goes on"
    assert_same(clusterings_of(found), alone)
    assert len(Folder.at(tmp_path).names()) == len(BLOCKS), "no checkpoint is left"


def test_runs_of_other_features_do_not_count(planted, tmp_path: Path) -> None:
    train(planted[0][:1], [range(1)], records_at(tmp_path))
    assert read_runs(records_at(tmp_path), range(1)) is not None
    assert read_runs(records_at(tmp_path, source="others"), range(1)) is None


def test_the_loss_of_a_run_is_what_its_generalisation_score_lacks(planted, alone) -> None:
    sets, labels = planted
    assert alone.losses_H is not None
    scores = 1.0 - alone.losses_H
    np.testing.assert_allclose(scores, alone.notes["generalization_scores"])
    # With fewer than 50 dimensions the principal components are a rotation, which the classifier does not see.
    first = alone.labels_HN[0]
    plain = np.mean([generalization_score(features, first, random_state=3) for features in sets[:2]])
    assert abs(scores[0] - plain) < 0.01
    assert clustering_accuracy(labels, alone.labels_HN[alone.losses_H.argmin()]) > 0.97


def test_a_loss_that_is_not_finite_is_named(planted) -> None:
    with pytest.raises(FloatingPointError, match=r"run 0 is not finite at step \d+ of 20; lower turtle.learning_rate"):
        train(planted[0][:1], [range(1)], settings=SETTINGS.model_copy(update={"inner_learning_rate": 1e38}))


def test_too_little_memory_is_refused_before_anything_is_allocated(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory_bytes", lambda device: 10_000)
    with pytest.raises(ResourceError, match=r"300 images with 24 \+ 10 dimensions, 4 clusters .* sample.max_images"):
        train(planted[0][:2])
