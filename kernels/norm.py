"""RMSNorm, alone or of a sum, in one pass over the rows (Zhang and Sennrich, arXiv 1910.07467, eq. 4).

Shapes: N rows, H columns of a row.

Autograd keeps the normalised input as it is and 1/rms of each row. The gradient of the weight is summed row by row in
each of at most NUM_PROGRAMS programs and then over the programs; who sums which rows depends on N and H alone, and
nothing is added atomically: a result is the same to the bit in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .checks import check_alike
from .dispatch import jit, tl, triton, triton_serves

# Elements of a program's tile, or one row if that is more; 16 a thread.
FORWARD_ELEMENTS = 2048
BACKWARD_ELEMENTS = 4096
# Two for each of an H200's 132 cores; their parts of the weight's gradient take 5.4 MB at H 5120.
NUM_PROGRAMS = 264


def tile(elements: int, num_hidden: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of about so many elements that holds whole rows; powers of two."""
    width = triton.next_power_of_2(num_hidden)
    rows = max(1, elements // width)
    return rows, width, min(16, max(4, rows * width // 512))


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, y, total, inverse_rms, num_rows, num_hidden, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of rows -> y and 1/rms; with a residual the sum too, and y is the norm of the sum as it is stored."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    column_in = columns < num_hidden
    inside = (rows < num_rows)[:, None] & column_in[None, :]
    at = rows.to(tl.int64)[:, None] * num_hidden + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        rounded = (values + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / num_hidden + eps)
    gain = tl.load(weight + columns, mask=column_in, other=0.0).to(tl.float32)
    tl.store(y + at, (values * inverse[:, None] * gain[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + rows, inverse, mask=rows < num_rows)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x, weight, inverse_rms, d_y, d_total, d_x, partial, num_rows, num_hidden,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of rows in every num_programs -> d_x, d_total added to it, and the program's part of d_weight [H]."""
    columns = tl.arange(0, WIDTH)
    column_in = columns < num_hidden
    gain = tl.load(weight + columns, mask=column_in, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    # Two stages: the next tile is on its way while this one is reduced.
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=2):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & column_in[None, :]
        at = rows.to(tl.int64)[:, None] * num_hidden + columns[None, :]
        inverse = tl.load(inverse_rms + rows, mask=rows < num_rows, other=0.0)[:, None]
        normalised = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
        slope = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
        d_weight += slope * normalised
        slope *= gain[None, :]
        shared = tl.sum(slope * normalised, axis=1) / num_hidden
        change = (slope - normalised * shared[:, None]) * inverse
        if HAS_RESIDUAL:
            change += tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + at, change.to(d_x.dtype.element_ty), mask=inside)
    at_part = partial + tl.program_id(0).to(tl.int64) * num_hidden + columns
    tl.store(at_part, tl.sum(d_weight, axis=0), mask=column_in)


class RMSNorm(torch.autograd.Function):
    """The Triton form, on contiguous tensors: (y, sum), the sum None without a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        num_hidden = weight.shape[0]
        num_rows = x.numel() // num_hidden
        y = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        inverse_rms = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        rows, width, num_warps = tile(FORWARD_ELEMENTS, num_hidden)
        if num_rows:
            _forward_kernel[(triton.cdiv(num_rows, rows),)](
                x, x if residual is None else residual, weight, y, y if total is None else total, inverse_rms,
                num_rows, num_hidden, eps,
                HAS_RESIDUAL=residual is not None, ROWS=rows, WIDTH=width, num_warps=num_warps,
            )  # fmt: skip
        ctx.save_for_backward(x if total is None else total, weight, inverse_rms)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        num_rows, num_hidden = len(inverse_rms), weight.shape[0]
        d_y = d_y.contiguous()
        d_x = torch.empty_like(x)
        rows, width, num_warps = tile(BACKWARD_ELEMENTS, num_hidden)
        num_programs = min(NUM_PROGRAMS, triton.cdiv(num_rows, rows))
        partial = torch.empty(num_programs, num_hidden, dtype=torch.float32, device=x.device)
        if num_rows:
            _backward_kernel[(num_programs,)](
                x, weight, inverse_rms, d_y, d_y if d_total is None else d_total.contiguous(), d_x, partial,
                num_rows, num_hidden,
                HAS_RESIDUAL=d_total is not None, ROWS=rows, WIDTH=width, num_warps=num_warps,
            )  # fmt: skip
        return d_x, None if d_total is None else d_x, partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32; differentiable in x and weight.

    Args:
        x: [...,H] floating point.
        weight: [H] of the same dtype.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check("rms_norm", x, weight)
    if triton_serves("rms_norm", x):
        return RMSNorm.apply(x.contiguous(), None, weight.contiguous(), eps)[0]
    return eager.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the dtype of x: the norm is of the sum as it is returned.

    ``residual`` has the shape and dtype of x; the rest is as for :func:`rms_norm`.
    """
    _check("add_rms_norm", x, weight, residual)
    if triton_serves("rms_norm", x):
        return RMSNorm.apply(x.contiguous(), residual.contiguous(), weight.contiguous(), eps)
    total = x + residual
    return eager.rms_norm(total, weight, eps), total


def _check(op: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or weight.numel() == 0:
        shapes = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"{op}: x and weight have shapes {shapes}; expected [...,H] and [H], H at least 1")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {list(residual.shape)}; expected {list(x.shape)} as x")
    check_alike(op, x=x, weight=weight, **({} if residual is None else {"residual": residual}))
