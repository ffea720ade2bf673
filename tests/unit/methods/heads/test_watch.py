from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.methods.heads.communicator import SingleWorker
from icce_ray.methods.heads.metrics_log import MetricsLog
from icce_ray.methods.heads.model import HeadParameters
from icce_ray.methods.heads.trained_heads import TrainedHeads, find_collapsed_heads
from icce_ray.methods.heads.watch import EpochWatch, mean_pairwise_nmi
from icce_ray.store import Folder


def watched_epoch(watch: EpochWatch, labels_HN: np.ndarray, epoch: int) -> dict[str, object]:
    """One epoch in two steps, the heads one by one."""
    watch.start_epoch()
    for images in np.array_split(np.random.default_rng(epoch).permutation(labels_HN.shape[1]), 2):
        for head, labels_N in enumerate(labels_HN):
            watch.record(slice(head, head + 1), images, torch.from_numpy(labels_N[np.newaxis, images]))
    return watch.finish_epoch(epoch, SingleWorker())


@pytest.mark.parametrize("max_watched", [4096, 40])
def test_the_watch_counts_what_changed_and_what_is_empty(max_watched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icce_ray.methods.heads.watch.MAX_WATCHED_IMAGES", max_watched)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (3, 100))
    labels[1][labels[1] == 2] = 0  # one of twelve clusters is empty
    watch = EpochWatch(100, np.arange(100), 3, 4, num_epochs=20, seed=0, device=torch.device("cpu"))
    first = watched_epoch(watch, labels, 1)
    assert first["empty_clusters"] == pytest.approx(1 / 12)
    assert first["label_change"] is None
    moved = labels.copy()
    moved[0] = (moved[0] + 1) % 4
    assert watched_epoch(watch, moved, 2)["label_change"] == pytest.approx(1 / 3)
    assert watched_epoch(watch, moved, 3)["label_change"] == 0.0


def test_pairs_of_heads_are_compared_by_their_nmi() -> None:
    labels = np.random.default_rng(1).integers(0, 5, (3, 200))
    expected = [
        normalized_mutual_info_score(labels[a], labels[b], average_method="geometric")
        for a, b in [(0, 1), (1, 2), (2, 0)]
    ]
    assert mean_pairwise_nmi(labels) == pytest.approx(np.mean(expected))
    assert mean_pairwise_nmi(labels[:1]) is None


def test_collapsed_heads_are_those_with_too_few_clusters() -> None:
    good = np.arange(60) % 6
    labels = np.stack([good, np.zeros(60, dtype=int), good % 3, good % 2])
    assert find_collapsed_heads(labels, 6) == [1, 3]
    assert find_collapsed_heads(labels[:, :1], 6) == [0, 1, 2, 3]
    assert find_collapsed_heads(np.zeros((1, 9), dtype=int), 2) == [0]


def make_trained(labels: np.ndarray) -> TrainedHeads:
    parameters = HeadParameters.initialise(len(labels), 3, 4, 4, 6, seed=0)
    return TrainedHeads(labels.astype(np.int32), np.arange(len(labels), dtype=float), parameters)


def test_collapsed_heads_are_left_out_and_named() -> None:
    trained = make_trained(np.stack([np.arange(60) % 6, np.zeros(60), np.arange(60) % 5]))
    kept = trained.without_collapsed_heads()
    assert np.array_equal(kept.label_matrix_HN, trained.label_matrix_HN[[0, 2]])
    assert kept.head_losses_H.tolist() == [0.0, 2.0]
    assert torch.equal(kept.parameters.prototypes_HKP, trained.parameters.prototypes_HKP[[0, 2]])
    assert kept.summary()["collapsed_heads"] == [1]
    assert kept.summary()["num_heads"] == 2


def test_where_all_heads_collapsed_all_are_kept() -> None:
    trained = make_trained(np.zeros((2, 9)))
    assert trained.without_collapsed_heads() is trained


def test_the_log_holds_one_line_an_epoch_and_feeds_tensorboard(tmp_path: Path) -> None:
    scalars = {"loss": 1.0, "best_head_loss": 0.5, "learning_rate": 0.1, "ce_weight": 0.0, "empty_clusters": 0.0}
    history = [{"epoch": epoch, "label_change": None, "head_nmi": 0.3} | scalars for epoch in (1, 2)]
    log = MetricsLog(Folder.at(tmp_path))
    log.update(history[:1])
    log.update(history, finished=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("heads/loss")] == [1, 2]
    assert "heads/label_change" not in events.Tags()["scalars"]
