"""Rotary position embedding of queries and keys in one launch (Su et al., arXiv 2104.09864, eq. 34).

Shapes: T tokens, Hq query heads, Hkv key heads, D head size. Channel i of a head is paired with channel i + D/2. A
rotation's gradient is turned back by the same angles, so autograd keeps cos and sin, which all layers share, and
neither query nor key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .checks import check_alike
from .dispatch import jit, tl, triton, triton_serves


@jit
def _turn_heads(  # type: ignore[no-untyped-def]
    x, out, token, cosine, sine, num_heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr
):
    """All heads of a token by the angles of its pairs of channels [1,WIDTH]; x and out may be one tensor."""
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (heads < num_heads) & (columns < SIZE // 2)
    at = (token * num_heads + heads) * SIZE + columns
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + SIZE // 2, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, num_query_heads, num_key_heads,
    BACK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
):  # fmt: skip
    """One token's query and key heads, turned by its angles, or back."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    # Half of each factor says it all: the first half of cos is its second, that of sin its second negated.
    at = token * SIZE + columns
    cosine = tl.load(cos + at, mask=columns < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + at + SIZE // 2, mask=columns < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sine = -sine
    _turn_heads(q, q_out, token, cosine, sine, num_query_heads, SIZE, WIDTH, QUERY_HEADS)
    _turn_heads(k, k_out, token, cosine, sine, num_key_heads, SIZE, WIDTH, KEY_HEADS)


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    num_tokens, num_query_heads, size = q.shape
    num_key_heads = k.shape[1]
    if num_tokens:
        _rotary_kernel[(num_tokens,)](
            q, k, cos, sin, q_out, k_out, num_query_heads, num_key_heads,
            BACK=back, SIZE=size, WIDTH=triton.next_power_of_2(size // 2),
            QUERY_HEADS=triton.next_power_of_2(num_query_heads), KEY_HEADS=triton.next_power_of_2(num_key_heads),
            num_warps=4,
        )  # fmt: skip
    return q_out, k_out


class Rotation(torch.autograd.Function):
    """The Triton form, out of place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn(d_q, d_k, cos, sin, back=True), None, None


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their tokens' positions; differentiable in q and k.

    Where neither q nor k requires a gradient, both may be overwritten: use what is returned.

    Args:
        q: [T,Hq,D] floating point, D even.
        k: [T,Hkv,D] of the same dtype.
        cos: [T,1,D] of the same dtype, both halves of D alike.
        sin: [T,1,D] of the same dtype, the first half of D the negated second (as ``engine.model.Rotary.angles``).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(q, k, cos, sin)
    if not triton_serves("rotary", q):
        return eager.rotate(q, cos, sin), eager.rotate(k, cos, sin)
    cos, sin = cos.detach().contiguous(), sin.detach().contiguous()
    if q.requires_grad or k.requires_grad:
        return Rotation.apply(q, k, cos, sin)
    torch.autograd.graph.increment_version((q, k))
    return _turn(q, k, cos, sin, in_place=True)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fit = q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2] and 0 not in (*q.shape[1:], k.shape[1])
    if not fit or q.shape[2] % 2 or not cos.shape == sin.shape == (q.shape[0], 1, q.shape[2]):
        shapes = ", ".join(f"{list(x.shape)}" for x in (q, k, cos))
        raise ValueError(
            f"apply_rotary: q, k, cos and sin have shapes {shapes} and {list(sin.shape)}; expected [T,Hq,D], [T,Hkv,D] "
            "and twice [T,1,D], D even"
        )
    check_alike("apply_rotary", q=q, k=k, cos=cos, sin=sin)
