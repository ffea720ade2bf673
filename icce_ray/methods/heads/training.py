"""Trains all heads at once, on one worker or many (METHOD section 2).

A step runs in two passes over blocks of heads: the teacher's targets of all heads come first, because the weight of a
pair is a mean over heads; then each block's student goes forward and backward. On a GPU one block holds all heads. On a
CPU a block is one head, whose activations stay in a core's cache, and every core works on a head of its own: that is
faster than all cores on one product, and the result does not depend on the number of threads. Long runs on a GPU take
the step of fused.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.checkpoint import CheckpointFolder
from icce_ray.methods.heads.communicator import Communicator, SingleWorker
from icce_ray.methods.heads.fused import FusedStep, compiled_step
from icce_ray.methods.heads.inputs import HeadInputs, InputNorm, seen_columns
from icce_ray.methods.heads.loss import PairLosses, pair_agreement, scan_losses, teacher_targets, temi_losses
from icce_ray.methods.heads.metrics_log import MetricsLog
from icce_ray.methods.heads.model import HeadParameters, backward, forward, head_logits
from icce_ray.methods.heads.optimizer import AdamW
from icce_ray.methods.heads.sampling import choose_batch_size, epoch_batches, num_steps_per_epoch
from icce_ray.methods.heads.schedule import ce_weight_at, learning_rate_at, teacher_momentum
from icce_ray.methods.heads.trained_heads import TrainedHeads
from icce_ray.methods.heads.training_memory import check_memory, head_blocks
from icce_ray.methods.heads.watch import EpochWatch
from icce_ray.neighbors.graph import NeighborGraph
from icce_ray.runtime.machine import matmul_dtype
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.threads import ThreadPool

MIN_PRIOR = 1e-12
LABELLING_ROWS = 4096
EARLY_STOP_EPOCHS = 3
LAST_LAYER = ("prototypes_HKP",)

Objective = Callable[[slice, torch.Tensor], PairLosses]
"""Losses of a run of heads, given their students' cosines (2, heads, b, K)."""


class HeadTrainer:
    """State of a training run: student, teacher, optimiser, prior."""

    def __init__(
        self,
        features_ND: npt.NDArray[Any],
        graph: NeighborGraph,
        config: HeadsConfig,
        *,
        num_clusters: int,
        seed: int,
        communicator: Communicator | None = None,
        device: torch.device | str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        num_images, dim = features_ND.shape
        assert num_images == graph.num_images
        self.config = config
        self.graph = graph
        self.seed = seed
        anchors = graph.anchors
        self.num_anchors = len(anchors)
        self.batch_size = choose_batch_size(self.num_anchors, config.batch_size)
        self.communicator: Communicator = communicator or SingleWorker()
        self.device = torch.device(device)
        self.dtype = matmul_dtype(config.precision, self.device)
        num_threads = num_threads or torch.get_num_threads()
        check_memory(
            config, num_images=num_images, dim=dim, num_clusters=num_clusters, batch_size=self.batch_size,
            device=self.device, num_threads=num_threads, num_workers=self.communicator.num_workers,
        )  # fmt: skip
        num_rows = self.batch_size * (1 + config.num_positives)
        self.blocks = head_blocks(self.device, config.num_heads, num_rows, num_clusters)
        # On a GPU, or with one head, there is nothing to share out: the calling thread does the work.
        self.pool = ThreadPool(num_threads if self.device.type == "cpu" and len(self.blocks) > 1 else 0)
        self.inputs = InputNorm(features_ND, config.input_norm, config.rotate, seed, self.device, self.pool)
        seen = config.num_inputs(dim)
        columns_HS = seen_columns(config.num_heads, dim, seen, seed)
        self.columns_HS = None if columns_HS is None else columns_HS.to(self.device)
        self.student = HeadParameters.initialise(
            config.num_heads, seen, config.hidden_dim, config.bottleneck_dim, num_clusters, seed, seen / dim
        ).map(lambda tensor: tensor.to(self.device))
        self.teacher = self.student.map(torch.clone)
        self.gradient = self.student.map(torch.zeros_like)
        self.prior_HK = torch.full((config.num_heads, num_clusters), 1.0 / num_clusters, device=self.device)
        self.optimizer = AdamW(self.student, config.weight_decay)
        self.teacher_momentum = teacher_momentum(config, self.steps_per_epoch)
        self.watch = EpochWatch(
            num_images, anchors, config.num_heads, num_clusters, config.num_epochs, seed, self.device
        )
        self.fused = self._compiled_step()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.head_losses_H = np.full(config.num_heads, np.nan)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.num_anchors, self.batch_size)

    @property
    def labels_rest(self) -> bool:
        """The labels have stopped moving: `early_stop_change` was not reached for three epochs in a row."""
        limit, last = self.config.early_stop_change, self.history[-EARLY_STOP_EPOCHS:]
        if limit is None or len(last) < EARLY_STOP_EPOCHS:
            return False
        return all(epoch["label_change"] is not None and epoch["label_change"] < limit for epoch in last)

    def train_epoch(self) -> None:
        """One pass over all images that have neighbours.

        Raises:
            FloatingPointError: a loss is not finite; names heads, epoch, step and what led to it.
        """
        started = time.perf_counter()
        self.watch.start_epoch()
        loss_sum_H = torch.zeros(self.config.num_heads, dtype=torch.float64, device=self.device)
        bad_step_H = torch.full((self.config.num_heads,), self.steps_per_epoch, device=self.device)
        batches = epoch_batches(
            self.graph,
            self.batch_size,
            self.config.num_positives,
            self.seed,
            self.epoch,
            self.communicator.rank,
            self.communicator.num_workers,
        )
        learning_rate = ce_weight = 0.0
        for step, (rows, num_pairs) in enumerate(batches):
            position = self.epoch + step / self.steps_per_epoch
            learning_rate = learning_rate_at(position, self.steps_per_epoch, num_pairs, self.config)
            ce_weight = ce_weight_at(position, self.config)
            loss_H = self.train_step(rows, num_pairs, learning_rate, ce_weight)
            loss_sum_H += loss_H
            # Kept on the device: asking whether a loss is finite would make a GPU wait at every step.
            bad_step_H = torch.where(loss_H.isfinite(), bad_step_H, bad_step_H.clamp_max(step))
        # One sum an epoch: the loss is only looked at here.
        head_losses_H = (self.communicator.sum_(loss_sum_H) / self.num_anchors).cpu().numpy()
        if not np.isfinite(head_losses_H).all():
            raise FloatingPointError(self._describe_fault(bad_step_H, learning_rate, ce_weight))
        self.epoch += 1
        self.head_losses_H = head_losses_H
        watched = self.watch.finish_epoch(self.epoch, self.communicator)
        seconds = time.perf_counter() - started
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": float(head_losses_H.mean()),
                "best_head_loss": float(head_losses_H.min()),
                "head_losses": [round(loss, 6) for loss in head_losses_H.tolist()],
                "learning_rate": learning_rate,
                "ce_weight": ce_weight,
                **watched,
                "seconds": round(seconds, 3),
                "pairs_per_s": round(self.num_anchors / seconds, 1),
            }
        )

    def train_step(
        self, rows: npt.NDArray[np.int64], num_pairs: int, learning_rate: float, ce_weight: float
    ) -> torch.Tensor:
        """One update. `rows` (1 + num_positives, b) is this worker's share of `num_pairs` pairs. Returns the loss per
        head, summed over this worker's pairs, float32 (H,)."""
        batch = self.pool.call(lambda: self._prepare(rows, num_pairs))
        if self.fused is not None:
            loss_H = self._write_gradient_fused(self.fused, batch, rows, num_pairs, ce_weight)
        else:
            loss_H = self._write_gradient(batch, rows, num_pairs, ce_weight)
        for gradient in self.gradient.tensors():
            self.communicator.sum_(gradient)
        frozen = LAST_LAYER if self.epoch < self.config.freeze_last_layer_epochs else ()
        self.optimizer.step(self.gradient, learning_rate, frozen)
        torch._foreach_lerp_(self.teacher.tensors(), self.student.tensors(), 1.0 - self.teacher_momentum)
        return loss_H

    def _write_gradient(
        self, batch: HeadInputs, rows: npt.NDArray[np.int64], num_pairs: int, ce_weight: float
    ) -> torch.Tensor:
        """Fill `gradient` from this worker's pairs; their loss (H,), summed."""
        if self.config.loss == "scan":
            objective = self._scan_objective(rows, num_pairs)
        else:
            objective = self._temi_objective(batch, rows, num_pairs, ce_weight)
        num_student_rows = 2 * rows.shape[1]
        scale = 1.0 / (self.config.num_heads * num_pairs)

        def update_gradient(heads: slice) -> torch.Tensor:
            parameters = self.student.heads(heads)
            inputs = batch.of(heads, num_student_rows)
            cache = forward(parameters, inputs)
            losses = objective(heads, _by_view(cache.logits_HnK, 2))
            gradient_HnK = losses.gradient_VHBK.mul_(scale).transpose(0, 1).reshape(cache.logits_HnK.shape)
            backward(parameters, inputs, cache, gradient_HnK, self.gradient.heads(heads))
            return losses.loss_H

        # Workers must meet in the same order, so an objective that sums over them stays in one thread.
        in_threads = self.config.loss == "temi" or self.communicator.num_workers == 1
        return torch.cat((self.pool if in_threads else ThreadPool(0)).map(update_gradient, self.blocks))

    def _write_gradient_fused(
        self, fused: FusedStep, batch: HeadInputs, rows: npt.NDArray[np.int64], num_pairs: int, ce_weight: float
    ) -> torch.Tensor:
        """As `_write_gradient`."""
        inputs = [batch.of(heads) for heads in self.blocks]
        targets, masses, agreements = [], [], []
        for heads, inputs_of_block in zip(self.blocks, inputs, strict=True):
            cosines_HVBK = fused.teacher_cosines(self.teacher.heads(heads), inputs_of_block)
            targets.append(fused.targets(cosines_HVBK, self.communicator))
            mass_HK, agreement_B, labels_HB = fused.statistics(targets[-1])
            masses.append(mass_HK)
            agreements.append(agreement_B)
            self.watch.record(heads, rows[0], labels_HB)
        weight_B = self._move_prior(masses, agreements, 2 * num_pairs)
        log_prior_HK = self.prior_HK.clamp_min(MIN_PRIOR).log()
        ce_weight_tensor = torch.full((), ce_weight, device=self.device)
        scale = torch.full((), 1.0 / (self.config.num_heads * num_pairs), device=self.device)
        losses = [
            fused.write_gradient(
                self.student.heads(heads), inputs_of_block, targets_of_block, log_prior_HK[heads], weight_B,
                ce_weight_tensor, scale, self.gradient.heads(heads),
            )
            for heads, inputs_of_block, targets_of_block in zip(self.blocks, inputs, targets, strict=True)
        ]  # fmt: skip
        return torch.cat(losses)

    def _move_prior(self, masses: list[torch.Tensor], agreements: list[torch.Tensor], num_targets: int) -> torch.Tensor:
        """Take in the sum of a step's targets of each block of heads; returns the weight of each pair (B,)."""
        self.prior_HK.lerp_(self.communicator.sum_(torch.cat(masses)) / num_targets, 1.0 - self.config.prior_momentum)
        return sum(agreements[1:], agreements[0]) / self.config.num_heads

    def label_matrix(self) -> npt.NDArray[np.int32]:
        """Every head's most likely cluster of every image, (H, N). Each worker labels its share of the rows."""
        num_images = self.graph.num_images
        labels_HN = torch.zeros((self.config.num_heads, num_images), dtype=torch.int32, device=self.device)
        share = np.array_split(np.arange(num_images), self.communicator.num_workers)[self.communicator.rank]

        def label(start: int) -> None:
            rows = share[start : start + LABELLING_ROWS]
            batch = HeadInputs(self.inputs.normalise(self.inputs.gather(rows)).to(self.dtype), self.columns_HS)
            for heads in self.blocks:
                logits = head_logits(self.teacher.heads(heads), batch.of(heads))
                labels_HN[heads, rows[0] : rows[-1] + 1] = logits.argmax(dim=-1).int()

        self.pool.map(label, range(0, len(share), LABELLING_ROWS))
        return self.communicator.sum_(labels_HN).cpu().numpy()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and JSON-able values."""
        tensors = self._trained_tensors()
        if self.watch.previous_Hw is not None:
            tensors["watch"] = self.watch.previous_Hw
        values = {"epoch": self.epoch, "history": self.history, "head_losses": self.head_losses_H.tolist()}
        return tensors, values

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        for name, tensor in self._trained_tensors().items():
            tensor.copy_(tensors[name])
        if "watch" in tensors:
            self.watch.previous_Hw = tensors["watch"].to(self.device)
        self.epoch = values["epoch"]
        self.history = values["history"]
        self.head_losses_H = np.asarray(values["head_losses"])

    def _compiled_step(self) -> FusedStep | None:
        """For long runs on GPUs, where all workers can compile it: they meet within a step."""
        if self.device.type != "cuda":
            return None
        num_rows = 2 * math.ceil(self.batch_size / self.communicator.num_workers)
        batch_nD = torch.ones((num_rows, self.inputs.features_ND.shape[1]), dtype=self.dtype, device=self.device)
        heads = self.blocks[0]
        inputs = HeadInputs(batch_nD, self.columns_HS).of(heads)
        num_steps = self.steps_per_epoch * self.config.num_epochs
        step = compiled_step(self.config, self.student.heads(heads), inputs, num_steps=num_steps)
        num_compiled = self.communicator.sum_(torch.tensor(int(step is not None), device=self.device))
        return step if int(num_compiled) == self.communicator.num_workers else None

    def _trained_tensors(self) -> dict[str, torch.Tensor]:
        """What training changes in place, by its name in a checkpoint."""
        owners = {
            "student": self.student.named(),
            "teacher": self.teacher.named(),
            "optimizer": self.optimizer.tensors(),
        }
        found = {f"{owner}.{name}": tensor for owner, named in owners.items() for name, tensor in named.items()}
        return {"prior": self.prior_HK} | found

    def _temi_objective(
        self, batch: HeadInputs, rows: npt.NDArray[np.int64], num_pairs: int, ce_weight: float
    ) -> Objective:
        log_targets_VHBK, weight_B = self._teacher_targets(batch, rows, num_pairs)
        log_prior_HK = self.prior_HK.clamp_min(MIN_PRIOR).log()

        def objective(heads: slice, cosines_VHBK: torch.Tensor) -> PairLosses:
            log_targets = log_targets_VHBK[:, heads]
            return temi_losses(cosines_VHBK, log_targets, log_prior_HK[heads], weight_B, self.config, ce_weight)

        return objective

    def _scan_objective(self, rows: npt.NDArray[np.int64], num_pairs: int) -> Objective:
        def objective(heads: slice, cosines_VHBK: torch.Tensor) -> PairLosses:
            self.watch.record(heads, rows[0], cosines_VHBK[0].argmax(dim=-1))
            return scan_losses(cosines_VHBK, num_pairs, self.config, self.communicator)

        return objective

    def _teacher_targets(
        self, batch: HeadInputs, rows: npt.NDArray[np.int64], num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log targets of the image and of its neighbours (2, H, b, K), and the weight of each pair; moves the prior."""
        config, num_views = self.config, len(rows)
        H, K = self.prior_HK.shape
        log_targets_VHBK = torch.empty((2, H, rows.shape[1], K), device=self.device)

        def teacher_cosines(heads: slice) -> torch.Tensor:
            cosines_VHBK = _by_view(head_logits(self.teacher.heads(heads), batch.of(heads)), num_views)
            self.watch.record(heads, rows[0], cosines_VHBK[0].argmax(dim=-1))
            return cosines_VHBK

        def targets(heads: slice, cosines_VHBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q_VHBK, log_q_VHBK = teacher_targets(cosines_VHBK, config, self.communicator)
            mass_HK = q_VHBK.sum(dim=(0, 2))
            if num_views > 2:
                mean_HBK = q_VHBK[1:].mean(dim=0)
                q_VHBK = torch.stack([q_VHBK[0], mean_HBK])
                log_q_VHBK = torch.stack([log_q_VHBK[0], mean_HBK.log()])
            log_targets_VHBK[:, heads] = log_q_VHBK
            return mass_HK, pair_agreement(q_VHBK)

        if self.communicator.num_workers == 1:
            results = self.pool.map(lambda heads: targets(heads, teacher_cosines(heads)), self.blocks)
        else:
            # Workers must meet in the same order, so what sums over them stays in one thread.
            results = [targets(slice(None), torch.cat(self.pool.map(teacher_cosines, self.blocks), dim=1))]
        masses, agreements = map(list, zip(*results, strict=True))
        return log_targets_VHBK, self._move_prior(masses, agreements, num_views * num_pairs)

    def _prepare(self, rows: npt.NDArray[np.int64], num_pairs: int) -> HeadInputs:
        """The normalised batch, all views below each other, in the dtype of the products."""
        batch = self.inputs.gather(rows).flatten(0, 1)
        batch = self.inputs.normalise_batch(batch, len(rows) * num_pairs, self.communicator)
        return HeadInputs(batch.to(self.dtype), self.columns_HS)

    def _describe_fault(self, bad_step_H: torch.Tensor, learning_rate: float, ce_weight: float) -> str:
        # The weight of a pair is shared, so one bad head spoils all in the next step: the first ones are to blame.
        first = int(bad_step_H.min())
        heads = (bad_step_H == first).nonzero().flatten().tolist()
        before = "this is the first epoch" if self.epoch == 0 else f"mean loss before {self.head_losses_H.mean():.4g}"
        return (
            f"the loss of heads {heads} is not finite in epoch {self.epoch}, step {first} of {self.steps_per_epoch} "
            f"(learning rate {learning_rate:.3g}, cross-entropy weight {ce_weight:.3g}, {before}); lower "
            "heads.learning_rate or set heads.precision=float32"
        )


def train_heads(
    features_ND: npt.NDArray[Any],
    graph: NeighborGraph,
    config: HeadsConfig,
    *,
    num_clusters: int,
    seed: int,
    communicator: Communicator | None = None,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    checkpoints: CheckpointFolder | None = None,
    progress: Progress | None = None,
    metrics_log: MetricsLog | None = None,
    until_epoch: int | None = None,
) -> TrainedHeads:
    """Train the heads and label every image with each. Heads that collapse are left out of the result.

    Args:
        features_ND: float16 or float32 (N, D), finite.
        graph: neighbours of the same N images.
        config: the `heads` section.
        num_clusters: K.
        seed: of initialisation, rotation and draws.
        communicator: the workers that share each batch; one process when not given.
        device: of the computation.
        num_threads: on a CPU; torch's setting when not given. It does not change the result.
        checkpoints: where to save every `checkpoint_interval_s` and resume from.
        progress: told of every epoch.
        metrics_log: given the history as it grows, by the worker of rank 0.
        until_epoch: pause after this epoch with a checkpoint, from which the next call goes on.

    Returns:
        The same on every worker. After a pause, what the heads say so far.

    Raises:
        FloatingPointError: a loss is not finite.
        ResourceError: it would not fit into memory.
    """
    trainer = HeadTrainer(
        features_ND,
        graph,
        config,
        num_clusters=num_clusters,
        seed=seed,
        communicator=communicator,
        device=device,
        num_threads=num_threads,
    )
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        trainer.load_state(*saved)
    is_first = trainer.communicator.rank == 0
    last_saved = time.monotonic()
    last_epoch = config.num_epochs if until_epoch is None else min(config.num_epochs, until_epoch)
    while trainer.epoch < last_epoch and not trainer.labels_rest:
        trainer.train_epoch()
        if progress is not None:
            progress.update(trainer.epoch, config.num_epochs, f"loss {trainer.history[-1]['loss']:.4f}")
        if metrics_log is not None and is_first:
            metrics_log.update(trainer.history)
        if checkpoints is not None and is_first:
            due = time.monotonic() - last_saved >= config.checkpoint_interval_s
            pauses = trainer.epoch == until_epoch
            if (due or pauses) and trainer.epoch < config.num_epochs:
                checkpoints.save(*trainer.state())
                last_saved = time.monotonic()
    finished = trainer.epoch == config.num_epochs or trainer.labels_rest
    if metrics_log is not None and is_first:
        metrics_log.update(trainer.history, finished=finished)
    return TrainedHeads(
        trainer.label_matrix(),
        trainer.head_losses_H,
        trainer.teacher,
        trainer.history,
        stopped_early=trainer.epoch < config.num_epochs,
    ).without_collapsed_heads()


def _by_view(logits_HnK: torch.Tensor, num_views: int) -> torch.Tensor:
    H, n, K = logits_HnK.shape
    return logits_HnK.view(H, num_views, n // num_views, K).transpose(0, 1)
