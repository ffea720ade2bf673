from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from icce_ray.runtime import machine

GIB = 2**30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group without limits, on a machine with 8 CPUs for this process."""
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def test_macos_has_no_affinity_and_no_control_groups(container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(machine, "CONTROL_GROUP", Path("/nowhere"))
    assert machine.usable_cpus() == 6


@pytest.mark.parametrize(
    ("listed", "hidden", "expected"),
    [("GPU 0: A (UUID: x)\nGPU 1: A (UUID: y)", False, 2), ("GPU 0: A", True, 0), ("No devices were found", False, 0)],
)
def test_gpus_are_counted_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, hidden: bool, expected: int
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.num_gpus() == expected
    monkeypatch.setenv("PATH", "")
    assert machine.num_gpus() == 0


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (None, 8),
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("10000 100000", 1),
        ("1600000 100000", 8),
    ],
)
def test_usable_cpus_are_those_of_the_affinity_within_the_quota(
    container: Path, quota: str | None, expected: int
) -> None:
    if quota is not None:
        (container / "cpu.max").write_text(quota)
    assert machine.usable_cpus() == expected


def test_available_memory_is_the_machines_within_the_limit_of_the_container(container: Path) -> None:
    unlimited = machine.available_memory_bytes()
    assert 0 < unlimited <= machine.total_memory_bytes()
    (container / "memory.max").write_text(str(unlimited // 4))
    (container / "memory.current").write_text(str(unlimited // 8))
    (container / "memory.stat").write_text("anon 1\ninactive_file 4096\n")
    assert machine.available_memory_bytes() == unlimited // 4 - unlimited // 8 + 4096
    (container / "memory.max").write_text("max")
    assert machine.available_memory_bytes() > unlimited // 2


def test_an_interface_is_found_by_its_address() -> None:
    assert machine.interface_with("127.0.0.1") == "lo"
    assert machine.interface_with("203.0.113.7") is None  # reserved for documentation


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_is_bfloat16_where_the_processor_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.matmul_dtype("auto", torch.device("cpu")) == expected
    assert machine.matmul_dtype("float16", torch.device("cpu")) == torch.float16
