"""What the heads see of the features: batches gathered from the matrix, rotated and normalised (METHOD section 2), and
of these each head's own random share of the dimensions [ours].

BatchNorm has no affine parameters and is shared by student and teacher. Its statistics are those of the global batch,
both views together; labelling uses those of the whole set, which the running averages of BatchNorm estimate.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.communicator import Communicator
from icce_ray.methods.heads.training_memory import max_held_bytes
from icce_ray.runtime.threads import ThreadPool

BN_EPS = 1e-5
ROWS_PER_BLOCK = 4096


class HeadInputs:
    """A batch as each head sees it.

    Args:
        batch_nD: normalised, in the dtype of the products.
        columns_HS: the dimensions that each head sees, as `seen_columns` draws them; None: all heads see all.
    """

    def __init__(self, batch_nD: torch.Tensor, columns_HS: torch.Tensor | None) -> None:
        self.batch_nD = batch_nD
        self.columns_HS = columns_HS
        # Rows of a matrix are chosen ten times as fast as columns.
        self.batch_Dn = None if columns_HS is None else batch_nD.t().contiguous()

    def of(self, heads: slice, num_rows: int | None = None) -> torch.Tensor:
        """Inputs of a run of heads as in model.py; of the first `num_rows` rows."""
        if self.columns_HS is None or self.batch_Dn is None:
            return self.batch_nD[:num_rows]
        columns_hS = self.columns_HS[heads]
        chosen_hSn = self.batch_Dn[:, :num_rows].index_select(0, columns_hS.flatten()).view(*columns_hS.shape, -1)
        inputs_hnS = chosen_hSn.transpose(1, 2)
        return inputs_hnS[0] if len(inputs_hnS) == 1 else inputs_hnS


def seen_columns(num_heads: int, dim: int, num_inputs: int, seed: int) -> torch.Tensor | None:
    """(H, S) int64, ascending in each row: the dimensions that each head sees, a uniform random choice that depends on
    `seed` and the number of the head alone. None where all heads see all."""
    if num_inputs == dim:
        return None
    choices = [
        np.sort(np.random.default_rng([seed, head, dim]).choice(dim, num_inputs, replace=False))
        for head in range(num_heads)
    ]
    return torch.from_numpy(np.stack(choices))


class InputNorm:
    """Rotation and normalisation of feature batches.

    Args:
        features_ND: float16 or float32, may be memory-mapped.
        kind: as `heads.input_norm`.
        rotate: as `heads.rotate`.
        seed: of the rotation.
        device: where batches go.
        pool: threads for the pass over everything at the start.
    """

    def __init__(
        self,
        features_ND: npt.NDArray[Any],
        kind: Literal["batch_norm", "standardize", "none"],
        rotate: bool,
        seed: int,
        device: torch.device,
        pool: ThreadPool | None = None,
    ) -> None:
        self.features_ND = features_ND
        self.kind = kind
        self.device = device
        dim = features_ND.shape[1]
        self.rotation_DD = random_rotation(dim, seed).to(device) if rotate else None
        self.held_ND: torch.Tensor | None = None
        if features_ND.size * 4 <= max_held_bytes(device):
            self._hold(pool or ThreadPool(0))
        self.mean_D, self.scale_D = torch.zeros(dim, device=device), torch.ones(dim, device=device)
        # BatchNorm's epsilon is meant for activations of about unit size. Features come in any unit, so it is taken
        # relative to their mean variance: constant dimensions stay 0, and the unit does not matter.
        self.min_variance = 0.0
        if kind != "none":
            (pool or ThreadPool(0)).call(self._measure_the_set)

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The features of `rows` (any shape), rotated, float32 (*rows.shape, D) on the device."""
        if self.held_ND is not None:
            return self.held_ND.index_select(0, to_device(rows.ravel(), self.device)).view(*rows.shape, -1)
        return self._read(rows.ravel()).view(*rows.shape, -1)

    def normalise_batch(self, batch_nD: torch.Tensor, num_global: int, communicator: Communicator) -> torch.Tensor:
        """Normalise this worker's rows of a training batch that has `num_global` rows over all workers."""
        if self.kind != "batch_norm":
            return self.normalise(batch_nD)
        mean_D = communicator.sum_(batch_nD.sum(dim=0)) / num_global
        centred = batch_nD - mean_D
        variance_D = communicator.sum_(centred.square().sum(dim=0)) / num_global
        return centred * torch.rsqrt(variance_D + self.min_variance)

    def normalise(self, batch_nD: torch.Tensor) -> torch.Tensor:
        """Normalise rows by the statistics of the whole set."""
        return (batch_nD - self.mean_D) * self.scale_D

    def _read(self, rows: npt.NDArray[np.int64] | slice) -> torch.Tensor:
        batch = torch.from_numpy(np.array(self.features_ND[rows], dtype=np.float32)).to(self.device)
        return batch if self.rotation_DD is None else batch @ self.rotation_DD

    def _hold(self, pool: ThreadPool) -> None:
        """Rotate everything once: on a CPU, rotating each batch would cost as much as several heads."""
        held_ND = torch.empty(self.features_ND.shape, device=self.device)

        def fill(start: int) -> None:
            held_ND[start : start + ROWS_PER_BLOCK] = self._read(slice(start, start + ROWS_PER_BLOCK))

        pool.map(fill, range(0, len(held_ND), ROWS_PER_BLOCK))
        self.held_ND = held_ND

    def _measure_the_set(self) -> None:
        num_rows, dim = self.features_ND.shape
        total, total_square = torch.zeros(2, dim, dtype=torch.float64, device=self.device)
        # Squares of values near 0 cancel least: a first guess of the mean is taken off.
        guess_D = self.gather(np.arange(min(num_rows, 256))).mean(dim=0)
        for start in range(0, num_rows, ROWS_PER_BLOCK):
            block = self.gather(np.arange(start, min(start + ROWS_PER_BLOCK, num_rows))) - guess_D
            total += block.sum(dim=0, dtype=torch.float64)
            total_square += block.square().sum(dim=0, dtype=torch.float64)
        mean = total / num_rows
        variance = (total_square / num_rows - mean.square()).clamp_min(0.0)
        self.min_variance = max(BN_EPS * float(variance.mean()), 1e-30)
        self.mean_D = (mean + guess_D).float()
        self.scale_D = torch.rsqrt(variance + self.min_variance).float()


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A tensor of the array on the device. A GPU goes on computing meanwhile: from memory that is not pinned, a copy
    would wait for all that it has been given to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def random_rotation(dim: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix (D, D), float32."""
    generator = np.random.default_rng([seed, dim])
    q, r = np.linalg.qr(generator.standard_normal((dim, dim)))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))
