"""Attention of new tokens to a paged cache, for sampling.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager, libraries
from .checks import check_heads, check_index, shape_of
from .dispatch import paged_attention_by
from .prefill import prefill

FORMS = {
    "triton": prefill,
    "flash-attn": libraries.paged_flash_attn,
    "xformers": libraries.paged_xformers,
    "eager": eager.paged_attention,
}


@torch.no_grad()
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
    check_heads("paged_attention", q, k_cache.flatten(0, 1), v_cache.flatten(0, 1))
    if k_cache.dim() != 4 or k_cache.shape[3] != q.shape[2]:
        raise ValueError(
            f"paged_attention: the caches have shape {shape_of(k_cache)}; expected "
            f"[num_blocks,block_size,Hkv,D] with D {q.shape[2]} as in q"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("paged_attention: the caches are not contiguous; allocate each layer's as one tensor")
    for name, index, dims in (
        ("block_tables", block_tables, 2),
        ("context_lens", context_lens, 1),
        ("cu_seqlens_q", cu_seqlens_q, 1),
    ):
        check_index("paged_attention", name, index, dims, q.device)
    if not len(block_tables) == len(context_lens) == len(cu_seqlens_q) - 1:
        raise ValueError(
            f"paged_attention: block_tables, context_lens and cu_seqlens_q have {len(block_tables)}, "
            f"{len(context_lens)} and {len(cu_seqlens_q)} rows; expected N, N and N+1"
        )
    if q.shape[0] == 0:
        return torch.empty_like(q)
    served_by = paged_attention_by(q.device.type, q.dtype, q.shape[2], k_cache.shape[1])
    q, block_tables, context_lens, cu_seqlens_q = (
        x.contiguous() for x in (q, block_tables, context_lens, cu_seqlens_q)
    )
    return FORMS[served_by](q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, max_seqlen_q)
