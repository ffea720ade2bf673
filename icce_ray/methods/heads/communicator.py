"""Sums over workers. The trainer computes every statistic of the global batch through one of these, so that it need not
know how many workers there are."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist


class Communicator(Protocol):
    """Workers that hold equal parameters and share every batch."""

    rank: int
    num_workers: int

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its sum over the workers, in place, and return it."""
        ...

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its elementwise maximum over the workers, in place, and return it."""
        ...


class SingleWorker:
    """One process: its sums are the sums."""

    rank = 0
    num_workers = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class TorchDistributed:
    """The default process group of torch.distributed (gloo or NCCL), which the caller has set up."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.num_workers = dist.get_world_size()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor
