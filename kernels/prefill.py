"""Prefill attention in Triton: the new tokens of many sequences against a paged cache that holds them already.

The G query heads of one key head are rows of one tile, so that a block of keys is read once for them, through the
sequence's table. A program takes a tile of rows of one sequence and goes through what is cached up to the last of them.
Tiles depend on D and dtype alone: how a prompt is cut into chunks changes a result by rounding only, and what else is
in the batch not at all.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, G = Hq/Hkv, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import architecture_of, jit, tl, triton
from .pages import load_queries, meet, tiles


@jit
def prefill_kernel(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, block_tables, context_lens, bounds, out, num_key_heads, max_blocks, scale,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one sequence and key head; G rows stand for one token."""
    key_head = tl.program_id(0)
    sequence = tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # those with most keys begin first
    start = tl.load(bounds + sequence)
    num_new = tl.load(bounds + sequence + 1) - start
    if first >= num_new * GROUP:
        return
    cached = tl.load(context_lens + sequence) - num_new
    base_2 = scale * 1.4426950408889634
    row = first + tl.arange(0, ROWS)
    inside = row < num_new * GROUP
    at = (start + row // GROUP).to(tl.int64) * (num_key_heads * GROUP) + key_head * GROUP + row % GROUP
    query = load_queries(q, at, inside, SIZE, WIDTH)
    last_key = cached + row // GROUP
    num_keys = cached + tl.minimum((first + ROWS - 1) // GROUP + 1, num_new)
    num_whole = (cached + first // GROUP + 1) // COLUMNS * COLUMNS  # keys in tiles that every row sees whole
    table = block_tables + sequence.to(tl.int64) * max_blocks
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        acc, total, top = meet(
            query, k_cache, v_cache, table, key_head, num_key_heads, num_whole * MASKED,
            num_whole + (num_keys - num_whole) * MASKED, last_key, base_2, acc, total, top,
            MASKED, BLOCK, SIZE, WIDTH, COLUMNS,
        )  # fmt: skip
    channels = tl.arange(0, WIDTH)
    mask = inside[:, None] & (channels < SIZE)[None, :]
    tl.store(out + at[:, None] * SIZE + channels[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """The Triton form of ``paged_attention``; all tensors contiguous."""
    out = torch.empty_like(q)
    size, key_heads = q.shape[2], k_cache.shape[2]
    group = q.shape[1] // key_heads
    tile = tiles("prefill", q.dtype, size, architecture_of(q.device))
    prefill_kernel[(key_heads, triton.cdiv(max_seqlen_q * group, tile.rows), len(context_lens))](
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, out, key_heads, block_tables.shape[1],
        size**-0.5,
        BLOCK=k_cache.shape[1], GROUP=group, SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)), ROWS=tile.rows,
        COLUMNS=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
