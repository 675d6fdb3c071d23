"""Which implementation serves an operation on a device; the only place that knows what is installed.

Triton has no wheel for some platforms; there ``triton``, ``tl`` and ``TensorDescriptor`` are None, :func:`jit` leaves a kernel as it is, and
the eager forms serve.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

OPERATIONS = (
    *("grouped_logprob", "clamped_delta_loss", "rms_norm", "rotary", "swiglu"),
    *("packed_attention", "paged_attention"),
)


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit`` where Triton is installed; the function itself elsewhere, where nothing launches it."""
    return function if triton is None else triton.jit(function)


@cache
def implementation(device_type: str, op: str) -> str:
    """Name what serves ``op`` on ``device_type``: "triton", "flash-attn", "sdpa" or "eager".

    Triton serves CUDA (which is also ROCm's name in PyTorch), and the CPU when Triton's interpreter was asked for.
    Raises ValueError for an unknown operation.
    """
    if op not in OPERATIONS:
        raise ValueError(f"operation {op!r} is unknown; expected one of {', '.join(OPERATIONS)}")
    on_gpu = device_type == "cuda"
    if op == "packed_attention":
        return "flash-attn" if on_gpu and _has_flash_attn() else "sdpa"
    if op == "paged_attention":
        return "eager"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if triton is not None and (on_gpu or interpreted) else "eager"


def triton_serves(op: str, tensor: torch.Tensor) -> bool:
    """Whether Triton runs ``op`` on such a tensor: not float64, nor bf16 in the interpreter, which gets it wrong."""
    excluded = (torch.float64, torch.bfloat16) if tensor.device.type == "cpu" else (torch.float64,)
    return tensor.dtype not in excluded and implementation(tensor.device.type, op) == "triton"


def describe(device_type: str | None = None) -> str:
    """One line for the start of a run: what serves each operation on ``device_type`` (default: what is available)."""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"kernels on {device_type}: " + ", ".join(f"{op} {implementation(device_type, op)}" for op in OPERATIONS)


@cache
def _has_flash_attn() -> bool:
    # Imported, not only looked for: a build for another PyTorch is there but does not load.
    try:
        importlib.import_module("flash_attn")
    except ImportError:
        return False
    return True
