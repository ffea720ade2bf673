"""The search engine for GPUs: blocked half-precision products on the tensor cores.

FAISS on a GPU has no range search and lists of at most 2048, so the threshold rule cannot be built on it. Here a block
of scores is compared with the queries' radii where it was computed, and only the pairs beyond leave the device. Scores
in float16 are good to 0.002; pairs closer to a border than that are scored again from the float32 rows, in float64,
on the device. So the neighbours are those of float32 on a CPU, ties included. What is left for the CPU, the rule on the
pairs, takes longer than the products: so several blocks of queries are searched at a time, each in a thread.

Legend: D feature dimension, n images of the shard, Q queries, B images of a block, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from icce_ray.neighbors.engine import BASE_BLOCK, RESOLUTION, Pairs, as_slice
from icce_ray.neighbors.prepared import Floats, Ids, PreparedFeatures

SCORES_PER_BLOCK = 2**28
RESCORED_ELEMENTS = 2**26
SAFETY = 1.25
SAMPLE_STRIDE = 4
GROUPS_PER_RANK = 64
BLOCK_BYTES = 2**31
"""Of device memory that a block of queries takes: scores, and which of them are beyond."""


class TorchEngine:
    """Holds the rows of a shard on a device, in float16 for the products and in float32 for the second look.

    Args:
        prepared: the features of all images.
        ids_n: the shard's images, ascending.
        device: where to search; `cpu` gives the same neighbours, slowly.
        num_threads: of this process.
    """

    def __init__(self, prepared: PreparedFeatures, ids_n: Ids, device: str = "cuda", num_threads: int = 1) -> None:
        dim = prepared.shape[1]
        self.ids_n = ids_n
        self.error = half_precision_error(dim)
        self.device = torch.device(device)
        self._rows_nD = torch.empty((len(ids_n), dim), dtype=torch.float32, device=self.device)

        def load(start: int) -> None:
            block = ids_n[start : start + BASE_BLOCK]
            self._rows_nD[start : start + len(block)] = torch.from_numpy(prepared[as_slice(block)]).to(self.device)

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(load, range(0, len(ids_n), BASE_BLOCK)))
        self._half_nD = self._rows_nD.half()
        self.blocks_at_once = num_threads
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            self.blocks_at_once = max(1, min(num_threads, free // BLOCK_BYTES))
        # Split sums in float16 would be off by more than `error` says.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def lower_bounds(self, queries_QD: Floats, k: int) -> Floats:
        """Every fourth image is looked at: products are cheap here, and what they let through is not. The images fall
        into G groups, and the k-th highest of the groups' maxima is the bound: k images reach it, and it is hardly
        below the k-th highest score, at the cost of one pass over the scores instead of a selection among them."""
        sample_mD = self._half_nD[:: max(1, min(SAMPLE_STRIDE, len(self.ids_n) // (GROUPS_PER_RANK * k)))]
        num_groups = min(len(sample_mD), GROUPS_PER_RANK * k)
        if num_groups < k:
            return np.full(len(queries_QD), -np.inf, np.float32)
        half_QD = self._half(queries_QD)
        best_QG = torch.full((len(queries_QD), num_groups), -torch.inf, dtype=torch.half, device=self.device)
        step = num_groups * max(1, SCORES_PER_BLOCK // (len(queries_QD) * num_groups))
        for start in range(0, len(sample_mD), step):
            scores_Qm = half_QD @ sample_mD[start : start + step].T
            # Those beside each other fall into different groups: the collection may be sorted by class.
            for scores_Qg in torch.split(scores_Qm, num_groups, dim=1):
                best_Qg = best_QG[:, : scores_Qg.shape[1]]
                torch.maximum(best_Qg, scores_Qg, out=best_Qg)
        bounds_Q: Floats = best_QG.topk(k, dim=1).values[:, -1].float().cpu().numpy()
        return bounds_Q

    def pairs_above(self, queries_QD: Floats, radius_Q: Floats) -> Iterator[Pairs]:
        half_QD = self._half(queries_QD)
        radius_Q1 = torch.from_numpy(_round_up_to_half(np.clip(radius_Q, -2.0, 2.0))).to(self.device)[:, None]
        step = max(1, SCORES_PER_BLOCK // len(queries_QD))
        for start in range(0, len(self.ids_n), step):
            scores_QB = half_QD @ self._half_nD[start : start + step].T
            rows_P, columns_P = (scores_QB >= radius_Q1).nonzero(as_tuple=True)
            scores_P = scores_QB[rows_P, columns_P].float()
            ids_P = self.ids_n[start + columns_P.cpu().numpy()]
            yield rows_P.int().cpu().numpy(), ids_P, scores_P.cpu().numpy()

    def exact(self, queries_QD: Floats, rows_P: npt.NDArray[np.int32], ids_P: Ids) -> Ids:
        rows = torch.from_numpy(np.asarray(rows_P, dtype=np.int64)).to(self.device)
        columns = torch.from_numpy(np.searchsorted(self.ids_n, ids_P)).to(self.device)
        float_QD = torch.from_numpy(queries_QD).to(self.device)
        units_P = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        step = max(1, RESCORED_ELEMENTS // queries_QD.shape[1])
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            products = float_QD[rows[chunk]].double() * self._rows_nD[columns[chunk]].double()
            units_P[chunk] = (products.sum(dim=1) / RESOLUTION).round().long()
        units: Ids = units_P.cpu().numpy()
        return units

    def _half(self, queries_QD: Floats) -> torch.Tensor:
        return torch.from_numpy(queries_QD).to(self.device).half()


def _round_up_to_half(radius_Q: Floats) -> npt.NDArray[np.float16]:
    """The lowest float16 numbers that are not below: float16 scores reach them when they reach the radius, and a GPU
    compares halves five times as fast as a half with a float."""
    half_Q = radius_Q.astype(np.float16)
    return np.where(half_Q < radius_Q, np.nextafter(half_Q, np.float16(np.inf)), half_Q)


def half_precision_error(dim: int) -> float:
    """Bound on the error of a float16 product of unit vectors, summed in float32, the result in float16.

    Rounding both factors moves the sum by at most 2^-10 (Cauchy-Schwarz), what is too small for float16 by 2^-24 for
    each dimension, the sum by 2^-23 for each, and the result by 2^-11.
    """
    return SAFETY * (2.0**-10 + 2.0**-11 + dim * (2.0**-23 + 2.0**-24)) + 2 * RESOLUTION
