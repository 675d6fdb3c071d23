"""Rotary position embedding of queries and keys in one launch (Su et al., arXiv 2104.09864, eq. 34).

Shapes: T tokens, Hq query heads, Hkv key heads, D head size. Channel i of a head is paired with channel i + D/2. A
rotation's gradient is turned back by the same angles, so autograd keeps cos and sin, which all layers share, and
neither query nor key. A sampler's keys and values go into its paged cache in the same launch.
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
    x, out, token, place, cosine, sine, num_heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr
):
    """All heads of a token by the angles of its pairs of channels [1,WIDTH], to a row of out, or nowhere if it is < 0.

    x and out may be one tensor.
    """
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (heads < num_heads) & (columns < SIZE // 2) & (place >= 0)
    at = (token * num_heads + heads) * SIZE + columns
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    at = (place * num_heads + heads) * SIZE + columns
    tl.store(out + at, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + SIZE // 2, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


@jit
def _angles(cos, sin, token, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine of a token's pairs of channels, [1,WIDTH] each."""
    columns = tl.arange(0, WIDTH)
    # Half of each factor says it all: the first half of cos is its second, that of sin its second negated.
    at = token * SIZE + columns
    cosine = tl.load(cos + at, mask=columns < SIZE // 2, other=0.0).to(tl.float32)
    sine = tl.load(sin + at + SIZE // 2, mask=columns < SIZE // 2, other=0.0).to(tl.float32)
    return cosine[None, :], sine[None, :]


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, num_query_heads, num_key_heads,
    BACK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
):  # fmt: skip
    """One token's query and key heads, turned by its angles, or back."""
    token = tl.program_id(0).to(tl.int64)
    cosine, sine = _angles(cos, sin, token, SIZE, WIDTH)
    if BACK:
        sine = -sine
    _turn_heads(q, q_out, token, token, cosine, sine, num_query_heads, SIZE, WIDTH, QUERY_HEADS)
    _turn_heads(k, k_out, token, token, cosine, sine, num_key_heads, SIZE, WIDTH, KEY_HEADS)


@jit
def _write_kernel(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, slots, k_cache, v_cache, num_query_heads, num_key_heads,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
):  # fmt: skip
    """One token's query heads turned in place; its key heads turned, and its values, to its slot of the caches."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    cosine, sine = _angles(cos, sin, token, SIZE, WIDTH)
    _turn_heads(q, q, token, token, cosine, sine, num_query_heads, SIZE, WIDTH, QUERY_HEADS)
    _turn_heads(k, k_cache, token, slot, cosine, sine, num_key_heads, SIZE, WIDTH, KEY_HEADS)
    heads = tl.arange(0, KEY_HEADS)[:, None]
    columns = tl.arange(0, 2 * WIDTH)[None, :]
    inside = (heads < num_key_heads) & (columns < SIZE) & (slot >= 0)
    at = heads * SIZE + columns
    value = tl.load(v + token * num_key_heads * SIZE + at, mask=inside, other=0.0)
    tl.store(v_cache + slot * num_key_heads * SIZE + at, value, mask=inside)


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    if len(q):
        _rotary_kernel[(len(q),)](
            q, k, cos, sin, q_out, k_out, q.shape[1], k.shape[1], BACK=back, **_sizes(q, k), num_warps=4
        )
    return q_out, k_out


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    heads = {"QUERY_HEADS": triton.next_power_of_2(q.shape[1]), "KEY_HEADS": triton.next_power_of_2(k.shape[1])}
    return {"SIZE": q.shape[2], "WIDTH": triton.next_power_of_2(q.shape[2] // 2), **heads}


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
    _check("apply_rotary", q, k, cos, sin)
    if not triton_serves("rotary", q):
        return eager.rotate(q, cos, sin), eager.rotate(k, cos, sin)
    cos, sin = cos.detach().contiguous(), sin.detach().contiguous()
    if q.requires_grad or k.requires_grad:
        return Rotation.apply(q, k, cos, sin)
    torch.autograd.graph.increment_version((q, k))
    return _turn(q, k, cos, sin, in_place=True)


@torch.no_grad()
def write_rotated(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """Turns queries and keys by their angles and stores keys and values in a paged cache, in one launch; no gradient.

    Args:
        q: [T,Hq,D] floating point, D even; may be overwritten: use what is returned.
        k: [T,Hkv,D] of the same dtype.
        v: [T,Hkv,D] of the same dtype.
        cos: [T,1,D], as :func:`apply_rotary` takes it.
        sin: as cos.
        k_cache: [num_blocks,block_size,Hkv,D] of the same dtype, contiguous: one layer of the pool.
        v_cache: as k_cache.
        slots: [T] int64, the place of each token among the pool's num_blocks * block_size, each at most once. In the
            Triton form -1 means that a token is stored nowhere (it pads a batch); the eager form takes none.

    Returns:
        [T,Hq,D], the queries turned.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a cache that is not contiguous.
        IndexError: on a CPU, a slot that the pool has not.
    """
    _check("write_rotated", q, k, cos, sin)
    _check_cache(k, v, k_cache, v_cache, slots)
    if not triton_serves("rotary", q):
        k_cache.flatten(0, 1).index_copy_(0, slots, eager.rotate(k, cos, sin))
        v_cache.flatten(0, 1).index_copy_(0, slots, v)
        return eager.rotate(q, cos, sin)
    q, k, v, cos, sin, slots = (x.contiguous() for x in (q, k, v, cos, sin, slots))
    if len(q):
        torch.autograd.graph.increment_version((q, k_cache, v_cache))
        _write_kernel[(len(q),)](
            q, k, v, cos, sin, slots, k_cache, v_cache, q.shape[1], k.shape[1], **_sizes(q, k), num_warps=4
        )
    return q


def _check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fit = q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2] and 0 not in (*q.shape[1:], k.shape[1])
    if not fit or q.shape[2] % 2 or not cos.shape == sin.shape == (q.shape[0], 1, q.shape[2]):
        shapes = ", ".join(f"{list(x.shape)}" for x in (q, k, cos))
        raise ValueError(
            f"{op}: q, k, cos and sin have shapes {shapes} and {list(sin.shape)}; expected [T,Hq,D], [T,Hkv,D] "
            "and twice [T,1,D], D even"
        )
    check_alike(op, q=q, k=k, cos=cos, sin=sin)


def _check_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if v.shape != k.shape or k_cache.dim() != 4 or not k_cache.shape[2:] == v_cache.shape[2:] == k.shape[1:]:
        shapes = ", ".join(f"{list(x.shape)}" for x in (k, v, k_cache))
        raise ValueError(
            f"write_rotated: k, v, k_cache and v_cache have shapes {shapes} and {list(v_cache.shape)}; expected twice "
            "[T,Hkv,D] and twice [num_blocks,block_size,Hkv,D]"
        )
    check_alike("write_rotated", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("write_rotated: the caches differ in shape or are not contiguous; allocate a layer's as one")
    if slots.dtype != torch.int64 or slots.shape != k.shape[:1] or slots.device != k.device:
        raise ValueError(
            f"write_rotated: slots is a {slots.dtype} tensor of shape {list(slots.shape)} on {slots.device}; expected "
            f"int64 of shape [{len(k)}] on {k.device}"
        )
