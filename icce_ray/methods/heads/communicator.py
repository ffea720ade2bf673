"""Sums over workers. The trainer computes every statistic of the global batch through one of these, so that it need not
know how many workers there are."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
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


GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915


def talk_over(address: str) -> None:
    """Let gloo use the network interface of this process that has the IPv4 `address`, unless the user has chosen one.

    By itself gloo takes the address that the host's own name stands for. On many hosts that is none, or one of the
    loopback's (Debian: 127.0.1.1), at which workers on other hosts look for it in vain.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
