"""How workers exchange results of their heads. Each worker trains some of the heads, so gathering is all they need. All
workers call the same methods in the same order."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class SingleWorker:
    """One process that trains all heads."""

    rank = 0
    num_workers = 1

    def gather(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        return rows

    gather_on_first = gather


class TorchDistributed:
    """The default process group of torch.distributed (gloo or NCCL), which the caller has set up."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.num_workers = dist.get_world_size()

    def gather(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        """The rows of all workers, in the order of ranks, on every worker. `num_rows`: of each worker."""
        received = self._room(rows, num_rows)
        dist.all_gather(received, _padded(rows, max(num_rows)))
        return _joined(received, num_rows)

    def gather_on_first(self, rows: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        """The rows of all workers on the worker of rank 0; on the others an empty tensor."""
        received = self._room(rows, num_rows) if self.rank == 0 else None
        dist.gather(_padded(rows, max(num_rows)), received)
        return rows[:0] if received is None else _joined(received, num_rows)

    def _room(self, rows: torch.Tensor, num_rows: Sequence[int]) -> list[torch.Tensor]:
        return [rows.new_empty((max(num_rows), *rows.shape[1:])) for _ in num_rows]


Communicator = SingleWorker | TorchDistributed


def _padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Collectives need the same shape from every worker."""
    padding = rows.new_zeros((num_rows - len(rows), *rows.shape[1:]))
    return torch.cat([rows, padding]) if len(padding) else rows.contiguous()


def _joined(received: Sequence[torch.Tensor], num_rows: Sequence[int]) -> torch.Tensor:
    return torch.cat([rows[:number] for rows, number in zip(received, num_rows, strict=True)])
