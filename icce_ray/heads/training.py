"""Trains all heads at once, on one worker or many (METHOD section 2).

A step runs in two passes over blocks of heads: the teacher's targets of all heads come first, because the weight of a
pair is a mean over heads; then each block's student goes forward and backward. On a GPU one block holds all heads. On a
CPU a block is one head, whose activations stay in a core's cache, and every core works on a head of its own: that is
faster than all cores on one product, and the result does not depend on the number of threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import HeadsConfig
from icce_ray.heads.checkpoint import CheckpointFolder
from icce_ray.heads.communicator import Communicator, SingleWorker
from icce_ray.heads.inputs import InputNorm
from icce_ray.heads.loss import ce_weight_at, pair_agreement, pair_losses, teacher_log_targets
from icce_ray.heads.model import HeadParameters, backward, forward, head_logits
from icce_ray.heads.sampling import choose_batch_size, epoch_batches, num_steps_per_epoch
from icce_ray.heads.threads import ThreadPool
from icce_ray.neighbors.graph import NeighborGraph
from icce_ray.precision import matmul_dtype
from icce_ray.progress import Progress

BASE_BATCH_SIZE = 256
MIN_PRIOR = 1e-12
TEACHER_MEMORY = 0.05
MAX_TEACHER_MEMORY_STEPS = 250.0
LABELLING_ROWS = 4096


@dataclass
class TrainedHeads:
    """What stage 1 leaves behind."""

    label_matrix_HN: npt.NDArray[np.int32]
    """Every head's cluster of every image."""
    head_losses_H: npt.NDArray[np.float64]
    """Mean loss of the last epoch; the best head has the lowest."""
    parameters: HeadParameters
    """Of the heads that gave the labels."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Per epoch: loss, learning rate, weight of the cross-entropy, seconds."""

    def summary(self) -> TrainingSummary:
        """Figures for the manifest and the log."""
        num_used_H = [len(np.unique(labels_N)) for labels_N in self.label_matrix_HN]
        return TrainingSummary(
            num_heads=len(self.head_losses_H),
            num_epochs=len(self.history),
            loss=float(self.head_losses_H.mean()),
            best_head=int(self.head_losses_H.argmin()),
            best_head_loss=float(self.head_losses_H.min()),
            num_collapsed_heads=sum(used < self.parameters.num_clusters / 2 for used in num_used_H),
            seconds_per_epoch=round(sum(epoch["seconds"] for epoch in self.history) / max(1, len(self.history)), 4),
        )


@dataclass(frozen=True)
class TrainingSummary:
    """A training run in figures."""

    num_heads: int
    num_epochs: int
    loss: float
    """Mean over heads in the last epoch."""
    best_head: int
    best_head_loss: float
    num_collapsed_heads: int
    """Heads that use fewer than half of their clusters."""
    seconds_per_epoch: float


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
        assert features_ND.shape[0] == graph.num_images
        self.config = config
        self.graph = graph
        self.seed = seed
        self.batch_size = choose_batch_size(graph.num_images, config.batch_size)
        self.communicator: Communicator = communicator or SingleWorker()
        self.device = torch.device(device)
        self.dtype = matmul_dtype(config.precision, self.device)
        # With one block there is nothing to share out: the calling thread does the work.
        self.blocks = head_blocks(self.device, config.num_heads)
        self.pool = ThreadPool(num_threads or torch.get_num_threads() if len(self.blocks) > 1 else 0)
        self.inputs = self.pool.call(
            lambda: InputNorm(features_ND, config.input_norm, config.rotate, seed, self.device)
        )
        self.student = HeadParameters.initialise(
            config.num_heads, features_ND.shape[1], config.hidden_dim, config.bottleneck_dim, num_clusters, seed
        ).map(lambda tensor: tensor.to(self.device))
        self.teacher = self.student.map(torch.clone)
        self.gradient = self.student.map(torch.zeros_like)
        self.prior_HK = torch.full((config.num_heads, num_clusters), 1.0 / num_clusters, device=self.device)
        self.optimizer = self._make_optimizer()
        self.teacher_momentum = teacher_momentum(config, self.steps_per_epoch)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.head_losses_H = np.full(config.num_heads, np.nan)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.graph.num_images, self.batch_size)

    def train_epoch(self) -> None:
        """One pass over all images.

        Raises:
            FloatingPointError: a loss is not finite; names epoch, step and heads.
        """
        started = time.perf_counter()
        self._freeze_prototypes(self.epoch < self.config.freeze_last_layer_epochs)
        loss_sum_H = torch.zeros(self.config.num_heads, dtype=torch.float64, device=self.device)
        culprits_H = torch.zeros(self.config.num_heads, dtype=torch.bool, device=self.device)
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
            learning_rate = self._learning_rate(position, num_pairs)
            ce_weight = ce_weight_at(position, self.config)
            loss_H = self.train_step(rows, num_pairs, learning_rate, ce_weight)
            loss_sum_H += loss_H
            # The weight of a pair is shared, so one bad head spoils all in the next step. Kept on the device: asking
            # whether there is one would make a GPU wait at every step.
            culprits_H |= ~loss_H.isfinite() & ~culprits_H.any()
        # One sum an epoch: the loss is only looked at here.
        self.head_losses_H = (self.communicator.sum_(loss_sum_H) / self.graph.num_images).cpu().numpy()
        if not np.isfinite(self.head_losses_H).all():
            bad = culprits_H.nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the loss of heads {bad} is not finite in epoch {self.epoch} (learning rate {learning_rate:.3g}, "
                f"cross-entropy weight {ce_weight:.3g}); lower heads.learning_rate or set heads.precision=float32"
            )
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": float(self.head_losses_H.mean()),
                "best_head_loss": float(self.head_losses_H.min()),
                "learning_rate": learning_rate,
                "ce_weight": ce_weight,
                "seconds": round(time.perf_counter() - started, 3),
            }
        )

    def train_step(
        self, rows: npt.NDArray[np.int64], num_pairs: int, learning_rate: float, ce_weight: float
    ) -> torch.Tensor:
        """One update. `rows` (1 + num_positives, b) is this worker's share of `num_pairs` pairs. Returns the loss per
        head, summed over this worker's pairs, float32 (H,)."""
        num_views, b = rows.shape
        batch = self.pool.call(lambda: self._prepare(rows, num_pairs))
        teacher_log_VHBK, weight_B = self._teacher_targets(batch, num_views, num_pairs)
        log_prior_HK = self.prior_HK.clamp_min(MIN_PRIOR).log()
        student_rows = batch[: 2 * b]
        scale = 1.0 / (self.config.num_heads * num_pairs)

        def update_gradient(heads: slice) -> torch.Tensor:
            parameters = self.student.heads(heads)
            cache = forward(parameters, student_rows)
            logits_HnK = cache.logits_HnK.requires_grad_()
            student_VHBK, teacher_VHBK = _by_view(logits_HnK, 2), teacher_log_VHBK[:, heads]
            loss = pair_losses(student_VHBK, teacher_VHBK, log_prior_HK[heads], weight_B, self.config, ce_weight)
            loss_H = loss.temi_H + ce_weight * loss.cross_entropy_H
            (logits_gradient_HnK,) = torch.autograd.grad(loss_H.sum() * scale, logits_HnK)
            with torch.no_grad():
                backward(parameters, student_rows, cache, logits_gradient_HnK, self.gradient.heads(heads))
            return loss_H.detach()

        losses = self.pool.map(update_gradient, self.blocks)
        for gradient in self.gradient.tensors():
            self.communicator.sum_(gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_lerp_(self.teacher.tensors(), self.student.tensors(), 1.0 - self.teacher_momentum)
        return torch.cat(losses)

    def label_matrix(self) -> npt.NDArray[np.int32]:
        """Every head's most likely cluster of every image, (H, N). Each worker labels its share of the rows."""
        num_images = self.graph.num_images
        labels_HN = torch.zeros((self.config.num_heads, num_images), dtype=torch.int32, device=self.device)
        share = np.array_split(np.arange(num_images), self.communicator.num_workers)[self.communicator.rank]

        def label(start: int) -> None:
            rows = share[start : start + LABELLING_ROWS]
            batch = self.inputs.normalise(self.inputs.gather(rows)).to(self.dtype)
            for heads in self.blocks:
                logits = head_logits(self.teacher.heads(heads), batch)
                labels_HN[heads, rows[0] : rows[-1] + 1] = logits.argmax(dim=-1).int()

        self.pool.map(label, range(0, len(share), LABELLING_ROWS))
        return self.communicator.sum_(labels_HN).cpu().numpy()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and JSON-able values."""
        tensors = {"prior": self.prior_HK}
        for name in self.student.named():
            parameter = getattr(self.student, name)
            tensors[f"student.{name}"] = parameter
            tensors[f"teacher.{name}"] = getattr(self.teacher, name)
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        values = {"epoch": self.epoch, "history": self.history, "head_losses": self.head_losses_H.tolist()}
        return tensors, values

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        self.prior_HK.copy_(tensors["prior"])
        for name in self.student.named():
            parameter = getattr(self.student, name)
            parameter.copy_(tensors[f"student.{name}"])
            getattr(self.teacher, name).copy_(tensors[f"teacher.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {
                    key: value.to(self.device if key != "step" or self.device.type == "cuda" else "cpu")
                    for key, value in state.items()
                }
        self.epoch = values["epoch"]
        self.history = values["history"]
        self.head_losses_H = np.asarray(values["head_losses"])

    def _teacher_targets(
        self, batch: torch.Tensor, num_views: int, num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log targets of the image and of its neighbours (2, H, b, K), and the weight of each pair; moves the prior."""
        config, single = self.config, self.communicator.num_workers == 1

        def targets(logits_VHBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            log_q_VHBK = teacher_log_targets(logits_VHBK, config, self.communicator)
            q_VHBK = log_q_VHBK.exp()
            mass_HK = q_VHBK.sum(dim=(0, 2))
            if num_views > 2:
                mean_HBK = q_VHBK[1:].mean(dim=0)
                q_VHBK = torch.stack([q_VHBK[0], mean_HBK])
                log_q_VHBK = torch.stack([log_q_VHBK[0], mean_HBK.log()])
            return log_q_VHBK, mass_HK, pair_agreement(q_VHBK)

        def teacher_logits(heads: slice) -> torch.Tensor:
            return _by_view(head_logits(self.teacher.heads(heads), batch), num_views)

        if single:
            results = self.pool.map(lambda heads: targets(teacher_logits(heads)), self.blocks)
        else:
            # Workers must meet in the same order, so what sums over them stays in one thread.
            results = [targets(torch.cat(self.pool.map(teacher_logits, self.blocks), dim=1))]
        log_targets, masses, agreements = zip(*results, strict=True)
        batch_prior_HK = self.communicator.sum_(torch.cat(masses)) / (num_views * num_pairs)
        self.prior_HK.lerp_(batch_prior_HK, 1.0 - config.prior_momentum)
        return torch.cat(log_targets, dim=1), sum(agreements[1:], agreements[0]) / config.num_heads

    def _prepare(self, rows: npt.NDArray[np.int64], num_pairs: int) -> torch.Tensor:
        """The normalised batch, all views below each other, in the dtype of the products."""
        batch = self.inputs.gather(rows).flatten(0, 1)
        return self.inputs.normalise_batch(batch, len(rows) * num_pairs, self.communicator).to(self.dtype)

    def _learning_rate(self, position: float, num_pairs: int) -> float:
        target = self.config.learning_rate * num_pairs / BASE_BATCH_SIZE
        warmup = min(self.config.warmup_epochs, self.config.num_epochs)
        if position >= warmup:
            return target
        return target * (position * self.steps_per_epoch + 1) / (warmup * self.steps_per_epoch)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        for parameter, gradient in zip(self.student.tensors(), self.gradient.tensors(), strict=True):
            parameter.grad = gradient
        named = self.student.named()
        weights = [tensor for name, tensor in named.items() if not name.startswith(("hidden_bias", "bottleneck_bias"))]
        biases = [tensor for name, tensor in named.items() if name.startswith(("hidden_bias", "bottleneck_bias"))]
        groups = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, fused=True)

    def _freeze_prototypes(self, frozen: bool) -> None:
        # An optimiser passes over parameters without gradient: no decay, no moments, as if the layer was not there.
        self.student.prototypes_HKP.grad = None if frozen else self.gradient.prototypes_HKP


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
) -> TrainedHeads:
    """Train the heads and label every image with each.

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

    Returns:
        The same on every worker.

    Raises:
        FloatingPointError: a loss is not finite.
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
    last_saved = time.monotonic()
    while trainer.epoch < config.num_epochs:
        trainer.train_epoch()
        if progress is not None:
            progress.update(trainer.epoch, config.num_epochs, f"loss {trainer.history[-1]['loss']:.4f}")
        if checkpoints is not None and trainer.communicator.rank == 0:
            due = time.monotonic() - last_saved >= config.checkpoint_interval_s
            if due and trainer.epoch < config.num_epochs:
                checkpoints.save(*trainer.state())
                last_saved = time.monotonic()
    return TrainedHeads(trainer.label_matrix(), trainer.head_losses_H, trainer.teacher, trainer.history)


def teacher_momentum(config: HeadsConfig, steps_per_epoch: int) -> float:
    """The teacher's momentum. `auto` [ours]: a teacher that remembers as long as the paper's, 250 steps, would still be
    what it was at the start when a short run on a small collection ends."""
    if config.teacher_momentum != "auto":
        return config.teacher_momentum
    remembered = min(max(1.0, TEACHER_MEMORY * steps_per_epoch * config.num_epochs), MAX_TEACHER_MEMORY_STEPS)
    return 1.0 - 1.0 / remembered


def head_blocks(device: torch.device, num_heads: int) -> list[slice]:
    """The runs of heads that are computed together: see the top of this file."""
    size = num_heads if device.type == "cuda" else 1
    return [slice(start, min(start + size, num_heads)) for start in range(0, num_heads, size)]


def _by_view(logits_HnK: torch.Tensor, num_views: int) -> torch.Tensor:
    H, n, K = logits_HnK.shape
    return logits_HnK.view(H, num_views, n // num_views, K).transpose(0, 1)
