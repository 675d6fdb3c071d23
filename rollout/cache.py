"""Paged KV memory: which blocks belong to whom (`BlockTables`), and the tensors themselves (`KVCache`).

The first is bookkeeping in NumPy and never touches a tensor, so that its rules can be tested by themselves:
a block is free or it is counted once for each row that holds it; a row may write only into a block that it alone
holds; after a flush nothing stored before can be read.

A full block may be named by its content, so that another row that begins with the same tokens finds it. A named block
that nobody holds stays until its memory is wanted.
"""

import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.config import ModelConfig

Copies = list[tuple[int, int]]
"""Blocks to copy before the next write: (source, destination)."""
Saved = tuple[Tensor, Tensor]
"""Keys and values of some blocks in the host's memory, [L, blocks, block_size, Hkv, D] each."""


class OutOfBlocks(RuntimeError):
    """A reservation asked for more blocks than are free; nothing was changed."""


def add_names(names: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Extends the names of a sequence's full blocks: digests of all tokens up to each block's end, 16 bytes."""
    for start in range(len(names) * block_size, len(token_ids) - block_size + 1, block_size):
        before = names[-1] if names else b""
        tokens = array("i", token_ids[start : start + block_size]).tobytes()
        names.append(hashlib.blake2b(before + tokens, digest_size=16).digest())


class BlockTables:
    """Reference-counted blocks of tokens, in one table with a row for each sequence.

    A closed row cannot be read, and :meth:`flush` closes them all. A block that was never used is taken only when
    there is no other, so ``peak_blocks``, the most that were held at a time, are also the first of the pool and all
    that were ever used.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        max_blocks: blocks that one row may hold.
    """

    def __init__(self, num_blocks: int, block_size: int, max_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.peak_blocks = 0
        self.references: NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.tables: NDArray[np.int32] = np.zeros((8, max_blocks), np.int32)  # Unused cells name block 0: readable.
        self.counts: NDArray[np.int32] = np.zeros(8, np.int32)  # blocks held by each row
        self.lengths: NDArray[np.int64] = np.zeros(8, np.int64)  # tokens stored by each row
        self.taken: list[int] = []  # blocks that rows took since the user of this list last emptied it
        self._open: NDArray[np.bool_] = np.zeros(8, np.bool_)
        # Last in, first out: blocks that were used a moment ago are still in the processor's cache.
        self._free: list[int] = []  # of those that were used before, the nameless ones
        self._kept: dict[int, None] = {}  # those that have a name; the one that served longest ago comes first
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._free_rows = list(range(7, -1, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self.num_blocks - self.peak_blocks + len(self._free) + len(self._kept)

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody holds; a shared one counts once."""
        return self.num_blocks - self.free_blocks

    def open(self) -> int:
        """Opens an empty row and returns its number."""
        if not self._free_rows:
            self._add_rows()
        row = self._free_rows.pop()
        self._open[row] = True
        return row

    def close(self, row: int) -> None:
        """Gives back every block of the row, and the row."""
        self._check(row)
        for block in reversed(self.tables[row, : self.counts[row]].tolist()):  # what others may share goes last
            self._drop(block)
        self._reset(row)

    def fork(self, source: int, length: int) -> int:
        """Opens a row that shares the first ``length`` tokens of another; copying waits until somebody writes."""
        self._check(source)
        if length > self.lengths[source]:
            raise ValueError(f"row {source} stores {self.lengths[source]} tokens, {length} were asked of it")
        row = self.open()
        count = self.blocks_of(length)
        shared = self.tables[source, :count]
        self.tables[row, :count] = shared
        self.counts[row] = count
        self.lengths[row] = length
        self.references[shared] += 1
        return row

    def stored(self, names: Sequence[bytes]) -> tuple[int, int]:
        """How many of a sequence's first blocks are stored by these names, and how many of them nobody holds."""
        count = idle = 0
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            count += 1
            idle += self.references[block] == 0
        return count, idle

    def adopt(self, names: Sequence[bytes]) -> int:
        """Opens a row that begins with the blocks that are stored by these names, up to the first that is not."""
        row = self.open()
        count, _ = self.stored(names)
        for column, name in enumerate(names[:count]):
            block = self._named[name]
            self._kept.pop(block, None)
            self.references[block] += 1
            self.tables[row, column] = block
        self.counts[row] = count
        self.lengths[row] = count * self.block_size
        return row

    def name(self, row: int, first: int, names: Sequence[bytes]) -> None:
        """Names the row's blocks from number ``first`` on, which are full and will not change."""
        self._check(row)
        for column, name in enumerate(names, first):
            block = int(self.tables[row, column])
            if block not in self._names and name not in self._named:
                self._names[block] = name
                self._named[name] = block

    def forget_names(self) -> None:
        """Takes all names away: no row will begin with what is stored now."""
        self._free += self._kept
        self._kept.clear()
        self._names.clear()
        self._named.clear()

    def blocks_of(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.block_size)

    def needed(self, row: int, tokens: int) -> int:
        """Blocks that :meth:`reserve` would take from the pool; at most, where several rows share the last one."""
        self._check(row)
        length, count = int(self.lengths[row]), int(self.counts[row])
        fresh = self.blocks_of(length + tokens) - count
        partial = tokens > 0 and length % self.block_size != 0
        return fresh + int(partial and self.references[self.tables[row, count - 1]] > 1)

    def reserve(self, row: int, tokens: int) -> Copies:
        """Makes room for ``tokens`` more, in blocks that this row alone holds, and counts them as stored.

        Returns:
            The copy that must be made before writing: a shared, partly filled last block becomes the row's own.

        Raises:
            OutOfBlocks: the pool holds too few free blocks; nothing was changed.
            ValueError: the row would grow beyond ``max_blocks``.
        """
        needed = self.needed(row, tokens)
        if needed > self.free_blocks:
            raise OutOfBlocks(f"{needed} blocks are needed and {self.free_blocks} are free")
        length, count = int(self.lengths[row]), int(self.counts[row])
        total = self.blocks_of(length + tokens)
        if total > self.max_blocks:
            raise ValueError(f"a row holds at most {self.max_blocks} blocks, {total} were asked for")
        copies: Copies = []
        if tokens and length % self.block_size:
            last = int(self.tables[row, count - 1])
            if self.references[last] > 1:
                own = self._take()
                self._drop(last)
                self.tables[row, count - 1] = own
                copies.append((last, own))
        for column in range(count, total):
            self.tables[row, column] = self._take()
        self.counts[row] = total
        self.lengths[row] = length + tokens
        return copies

    def needed_for_next(self, rows: NDArray[np.int64]) -> int:
        """Blocks that one more token in each of ``rows`` takes; at most, where rows share a last block."""
        return int(self._at_edge(rows).sum())

    def reserve_next(self, rows: NDArray[np.int64]) -> Copies:
        """:meth:`reserve` of one token in each of ``rows``, in one go. Only rows at an edge cost Python time."""
        edge = self._at_edge(rows)
        if int(edge.sum()) > self.free_blocks:
            raise OutOfBlocks(f"{int(edge.sum())} blocks are needed and {self.free_blocks} are free")
        copies: Copies = []
        if edge.any():
            for row in rows[edge].tolist():
                copies += self.reserve(row, 1)
        self.lengths[rows[~edge]] += 1
        return copies

    def slots(self, row: int, start: int, stop: int) -> NDArray[np.int64]:
        """Where tokens ``start`` to ``stop`` of a row lie, as indices into the pool's tokens."""
        self._check(row)
        at = np.arange(start, stop)
        return self.tables[row, at // self.block_size].astype(np.int64) * self.block_size + at % self.block_size

    def last_slots(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the last token of each row lies."""
        at = self.lengths[rows] - 1
        return self.tables[rows, at // self.block_size].astype(np.int64) * self.block_size + at % self.block_size

    def view(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The block table of ``rows``, [N, blocks of the longest], as attention reads it."""
        if not self._open[rows].all():
            self._check(int(rows[~self._open[rows]][0]))
        return self.tables[rows, : max(1, int(self.counts[rows].max()))]

    def flush(self) -> None:
        """Closes every row and forgets every name: what is stored was computed with weights that are gone."""
        for row in np.flatnonzero(self._open).tolist():
            self.close(row)
        self.forget_names()

    def _at_edge(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        lengths = self.lengths[rows]
        full = lengths % self.block_size == 0
        last = self.tables[rows, np.maximum(self.counts[rows] - 1, 0)]
        return full | (self.references[last] > 1)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block = next(iter(self._kept))
            del self._kept[block], self._named[self._names.pop(block)]
        else:
            block = self.peak_blocks
            self.peak_blocks += 1
        self.references[block] = 1
        self.taken.append(block)
        return block

    def _drop(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            if block in self._names:
                self._kept[block] = None
            else:
                self._free.append(block)

    def _reset(self, row: int) -> None:
        self.tables[row, : self.counts[row]] = 0
        self.counts[row] = 0
        self.lengths[row] = 0
        self._open[row] = False
        self._free_rows.append(row)

    def _check(self, row: int) -> None:
        if not self._open[row]:
            raise RuntimeError(f"row {row} of the KV cache is closed: it was given back, or voided by a flush")

    def _add_rows(self) -> None:
        old = len(self.counts)
        self.tables = np.concatenate((self.tables, np.zeros_like(self.tables)))
        self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
        self.lengths = np.concatenate((self.lengths, np.zeros_like(self.lengths)))
        self._open = np.concatenate((self._open, np.zeros_like(self._open)))
        self._free_rows.extend(range(2 * old - 1, old - 1, -1))


class KVCache:
    """Keys and values of every layer: [L, num_blocks, block_size, Hkv, D] each.

    Memory is taken at the first use, and again at the first after :meth:`free`. Blocks are zero at first, so that cells
    which attention masks are always finite.

    Args:
        config: the model's shape.
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        device: where the model computes.
        dtype: the model's precision.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_size)
        self._device, self._dtype = device, dtype
        self._ready = 0
        self._spoilt = False

    @cached_property
    def keys(self) -> Tensor:
        return torch.empty(self._shape, device=self._device, dtype=self._dtype)

    @cached_property
    def values(self) -> Tensor:
        return torch.empty(self._shape, device=self._device, dtype=self._dtype)

    def prepare(self, num_blocks: int, taken: list[int], copies: Copies) -> None:
        """Makes the first blocks of the pool fit for use, and makes the copies that writing waits for.

        A CPU's pages are not touched before they serve. ``taken`` are the blocks that were taken since the last call;
        the list is emptied.
        """
        if num_blocks > self._ready:
            for pool in (self.keys, self.values):
                pool[:, self._ready : num_blocks].zero_()
            self._ready = num_blocks
        pairs = torch.tensor(copies, dtype=torch.int64, device=self._device).view(-1, 2)
        for pool in (self.keys, self.values) if copies or self._spoilt else ():
            sources = pool.index_select(1, pairs[:, 0])  # one of them may have been taken since
            if self._spoilt:
                pool[:, taken] = 0
            pool.index_copy_(1, pairs[:, 1], sources)
        taken.clear()

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v [T,Hkv,D] of one layer at ``slots`` [T] int64, indices into the pool's tokens."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def distrust(self) -> None:
        """From now on blocks are zeroed each time they are taken: some hold what is not finite."""
        self._spoilt = True

    def free(self) -> None:
        """Gives the memory back; what was stored is gone."""
        for name in ("keys", "values"):
            self.__dict__.pop(name, None)
        self._ready, self._spoilt = 0, False

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        tokens = 2 * config.num_hidden_layers * block_size
        return tokens * config.num_key_value_heads * config.head_size * dtype.itemsize

    def save(self, blocks: NDArray[np.int32]) -> Saved:
        """Whole blocks, copied to the host's memory."""
        index = torch.from_numpy(blocks).to(self._device)
        keys, values = (pool.index_select(1, index).cpu() for pool in (self.keys, self.values))
        return keys, values

    def load(self, blocks: NDArray[np.int32], saved: Saved) -> None:
        """Brings saved blocks back, into these."""
        index = torch.from_numpy(blocks).long().to(self._device)
        for pool, part in zip((self.keys, self.values), saved, strict=True):
            pool.index_copy_(1, index, part.to(self._device))
