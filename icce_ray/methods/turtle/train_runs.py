"""Train runs of TURTLE, in memory that is known before, and judge each by its generalisation score (docs/METHOD.md,
"TURTLE").

Runs are trained in blocks, in the same products, each from its own seed. The blocks depend on the number of runs and of
clusters alone, so a run gives the same bits on any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from icce_ray.config import TurtleConfig
from icce_ray.methods.clusterings import Clusterings
from icce_ray.methods.saved_state import read_state, save_state
from icce_ray.methods.turtle.bilevel_step import (
    Layers,
    chunk_slices,
)
from icce_ray.methods.turtle.feature_scaling import label_rows, prepare_features
from icce_ray.methods.turtle.run_block import RunBlock, run_blocks
from icce_ray.metrics.label_free_scores import generalization_score, project_pca
from icce_ray.runtime.machine import available_memory_bytes, matmul_dtype, require_memory
from icce_ray.runtime.progress import QUIET, Progress
from icce_ray.runtime.threads import ThreadPool
from icce_ray.sample.training_set import sample_ids
from icce_ray.store.part_records import PartRecords

WORK_ARRAYS = 6
"""Largest number of C x n float32 arrays of a chunk of n rows at a time."""
PARAMETER_COPIES = 12
"""Float32 arrays of D x C: encoder and classifier with their gradients and Adam's two moments, and the normalised
weights."""
WEIGHTS_NAME = "turtle.safetensors"
MIN_SCORED, SCORED_PER_CLUSTER = 5_000, 20
"""Images that the generalisation score is measured on."""
HISTORY_ROWS = 100


def training_bytes(
    settings: TurtleConfig,
    *,
    num_images: int,
    dims: Sequence[int],
    num_clusters: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int = 1,
) -> int:
    """Memory of a worker, in bytes, for N images in S spaces of D dimensions, B of them in a batch, features of b
    bytes, C = R K columns of the R runs of a block: over all spaces ``b N D`` features, ``2 b B D`` a batch in both
    orders, ``4 D D`` the rotation, ``48 D C`` parameters, ``(b + 4) D C`` the gradient of each chunk;
    ``4 B C (2 S + 1)`` labels with the first predictions, ``24 n C S`` for each chunk of n rows that is worked on,
    ``12 R N`` labels of all images.
    """
    runs = max(map(len, run_blocks(settings.num_runs, num_clusters)))
    batch_size = min(num_images, settings.batch_size)
    chunks = chunk_slices(batch_size, device)
    chunk_rows: int = max(rows.stop - rows.start for rows in chunks)
    at_once = min(len(chunks), num_threads)
    total_dim, b, C = sum(dims), dtype.itemsize, runs * num_clusters
    features = b * total_dim * (num_images + 2 * batch_size) + 4 * max(dims) ** 2
    parameters = total_dim * C * (4 * PARAMETER_COPIES + (b + 4) * len(chunks))
    labels = 4 * batch_size * C * (2 * len(dims) + 1) + 4 * WORK_ARRAYS * chunk_rows * C * at_once * len(dims)
    return features + parameters + labels + 12 * runs * num_images


@dataclass(frozen=True)
class FinishedRuns:
    """Results of the runs of a block. C = R K columns, those of the runs side by side."""

    labels_RN: npt.NDArray[np.int32]
    layers: Layers
    """On each feature set as it was given."""
    scores: list[float]
    """Generalisation score of each run, 0 to 1, mean over feature sets; 0 where it is undefined."""
    history: list[dict[str, Any]]
    """`step`, `prediction_errors` and `entropies` (nats) of the runs, for about 100 steps; the last one is the last
    row."""


def train_runs(
    feature_sets: Sequence[npt.NDArray[Any]],
    settings: TurtleConfig,
    blocks: Sequence[range],
    *,
    num_clusters: int,
    seed: int,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    progress: Progress = QUIET,
    records: PartRecords | None = None,
) -> list[FinishedRuns]:
    """Train some of the blocks of :func:`run_blocks`, one after the other, on one or more feature matrices of the same
    N images, float16 or float32, finite. A run does not depend on the other blocks. Finished blocks and checkpoints are
    kept in `records`, and looked for first. Raises FloatingPointError: a loss is not finite; ResourceError: it would
    not fit into memory."""
    device = torch.device(device)
    num_threads = num_threads or torch.get_num_threads()
    dtype = matmul_dtype(settings.precision, device)
    finished = [None if records is None else read_runs(records, runs) for runs in blocks]
    if all(finished):
        return [found for found in finished if found is not None]
    num_images, dims = len(feature_sets[0]), [features_ND.shape[1] for features_ND in feature_sets]
    needed = training_bytes(
        settings, num_images=num_images, dims=dims, num_clusters=num_clusters, dtype=dtype, device=device,
        num_threads=num_threads,
    )  # fmt: skip
    require_memory(
        needed,
        available_memory_bytes(device),
        f"turtle: {num_images:,} images with {' + '.join(map(str, dims))} dimensions, {num_clusters:,} clusters and "
        f"batches of {settings.batch_size:,}",
        "Lower sample.max_images or turtle.batch_size, or use larger machines",
        " on each worker",
    )
    points = _score_points(feature_sets, num_clusters, seed)
    results = []
    with ThreadPool(0 if device.type == "cuda" else num_threads) as pool:
        spaces = [
            prepare_features(
                features_ND, scale=settings.scale_features, seed=seed, dtype=dtype, device=device, pool=pool
            )
            for features_ND in feature_sets
        ]
        for number, (runs, found) in enumerate(zip(blocks, finished, strict=True)):
            if found is None:
                block = RunBlock(spaces, settings, runs, num_clusters=num_clusters, seed=seed, pool=pool)
                history = _train(block, runs, number, len(blocks), progress, records)
                layers = block.layers_on_given()
                labels_RN = label_rows(feature_sets, layers, num_clusters, device=device, pool=pool)
                scores = [_run_score(points, labels_N, seed) for labels_N in labels_RN]
                found = FinishedRuns(labels_RN, layers, scores, history)
                if records is not None:
                    _keep(found, records, runs)
            results.append(found)
    return results


def read_runs(records: PartRecords, runs: range) -> FinishedRuns | None:
    """The runs of a block; None if they are not finished."""
    kept = read_state(records, _name(runs))
    if kept is None or "scores" not in kept[1]:
        return None
    tensors, values = kept
    layers = [tensors[f"layer.{space}"] for space in range(len(tensors) - 1)]
    return FinishedRuns(tensors["labels"].numpy(), layers, values["scores"], values["history"])


def clusterings_of(blocks: Sequence[FinishedRuns]) -> Clusterings:
    """The label matrix of all runs, and their layers, columns side by side, in turtle.safetensors. The loss of a run is
    1 - its generalisation score: the lowest is the best."""
    scores = [score for block in blocks for score in block.scores]
    history = []
    for rows in zip(*(block.history for block in blocks), strict=True):
        errors = [error for row in rows for error in row["prediction_errors"]]
        entropies = [entropy for row in rows for entropy in row["entropies"]]
        losses = {"loss": float(np.mean(errors)), "best_head_loss": min(errors), "run_losses": errors}
        history.append({"epoch": rows[0]["step"]} | losses | {"entropy": float(np.mean(entropies))})
    tensors = {f"layer.{space}": layer_EC for space, layer_EC in enumerate(layers_of(blocks))}
    return Clusterings(
        np.concatenate([block.labels_RN for block in blocks]),
        1.0 - np.array(scores),
        files={WEIGHTS_NAME: safetensors.torch.save(tensors)},
        history=history,
        notes={"generalization_scores": scores},
    )


def layers_of(blocks: Sequence[FinishedRuns]) -> list[torch.Tensor]:
    """The layer (E, C) of each feature set, the columns of all runs side by side."""
    return [
        torch.cat([layer_EC.cpu() for layer_EC in layers], dim=1)
        for layers in zip(*(block.layers for block in blocks), strict=True)
    ]


def _name(runs: range) -> str:
    return f"runs-{runs.start:05d}-{runs.stop:05d}"


def _keep(found: FinishedRuns, records: PartRecords, runs: range) -> None:
    tensors = {"labels": torch.from_numpy(found.labels_RN)}
    tensors |= {f"layer.{space}": layer_EC for space, layer_EC in enumerate(found.layers)}
    save_state(records, _name(runs), tensors, {"scores": found.scores, "history": found.history})


def _score_points(
    feature_sets: Sequence[npt.NDArray[Any]], num_clusters: int, seed: int
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]]:
    """Rows of a uniform sample (n,), and their principal components in each feature set."""
    num_images = len(feature_sets[0])
    rows = sample_ids(num_images, max(MIN_SCORED, SCORED_PER_CLUSTER * num_clusters), seed)
    rows_n = np.arange(num_images) if rows is None else rows
    return rows_n, [project_pca(np.array(matrix_ND[rows_n], dtype=np.float32), seed) for matrix_ND in feature_sets]


def _run_score(
    points: tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]], labels_N: npt.NDArray[np.int32], seed: int
) -> float:
    rows_n, spaces = points
    scores = [generalization_score(points_nd, labels_N[rows_n], random_state=seed) for points_nd in spaces]
    return float(np.mean([score or 0.0 for score in scores]))


def _train(
    block: RunBlock, runs: range, number: int, num_blocks: int, progress: Progress, records: PartRecords | None
) -> list[dict[str, Any]]:
    """All steps of a block, from its checkpoint on. Returns its history."""
    num_steps = block.settings.num_steps
    history: list[dict[str, Any]] = []
    if records is not None and (saved := read_state(records, _name(runs))) is not None:
        tensors, values = saved
        block.load(tensors, values["step"])
        history = values["history"]
    last_saved = time.monotonic()
    while block.step < num_steps:
        losses = block.train_step()
        if block.step % max(1, num_steps // HISTORY_ROWS) and block.step < num_steps:
            continue
        errors, entropies = losses.prediction_error.tolist(), losses.entropy.tolist()
        if not np.isfinite([errors, entropies]).all():
            bad = runs[int(np.argmin(np.isfinite(errors) & np.isfinite(entropies)))]
            raise FloatingPointError(
                f"the loss of run {bad} is not finite at step {block.step} of {num_steps}; lower turtle.learning_rate, "
                "or set turtle.scale_features=true and turtle.precision=float32"
            )
        history.append({"step": block.step, "prediction_errors": errors, "entropies": entropies})
        done = number * num_steps + block.step
        progress.update(done, num_blocks * num_steps, f"prediction error {np.mean(errors):.3f}")
        if records is not None and time.monotonic() - last_saved >= block.settings.checkpoint_interval_s:
            values = {"step": block.step, "history": history}
            save_state(records, _name(runs), block.tensors(), values, f"-{block.step:06d}")
            last_saved = time.monotonic()
    return history
