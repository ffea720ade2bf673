"""Train runs of TURTLE and judge each by its generalisation score (docs/METHOD.md, "TURTLE")."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.turtle.feature_scaling import prepare_features
from icce_ray.methods.turtle.run_folder import RunFolder
from icce_ray.methods.turtle.turtle_memory import check_memory
from icce_ray.methods.turtle.turtle_run import TurtleRun
from icce_ray.metrics.label_free_scores import generalization_score, project_pca
from icce_ray.runtime.machine import matmul_dtype
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.threads import ThreadPool
from icce_ray.sample.training_set import sample_rows

MIN_SCORED, SCORED_PER_CLUSTER = 5_000, 20
"""Images that the generalisation score is measured on."""
HISTORY_ROWS = 100


@dataclass(frozen=True)
class FinishedRun:
    """What one run has found."""

    labels_N: npt.NDArray[np.int32]
    score: float
    """Generalisation score, 0 to 1, mean over feature sets; 0 where it is undefined."""
    history: list[dict[str, float]]
    """`step`, `prediction_error` and `entropy` (nats) of about 100 steps; the last one is the last row."""


def train_runs(
    feature_sets: Sequence[npt.NDArray[Any]],
    settings: TurtleConfig,
    runs: Sequence[int],
    *,
    num_clusters: int,
    seed: int,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    progress: Progress | None = None,
    folder: RunFolder | None = None,
) -> dict[int, FinishedRun]:
    """Train some of the runs, one after the other.

    Args:
        feature_sets: one or more feature matrices of the same N images, float16 or float32, finite.
        settings: the `turtle` section.
        runs: their numbers, from 0 on.
        num_clusters: K.
        seed: seed of all runs. A run depends on it and on the run's number, not on the other runs.
        device: where to compute.
        num_threads: CPU threads; None: torch's setting. They do not change the result.
        progress: told of the steps.
        folder: where finished runs and checkpoints are kept, and looked for first.

    Raises:
        FloatingPointError: a loss is not finite.
        ResourceError: it would not fit into memory.
    """
    device = torch.device(device)
    num_threads = num_threads or torch.get_num_threads()
    dtype = matmul_dtype(settings.precision, device)
    results = read_runs(folder, runs) if folder is not None else {}
    pending = [run for run in runs if run not in results]
    if not pending:
        return results
    num_images, dims = len(feature_sets[0]), [features_ND.shape[1] for features_ND in feature_sets]
    check_memory(
        settings, num_images=num_images, dims=dims, num_clusters=num_clusters, dtype=dtype, device=device,
        num_threads=num_threads,
    )  # fmt: skip
    points = score_points(feature_sets, num_clusters, seed)
    with ThreadPool(0 if device.type == "cuda" else num_threads) as pool:
        spaces = [
            prepare_features(
                features_ND, scale=settings.scale_features, seed=seed, dtype=dtype, device=device, pool=pool
            )
            for features_ND in feature_sets
        ]
        for run in pending:
            made = TurtleRun(spaces, settings, num_clusters=num_clusters, seed=seed, run=run, pool=pool)
            history = _train(made, run, len(results), len(runs), progress, folder)
            labels_N = made.labels()
            results[run] = FinishedRun(labels_N, run_score(points, labels_N, seed), history)
            if folder is not None:
                folder.write(run, labels_N, {"score": results[run].score, "history": history})
    return results


def read_runs(folder: RunFolder, runs: Sequence[int]) -> dict[int, FinishedRun]:
    """Those of the runs that are finished."""
    found = {run: folder.read(run) for run in runs}
    return {run: FinishedRun(kept[0], **kept[1]) for run, kept in found.items() if kept is not None}


def clusterings_of(results: Mapping[int, FinishedRun]) -> Clusterings:
    """The label matrix of all runs. The loss of a run is 1 - its generalisation score: the lowest is the best."""
    runs = [results[run] for run in sorted(results)]
    scores_R = np.array([run.score for run in runs])
    history = []
    for rows in zip(*(run.history for run in runs), strict=True):
        errors = [row["prediction_error"] for row in rows]
        losses = {"loss": float(np.mean(errors)), "best_head_loss": min(errors), "run_losses": errors}
        history.append(
            {"epoch": rows[0]["step"]} | losses | {"entropy": float(np.mean([row["entropy"] for row in rows]))}
        )
    return Clusterings(
        np.stack([run.labels_N for run in runs]),
        1.0 - scores_R,
        history=history,
        notes={"generalization_scores": scores_R.tolist()},
    )


def score_points(
    feature_sets: Sequence[npt.NDArray[Any]], num_clusters: int, seed: int
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]]:
    """Rows of a uniform sample (n,), and their principal components in each feature set."""
    num_images = len(feature_sets[0])
    rows = sample_rows(num_images, max(MIN_SCORED, SCORED_PER_CLUSTER * num_clusters), seed)
    rows_n = np.arange(num_images) if rows is None else rows
    return rows_n, [project_pca(np.array(matrix_ND[rows_n], dtype=np.float32), seed) for matrix_ND in feature_sets]


def run_score(
    points: tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]], labels_N: npt.NDArray[np.int32], seed: int
) -> float:
    """Generalisation score of labels, the mean over feature sets; 0 where it is undefined."""
    rows_n, spaces = points
    scores = [generalization_score(points_nd, labels_N[rows_n], random_state=seed) for points_nd in spaces]
    return float(np.mean([score or 0.0 for score in scores]))


def _train(
    made: TurtleRun, run: int, num_finished: int, num_runs: int, progress: Progress | None, folder: RunFolder | None
) -> list[dict[str, float]]:
    """All steps of a run, from its checkpoint on. Returns its history."""
    num_steps = made.settings.num_steps
    history: list[dict[str, float]] = []
    if folder is not None and (saved := folder.load_checkpoint(run)) is not None:
        tensors, values = saved
        made.load(tensors, values["step"])
        history = values["history"]
    last_saved = time.monotonic()
    while made.step < num_steps:
        losses = made.train_step()
        if made.step % max(1, num_steps // HISTORY_ROWS) and made.step < num_steps:
            continue
        error, entropy = float(losses.prediction_error), float(losses.entropy)
        if not np.isfinite(error + entropy):
            raise FloatingPointError(
                f"the loss of run {run} is not finite at step {made.step} of {num_steps}; lower turtle.learning_rate, "
                "or set turtle.scale_features=true and turtle.precision=float32"
            )
        history.append({"step": made.step, "prediction_error": error, "entropy": entropy})
        if progress is not None:
            done = num_finished * num_steps + made.step
            progress.update(done, num_runs * num_steps, f"run {run}: prediction error {error:.3f}")
        if folder is not None and time.monotonic() - last_saved >= made.settings.checkpoint_interval_s:
            folder.save_checkpoint(run, made.tensors(), {"step": made.step, "history": history})
            last_saved = time.monotonic()
    return history
