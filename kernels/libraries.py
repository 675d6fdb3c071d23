"""Attention by kernels of others: flash-attn, PyTorch's varlen_attn, xformers.

For packed segments each takes q [T,Hq,D], k and v [T,Hkv,D] in half precision, contiguous, cu_seqlens [N+1] int32 and
the longest segment, all on CUDA, T at least 1, and is differentiable. For a paged cache (``paged_``) they take what
``paged_attention`` does, in blocks of a multiple of 256 tokens, and have no gradient. Which of them are installed is
known to ``dispatch``.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, *bounds, causal=True, deterministic=deterministic)


def paged_flash_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, cu_seqlens: Tensor, longest: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_lengths = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    bounds = (cu_seqlens, cu_lengths, longest, tables.shape[1] * k_cache.shape[1])
    return flash_attn_varlen_func(q, k_cache, v_cache, *bounds, causal=True, block_table=tables)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    return _varlen_attn()(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


@cache
def _varlen_attn() -> Any:
    """PyTorch's function, causal and for grouped heads, of which PyTorch 2.11 need not and cannot be told."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return partial(varlen_attn, **options)


def xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from xformers.ops import memory_efficient_attention

    group = q.shape[1] // k.shape[1]
    # Its grouped form has no backward pass.
    k, v = (x[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for x in (k, v))
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=_causal_blocks(cu_seqlens))[0]


def paged_xformers(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, cu_seqlens: Tensor, longest: int
) -> Tensor:
    from xformers.ops import memory_efficient_attention_forward
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask as Mask

    key_heads, size = k_cache.shape[2:]
    query = q.view(1, len(q), key_heads, -1, size)
    keys = (x.view(1, -1, key_heads, 1, size).expand(-1, -1, -1, query.shape[3], -1) for x in (k_cache, v_cache))
    new = _lengths_of(cu_seqlens)
    # Made anew: what it holds of the tables must not outlive them.
    bias = Mask.from_seqlens(q_seqlen=new, kv_seqlen=lengths.tolist(), block_tables=tables, page_size=k_cache.shape[1])
    return memory_efficient_attention_forward(query, *keys, attn_bias=bias).reshape(q.shape)


# xformers wants the lengths on the host: they are fetched once for a packing, not in every layer.
_blocks = WeakTensorKeyDictionary()


def _causal_blocks(cu_seqlens: Tensor) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _blocks.get(cu_seqlens)
    if known is None or known[0] != version:
        mask = BlockDiagonalCausalMask.from_seqlens(_lengths_of(cu_seqlens), device=cu_seqlens.device)
        _blocks[cu_seqlens] = known = (version, mask)
    return known[1]


def _lengths_of(cu_seqlens: Tensor) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
