"""Chooses the precision and the kernels with which a device trains fastest."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def mixed_precision(device: torch.device) -> torch.autocast:
    """Compute in bf16 where the device has instructions for it; without them it is many times slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bf16())


def cpu_has_bf16() -> bool:
    """Whether torch has kernels for bf16 that are fast on this processor: on x86, from AVX-512 on."""
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose the attention kernel that trains fastest: on a CPU, the fused one has slow gradients."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
