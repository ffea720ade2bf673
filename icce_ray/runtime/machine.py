"""This machine: CPUs, GPUs, memory, network interfaces, and the dtype of its fastest matrix products."""

from __future__ import annotations

import fcntl
import importlib.util
import math
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icce_ray.errors import ResourceError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Limits of the container that this process runs in."""
GPU_ANSWER_S = 20
SIOCGIFADDR = 0x8915
"""The ioctl that asks for an interface's address."""


def has_umap() -> bool:
    """Whether umap-learn, an extra, is installed. A folder of that name in the working directory does not count."""
    spec = importlib.util.find_spec("umap")
    return spec is not None and spec.origin is not None


def check_umap(setting: str) -> None:
    """Raises ResourceError: umap-learn, which the setting needs, is missing."""
    if not has_umap():
        raise ResourceError(f"{setting} needs the package umap-learn: pip install 'icce_ray[umap]', or change it")


def usable_cpus() -> int:
    """Number of CPUs that this process may use: its affinity, within the quota of its container."""
    # macOS has neither.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CONTROL_GROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))


def num_gpus() -> int:
    """Number of NVIDIA GPUs that this process may use, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "-") == "" or shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=GPU_ANSWER_S)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def total_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes(device: torch.device | None = None) -> int:
    """Memory of this machine that can still be allocated, within the limit of its container; or that of a GPU."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total_memory_bytes()
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        # Cached pages of files count as used, but the kernel reclaims them.
        reclaimable = int(dict(line.split() for line in lines).get("inactive_file", 0))
    except (OSError, ValueError):
        return available
    return min(available, limit - used + reclaimable)


def require_memory(needed: float, available: float, what: str, remedy: str, where: str = "") -> None:
    """Refuse work before it allocates anything. Raises ResourceError: `needed` bytes are more than are `available`."""
    if needed > available:
        raise ResourceError(
            f"{what} need about {needed / 1e9:.1f} GB{where}; {available / 1e9:.1f} GB are free. {remedy}"
        )


def interface_with(address: str) -> str | None:
    """Name of the network interface that has the IPv4 `address`, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. With `auto`, bfloat16 where the processor has units for it, which are 2 to 16 times
    as fast; elsewhere bfloat16 is emulated and slower than float32."""
    import torch

    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16")
    return torch.bfloat16 if native else torch.float32
