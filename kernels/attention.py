"""Causal attention over packed segments.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from torch import Tensor

from . import eager, libraries
from .checks import check_heads, check_index, shape_of
from .dispatch import packed_attention_by
from .exact_attention import exact_packed_attention
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
    check_heads("packed_attention", q, k, v)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"packed_attention: q {shape_of(q)} and k {shape_of(k)} differ in tokens or head size; both are [T,heads,D]"
        )
    check_index("packed_attention", "cu_seqlens", cu_seqlens, 1, q.device)
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


def _check_prefix(prefix: Tensor, cu_seqlens: Tensor) -> None:
    check_index("packed_attention", "prefix", prefix, 1, cu_seqlens.device)
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
