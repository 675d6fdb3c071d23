"""Causal attention: over packed segments for training, over a paged cache for sampling.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager, libraries
from .dispatch import exact_serves_paged, packed_attention_by
from .exact_attention import exact_packed_attention, exact_paged_attention
from .segments import SegmentAttention

LIBRARIES = {"flash-attn": libraries.flash_attn, "varlen": libraries.varlen, "xformers": libraries.xformers}


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention inside each packed segment, and to the whole of its prefix if it has one.

    A token sees nothing else: never another segment. Differentiable in q, k and v.

    Args:
        q: [T,Hq,D] floating point.
        k: [T,Hkv,D] of the same dtype; Hkv divides Hq.
        v: [T,Hkv,D] of the same dtype.
        cu_seqlens: [N+1] int32, where each segment starts; the first is 0, the last T.
        max_seqlen: tokens in the longest segment.
        prefix: [N] int32, the number of the segment that each segment sees as if it stood before its own tokens (the
            shared prompt of a group), or -1. Segments that see a prefix follow it directly, one after the other, and it
            has none itself. Values that break this are found on a CPU only.

    Returns:
        [T,Hq,D] of q's dtype; scores are scaled by D**-0.5.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a prefix that stands elsewhere.
    """
    _check_heads("packed_attention", q, k, v)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"packed_attention: q {_shape(q)} and k {_shape(k)} differ in tokens or head size; both are [T,heads,D]"
        )
    _check_index("packed_attention", "cu_seqlens", cu_seqlens, 1, q.device)
    if prefix is not None:
        _check_prefix(prefix, cu_seqlens)
    served_by = packed_attention_by(q.device.type, q.dtype, q.shape[2], prefix is not None)
    if served_by == "sdpa" or q.shape[0] == 0:
        return eager.packed_attention(q, k, v, cu_seqlens, max_seqlen, prefix)
    if served_by == "exact":
        return exact_packed_attention(q, k, v, cu_seqlens, max_seqlen, prefix)
    q, k, v, cu_seqlens = (x.contiguous() for x in (q, k, v, cu_seqlens))
    if served_by == "triton":
        return SegmentAttention.apply(q, k, v, cu_seqlens, max_seqlen, None if prefix is None else prefix.contiguous())
    return LIBRARIES[served_by](q, k, v, cu_seqlens, max_seqlen)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Attention of new tokens to a paged cache that already holds their keys and values; no gradient.

    One form serves a prefill, a prefill behind a cached prefix, and decoding: query i of sequence n is at position
    context_lens[n] - len_q[n] + i and attends to every cached position up to its own.

    Args:
        q: [T,Hq,D] floating point, the new tokens of all sequences.
        k_cache: [num_blocks,block_size,Hkv,D] of the same dtype, contiguous, finite in unused places too.
        v_cache: as k_cache.
        block_tables: [N,max_blocks] int32, the cache block of each run of block_size positions; unused entries may be
            anything below num_blocks.
        context_lens: [N] int32, tokens in the cache, the new ones included.
        cu_seqlens_q: [N+1] int32, where each sequence's new tokens start in q; the first is 0, the last T.
        max_seqlen_q: new tokens of the longest sequence; 1 when decoding.

    Returns:
        [T,Hq,D] of q's dtype; scores are scaled by D**-0.5.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a cache that is not contiguous.
    """
    _check_heads("paged_attention", q, k_cache.flatten(0, 1), v_cache.flatten(0, 1))
    if k_cache.dim() != 4 or k_cache.shape[3] != q.shape[2]:
        raise ValueError(
            f"paged_attention: the caches have shape {_shape(k_cache)}; expected "
            f"[num_blocks,block_size,Hkv,D] with D {q.shape[2]} as in q"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("paged_attention: the caches are not contiguous; allocate each layer's as one tensor")
    for name, index, dims in (
        ("block_tables", block_tables, 2),
        ("context_lens", context_lens, 1),
        ("cu_seqlens_q", cu_seqlens_q, 1),
    ):
        _check_index("paged_attention", name, index, dims, q.device)
    if not len(block_tables) == len(context_lens) == len(cu_seqlens_q) - 1:
        raise ValueError(
            f"paged_attention: block_tables, context_lens and cu_seqlens_q have {len(block_tables)}, "
            f"{len(context_lens)} and {len(cu_seqlens_q)} rows; expected N, N and N+1"
        )
    paged = exact_paged_attention if exact_serves_paged(q) else eager.paged_attention
    return paged(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, max_seqlen_q)


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}"


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q, k and v have shapes {_shape(q)}, {_shape(k)} and {_shape(v)}; expected [T,Hq,D] and twice "
            "[T,Hkv,D] with Hkv dividing Hq"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; expected one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v are on {q.device}, {k.device} and {v.device}; move them to one device")


def _check_index(op: str, name: str, index: Tensor, dims: int, device: torch.device) -> None:
    if index.dtype != torch.int32 or index.dim() != dims or index.device != device:
        raise ValueError(
            f"{op}: {name} is a {index.dim()}-dimensional {index.dtype} tensor on {index.device}; expected "
            f"{dims} dimensions of int32 on {device}"
        )


def _check_prefix(prefix: Tensor, cu_seqlens: Tensor) -> None:
    _check_index("packed_attention", "prefix", prefix, 1, cu_seqlens.device)
    if len(prefix) != len(cu_seqlens) - 1:
        raise ValueError(
            f"packed_attention: prefix has {len(prefix)} entries for {len(cu_seqlens) - 1} segments; expected one each"
        )
    if prefix.device.type != "cpu":  # to read it there would make the host wait
        return
    before = -1
    for n, number in enumerate(prefix.tolist()):
        nearest = n - 1 if before < 0 else before
        if number not in (-1, nearest):
            raise ValueError(
                f"packed_attention: prefix[{n}] is {number}; expected {'' if nearest < 0 else f'{nearest} or '}-1, for "
                "the segments that see a prefix follow it directly"
            )
        before = number
