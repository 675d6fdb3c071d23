"""SwiGLU between its projections: silu(gate) * up in one pass (Shazeer, arXiv 2002.05202, eq. 6).

Autograd keeps gate and up alone; the backward pass makes the sigmoid again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .checks import check_alike
from .dispatch import jit, tl, triton, triton_serves

BLOCK = 2048


@jit
def _forward_kernel(gate, up, out, num_elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of elements; gate and out may be one tensor."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (x * tl.sigmoid(x) * other).to(out.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gate, up, d_out, d_gate, d_up, num_elements, BLOCK: tl.constexpr
):
    """A block of elements: silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
    chance = tl.sigmoid(x)
    steep = chance * (1.0 + x * (1.0 - chance))
    tl.store(d_gate + at, (slope * other * steep).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (slope * x * chance).to(d_up.dtype.element_ty), mask=inside)


def _product(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    if out.numel():
        _forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


class SwiGLU(torch.autograd.Function):
    """The Triton form, out of place, on contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up, torch.empty_like(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            _backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=4
            )
        return d_gate, d_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32 on a GPU; differentiable in both.

    Where neither requires a gradient, gate may be overwritten: use what is returned.

    Args:
        gate: floating point, of any shape.
        up: of the same shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if gate.shape != up.shape:
        raise ValueError(f"silu_mul: gate and up have shapes {list(gate.shape)} and {list(up.shape)}; expected one")
    check_alike("silu_mul", gate=gate, up=up)
    if not triton_serves("swiglu", gate):
        return eager.silu_mul(gate, up)
    if gate.requires_grad or up.requires_grad:
        return SwiGLU.apply(gate.contiguous(), up.contiguous())
    torch.autograd.graph.increment_version(gate)
    gate = gate.contiguous()
    return _product(gate, up.contiguous(), gate)
