"""Which implementation serves an operation on a device; the only place that knows what is installed.

Triton has no wheel for some platforms; there ``triton``, ``tl`` and ``TensorDescriptor`` are None, :func:`jit` leaves a
kernel as it is, and the eager forms serve.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

# What can serve each operation, the best first. What stands behind "torch" and "sdpa", which serve every device, must
# be asked for: see force_exact.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("grouped_logprob", "clamped_delta_loss", "rms_norm", "rotary", "swiglu"), ("triton", "eager")),
    "linear": ("onednn", "torch", "triton"),
    "sample_tokens": ("triton", "eager"),
    "packed_attention": ("flash-attn", "varlen", "xformers", "triton", "sdpa", "exact"),
    "paged_attention": ("triton", "flash-attn", "xformers", "eager"),
}
OPERATIONS = tuple(IMPLEMENTATIONS)
# Attention kernels of others, each with the module that has it.
LIBRARIES = {"flash-attn": "flash_attn", "varlen": "torch.nn.attention.varlen", "xformers": "xformers.ops"}
MAX_HEAD_SIZE = 256
_forced: dict[tuple[str, str], str] = {}


def jit(function: Callable[..., None], unspecialised: Sequence[str] = ()) -> Any:
    """``triton.jit`` where Triton is installed; the function itself elsewhere, where nothing launches it.

    Of the values of ``unspecialised`` arguments the code knows nothing, so that there is one binary for all.
    """
    return function if triton is None else triton.jit(function, do_not_specialize=unspecialised)


@cache
def available(device_type: str, op: str) -> tuple[str, ...]:
    """Name what can serve ``op`` on ``device_type`` here, the best first. Raises ValueError for an unknown operation.

    Triton serves CUDA (which is also ROCm's name in PyTorch), and the CPU when Triton's interpreter was asked for; the
    libraries serve CUDA.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"operation {op!r} is unknown; expected one of {', '.join(OPERATIONS)}")
    return tuple(name for name in IMPLEMENTATIONS[op] if _runs_on(device_type, name) and _installed(name))


def implementation(device_type: str, op: str) -> str:
    """Name what serves ``op`` on ``device_type``: what was forced, else the first that is available."""
    return _forced.get((device_type, op)) or available(device_type, op)[0]


def force(op: str, name: str, device_type: str | None = None) -> None:
    """Serve ``op`` by ``name`` in this process; to be called before the first use.

    Args:
        op: one of OPERATIONS.
        name: one of IMPLEMENTATIONS[op], or "auto" for the first that is available.
        device_type: where; by default what is available.

    Raises:
        ValueError: an unknown operation or name, or one that is not installed or does not run on the device.
    """
    device_type = device_type or _default_device()
    names = available(device_type, op)
    if name == "auto":
        _forced.pop((device_type, op), None)
        return
    if name not in names:
        if name not in IMPLEMENTATIONS[op]:
            reason = "is unknown"
        else:
            reason = "is not installed" if _runs_on(device_type, name) else f"does not run on {device_type}"
        raise ValueError(f"{op}: implementation {name!r} {reason}; choose one of auto, {', '.join(names)}")
    _forced[device_type, op] = name


def force_exact(device_type: str | None = None) -> None:
    """Serve linear maps and packed attention by the forms of the exact mode; as :func:`force`.

    On a CPU the usual linear map is one, by oneDNN.
    """
    device_type = device_type or _default_device()
    force("packed_attention", "exact", device_type)
    if "triton" in available(device_type, "linear"):
        force("linear", "triton", device_type)


@contextmanager
def exact_forms(device_type: str) -> Iterator[None]:
    """:func:`force_exact` for a while."""
    before = dict(_forced)
    force_exact(device_type)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def packed_attention_by(device_type: str, dtype: torch.dtype, head_size: int, shared: bool) -> str:
    """Name what serves packed attention of such heads, with prefixes if ``shared``.

    It is the implementation, or the first behind it that can: the libraries take half precision, head sizes that are
    multiples of 8 up to 256, and no prefix; Triton head sizes up to 256.
    """
    names = available(device_type, "packed_attention")
    half = dtype in (torch.float16, torch.bfloat16)
    can = dict.fromkeys(LIBRARIES, half and not shared and head_size <= MAX_HEAD_SIZE and head_size % 8 == 0)
    can |= {"triton": _triton_takes(device_type, dtype) and head_size <= MAX_HEAD_SIZE, "sdpa": True}
    asked = implementation(device_type, "packed_attention")
    if asked == "exact":
        return "exact" if exact_attention_by(device_type, dtype, head_size) else "sdpa"
    return next(name for name in names[names.index(asked) :] if can[name])


def exact_attention_by(device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """Name what serves attention of the exact mode: "triton" where it runs, "eager" for float32 on a CPU, else ""."""
    if "triton" in available(device_type, "linear"):
        return "triton" if _triton_takes(device_type, dtype) and head_size <= MAX_HEAD_SIZE else ""
    return "eager" if device_type == "cpu" and dtype == torch.float32 else ""


def paged_attention_by(device_type: str, dtype: torch.dtype, head_size: int, block_size: int) -> str:
    """Name what serves attention to a paged cache of such heads and blocks.

    It is the implementation, or the first behind it that can: Triton takes head sizes up to 256 and blocks whose size
    is a power of two from 16 on; the libraries half precision, head sizes that are multiples of 8 up to 256, and
    blocks of a multiple of 256. Where it is Triton, ``decode.DecodePlan`` serves decoding.
    """
    names = available(device_type, "paged_attention")
    half = dtype in (torch.float16, torch.bfloat16)
    power = block_size >= 16 and block_size & (block_size - 1) == 0
    can = dict.fromkeys(LIBRARIES, half and head_size <= MAX_HEAD_SIZE and head_size % 8 == 0 and block_size % 256 == 0)
    can |= {"triton": power and _triton_takes(device_type, dtype) and head_size <= MAX_HEAD_SIZE, "eager": True}
    return next(name for name in names[names.index(implementation(device_type, "paged_attention")) :] if can[name])


def triton_serves(op: str, tensor: torch.Tensor) -> bool:
    """Whether Triton runs ``op`` on such a tensor: not float64, nor bf16 in the interpreter, which gets it wrong."""
    device_type = tensor.device.type
    return _triton_takes(device_type, tensor.dtype) and implementation(device_type, op) == "triton"


def onednn_serves(tensor: torch.Tensor) -> bool:
    """Whether oneDNN computes the products of such a tensor: float32 on a CPU."""
    return tensor.dtype == torch.float32 and implementation(tensor.device.type, "linear") == "onednn"


def describe(device_type: str | None = None) -> str:
    """One line for the start of a run: what serves each operation on ``device_type`` (default: what is available)."""
    device_type = device_type or _default_device()
    served = [f"{op} {implementation(device_type, op)}" for op in OPERATIONS]
    usual = implementation(device_type, "packed_attention")
    others = {
        "float32": packed_attention_by(device_type, torch.float32, 64, False),
        "with prefixes": packed_attention_by(device_type, torch.float16, 64, True),
    }
    served += [f"packed_attention {what} {name}" for what, name in others.items() if name != usual]
    return f"kernels on {device_type}: " + ", ".join(served)


@cache
def architecture_of(device: torch.device) -> str:
    """Whose settings a Triton kernel takes: "sm_90", "sm_80", "gfx942", or "cpu" for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    # 12 has neither the matrix instructions nor the shared memory of 9 and 10.
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _runs_on(device_type: str, name: str) -> bool:
    if name == "triton":
        return device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    if name == "onednn":
        return device_type == "cpu"
    if name == "varlen":
        return device_type == "cuda" and torch.version.hip is None
    return device_type == "cuda" or name not in LIBRARIES


@cache
def _installed(name: str) -> bool:
    if name == "onednn":
        return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if name not in LIBRARIES:
        return name != "triton" or triton is not None
    # Imported, not only looked for: a build for another PyTorch is there but does not load.
    try:
        importlib.import_module(LIBRARIES[name])
    except ImportError:
        return False
    return True


def _triton_takes(device_type: str, dtype: torch.dtype) -> bool:
    return dtype not in ((torch.float64, torch.bfloat16) if device_type == "cpu" else (torch.float64,))
