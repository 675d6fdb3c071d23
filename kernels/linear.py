"""A linear map, x @ weight.T + bias.

Shapes: T rows, K inputs, N outputs.

On a CPU, float32 goes through oneDNN's product, which PyTorch's compiler calls where ``F.linear`` calls MKL: on a
processor of AMD it takes half the time. It reads a transposed matrix where it lies, so both gradients are products of
views. In the exact mode Triton computes it (``product.py``), and the gradients are as they usually are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_alike
from .dispatch import onednn_serves, triton_serves
from .product import exact_product

# Multiples of the rows that oneDNN is given: of many, of a few hundred, and of few.
ROWS, SOME_ROWS, FEW_ROWS = 256, 64, 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; differentiable in all three.

    By oneDNN and by Triton a row's result is the same to the bit among any number of others, at any place.

    Args:
        x: [T,K] floating point.
        weight: [N,K] of the same dtype.
        bias: [N] of the same dtype, or None.

    Returns:
        [T,N] of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, weight, bias)
    exact = triton_serves("linear", x)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if learns and (exact or onednn_serves(x)):
        return _Linear.apply(x, weight, bias, exact)
    return exact_product(x, weight, bias) if exact else product(x, weight, bias)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:  # [T,K], [N,K], [N] -> [T,N]
    """a @ b.T + bias; by oneDNN without a gradient. b may be a transposed view.

    Rows are filled up, also because a lone one would be summed in another order than two.
    """
    if not onednn_serves(a) or a.numel() == 0:  # a sum over nothing is beyond oneDNN
        return F.linear(a, b, bias)
    return _multiply(_fill(a), b, bias)[: len(a)]


def _fill(x: Tensor) -> Tensor:  # [T,K] -> [more,K]
    """Fills up with rows of zeros to one of few numbers of rows.

    oneDNN makes code for every shape that it meets, some hundred KiB each, and keeps that of up to 1,024.
    """
    count = len(x)
    missing = -count % (ROWS if count > 2 * ROWS else SOME_ROWS if count > SOME_ROWS else FEW_ROWS)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        return exact_product(x, weight, bias) if exact else product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        d_out = d_out.contiguous()  # a sum's gradient is one number, expanded
        return (
            product(d_out, weight.t()) if need_x else None,
            transposed_product(d_out, x).contiguous() if need_weight else None,
            d_out.sum(0) if need_bias else None,
            None,
        )


def transposed_product(a: Tensor, b: Tensor) -> Tensor:  # [T,N], [T,K] -> [N,K]
    """a.T @ b, perhaps as a transposed view: oneDNN is faster where the narrower matrix comes first."""
    if not onednn_serves(a) or a.numel() == 0:
        return a.t() @ b
    a, b = _fill(a), _fill(b)
    return _multiply(a.t(), b.t()) if a.shape[1] < b.shape[1] else _multiply(b.t(), a.t()).t()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{list(t.shape)}" for t in (x, weight, bias) if t is not None)
        raise ValueError(f"linear: x, weight and bias have shapes {shapes}; expected [T,K], [N,K] and [N]")
    check_alike("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
