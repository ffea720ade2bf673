from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from icce_ray.config import HeadsConfig
from icce_ray.config import schema as config_module
from icce_ray.methods import METHODS
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.sampling import epoch_batches
from icce_ray.methods.heads.schedule import teacher_momentum
from icce_ray.methods.heads.trained_heads import TrainedHeads
from icce_ray.methods.heads.training import HeadTrainer, train_heads
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.store import Folder

from .reference import ReferenceTrainer, sinkhorn


def settings(**changes: object) -> HeadsConfig:
    small = {
        "num_heads": 3, "num_epochs": 7, "batch_size": 64, "hidden_dim": 16, "bottleneck_dim": 8,
        "precision": "float32", "warmup_epochs": 2, "learning_rate": 1e-2, "teacher_momentum": 0.98,
    }  # fmt: skip
    return HeadsConfig.model_validate(small | changes)


@pytest.mark.parametrize("heads_in_a_block", [1, 2])
@pytest.mark.parametrize("method", ["icce", "temi"])
def test_losses_per_head_are_those_of_the_plain_transcription(
    planted, method: str, heads_in_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "MIN_INPUTS", 4)
    features, graph, _ = planted
    config = settings(**METHODS[method].settings.get("heads", {}))
    trainer = HeadTrainer(features, graph, config, num_clusters=4, seed=0)
    trainer.blocks = [slice(start, min(start + heads_in_a_block, 3)) for start in range(0, 3, heads_in_a_block)]
    assert trainer.student.hidden_weight_HMS.shape[2] == (6 if method == "icce" else 12)
    reference = ReferenceTrainer(trainer.student.map(torch.clone), config, trainer.steps_per_epoch, trainer.columns_HS)
    step = 0
    for epoch in range(config.num_epochs):
        expected = np.zeros(config.num_heads)
        for rows, num_pairs in epoch_batches(graph, config.batch_size, 1, 0, epoch, 0, 1):
            batch = trainer.inputs.gather(rows).flatten(0, 1)
            views = trainer.inputs.normalise_batch(batch, 2 * num_pairs, trainer.communicator).chunk(2)
            expected += num_pairs * np.array(reference.step(*views, step)) / graph.num_images
            step += 1
        trainer.train_epoch()
        np.testing.assert_allclose(trainer.head_losses_H, expected, rtol=1e-5, atol=1e-5)
    assert step >= 20


def test_the_number_of_threads_does_not_change_a_bit(planted) -> None:
    features, graph, _ = planted
    runs = [
        train_heads(features, graph, settings(precision="bfloat16"), num_clusters=4, seed=1, num_threads=threads)
        for threads in (1, 3)
    ]
    assert np.array_equal(runs[0].label_matrix_HN, runs[1].label_matrix_HN)
    assert np.array_equal(runs[0].head_losses_H, runs[1].head_losses_H)


class ThreadWorkers:
    """Workers that are threads of this process and meet at a barrier."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.barrier = threading.Barrier(num_workers)
        self.slots: list[torch.Tensor | None] = [None] * num_workers

    def worker(self, rank: int) -> _ThreadWorker:
        return _ThreadWorker(self, rank)


class _ThreadWorker:
    def __init__(self, group: ThreadWorkers, rank: int) -> None:
        self.group, self.rank, self.num_workers = group, rank, group.num_workers

    def _combine(self, tensor: torch.Tensor, maximum: bool) -> torch.Tensor:
        self.group.slots[self.rank] = tensor.clone()
        self.group.barrier.wait()
        stacked = torch.stack(self.group.slots)
        self.group.barrier.wait()
        return tensor.copy_(stacked.amax(dim=0) if maximum else stacked.sum(dim=0))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._combine(tensor, maximum=False)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._combine(tensor, maximum=True)


def train_in_threads(num_workers: int, features, graph, config: HeadsConfig, **options: object) -> list[TrainedHeads]:
    group, results = ThreadWorkers(num_workers), {}

    def work(rank: int) -> None:
        results[rank] = train_heads(
            features, graph, config, num_clusters=4, seed=0, communicator=group.worker(rank), num_threads=1, **options
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(results) == list(range(num_workers))
    return [results[rank] for rank in range(num_workers)]


@pytest.mark.parametrize(("num_workers", "loss"), [(2, "temi"), (3, "temi"), (2, "scan")])
def test_many_workers_follow_the_trajectory_of_one(planted, num_workers: int, loss: str) -> None:
    features, graph, _ = planted
    config = settings(num_epochs=17, loss=loss)
    alone = train_heads(features, graph, config, num_clusters=4, seed=0)
    assert len(alone.history) * 3 >= 50
    for trained in train_in_threads(num_workers, features, graph, config):
        ours, theirs = (np.array([epoch["head_losses"] for epoch in run.history]) for run in (trained, alone))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)
        for name in ("empty_clusters", "label_change"):
            ours, theirs = ([epoch[name] for epoch in run.history[1:]] for run in (trained, alone))
            np.testing.assert_allclose(ours, theirs, atol=0.005)
        assert (trained.label_matrix_HN == alone.label_matrix_HN).mean() >= 0.995


class Stopped(Exception):
    pass


def test_a_stopped_run_resumes_to_the_very_same_result(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    config = settings(checkpoint_interval_s=1e-9)
    undisturbed = train_heads(features, graph, config, num_clusters=4, seed=0)
    checkpoints = CheckpointFolder(Folder.at(tmp_path))

    class StopAfter:
        def update(self, done: int, total: int, note: str = "") -> None:
            if done == 5:
                raise Stopped

    with pytest.raises(Stopped):
        train_heads(features, graph, config, num_clusters=4, seed=0, checkpoints=checkpoints, progress=StopAfter())
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded[1]["epoch"] == 4
    resumed = train_heads(features, graph, config, num_clusters=4, seed=0, checkpoints=checkpoints)
    assert np.array_equal(resumed.label_matrix_HN, undisturbed.label_matrix_HN)
    assert np.array_equal(resumed.head_losses_H, undisturbed.head_losses_H)
    assert [epoch["loss"] for epoch in resumed.history] == [epoch["loss"] for epoch in undisturbed.history]


def test_a_run_resumes_on_another_number_of_workers(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    config = settings(num_epochs=12)
    undisturbed = train_heads(features, graph, config, num_clusters=4, seed=0)
    trainer = HeadTrainer(features, graph, config, num_clusters=4, seed=0)
    for _ in range(5):
        trainer.train_epoch()
    checkpoints = CheckpointFolder(Folder.at(tmp_path))
    checkpoints.save(*trainer.state())
    for trained in train_in_threads(2, features, graph, config, checkpoints=checkpoints):
        assert trained.history[:5] == trainer.history
        assert (trained.label_matrix_HN == undisturbed.label_matrix_HN).mean() >= 0.995


def test_training_stops_when_the_labels_rest_and_says_so(planted) -> None:
    features, graph, _ = planted
    config = settings(num_epochs=60, teacher_momentum=0.9)
    assert not train_heads(features, graph, config, num_clusters=4, seed=0).stopped_early
    trained = train_heads(
        features, graph, config.model_copy(update={"early_stop_change": 0.02}), num_clusters=4, seed=0
    )
    assert trained.stopped_early
    changes = [epoch["label_change"] for epoch in trained.history]
    assert max(changes[-3:]) < 0.02
    assert all(max(changes[stop - 3 : stop]) >= 0.02 for stop in range(4, len(changes)))


def test_a_pause_tells_what_the_heads_say_so_far_and_changes_nothing(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    config = settings(checkpoint_interval_s=1e9)
    whole = train_heads(features, graph, config, num_clusters=4, seed=0)
    checkpoints = CheckpointFolder(Folder.at(tmp_path))
    for epoch in (2, 5):
        paused = train_heads(
            features, graph, config, num_clusters=4, seed=0, checkpoints=checkpoints, until_epoch=epoch
        )
        assert paused.history[-1]["epoch"] == epoch
        loaded = checkpoints.load()
        assert loaded is not None
        assert loaded[1]["epoch"] == epoch
    assert not np.array_equal(paused.label_matrix_HN, whole.label_matrix_HN)
    ended = train_heads(features, graph, config, num_clusters=4, seed=0, checkpoints=checkpoints)
    np.testing.assert_array_equal(ended.label_matrix_HN, whole.label_matrix_HN)
    assert [epoch["loss"] for epoch in ended.history] == [epoch["loss"] for epoch in whole.history]


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    trainer = HeadTrainer(features, graph, settings(), num_clusters=4, seed=0)
    checkpoints = CheckpointFolder(Folder.at(tmp_path))
    for _ in range(3):
        trainer.train_epoch()
        checkpoints.save(*trainer.state())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "epoch-000002.safetensors",
        "epoch-000003.safetensors",
    ]
    newest = tmp_path / "epoch-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded[1]["epoch"] == 2


@pytest.mark.parametrize(
    "changes", [{}, {"num_positives": 3}, {"sinkhorn": False}, {"input_norm": "none"}, {"loss": "scan"}]
)
def test_planted_clusters_are_found(planted, changes: dict[str, object]) -> None:
    features, graph, labels = planted
    config = settings(num_epochs=40, teacher_momentum=0.9, **changes)
    trained = train_heads(features, graph, config, num_clusters=4, seed=0)
    best = trained.label_matrix_HN[trained.head_losses_H.argmin()]
    assert clustering_accuracy(labels, best) > 0.95


def test_with_several_positives_the_target_is_their_mean(planted) -> None:
    features, graph, _ = planted
    config = settings(num_positives=3)
    trainer = HeadTrainer(features, graph, config, num_clusters=4, seed=0)
    rows, num_pairs = next(epoch_batches(graph, 64, 3, 0, 0, 0, 1))
    batch = trainer._prepare(rows, num_pairs)
    log_targets, weight = trainer._teacher_targets(batch, rows, num_pairs)
    reference = ReferenceTrainer(trainer.teacher, config, 3)
    plain = []
    for teacher in reference.teachers:
        with torch.no_grad():
            plain.append(
                [sinkhorn(teacher(view), config.teacher_temperature, 3) for view in batch.of(slice(0, 1)).chunk(4)]
            )
    expected_weight = sum((q[0] * (q[1] + q[2] + q[3]) / 3).sum(dim=-1) for q in plain) / len(plain)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_targets[1, 2].exp(), sum(plain[2][1:]) / 3, rtol=1e-4, atol=1e-5)


def test_the_prototypes_rest_while_they_are_frozen(planted) -> None:
    features, graph, _ = planted
    trainer = HeadTrainer(features, graph, settings(freeze_last_layer_epochs=1), num_clusters=4, seed=0)
    before = trainer.student.prototypes_HKP.clone()
    trainer.train_epoch()
    assert torch.equal(trainer.student.prototypes_HKP, before)
    trainer.train_epoch()
    assert not torch.equal(trainer.student.prototypes_HKP, before)


def test_a_loss_that_is_not_finite_is_reported_with_what_led_to_it(planted) -> None:
    features, graph, _ = planted
    trainer = HeadTrainer(features, graph, settings(), num_clusters=4, seed=0)
    trainer.student.prototypes_HKP[1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"heads \[1\] is not finite in epoch 0, step 0 of 3 \(learning rate"):
        trainer.train_epoch()


def test_the_automatic_momentum_remembers_a_share_of_short_runs_and_is_the_papers_in_long_ones() -> None:
    assert teacher_momentum(settings(teacher_momentum="auto", num_epochs=100), 10) == pytest.approx(1 - 1 / 50)
    assert teacher_momentum(settings(teacher_momentum="auto", num_epochs=400), 1250) == pytest.approx(0.996)
    assert teacher_momentum(settings(teacher_momentum=0.9), 10) == 0.9
