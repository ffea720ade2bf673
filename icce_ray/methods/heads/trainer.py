"""Trains the heads of one worker, epoch by epoch.

Every worker trains its share of the heads on the whole batch; one collective a step gathers how strongly each head
agrees with each pair (H x B numbers). Nothing else crosses heads, so any number of workers gives the same bits. On a
CPU each thread computes one head at a time, so the number of threads does not matter either.

H heads of all workers, h of this one, B pairs of a step, K clusters.
"""

import time
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.balance import (
    LAST_RENEWAL,
    comparison_epoch,
    has_too_many_empty,
    move_balance,
    renew_prototypes,
)
from icce_ray.methods.heads.communicator import Communicator
from icce_ray.methods.heads.compiled_step import choose_passes
from icce_ray.methods.heads.division import HeadDivision
from icce_ray.methods.heads.inputs import ROWS_AT_ONCE, FeatureNorm, HeadInputs, seen_columns
from icce_ray.methods.heads.model import forward
from icce_ray.methods.heads.optimizer import ce_weight_at, learning_rate_at, teacher_momentum
from icce_ray.methods.heads.pair_batches import choose_batch_size, epoch_batches, num_steps_per_epoch
from icce_ray.methods.heads.state import HeadState
from icce_ray.methods.heads.step import Batch, HeadBlock, StepValues
from icce_ray.methods.heads.teacher import pair_weights
from icce_ray.methods.heads.training_memory import require_training_memory
from icce_ray.methods.heads.watch import EpochWatch, mean_pairwise_nmi
from icce_ray.metrics.contingency import MIN_SIZE_AGREEMENT, size_agreement
from icce_ray.neighbors.graph import NeighborGraph
from icce_ray.runtime.machine import matmul_dtype
from icce_ray.runtime.threads import ThreadPool, prefetched

NMI_PER_RUN = 20
LAST_LAYER = "prototypes_HKP"


class HeadTrainer:
    """The training of one worker's heads."""

    def __init__(
        self,
        features_ND: npt.NDArray[Any],
        graph: NeighborGraph,
        settings: HeadsConfig,
        *,
        num_clusters: int,
        seed: int,
        communicator: Communicator,
        device: torch.device,
        num_threads: int,
    ) -> None:
        num_images, dim = features_ND.shape
        assert num_images == graph.num_images
        self.settings = settings
        self.graph = graph
        self.seed = seed
        self.communicator = communicator
        self.device = device
        self.num_anchors = len(graph.anchors)
        self.batch_size = choose_batch_size(self.num_anchors, settings.batch_size)
        on_gpu = device.type == "cuda"
        self.division = HeadDivision.of(settings.num_heads, communicator.num_workers, on_gpu=on_gpu)
        self.heads = self.division.heads(communicator.rank)
        require_training_memory(
            settings, num_images=num_images, dim=dim, num_clusters=num_clusters, batch_size=self.batch_size,
            device=device, num_threads=num_threads, num_workers=communicator.num_workers,
        )  # fmt: skip
        self.pool = ThreadPool(0 if on_gpu else num_threads)
        self.dtype = matmul_dtype(settings.precision, device)
        self.norm = FeatureNorm(features_ND, settings.input_norm, settings.rotate, seed, device, self.pool)
        columns_hS = seen_columns(self.heads, dim, settings.num_inputs(dim), seed)
        self.columns_hS = None if columns_hS is None else columns_hS.to(device)
        self.state = HeadState.initialise(settings, self.heads, dim, num_clusters, seed, device)
        self.blocks = self._make_blocks()
        self.watch = EpochWatch(num_images, graph.anchors, len(self.heads), num_clusters, seed, device)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.head_losses_H = np.full(settings.num_heads, np.nan)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.num_anchors, self.batch_size)

    def train_epoch(self) -> None:
        """One pass over all images that have neighbours. Raises FloatingPointError: a loss is not finite; names heads,
        epoch, step and the settings in use."""
        started = time.perf_counter()
        self.watch.start_epoch()
        rows = epoch_batches(self.graph, self.batch_size, self.settings.num_positives, self.seed, self.epoch)
        loss_sum_h, bad_step_h = self.train_steps(map(self.make_batch, rows))
        if self.settings.finds_balance:
            self._find_balance()
        self._finish_epoch(loss_sum_h, bad_step_h, time.perf_counter() - started)

    def make_batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The normalised features of the images of a step and of their neighbours, `rows` (V, B)."""
        batch_nD = self.norm.normalise_batch(self.norm.gather(rows.ravel()))
        return Batch(rows, HeadInputs(batch_nD.to(self.dtype), self.columns_hS))

    def train_steps(self, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One update for each batch, from the start of the present epoch. Returns the loss summed over pairs (h,),
        float64, and the first step at which it was not finite (h,), or the number of steps where it always was."""
        upcoming = prefetched(batches)
        batch = next(upcoming)
        agreement_hB = torch.cat(self.pool.map(partial(self._look, batch=batch), self.blocks))
        loss_sum_h = torch.zeros(len(self.heads), dtype=torch.float64, device=self.device)
        bad_step_h = torch.full((len(self.heads),), self.steps_per_epoch, device=self.device)
        for step, next_batch in enumerate(chain(upcoming, [None])):
            weight_B = None
            if self.settings.loss == "temi":
                weight_B = pair_weights(self.communicator.gather(agreement_hB, self.division.num_heads))
            values = self._values(step, batch.num_pairs)
            work = partial(self._train, batch=batch, weight_B=weight_B, values=values, next_batch=next_batch)
            losses, agreements = zip(*self.pool.map(work, self.blocks), strict=True)
            loss_h, agreement_hB = torch.cat(losses), torch.cat(agreements)
            loss_sum_h += loss_h
            # Kept on the device: asking whether a loss is finite would make a GPU wait at every step.
            bad_step_h = torch.where(loss_h.isfinite(), bad_step_h, bad_step_h.clamp_max(step))
            if next_batch is not None:
                batch = next_batch
        return loss_sum_h, bad_step_h

    def label_matrix(self) -> npt.NDArray[np.int32]:
        """The most likely cluster of every image by each of this worker's heads, (h, N)."""
        num_images = self.graph.num_images
        labels_hN = torch.zeros((len(self.heads), num_images), dtype=torch.int32, device=self.device)

        def label(start: int) -> None:
            stop = min(start + ROWS_AT_ONCE, num_images)
            batch_nD = self.norm.normalise(self.norm.gather(np.arange(start, stop)))
            inputs = HeadInputs(batch_nD.to(self.dtype), self.columns_hS)
            for block in self.blocks:
                cosines_HnK = forward(block.state.teacher, inputs.of(block.heads)).cosines_HnK
                labels_hN[block.heads, start:stop] = cosines_HnK.argmax(dim=-1).int()

        self.pool.map(label, range(0, num_images, ROWS_AT_ONCE))
        labels: npt.NDArray[np.int32] = labels_hN.cpu().numpy()
        return labels

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of this worker's heads that a resumed run needs, heads first. Loading copies into them."""
        return self.state.named() | {"watched_labels": self.watch.previous_Hw}

    def values(self) -> dict[str, Any]:
        """The JSON-able values that a resumed run needs, the same on all workers."""
        return {"epoch": self.epoch, "history": self.history, "head_losses": self.head_losses_H.tolist()}

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Go on from what :meth:`tensors` and :meth:`values` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.epoch = values["epoch"]
        self.history = values["history"]
        self.head_losses_H = np.asarray(values["head_losses"])

    def _make_blocks(self) -> list[HeadBlock]:
        first = self.heads.start
        slices = [
            slice(block.start - first, block.stop - first) for block in self.division.blocks[self.communicator.rank]
        ]
        states = [self.state.heads(heads) for heads in slices]
        num_rows, dim = self.batch_size * (1 + self.settings.num_positives), self.norm.features_ND.shape[1]
        inputs = HeadInputs(torch.ones((num_rows, dim), dtype=self.dtype, device=self.device), self.columns_hS)
        num_steps = self.steps_per_epoch * self.settings.num_epochs
        passes = choose_passes(self.settings, states, inputs, slices, num_steps)
        momentum = teacher_momentum(self.settings, self.steps_per_epoch)
        return [
            HeadBlock(state, heads, self.settings, momentum, passes)
            for state, heads in zip(states, slices, strict=True)
        ]

    def _values(self, step: int, num_pairs: int) -> StepValues:
        settings, num_steps = self.settings, self.steps_per_epoch
        position = self.epoch + step / num_steps
        num_updates = dict.fromkeys(self.state.student.named(), self.epoch * num_steps + step)
        num_updates[LAST_LAYER] -= settings.freeze_last_layer_epochs * num_steps
        if num_updates[LAST_LAYER] < 0:
            del num_updates[LAST_LAYER]
        return StepValues(
            learning_rate_at(position, num_steps, num_pairs, settings), ce_weight_at(position, settings), num_updates
        )

    def _look(self, block: HeadBlock, batch: Batch) -> torch.Tensor:
        """Agreement of a block of heads with the pairs of a batch, (H, B); empty with SCAN's loss, which has none."""
        if self.settings.loss == "scan":
            return torch.zeros((0, 0), device=self.device)
        agreement_HB, labels_HB = block.look(batch)
        self.watch.record(block.heads, batch.rows[0], labels_HB)
        return agreement_HB

    def _train(
        self, block: HeadBlock, batch: Batch, weight_B: torch.Tensor | None, values: StepValues,
        next_batch: Batch | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Train a block of heads on a batch and look at the next one, while the teacher is in the cache. Returns the
        loss (H,) and the agreement with the next batch (H, B)."""
        loss_H, labels_HB = block.train(batch, weight_B, values)
        if self.settings.loss == "scan":
            self.watch.record(block.heads, batch.rows[0], labels_HB)
        agreement_HB = torch.zeros((0, 0), device=self.device) if next_batch is None else self._look(block, next_batch)
        return loss_H, agreement_HB

    def _find_balance(self) -> None:
        """Move the balance of each head, and give prototypes to those that have too many empty clusters."""
        too_many_h = has_too_many_empty(self.watch.sizes_HK)
        too_low_h = too_many_h
        compared = comparison_epoch(self.settings.num_epochs)
        if self.epoch >= compared and self.history[compared - 1]["size_agreement"] < MIN_SIZE_AGREEMENT:
            too_low_h = too_many_h | (self.watch.sizes_HK == 0).any(dim=1) | (self.state.balance_H > 0)
        move_balance(self.state.balance_H, too_low_h, self.epoch, self.settings.num_epochs)
        needs_new = too_many_h.tolist()
        if not any(needs_new) or self.epoch + 1 > LAST_RENEWAL * self.settings.num_epochs:
            return
        generator = np.random.default_rng([self.seed, self.epoch])
        # As many rows as a step has, which the memory is sized for.
        rows = generator.choice(self.graph.anchors, min(2 * self.batch_size, self.num_anchors), replace=False)
        inputs = HeadInputs(self.norm.normalise(self.norm.gather(rows)).to(self.dtype), self.columns_hS)

        def renew(block: HeadBlock) -> None:
            heads = range(len(needs_new))[block.heads]
            seeds = [[self.seed, self.epoch, self.heads[head]] if needs_new[head] else None for head in heads]
            if any(seeds):
                renew_prototypes(block.state, inputs.of(block.heads), self.watch.sizes_HK[block.heads], seeds)

        self.pool.map(renew, self.blocks)

    def _finish_epoch(self, loss_sum_h: torch.Tensor, bad_step_h: torch.Tensor, seconds: float) -> None:
        """Share the figures of the epoch among the workers, and note them in the history."""
        changed_h, empty_h = self.watch.finish_epoch()
        figures = (loss_sum_h, bad_step_h, changed_h, empty_h, self.state.balance_H)
        figures_h5 = torch.stack([figure.double() for figure in figures], dim=1)
        figures_H5 = self.communicator.gather(figures_h5, self.division.num_heads).cpu().numpy()
        loss_sum_H, bad_step_H, changed_H, empty_H, balance_H = figures_H5.T
        losses_H = loss_sum_H / self.num_anchors
        last = self._values(self.steps_per_epoch - 1, self.num_anchors // self.steps_per_epoch)
        if not np.isfinite(losses_H).all():
            raise FloatingPointError(self._describe_fault(bad_step_H, last))
        self.epoch += 1
        self.head_losses_H = losses_H
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": float(losses_H.mean()),
                "best_head_loss": float(losses_H.min()),
                "head_losses": [round(loss, 6) for loss in losses_H.tolist()],
                "learning_rate": last.learning_rate,
                "ce_weight": last.ce_weight,
                "empty_clusters": float(empty_H.sum() / (len(losses_H) * self.state.prior_HK.shape[1])),
                "balance": float(balance_H.mean()),
                "label_change": None
                if self.epoch == 1
                else float(changed_H.sum() / (len(losses_H) * self.watch.previous_Hw.shape[1])),
                **self._compare_heads(),
                "seconds": round(seconds, 3),
                "pairs_per_s": round(self.num_anchors / seconds, 1),
            }
        )

    def _compare_heads(self) -> dict[str, float | None]:
        """How similar the heads' labels are, and how far they agree about the sizes of clusters. Both are None in most
        epochs, because they take the labels of all workers."""
        settings = self.settings
        finds_nmi = self.epoch % max(1, settings.num_epochs // NMI_PER_RUN) == 0
        finds_sizes = settings.finds_balance and self.epoch == comparison_epoch(settings.num_epochs)
        if not (finds_nmi or finds_sizes):
            return {"head_nmi": None, "size_agreement": None}
        labels_Hw = self.communicator.gather(self.watch.previous_Hw, self.division.num_heads).cpu().numpy()
        return {
            "head_nmi": mean_pairwise_nmi(labels_Hw) if finds_nmi else None,
            "size_agreement": size_agreement(labels_Hw) if finds_sizes else None,
        }

    def _describe_fault(self, bad_step_H: npt.NDArray[np.float64], last: StepValues) -> str:
        # All heads share the weight of a pair, so one bad head spoils all others in the next step.
        first = int(bad_step_H.min())
        heads = np.flatnonzero(bad_step_H == first).tolist()
        before = "this is the first epoch" if self.epoch == 0 else f"mean loss before {self.head_losses_H.mean():.4g}"
        return (
            f"the loss of heads {heads} is not finite in epoch {self.epoch}, step {first} of {self.steps_per_epoch} "
            f"(learning rate {last.learning_rate:.3g}, cross-entropy weight {last.ce_weight:.3g}, {before}); lower "
            "heads.learning_rate or set heads.precision=float32"
        )
