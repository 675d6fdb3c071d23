"""What every small kernel asks of its tensors before it launches."""

from __future__ import annotations

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
