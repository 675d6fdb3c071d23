"""Keys and values that lie in blocks named by a table, met by a tile of queries: what decoding and prefill share."""

from __future__ import annotations

import torch

from .dispatch import jit, tl
from .segments import Tiles

MIN_BLOCK_SIZE = 16

# bf16 and float16, by kernel and architecture, for head sizes up to 64, 128 and 256. For the heads of common models
# none spills a register (``bench/compile.py``), and those of sm_80 fit into the 99 KB of shared memory of 8.6, 8.9 and
# 12; not yet measured on a GPU. Rows of "decode" are those of rows that share a prefix: a row's own keys meet 16, or G,
# and are twice as many.
TILES = {
    ("prefill", "sm_90"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    ("decode", "sm_90"): (Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 32, 8, 3)),
    ("prefill", "sm_80"): (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 2)),
    ("decode", "sm_80"): (Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 3), Tiles(32, 32, 8, 2)),
    ("prefill", "gfx942"): (Tiles(128, 64, 4, 1), Tiles(128, 64, 4, 1), Tiles(64, 32, 4, 1)),
    ("decode", "gfx942"): (Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 16, 4, 1)),
}
# Multiplied without tensor cores.
FLOAT32_TILES = {"sm_90": Tiles(16, 16, 8, 2), "sm_80": Tiles(16, 16, 8, 2), "gfx942": Tiles(16, 16, 4, 1)}
# The interpreter's time goes by operations, not by elements; still, a split is more than one tile.
INTERPRETER_TILES = {"prefill": Tiles(32, 64, 4, 1), "decode": Tiles(32, 64, 4, 1)}


def tiles(kernel: str, dtype: torch.dtype, size: int, target: str) -> Tiles:
    """Settings of "prefill" or "decode" for a head size, by ``dispatch.architecture_of``."""
    if target == "cpu":
        return INTERPRETER_TILES[kernel]
    if dtype == torch.float32:
        return FLOAT32_TILES[target]
    return TILES[kernel, target][0 if size <= 64 else 1 if size <= 128 else 2]


@jit
def load_queries(q, rows, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors ``rows`` [R] of q, [R,WIDTH]; zero behind SIZE and where not ``inside``."""
    channels = tl.arange(0, WIDTH)
    mask = inside[:, None]
    if SIZE != WIDTH:
        mask = mask & (channels < SIZE)[None, :]
    return tl.load(q + rows.to(tl.int64)[:, None] * SIZE + channels[None, :], mask=mask, other=0.0)


@jit
def meet(  # type: ignore[no-untyped-def]
    query, k_cache, v_cache, table, key_head, num_key_heads, begin, stop, last_key, base_2, acc, total, top,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``begin`` to ``stop`` to the running softmax of a tile of queries.

    Masked, ``stop`` may lie inside a tile, and a query sees no key behind its ``last_key`` [R].
    """
    channels = tl.arange(0, WIDTH)[None, :]
    for first in range(begin, stop, COLUMNS):
        keys = first + tl.arange(0, COLUMNS)
        if MASKED:
            block = tl.load(table + keys // BLOCK, mask=keys < stop, other=0)
        else:
            block = tl.load(table + keys // BLOCK)
        row = (block.to(tl.int64) * BLOCK + keys % BLOCK) * num_key_heads + key_head
        at = row[:, None] * SIZE + channels
        if MASKED and SIZE != WIDTH:
            key = tl.load(k_cache + at, mask=(keys < stop)[:, None] & (channels < SIZE), other=0.0)
            value = tl.load(v_cache + at, mask=(keys < stop)[:, None] & (channels < SIZE), other=0.0)
        elif MASKED:
            key = tl.load(k_cache + at, mask=(keys < stop)[:, None], other=0.0)
            value = tl.load(v_cache + at, mask=(keys < stop)[:, None], other=0.0)
        elif SIZE != WIDTH:
            key = tl.load(k_cache + at, mask=channels < SIZE, other=0.0)
            value = tl.load(v_cache + at, mask=channels < SIZE, other=0.0)
        else:
            key = tl.load(k_cache + at)
            value = tl.load(v_cache + at)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * base_2)
        power = tl.exp2(scores * base_2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(power, axis=1)
        acc = tl.dot(power.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top
