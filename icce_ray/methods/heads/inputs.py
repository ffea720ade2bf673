"""Inputs of the heads: rotated, normalised batches of features, and a random subset of the dimensions for each head
(docs/METHOD.md, "Batch normalisation" and "Architecture")."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.methods.heads.training_memory import max_held_bytes
from icce_ray.runtime.threads import ThreadPool

BN_EPS = 1e-5
ROWS_AT_ONCE = 4096


class HeadInputs:
    """A batch as each head sees it.

    Args:
        batch_nD: normalised, in the dtype of the products.
        columns_HS: the dimensions that each head sees, from :func:`seen_columns`; None: all heads see all.
    """

    def __init__(self, batch_nD: torch.Tensor, columns_HS: torch.Tensor | None) -> None:
        self.batch_nD = batch_nD
        self.columns_HS = columns_HS
        # Selecting rows of a matrix is ten times as fast as selecting columns.
        self.batch_Dn = None if columns_HS is None else batch_nD.t().contiguous()

    def of(self, heads: slice, num_rows: int | None = None) -> torch.Tensor:
        """Inputs of some heads, in the shape that model.py expects, for the first `num_rows` rows."""
        if self.columns_HS is None or self.batch_Dn is None:
            return self.batch_nD[:num_rows]
        columns_hS = self.columns_HS[heads]
        chosen_hSn = self.batch_Dn[:, :num_rows].index_select(0, columns_hS.flatten()).view(*columns_hS.shape, -1)
        inputs_hnS = chosen_hSn.transpose(1, 2)
        return inputs_hnS[0] if len(inputs_hnS) == 1 else inputs_hnS


def seen_columns(heads: range, dim: int, num_inputs: int, seed: int) -> torch.Tensor | None:
    """(H, S) int64, ascending in each row: the dimensions that each head sees, a uniform random choice that depends on
    `seed` and the head's number alone. None if all heads see all."""
    if num_inputs == dim:
        return None
    choices = [np.random.default_rng([seed, head, dim]).choice(dim, num_inputs, replace=False) for head in heads]
    return torch.from_numpy(np.sort(np.stack(choices), axis=1))


class FeatureNorm:
    """Rotation and normalisation of feature batches. Labels use the statistics of the whole set, which the running
    averages of batch normalisation would estimate.

    Args:
        features_ND: float16 or float32, may be memory-mapped.
    """

    def __init__(
        self,
        features_ND: npt.NDArray[Any],
        kind: Literal["batch_norm", "standardize", "none"],
        rotate: bool,
        seed: int,
        device: torch.device,
        pool: ThreadPool,
    ) -> None:
        self.features_ND = features_ND
        self.kind = kind
        self.device = device
        dim = features_ND.shape[1]
        self.rotation_DD = random_rotation(dim, seed).to(device) if rotate else None
        self.held_ND: torch.Tensor | None = None
        if features_ND.size * 4 <= max_held_bytes(device):
            self._hold(pool)
        self.mean_D, self.scale_D = torch.zeros(dim, device=device), torch.ones(dim, device=device)
        self.min_variance = 0.0
        if kind != "none":
            pool.call(self._measure_set)

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The features of `rows` (n,), rotated, float32 (n, D) on the device."""
        if self.held_ND is not None:
            return self.held_ND.index_select(0, to_device(rows, self.device))
        return self._read(rows)

    def normalise_batch(self, batch_nD: torch.Tensor) -> torch.Tensor:
        """Normalise the rows of a training batch, all views together."""
        if self.kind == "batch_norm":
            return batch_normalise(batch_nD, self.min_variance)
        return self.normalise(batch_nD)

    def normalise(self, batch_nD: torch.Tensor) -> torch.Tensor:
        """Normalise rows by the statistics of the whole set."""
        return (batch_nD - self.mean_D) * self.scale_D

    def _read(self, rows: npt.NDArray[np.int64] | slice) -> torch.Tensor:
        batch = torch.from_numpy(np.array(self.features_ND[rows], dtype=np.float32)).to(self.device)
        return batch if self.rotation_DD is None else batch @ self.rotation_DD

    def _hold(self, pool: ThreadPool) -> None:
        """Rotate all features once: on a CPU, rotating each batch would cost as much as several heads."""
        held_ND = torch.empty(self.features_ND.shape, device=self.device)

        def fill(start: int) -> None:
            held_ND[start : start + ROWS_AT_ONCE] = self._read(slice(start, start + ROWS_AT_ONCE))

        pool.map(fill, range(0, len(held_ND), ROWS_AT_ONCE))
        self.held_ND = held_ND

    def _measure_set(self) -> None:
        num_rows, dim = self.features_ND.shape
        total, total_square = torch.zeros(2, dim, dtype=torch.float64, device=self.device)
        # Subtracting a first guess of the mean keeps the squares from cancelling.
        guess_D = self.gather(np.arange(min(num_rows, 256))).mean(dim=0)
        for start in range(0, num_rows, ROWS_AT_ONCE):
            rows = self.gather(np.arange(start, min(start + ROWS_AT_ONCE, num_rows))) - guess_D
            total += rows.sum(dim=0, dtype=torch.float64)
            total_square += rows.square().sum(dim=0, dtype=torch.float64)
        mean = total / num_rows
        variance = (total_square / num_rows - mean.square()).clamp_min(0.0)
        # Features come in any unit: BatchNorm's epsilon is taken relative to their mean variance. Constant dimensions
        # then stay 0.
        self.min_variance = max(BN_EPS * float(variance.mean()), 1e-30)
        self.mean_D = (mean + guess_D).float()
        self.scale_D = torch.rsqrt(variance + self.min_variance).float()


def batch_normalise(batch_nD: torch.Tensor, min_variance: float) -> torch.Tensor:
    """Batch normalisation without scale and shift (docs/METHOD.md, "Batch normalisation"); `min_variance` is its
    epsilon."""
    num_rows = len(batch_nD)
    centred = batch_nD - batch_nD.sum(dim=0) / num_rows
    variance_D = centred.square().sum(dim=0) / num_rows
    return centred * torch.rsqrt(variance_D + min_variance)


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A tensor of the array on the device. Pinned memory lets a GPU compute during the copy; otherwise the copy would
    wait until the GPU is idle."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def random_rotation(dim: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix (D, D), float32."""
    generator = np.random.default_rng([seed, dim])
    q, r = np.linalg.qr(generator.standard_normal((dim, dim)))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))
