"""Attention whose result for a token is the same to the bit however it is computed: the base of the exact mode.

A token that is decoded alone, in a chunk of a prompt, or in a packed batch of the trainer attends by the same sums in
the same order. One kernel, in one binary, serves a packed stream and a paged cache: they differ in where a key lies and
in nothing else. A program takes a tile of rows of one sequence and key head, and goes through the keys in chunks that
begin at fixed positions of the sequence, those of a shared prompt first. Nothing splits the keys. A chunk that a row
does not see leaves its maximum as it is and adds exactly zero. In PyTorch, for a CPU: ``eager_exact.py``.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, G = Hq/Hkv, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import eager_exact
from .decode import check_step, send
from .dispatch import architecture_of, exact_attention_by, jit, tl, triton
from .pages import load_queries
from .segments import SegmentAttention, Tiles, check_size

# bf16 and float16, by architecture, for head sizes up to 64, 128 and 256; columns are a chunk. A row that decodes fills
# G rows of a tile: 64 are the least that the matrix units of sm_90 multiply at a time. None spills a register
# (``bench/compile.py``), and those of sm_80 fit into the 99 KB of shared memory of 8.6, 8.9 and 12; not yet measured on
# a GPU.
TILES = {
    "sm_90": (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(128, 32, 8, 2)),
    "sm_80": (Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "gfx942": (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1)),
}
# Multiplied without tensor cores.
FLOAT32_TILES = {"sm_90": Tiles(16, 16, 8, 2), "sm_80": Tiles(16, 16, 8, 2), "gfx942": Tiles(16, 16, 4, 1)}
# Small, so that short sequences are many tiles and chunks.
INTERPRETER_TILES = Tiles(32, 32, 4, 1)


def tiles(dtype: torch.dtype, size: int, target: str) -> Tiles:
    """Settings for a head size, by ``dispatch.architecture_of``."""
    if target == "cpu":
        return INTERPRETER_TILES
    if dtype == torch.float32:
        return FLOAT32_TILES[target]
    return TILES[target][0 if size <= 64 else 1 if size <= 128 else 2]


# One binary for any packing and any cache of a model.
@partial(jit, unspecialised=("bounds", "prefix", "block_tables", "context_lens", "num_tokens", "num_prefixes",
                             "max_blocks", "block_size"))  # fmt: skip
def exact_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, prefix, block_tables, context_lens, out, log_sum,
    num_tokens, num_prefixes, max_blocks, block_size, num_key_heads, scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one sequence and key head -> output and log-sum-exp / scale.

    Keys lie in a paged cache, or with ``max_blocks`` 0 in a packed stream; then ``prefix`` counts if ``num_prefixes``.
    """
    key_head = tl.program_id(0)
    sequence = tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # those with most keys begin first
    start = tl.load(bounds + sequence)
    num_new = tl.load(bounds + sequence + 1) - start
    paged = max_blocks > 0
    number = tl.load(prefix + sequence, mask=num_prefixes > 0, other=-1)
    shared_start = tl.load(bounds + tl.maximum(number, 0))
    shared = tl.where(number < 0, 0, tl.load(bounds + tl.maximum(number, 0) + 1) - shared_start)
    context = tl.load(context_lens + sequence, mask=paged, other=0)
    context = tl.where(paged, context, shared + num_new)
    if (first >= num_new * GROUP) | (context == 0):
        return
    before = context - num_new
    base_2 = scale * 1.4426950408889634
    row = first + tl.arange(0, ROWS)
    inside = row < num_new * GROUP
    token = start + row // GROUP
    head = key_head * GROUP + row % GROUP
    at = token.to(tl.int64) * (num_key_heads * GROUP) + head
    query = load_queries(q, at, inside, SIZE, WIDTH)
    last_key = before + row // GROUP
    num_keys = before + tl.minimum((first + ROWS - 1) // GROUP + 1, num_new)
    table = block_tables + sequence.to(tl.int64) * max_blocks
    channels = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    # One loop for chunks that are seen whole and in part: two would be compiled each in its own way.
    for begin in range(0, num_keys, CHUNK):
        keys = begin + tl.arange(0, CHUNK)
        real = keys < num_keys
        block = tl.load(table + keys // block_size, mask=real & paged, other=0)
        stream_row = tl.where(keys < before, shared_start, start - before) + keys
        place = block.to(tl.int64) * block_size + tl.where(paged, keys % block_size, stream_row)
        key_at = (place * num_key_heads + key_head)[:, None] * SIZE + channels
        real = real[:, None]
        if SIZE != WIDTH:
            real = real & (channels < SIZE)
        key = tl.load(k + key_at, mask=real, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * base_2)
        power = tl.exp2(scores * base_2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(power, axis=1)
        value = tl.load(v + key_at, mask=real, other=0.0)
        acc = tl.dot(power.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    mask = inside[:, None] & (channels < SIZE)
    tl.store(out + at[:, None] * SIZE + channels, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(log_sum + head.to(tl.int64) * num_tokens + token, (top + tl.log2(total)) / base_2, mask=inside)


def exact_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention inside packed segments; arguments and result as ``kernels.packed_attention``."""
    if exact_attention_by(q.device.type, q.dtype, q.shape[2]) != "triton":
        return eager_exact.packed_attention(q, k, v, cu_seqlens, max_seqlen, prefix)
    q, k, v, cu_seqlens = (x.contiguous() for x in (q, k, v, cu_seqlens))
    return ExactSegmentAttention.apply(q, k, v, cu_seqlens, max_seqlen, None if prefix is None else prefix.contiguous())


@torch.no_grad()
def exact_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Attention of new tokens to a paged cache; arguments and result as ``kernels.paged_attention``.

    Rows of q behind the last sequence's, which fill a batch up, are zeros in the result.
    """
    if exact_attention_by(q.device.type, q.dtype, q.shape[2]) != "triton":
        step = (block_tables, context_lens, cu_seqlens_q, max_seqlen_q)
        return eager_exact.paged_attention(q, k_cache, v_cache, *step)
    q, block_tables, context_lens, cu_seqlens_q = (
        x.contiguous() for x in (q, block_tables, context_lens, cu_seqlens_q)
    )
    return _launch(q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, pages=(block_tables, context_lens))[0]


class ExactSegmentAttention(SegmentAttention):
    """The Triton form of packed attention. Its gradient needs output and log-sum-exp alone: that of the usual form."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None
    ) -> Tensor:
        check_size(q)
        out, log_sum = _launch(q, k, v, cu_seqlens, max_seqlen, prefix)
        ctx.save_for_backward(q, k, v, cu_seqlens, prefix, out, log_sum)
        ctx.max_seqlen = max_seqlen
        return out


class ExactDecode:
    """One decoding step for many layers, in buffers that stay in place, as ``decode.DecodePlan``.

    Args:
        num_rows: most rows of a step.
        max_blocks: most blocks of a row.
        block_size: tokens in a block.
        device: where queries and cache are.

    Attributes:
        block_tables: [num_rows, max_blocks] int32.
        context_lens: [num_rows] int32, tokens in the cache, the new one included; 0 for rows that are not used.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._bounds = torch.arange(num_rows + 1, dtype=torch.int32, device=device)

    def set(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Plans a step; arguments and errors as those of ``DecodePlan.set``. The host does not wait for the device."""
        check_step(self.block_tables, self._block_size, tables, lengths)
        contexts = np.zeros(len(self.context_lens), np.int64)
        contexts[: len(lengths)] = lengths
        send(self.context_lens, contexts)
        send(self.block_tables, tables)

    def update(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """The same rows some tokens later."""
        self.set(tables, lengths)

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attention of the new tokens in one layer, which the cache holds already; no gradient.

        Args:
            q: [N,Hq,D]; those behind the rows that were set get zeros.
            k_cache: [num_blocks, block_size, Hkv, D] contiguous, of q's dtype.
            v_cache: as k_cache.
        """
        pages = (self.block_tables, self.context_lens)
        return _launch(q.detach().contiguous(), k_cache, v_cache, self._bounds, 1, pages=pages)[0]


def _launch(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, prefix: Tensor | None = None,
    pages: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and log-sum-exp / scale [Hq,T] float32; k and v [T,Hkv,D], or [num_blocks,block_size,Hkv,D] in pages."""
    (num_tokens, num_heads, size), num_key_heads = q.shape, k.shape[-2]
    out, log_sum = torch.zeros_like(q), torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    tables, contexts = (bounds[None], bounds) if pages is None else pages
    tile, group = tiles(q.dtype, size, architecture_of(q.device)), num_heads // num_key_heads
    grid = (num_key_heads, triton.cdiv(longest * group, tile.rows), len(bounds) - 1)
    if min(grid) > 0:
        exact_kernel[grid](
            q, k, v, bounds, bounds if prefix is None else prefix, tables, contexts, out, log_sum,
            num_tokens, 0 if prefix is None else len(prefix), 0 if pages is None else tables.shape[1],
            1 if pages is None else k.shape[1], num_key_heads, size**-0.5,
            GROUP=group, SIZE=size, WIDTH=max(16, triton.next_power_of_2(size)), ROWS=tile.rows, CHUNK=tile.columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, log_sum
