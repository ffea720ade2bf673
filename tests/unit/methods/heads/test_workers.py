"""Any number of workers gives the bits of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods import METHODS
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.fit import fit
from icce_ray.store import Folder

from .workers import ThreadWorker, _ThreadWorkers, fit_on_workers, make_trainer, small_settings

PAPER = {"rotate": False, "input_share": 1.0, "teacher_momentum": 0.996, "balance": 1.0}


def assert_same(ours: Clusterings, alone: Clusterings) -> None:
    """Equal labels, losses, weights and history, but for the time that it took."""
    assert np.array_equal(ours.labels_HN, alone.labels_HN)
    assert ours.losses_H is not None
    assert np.array_equal(ours.losses_H, alone.losses_H)
    assert ours.files == alone.files
    assert ours.notes == alone.notes
    times = ("seconds", "pairs_per_s")
    for mine, theirs in zip(ours.history, alone.history, strict=True):
        assert mine.keys() == theirs.keys()
        assert [mine[key] for key in mine if key not in times] == [theirs[key] for key in theirs if key not in times]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["icce", "temi", "scan", "paper", "several neighbours"])
def test_two_three_and_five_workers_give_the_bits_of_one(
    planted, method: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icce_ray.config.method_settings.MIN_INPUTS", 6)  # of 12: each head sees a share of its own
    features, graph, _ = planted
    own = METHODS[method].settings.get("heads", {}) if method in METHODS else PAPER
    changes = {"num_positives": 3} if method == "several neighbours" else own
    # Widths that no vector unit divides: a head's place in memory then depends on the division.
    settings = small_settings(
        num_heads=5, num_epochs=4, hidden_dim=19, bottleneck_dim=7, precision=precision, **changes
    )
    alone = fit(features, graph, settings, num_clusters=4, seed=0, num_threads=1)
    for num_workers in (2, 3, 5):
        first, *others = fit_on_workers(num_workers, features, graph, settings)
        assert_same(first, alone)
        assert all(other.labels_HN.size == 0 and not other.files for other in others)
        assert all(np.array_equal(other.losses_H, alone.losses_H) for other in others)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_workers_find_the_balance_and_renew_prototypes_as_one_does(
    planted, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icce_ray.methods.heads.balance.MAX_NUM_EMPTY", 2)
    features, graph, _ = planted
    settings = small_settings(num_heads=5, num_epochs=16, balance="auto", precision=precision)
    alone = fit(features, graph, settings, num_clusters=24, seed=0, num_threads=1)
    assert max(epoch["empty_clusters"] for epoch in alone.history[:11]) > 2 / 24
    assert len({epoch["balance"] for epoch in alone.history}) > 3
    for num_workers in (2, 5):
        assert_same(fit_on_workers(num_workers, features, graph, settings, num_clusters=24)[0], alone)


def test_random_divisions_sizes_and_threads_give_the_bits_of_one(planted) -> None:
    features, graph, _ = planted
    generator = np.random.default_rng(8)
    for _ in range(6):
        num_heads = int(generator.integers(2, 9))
        settings = small_settings(
            num_heads=num_heads, num_epochs=2, hidden_dim=int(generator.integers(3, 70)),
            bottleneck_dim=int(generator.integers(2, 40)), batch_size=int(generator.integers(20, 90)),
            precision=str(generator.choice(["float32", "bfloat16"])),
        )  # fmt: skip
        alone = fit(features, graph, settings, num_clusters=4, seed=0, num_threads=1)
        num_workers, num_threads = int(generator.integers(2, num_heads + 1)), int(generator.integers(1, 4))
        assert_same(fit_on_workers(num_workers, features, graph, settings, num_threads=num_threads)[0], alone)


def test_a_step_moves_one_number_for_each_head_and_pair(planted) -> None:
    settings = small_settings(num_heads=5, num_epochs=3)
    trainer = make_trainer(planted, settings, communicator=ThreadWorker(_ThreadWorkers(1), 0))
    trainer.train_epoch()
    per_step = [(5, 67), (5, 67), (5, 66)]
    assert trainer.communicator.shapes == [*per_step, (5, 5), (5, 200)]  # then figures, and labels for the NMI


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 5)])
def test_a_run_resumes_on_another_number_of_workers(planted, tmp_path: Path, before: int, after: int) -> None:
    features, graph, _ = planted
    settings = small_settings(num_heads=5, num_epochs=6, checkpoint_interval_s=1e-9, balance="auto")
    alone = fit(features, graph, settings, num_clusters=4, seed=0, num_threads=1)
    stopped = fit_until(4, before, features, graph, settings, tmp_path)
    saved = CheckpointFolder(stopped).load(range(5))
    assert saved is not None
    assert saved[1]["epoch"] in (3, 4)
    assert_same(fit_on_workers(after, features, graph, settings, folder=stopped)[0], alone)


class Stopped(Exception):
    pass


class StopAfter:
    """A progress that ends training when an epoch is done."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def update(self, done: int, total: int, note: str = "") -> None:
        if done > self.epoch:
            raise Stopped


def fit_until(epoch: int, num_workers: int, features, graph, settings: HeadsConfig, path: Path) -> Folder:
    folder = Folder.at(path)
    with pytest.raises(Stopped):
        fit_on_workers(num_workers, features, graph, settings, folder=folder, progress=StopAfter(epoch))
    return folder


def test_workers_agree_on_a_checkpoint_that_all_of_them_can_read(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    settings = small_settings(num_heads=4, num_epochs=6, checkpoint_interval_s=1e-9)
    alone = fit(features, graph, settings, num_clusters=4, seed=0, num_threads=1)
    folder = fit_until(4, 2, features, graph, settings, tmp_path)
    damaged = max((tmp_path / "checkpoints").glob("*-heads-00002-00004.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert_same(fit_on_workers(2, features, graph, settings, folder=folder)[0], alone)


def test_the_weights_of_all_workers_are_saved_in_the_order_of_heads(planted) -> None:
    features, graph, _ = planted
    first, _ = fit_on_workers(2, features, graph, small_settings(num_heads=3))
    weights = safetensors.torch.load(first.files["heads.safetensors"])
    trainer = make_trainer(planted, small_settings(num_heads=3))
    while trainer.epoch < trainer.settings.num_epochs:
        trainer.train_epoch()
    for name, tensor in trainer.state.teacher.named().items():
        assert torch.equal(weights[name], tensor)
