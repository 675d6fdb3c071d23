"""Decode attention in Triton: a query for each row against the paged cache, a shared prefix read once.

A step is a list of items made on the host (``work_list``), whose lengths the device reads, so that a CUDA graph can
replay with them while contexts grow. One kernel computes all items: softmax over an item's keys, its output in float32
and its log-sum-exp; another joins the pieces of each row in their order. Nothing is added atomically: a result is the
same to the bit in every run, and depends on no other rows but those with which its row shares blocks. After
FlashDecoding (Dao et al., 2023) and Hydragen (Juravsky et al., arXiv 2402.05099).

Shapes: N rows, Hq query heads, Hkv key/value heads, G = Hq/Hkv, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dispatch import architecture_of, jit, tl, triton
from .pages import MIN_BLOCK_SIZE, load_queries, meet, tiles
from .segments import Tiles
from .work_list import FIELDS, split_edges, work_list

JOINED_PIECES = 16  # at one time
PROGRAMS_PER_PROCESSOR = 8  # about twice what is resident, so that who gets shorter items takes more


def heights(tile: Tiles, group: int) -> dict[str, int]:
    """Rows of the tiles of items with one row and with several."""
    short = max(16, triton.next_power_of_2(group))
    return {"SHORT": short, "TALL": max(short, tile.rows)}


@jit
def _item(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, block_tables, context_lens, item, partial, log_sum, key_head, num_key_heads, max_blocks,
    max_pieces, scale,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The item's rows and the queries of one key head against its keys -> its piece of each."""
    first_row = tl.load(item)
    num_rows = tl.load(item + 1)
    begin = tl.load(item + 2)
    # Keys that several rows share lie before the newest of each; those of one row end with it.
    stop = tl.minimum(tl.load(item + 3), tl.load(context_lens + first_row))
    piece = tl.load(item + 4)
    base_2 = scale * 1.4426950408889634
    place = tl.arange(0, HEIGHT)
    row = first_row + place // GROUP
    head = key_head * GROUP + place % GROUP
    inside = place < num_rows * GROUP
    num_heads = num_key_heads * GROUP
    query = load_queries(q, row * num_heads + head, inside, SIZE, WIDTH)
    acc = tl.zeros([HEIGHT, WIDTH], dtype=tl.float32)
    total = tl.zeros([HEIGHT], dtype=tl.float32)
    top = tl.full([HEIGHT], float("-inf"), dtype=tl.float32)
    last_key = tl.zeros([HEIGHT], dtype=tl.int32) + stop - 1
    acc, total, top = meet(
        query, k_cache, v_cache, block_tables + first_row.to(tl.int64) * max_blocks, key_head, num_key_heads,
        begin, stop, last_key, base_2, acc, total, top, True, BLOCK, SIZE, WIDTH, COLUMNS,
    )  # fmt: skip
    at = (row.to(tl.int64) * max_pieces + piece) * num_heads + head
    tl.store(log_sum + at, top + tl.log2(total), mask=inside)  # -inf for an item that the row has not grown into
    channels = tl.arange(0, WIDTH)
    inside = (inside & (total > 0))[:, None] & (channels < SIZE)[None, :]
    tl.store(partial + at[:, None] * SIZE + channels[None, :], acc / total[:, None], mask=inside)


@jit
def items_kernel(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, block_tables, context_lens, work_count, items, partial, log_sum,
    num_key_heads, max_blocks, max_pieces, scale,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SHORT: tl.constexpr, TALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every item and key head, in turns among the programs."""
    for work in range(tl.program_id(0), tl.load(work_count) * num_key_heads, tl.num_programs(0)):
        key_head = work % num_key_heads
        item = items + work // num_key_heads * FIELDS
        if tl.load(item + 1) * GROUP <= SHORT:
            _item(
                q, k_cache, v_cache, block_tables, context_lens, item, partial, log_sum, key_head, num_key_heads,
                max_blocks, max_pieces, scale, BLOCK, GROUP, SIZE, WIDTH, SHORT, 2 * COLUMNS,
            )  # fmt: skip
        else:
            _item(
                q, k_cache, v_cache, block_tables, context_lens, item, partial, log_sum, key_head, num_key_heads,
                max_blocks, max_pieces, scale, BLOCK, GROUP, SIZE, WIDTH, TALL, COLUMNS,
            )  # fmt: skip


@jit
def join_kernel(  # type: ignore[no-untyped-def]
    partial, log_sum, pieces, out, num_query_heads, max_pieces,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The pieces of one row and head -> its output; zero for a row without any."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(pieces + row)
    channels = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    total = 0.0
    top = float("-inf")
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        at = (row * max_pieces + piece) * num_query_heads + head
        log_sums = tl.load(log_sum + at, mask=piece < count, other=float("-inf"))
        inside = (piece < count)[:, None] & (channels < SIZE)[None, :]
        parts = tl.load(partial + at[:, None] * SIZE + channels[None, :], mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(log_sums, axis=0))
        share = tl.exp2(log_sums - new_top)
        shrink = tl.exp2(top - new_top)
        # An item without keys has written no output: what lies there may be anything.
        parts = tl.where((share > 0)[:, None], parts * share[:, None], 0.0)
        acc = acc * shrink + tl.sum(parts, axis=0)
        total = total * shrink + tl.sum(share, axis=0)
        top = new_top
    # The largest share is 1, so that this divides by the total wherever there is one.
    acc = acc / tl.maximum(total, 1.0)
    at = (row * num_query_heads + head) * SIZE + channels
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=channels < SIZE)


class DecodePlan:
    """One decoding step for many layers: what each row's new token attends to, as a list of work on the device.

    The list's memory on the device is allocated once and stays in place, so that a CUDA graph that has captured calls
    replays with whatever was set last. A row may grow while a plan stands: the kernels read ``context_lens``, which a
    graph may count up by itself, and :meth:`covers` says how far.

    Args:
        num_rows: most rows of a step.
        max_blocks: most blocks of a row.
        block_size: tokens in a block, a power of two from 16 on.
        heads: (Hq, Hkv); Hkv divides Hq.
        head_size: D, up to 256.
        dtype: of queries and cache.
        device: where they are.

    Attributes:
        block_tables: [num_rows, max_blocks] int32.
        context_lens: [num_rows] int32, tokens in the cache, the new one included; 0 for rows that are not used.

    Raises:
        ValueError: a block size that it does not take.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        heads: tuple[int, int],
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
            raise ValueError(
                f"decode: block_size is {block_size}; expected a power of two from {MIN_BLOCK_SIZE} on, or decode with "
                "CascadeDecode"
            )
        self._heads, self._size, self._block_size = heads, head_size, block_size
        self._edges = split_edges(max_blocks * block_size)
        self._tile = tiles("decode", dtype, head_size, architecture_of(device))
        group = heads[0] // heads[1]
        self._heights = heights(self._tile, group)
        self._rows_together = max(1, self._heights["TALL"] // group)
        self._max_pieces = len(self._edges)  # the splits, and one that the end of a shared prefix cuts in two
        places = num_rows * self._max_pieces
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        # One tensor, so that a plan is one copy from the host.
        self._lists = torch.zeros(1 + 2 * num_rows + FIELDS * places, dtype=torch.int32, device=device)
        self._work_count, self.context_lens, self._pieces, self._items = self._lists.split(
            [1, num_rows, num_rows, FIELDS * places]
        )
        self._places = places
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._num_programs = min(places * heads[1], PROGRAMS_PER_PROCESSOR * processors)
        self._least = self._limits = np.zeros(0, np.int64)

    def set(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Plans a step. The host does not wait for the device.

        Args:
            tables: [N, blocks] block tables; rows that share a prefix should be neighbours; unused cells name any
                block.
            lengths: [N] tokens in the cache, the new one included, at least 1.

        Raises:
            ValueError: more rows or blocks than the plan was made for, or a length that its table has no blocks for.
        """
        check_step(self.block_tables, self._block_size, tables, lengths)
        work = work_list(tables, lengths, self._block_size, self._edges, self._rows_together)
        self._least, self._limits = work.least, work.limits
        num_rows = len(self.block_tables)
        count = 1 + 2 * num_rows
        lists = np.zeros(count + work.items.size, np.int64)
        lists[0] = len(work.items)
        lists[1 : 1 + len(lengths)] = lengths
        lists[1 + num_rows :][: len(lengths)] = work.pieces
        lists[count:] = work.items.ravel()
        send(self._lists, lists)
        send(self.block_tables, tables)

    def update(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """The same rows some tokens later: their lengths, and new blocks at the ends of their tables.

        The work is planned anew only where a row has grown beyond what the plan covers.
        """
        if not self.covers(lengths):
            return self.set(tables, lengths)
        check_step(self.block_tables, self._block_size, tables, lengths)
        send(self.context_lens, lengths)
        send(self.block_tables, tables)

    def covers(self, lengths: NDArray[np.int64]) -> bool:
        """Whether the work that was set serves the same rows at these lengths.

        It does until a row passes the end of the split behind the one that its newest token was in: for at least
        ``work_list.SPLIT_TOKENS`` more tokens, or until its table is full.
        """
        return len(lengths) == len(self._limits) and bool(((lengths >= self._least) & (lengths <= self._limits)).all())

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attention of the new tokens in one layer, which the cache holds already; two launches, no gradient.

        Args:
            q: [N,Hq,D], N at most the plan's rows; those behind the rows that were set get zeros.
            k_cache: [num_blocks, block_size, Hkv, D] contiguous, of q's dtype.
            v_cache: as k_cache.

        Returns:
            [N,Hq,D]; scores are scaled by D**-0.5.

        Raises:
            ValueError: shapes that the plan was not made for.
        """
        expected = (self._block_size, self._heads[1], self._size)
        if len(q) > len(self.block_tables) or q.shape[1:] != (self._heads[0], self._size):
            raise ValueError(
                f"decode: q has shape {list(q.shape)}; the plan was made for up to {len(self.block_tables)} rows of "
                f"{[self._heads[0], self._size]}"
            )
        if not k_cache.shape[1:] == v_cache.shape[1:] == expected or not k_cache.dtype == v_cache.dtype == q.dtype:
            raise ValueError(
                f"decode: the caches are {k_cache.dtype} {list(k_cache.shape)} and {v_cache.dtype} "
                f"{list(v_cache.shape)}; expected {q.dtype} and blocks of shape {list(expected)}"
            )
        q, out = q.detach().contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
        if not len(q):
            return out
        # Not kept: the graphs that take turns may have it from one pool.
        partial = torch.empty(self._places, self._heads[0], self._size, device=q.device)
        log_sum = torch.empty(self._places, self._heads[0], device=q.device)
        sizes = {"SIZE": self._size, "WIDTH": max(16, triton.next_power_of_2(self._size))}
        items_kernel[(self._num_programs,)](
            q, k_cache, v_cache, self.block_tables, self.context_lens, self._work_count, self._items,
            partial, log_sum, self._heads[1], self.block_tables.shape[1], self._max_pieces,
            self._size**-0.5,
            FIELDS=FIELDS, BLOCK=self._block_size, GROUP=self._heads[0] // self._heads[1], **sizes, **self._heights,
            COLUMNS=self._tile.columns, num_warps=self._tile.num_warps, num_stages=self._tile.num_stages,
        )  # fmt: skip
        join_kernel[(len(q), self._heads[0])](
            partial, log_sum, self._pieces, out, self._heads[0], self._max_pieces,
            **sizes, PIECES=JOINED_PIECES, num_warps=4,
        )  # fmt: skip
        return out


def check_step(block_tables: Tensor, block_size: int, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
    """Raise ValueError for more rows or blocks than ``block_tables`` has, or a length that needs more blocks."""
    num_rows, max_blocks = block_tables.shape
    if not (0 < len(tables) == len(lengths) <= num_rows and tables.shape[1] <= max_blocks):
        raise ValueError(
            f"decode: tables of shape {list(tables.shape)} and {len(lengths)} lengths; expected one each for 1 to "
            f"{num_rows} rows of at most {max_blocks} blocks"
        )
    if not 1 <= lengths.min() <= lengths.max() <= tables.shape[1] * block_size:
        raise ValueError(
            f"decode: lengths from {lengths.min()} to {lengths.max()}; expected 1 to the "
            f"{tables.shape[1] * block_size} tokens of {tables.shape[1]} blocks"
        )


def send(target: Tensor, numbers: NDArray[np.integer]) -> None:
    """Writes to the beginning of ``target`` in each dimension, int32; the host does not wait for the device."""
    # Memory that the allocator does not hand out again before a copy from it is done.
    staged = torch.empty(numbers.shape, dtype=torch.int32, pin_memory=target.is_cuda)
    staged.numpy()[:] = numbers
    target[tuple(slice(size) for size in numbers.shape)].copy_(staged, non_blocking=True)
