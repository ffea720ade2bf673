"""Which dtype matrix products are computed in: where there are units for bfloat16, it is 2 to 16 times as fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: as asked for, or, with `auto`, bfloat16 where the processor has units for it
    (elsewhere it would be emulated, and slower than float32)."""
    import torch

    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16")
    return torch.bfloat16 if native else torch.float32
