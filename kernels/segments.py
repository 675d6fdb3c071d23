"""Causal attention inside packed segments that may share a prefix, in Triton.

Shapes: T tokens, N segments, Hq query heads, Hkv key/value heads, D head size.

A row sees the segment that it has as a prefix, whole, and its own segment up to itself. Forward and gradient of the
queries: a program takes a tile of rows of one segment and head and goes through those keys as if they lay end to end;
forward keeps the log-sum-exp of each row. Gradient of keys and values: the segments that see a prefix follow it
directly, so what sees a key is every row from it to the end of the last such segment; a program takes a tile of keys
and one query head, and the query heads of a key head are summed afterwards. Tiles depend on D and dtype alone and
nothing is added atomically: a result is the same to the bit in every run. After FlashAttention-2 (Dao, arXiv
2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import architecture_of, jit, tl, triton


class Tiles(NamedTuple):
    """Sizes of one program's tile and how it is run."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# bf16 and float16, by kernel and architecture, for head sizes up to 64, 128 and 256. Chosen as the largest that spill
# no register, and on sm_80 fit into the 99 KB of shared memory of 8.6, 8.9 and 12; not yet measured on a GPU.
TILES = {
    ("forward", "sm_90"): (Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    ("query gradient", "sm_90"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 32, 8, 2)),
    ("key gradient", "sm_90"): (Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(32, 32, 8, 2)),
    ("forward", "sm_80"): (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 2)),
    ("query gradient", "sm_80"): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 4, 2)),
    ("key gradient", "sm_80"): (Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)),
    ("forward", "gfx942"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 32, 4, 1)),
    ("query gradient", "gfx942"): (Tiles(128, 64, 4, 1), Tiles(128, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("key gradient", "gfx942"): (Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(16, 64, 4, 1)),
}
# Multiplied without tensor cores.
FLOAT32_TILES = {
    "sm_90": Tiles(16, 16, 8, 2),
    "sm_80": Tiles(16, 16, 8, 2),
    "gfx942": Tiles(16, 16, 4, 1),
}
# Small, so that short segments are many tiles.
INTERPRETER_TILES = Tiles(32, 16, 4, 1)


def tiles(kernel: str, dtype: torch.dtype, size: int, target: str) -> Tiles:
    """Settings of "forward", "query gradient" or "key gradient" for a head size, by ``dispatch.architecture_of``."""
    if target == "cpu":
        return INTERPRETER_TILES
    if dtype == torch.float32:
        return FLOAT32_TILES[target]
    return TILES[kernel, target][0 if size <= 64 else 1 if size <= 128 else 2]


@jit
def _at(base, rows, limit, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the vectors of ``rows`` lie, and what of it is inside: rows before ``limit`` and channels before SIZE."""
    channels = tl.arange(0, WIDTH)
    inside = (rows < limit)[:, None]
    if SIZE != WIDTH:
        inside = inside & (channels < SIZE)[None, :]
    return base + rows[:, None] * stride + channels[None, :], inside


@jit
def _load(base, rows, limit, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at, inside = _at(base, rows, limit, stride, SIZE, WIDTH)
    return tl.load(at, mask=inside, other=0.0)


@jit
def _store(base, rows, limit, stride, values, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at, inside = _at(base, rows, limit, stride, SIZE, WIDTH)
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@jit
def _prefix_of(segment, start, bounds, prefix, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first row, tokens) of what the segment sees whole; no tokens without a prefix."""
    prefix_start = start
    prefix_tokens = 0
    if SHARED:
        number = tl.load(prefix + segment)
        at = bounds + tl.maximum(number, 0)
        prefix_start = tl.load(at)
        prefix_tokens = tl.where(number < 0, 0, tl.load(at + 1) - prefix_start)
    return prefix_start, prefix_tokens


@jit
def _rows_of(keys, start, prefix_start, prefix_tokens, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of the stream in which a segment's keys lie, counted from the first of its prefix."""
    rows = start - prefix_tokens + keys
    if SHARED:
        rows = tl.where(keys < prefix_tokens, prefix_start + keys, rows)
    return rows


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, prefix, out, log_sum, num_tokens, num_query_heads, num_key_heads, scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one head and segment -> output and log-sum-exp / scale, so that it is one of products."""
    head = tl.program_id(0)
    segment = tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # those with most keys begin first
    start = tl.load(bounds + segment)
    stop = tl.load(bounds + segment + 1)
    if first >= stop - start:
        return
    prefix_start, prefix_tokens = _prefix_of(segment, start, bounds, prefix, SHARED)
    base_2 = scale * 1.4426950408889634
    key_head = head // (num_query_heads // num_key_heads)
    query_stride = num_query_heads * SIZE
    key_stride = num_key_heads * SIZE
    rows = start + first + tl.arange(0, ROWS)
    query = _load(q + head * SIZE, rows, stop, query_stride, SIZE, WIDTH)
    last_key = prefix_tokens + first + tl.arange(0, ROWS)
    num_keys = prefix_tokens + tl.minimum(first + ROWS, stop - start)
    num_whole = (prefix_tokens + first + 1) // COLUMNS * COLUMNS  # keys in tiles that every row sees whole
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for begin in range(num_whole * MASKED, num_whole + (num_keys - num_whole) * MASKED, COLUMNS):
            keys = begin + tl.arange(0, COLUMNS)
            key_rows = _rows_of(keys, start, prefix_start, prefix_tokens, SHARED)
            key = _load(k + key_head * SIZE, key_rows, stop, key_stride, SIZE, WIDTH)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            if MASKED:
                scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * base_2)
            power = tl.exp2(scores * base_2 - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(power, axis=1)
            value = _load(v + key_head * SIZE, key_rows, stop, key_stride, SIZE, WIDTH)
            acc = tl.dot(power.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    _store(out + head * SIZE, rows, stop, query_stride, acc / total[:, None], SIZE, WIDTH)
    tl.store(log_sum + head * num_tokens + rows, (top + tl.log2(total)) / base_2, mask=rows < stop)


@jit
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, prefix, out, d_out, log_sum, slope, d_q, num_tokens, num_query_heads, num_key_heads, scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one head and segment -> d_q, and ``slope``, the sum of out x d_out of each row."""
    head = tl.program_id(0)
    segment = tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    start = tl.load(bounds + segment)
    stop = tl.load(bounds + segment + 1)
    if first >= stop - start:
        return
    prefix_start, prefix_tokens = _prefix_of(segment, start, bounds, prefix, SHARED)
    base_2 = scale * 1.4426950408889634
    key_head = head // (num_query_heads // num_key_heads)
    query_stride = num_query_heads * SIZE
    key_stride = num_key_heads * SIZE
    rows = start + first + tl.arange(0, ROWS)
    query = _load(q + head * SIZE, rows, stop, query_stride, SIZE, WIDTH)
    d_row = _load(d_out + head * SIZE, rows, stop, query_stride, SIZE, WIDTH)
    output = _load(out + head * SIZE, rows, stop, query_stride, SIZE, WIDTH)
    row_slope = tl.sum(output.to(tl.float32) * d_row.to(tl.float32), axis=1)
    at = head * num_tokens + rows
    tl.store(slope + at, row_slope, mask=rows < stop)
    row_sum = tl.load(log_sum + at, mask=rows < stop, other=0.0)
    last_key = prefix_tokens + first + tl.arange(0, ROWS)
    num_keys = prefix_tokens + tl.minimum(first + ROWS, stop - start)
    num_whole = (prefix_tokens + first + 1) // COLUMNS * COLUMNS
    acc = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for begin in range(num_whole * MASKED, num_whole + (num_keys - num_whole) * MASKED, COLUMNS):
            keys = begin + tl.arange(0, COLUMNS)
            key_rows = _rows_of(keys, start, prefix_start, prefix_tokens, SHARED)
            key = _load(k + key_head * SIZE, key_rows, stop, key_stride, SIZE, WIDTH)
            value = _load(v + key_head * SIZE, key_rows, stop, key_stride, SIZE, WIDTH)
            below = tl.zeros([ROWS, COLUMNS], dtype=tl.float32) - row_sum[:, None]
            if MASKED:
                below = tl.where(keys[None, :] <= last_key[:, None], below, float("-inf"))
            chance = tl.exp2(tl.dot(query, tl.trans(key), below, input_precision="ieee") * base_2)
            below = tl.zeros([ROWS, COLUMNS], dtype=tl.float32) - row_slope[:, None]
            d_scores = chance * tl.dot(d_row, tl.trans(value), below, input_precision="ieee")
            acc = tl.dot(d_scores.to(key.dtype), key, acc, input_precision="ieee")
    _store(d_q + head * SIZE, rows, stop, query_stride, acc * scale, SIZE, WIDTH)


@jit
def _key_gradient_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bounds, prefix, d_out, log_sum, slope, d_k, d_v,
    num_tokens, num_query_heads, num_key_heads, scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one segment -> what one query head adds to d_k and d_v, [T,Hq,D] each."""
    head = tl.program_id(0)
    segment = tl.program_id(2)
    start = tl.load(bounds + segment)
    stop = tl.load(bounds + segment + 1)
    first = start + tl.program_id(1) * COLUMNS
    if first >= stop:
        return
    last_row = stop
    if SHARED:
        num_segments = tl.num_programs(2)
        for begin in range(segment + 1, num_segments, 128):
            others = begin + tl.arange(0, 128)
            sees = tl.load(prefix + others, mask=others < num_segments, other=-1) == segment
            last_row = tl.maximum(last_row, tl.max(tl.load(bounds + others + 1, mask=sees, other=0), axis=0))
    base_2 = scale * 1.4426950408889634
    key_head = head // (num_query_heads // num_key_heads)
    query_stride = num_query_heads * SIZE
    key_stride = num_key_heads * SIZE
    columns = first + tl.arange(0, COLUMNS)
    key = _load(k + key_head * SIZE, columns, stop, key_stride, SIZE, WIDTH)
    value = _load(v + key_head * SIZE, columns, stop, key_stride, SIZE, WIDTH)
    d_key = tl.zeros([COLUMNS, WIDTH], dtype=tl.float32)
    d_value = tl.zeros([COLUMNS, WIDTH], dtype=tl.float32)
    # The rows behind the tile see all of it, those beside it a part.
    behind = tl.minimum(first + max(ROWS, COLUMNS), last_row)
    for MASKED in tl.static_range(2):
        for begin in range(behind + (first - behind) * MASKED, last_row + (behind - last_row) * MASKED, ROWS):
            rows = begin + tl.arange(0, ROWS)
            query = _load(q + head * SIZE, rows, last_row, query_stride, SIZE, WIDTH)
            d_row = _load(d_out + head * SIZE, rows, last_row, query_stride, SIZE, WIDTH)
            at = head * num_tokens + rows
            row_sum = tl.load(log_sum + at, mask=rows < last_row, other=0.0)
            row_slope = tl.load(slope + at, mask=rows < last_row, other=0.0)
            below = tl.zeros([COLUMNS, ROWS], dtype=tl.float32) - row_sum[None, :]
            if MASKED:
                below = tl.where(columns[:, None] <= rows[None, :], below, float("-inf"))
            chance = tl.exp2(tl.dot(key, tl.trans(query), below, input_precision="ieee") * base_2)
            below = tl.zeros([COLUMNS, ROWS], dtype=tl.float32) - row_slope[None, :]
            d_scores = chance * tl.dot(value, tl.trans(d_row), below, input_precision="ieee")
            d_value = tl.dot(chance.to(d_row.dtype), d_row, d_value, input_precision="ieee")
            d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision="ieee")
    _store(d_k + head * SIZE, columns, stop, query_stride, d_key * scale, SIZE, WIDTH)
    _store(d_v + head * SIZE, columns, stop, query_stride, d_value, SIZE, WIDTH)


KERNELS = {"forward": _forward_kernel, "query gradient": _query_gradient_kernel, "key gradient": _key_gradient_kernel}


def _launch(
    name: str, packing: tuple[Tensor, int, Tensor | None], q: Tensor, k: Tensor, v: Tensor, *others: Tensor
) -> None:
    cu_seqlens, max_seqlen, prefix = packing
    num_tokens, num_heads, size = q.shape
    if num_tokens == 0:
        return
    width = max(16, triton.next_power_of_2(size))
    tile = tiles(name, q.dtype, size, architecture_of(q.device))
    along = tile.columns if name == "key gradient" else tile.rows
    KERNELS[name][(num_heads, triton.cdiv(max_seqlen, along), len(cu_seqlens) - 1)](
        q, k, v, cu_seqlens, cu_seqlens if prefix is None else prefix, *others,
        num_tokens, num_heads, k.shape[1], size**-0.5,
        SHARED=prefix is not None, SIZE=size, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def check_size(q: Tensor) -> None:
    """Raise ValueError where places in q are beyond 32 bits."""
    if q.numel() >= 2**31:
        raise ValueError(
            f"packed_attention: q has {q.numel()} elements and Triton's form takes fewer than 2**31; pack fewer tokens"
        )


class SegmentAttention(torch.autograd.Function):
    """The Triton form of ``packed_attention``; all tensors contiguous."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None
    ) -> Tensor:
        check_size(q)
        out = torch.empty_like(q)
        log_sum = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        _launch("forward", (cu_seqlens, max_seqlen, prefix), q, k, v, out, log_sum)
        ctx.save_for_backward(q, k, v, cu_seqlens, prefix, out, log_sum)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, prefix, out, log_sum = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_q, d_k, d_v = (torch.empty_like(q) for _ in range(3))  # of keys and values: each query head's part
        slope = torch.empty_like(log_sum)
        packing = (cu_seqlens, ctx.max_seqlen, prefix)
        _launch("query gradient", packing, q, k, v, out, d_out, log_sum, slope, d_q)
        _launch("key gradient", packing, q, k, v, d_out, log_sum, slope, d_k, d_v)
        if k.shape[1] < q.shape[1]:
            d_k, d_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (d_k, d_v))
        return d_q, d_k, d_v, None, None, None
