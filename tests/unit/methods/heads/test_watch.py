from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.methods.heads.checkpoint import MetricsLog
from icce_ray.methods.heads.watch import EpochWatch, mean_pairwise_nmi
from icce_ray.store import Folder


def watched_epoch(watch: EpochWatch, labels_HN: np.ndarray, epoch: int) -> tuple[list[int], list[int]]:
    """Changed labels and empty clusters by head, after an epoch in two steps, the heads one by one."""
    watch.start_epoch()
    for images in np.array_split(np.random.default_rng(epoch).permutation(labels_HN.shape[1]), 2):
        for head, labels_N in enumerate(labels_HN):
            watch.record(slice(head, head + 1), images, torch.from_numpy(labels_N[np.newaxis, images]))
    changed_H, empty_H = watch.finish_epoch()
    return changed_H.tolist(), empty_H.tolist()


@pytest.mark.parametrize("max_watched", [4096, 40])
def test_the_watch_counts_what_changed_and_what_is_empty(max_watched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icce_ray.methods.heads.watch.MAX_WATCHED_IMAGES", max_watched)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (3, 100))
    labels[1][labels[1] == 2] = 0  # one of twelve clusters is empty
    watch = EpochWatch(100, np.arange(100), 3, 4, seed=0, device=torch.device("cpu"))
    num_watched = min(100, max_watched)
    assert watched_epoch(watch, labels, 1) == ([num_watched] * 3, [0, 1, 0])
    moved = labels.copy()
    moved[0] = (moved[0] + 1) % 4
    assert watched_epoch(watch, moved, 2)[0] == [num_watched, 0, 0]
    assert watched_epoch(watch, moved, 3)[0] == [0, 0, 0]
    assert watched_epoch(watch, moved // 2, 4)[1] == [2, 2, 2], "two of four are left, whatever was there before"


def test_pairs_of_heads_are_compared_by_their_nmi() -> None:
    labels = np.random.default_rng(1).integers(0, 5, (3, 200))
    expected = [
        normalized_mutual_info_score(labels[a], labels[b], average_method="geometric")
        for a, b in [(0, 1), (1, 2), (2, 0)]
    ]
    assert mean_pairwise_nmi(labels) == pytest.approx(np.mean(expected))
    assert mean_pairwise_nmi(labels[:1]) is None


def test_the_log_holds_one_line_an_epoch(tmp_path: Path) -> None:
    history = [{"epoch": epoch, "loss": 1.0, "head_nmi": None} for epoch in (1, 2)]
    log = MetricsLog(Folder.at(tmp_path))
    log.update(history[:1])
    log.update(history, finished=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
