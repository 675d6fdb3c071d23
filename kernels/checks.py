"""What kernels ask of their tensors before they launch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors have one floating-point dtype and one device, those of the first."""
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise ValueError(f"{op}: {first_name} is {first.dtype}; cast it to a floating-point dtype")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} and {first_name} {first.dtype}; cast them to one floating-point dtype"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and {first_name} on {first.device}; move them to one device"
            )


def shape_of(tensor: Tensor) -> str:
    """As errors write it."""
    return f"{list(tensor.shape)}"


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q [T,Hq,D], k and v [T,Hkv,D] have heads that fit, one dtype and one device."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q, k and v have shapes {shape_of(q)}, {shape_of(k)} and {shape_of(v)}; expected [T,Hq,D] and twice "
            "[T,Hkv,D] with Hkv dividing Hq"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; expected one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v are on {q.device}, {k.device} and {v.device}; move them to one device")


def check_index(op: str, name: str, index: Tensor, dims: int, device: torch.device) -> None:
    """Raise ValueError unless ``index`` is int32 of so many dimensions on ``device``."""
    if index.dtype != torch.int32 or index.dim() != dims or index.device != device:
        raise ValueError(
            f"{op}: {name} is a {index.dim()}-dimensional {index.dtype} tensor on {index.device}; expected "
            f"{dims} dimensions of int32 on {device}"
        )
