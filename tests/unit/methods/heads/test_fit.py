from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.fit import _is_finished, find_collapsed_heads, fit, stage_metrics
from icce_ray.methods.heads.model import HeadParameters, forward
from icce_ray.metrics.true_label_scores import clustering_accuracy
from icce_ray.store import Folder

from .workers import make_trainer, small_settings


def test_the_number_of_threads_does_not_change_a_bit(planted) -> None:
    features, graph, _ = planted
    runs = [
        fit(features, graph, small_settings(precision="bfloat16"), num_clusters=4, seed=1, num_threads=threads)
        for threads in (1, 3)
    ]
    assert np.array_equal(runs[0].labels_HN, runs[1].labels_HN)
    assert runs[0].files == runs[1].files


def test_the_teachers_weights_are_saved_and_give_the_labels(planted) -> None:
    features, graph, _ = planted
    settings = small_settings(num_epochs=3)
    clusterings = fit(features, graph, settings, num_clusters=4, seed=0)
    trainer = make_trainer(planted, settings)
    for _ in range(3):
        trainer.train_epoch()
    weights = safetensors.torch.load(clusterings.files["heads.safetensors"])
    teacher, student = trainer.state.teacher.named(), trainer.state.student.named()
    assert weights.keys() == teacher.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, teacher[name]), name
        assert not torch.equal(tensor, student[name]), name
    inputs = trainer.norm.normalise(trainer.norm.gather(np.arange(200)))
    labels = {name: forward(HeadParameters(**tensors), inputs).cosines_HnK.argmax(dim=-1).numpy() for name, tensors in
              (("teacher", teacher), ("student", student))}  # fmt: skip
    assert np.array_equal(clusterings.labels_HN, labels["teacher"])
    assert not np.array_equal(clusterings.labels_HN, labels["student"])


class Stopped(Exception):
    pass


def test_a_stopped_run_resumes_to_the_very_same_result(planted, tmp_path: Path) -> None:
    features, graph, _ = planted
    settings = small_settings(checkpoint_interval_s=1e-9)
    undisturbed = fit(features, graph, settings, num_clusters=4, seed=0)
    folder = Folder.at(tmp_path)

    class StopAfter:
        def update(self, done: int, total: int, note: str = "") -> None:
            if done == 5:
                raise Stopped

    with pytest.raises(Stopped):
        fit(features, graph, settings, num_clusters=4, seed=0, folder=folder, progress=StopAfter())
    loaded = CheckpointFolder(folder).load(range(3))
    assert loaded is not None
    assert loaded[1]["epoch"] == 4
    resumed = fit(features, graph, settings, num_clusters=4, seed=0, folder=folder)
    assert np.array_equal(resumed.labels_HN, undisturbed.labels_HN)
    assert np.array_equal(resumed.losses_H, undisturbed.losses_H)
    assert resumed.files == undisturbed.files
    assert [epoch["loss"] for epoch in resumed.history] == [epoch["loss"] for epoch in undisturbed.history]
    changes = [[epoch["label_change"] for epoch in run.history] for run in (resumed, undisturbed)]
    assert changes[0] == changes[1]


def test_training_stops_when_the_labels_rest_and_says_so(planted) -> None:
    features, graph, _ = planted
    settings = small_settings(num_epochs=60, teacher_momentum=0.9)
    assert fit(features, graph, settings, num_clusters=4, seed=0).notes["stopped_early"] is False
    settings = settings.model_copy(update={"early_stop_change": 0.02})
    stopped = fit(features, graph, settings, num_clusters=4, seed=0)
    assert stopped.notes["stopped_early"] is True
    changes = [epoch["label_change"] for epoch in stopped.history]
    assert max(changes[-3:]) < 0.02
    assert all(max(changes[stop - 3 : stop]) >= 0.02 for stop in range(4, len(changes)))


def test_labels_rest_if_few_changed_in_each_of_three_epochs(planted) -> None:
    trainer = make_trainer(planted, small_settings(num_epochs=60, early_stop_change=0.02))
    cases = [
        ([0.01, 0.01], False), ([None, 0.01, 0.01], False), ([0.5, 0.01, 0.01], False), ([0.01, 0.02, 0.01], False),
        ([0.5, 0.01, 0.01, 0.01], True), ([0.01, 0.01, 0.5], False),
    ]  # fmt: skip
    for changes, rest in cases:
        trainer.history = [{"label_change": change} for change in changes]
        assert _is_finished(trainer) == rest, changes
    trainer.settings = small_settings(num_epochs=60)
    assert not _is_finished(trainer)


@pytest.mark.parametrize(
    "changes", [{}, {"num_positives": 3}, {"sinkhorn": False}, {"input_norm": "none"}, {"loss": "scan"}]
)
def test_planted_clusters_are_found(planted, changes: dict[str, object]) -> None:
    features, graph, labels = planted
    settings = small_settings(num_epochs=40, teacher_momentum=0.9, **changes)
    clusterings = fit(features, graph, settings, num_clusters=4, seed=0)
    best = clusterings.labels_HN[clusterings.losses_H.argmin()]
    assert clustering_accuracy(labels, best) > 0.95


def test_collapsed_heads_are_those_with_too_few_clusters() -> None:
    good = np.arange(60) % 6
    labels = np.stack([good, np.zeros(60, dtype=int), good % 3, good % 2])
    assert find_collapsed_heads(labels, 6) == [1, 3]
    assert find_collapsed_heads(labels[:, :1], 6) == [0, 1, 2, 3]
    assert find_collapsed_heads(labels[:, :2], 6) == [1], "two images can be in two clusters"
    assert find_collapsed_heads(np.zeros((1, 9), dtype=int), 2) == [0]


def fit_with_labels(planted, labels_HN: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Clusterings:
    """Heads that label the images as they are told to."""
    features, graph, _ = planted
    monkeypatch.setattr("icce_ray.methods.heads.trainer.HeadTrainer.label_matrix", lambda trainer: labels_HN)
    return fit(features, graph, small_settings(num_epochs=1), num_clusters=4, seed=0)


def test_collapsed_heads_are_left_out_and_named(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    labels_HN = np.stack([np.arange(200) % 4, np.zeros(200), np.arange(200) % 3]).astype(np.int32)
    kept = fit_with_labels(planted, labels_HN, monkeypatch)
    assert np.array_equal(kept.labels_HN, labels_HN[[0, 2]])
    assert kept.notes["collapsed_heads"] == [1]
    losses_H = kept.history[-1]["head_losses"]
    np.testing.assert_allclose(kept.losses_H, [losses_H[0], losses_H[2]], atol=1e-6)
    trainer = make_trainer(planted, small_settings(num_epochs=1))
    trainer.train_epoch()
    weights = safetensors.torch.load(kept.files["heads.safetensors"])
    assert torch.equal(weights["prototypes_HKP"], trainer.state.teacher.prototypes_HKP[[0, 2]])
    metrics = stage_metrics(kept)
    assert metrics["collapsed_heads"] == [1]
    assert metrics["num_heads"] == 2
    assert metrics["best_head"] == int(np.argmin(kept.losses_H))


def test_where_all_heads_collapsed_all_are_kept(planted, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fit_with_labels(planted, np.zeros((3, 200), dtype=np.int32), monkeypatch)
    assert kept.labels_HN.shape == (3, 200)
    assert kept.notes["collapsed_heads"] == []
