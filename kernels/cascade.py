"""Decode attention in PyTorch: a shared prefix's keys are read once a group, and what layers share is done once.

A step of a small model on a CPU is bound by reading keys and values and by the count of operations. Sequences whose
tables begin with the same blocks (the samples of one prompt) meet the keys there in one product; only what differs is
gathered for each sequence. Values are never gathered: a weighted sum of rows that lie anywhere is what an embedding bag
computes. Nothing is approximated. A model with many key heads takes PyTorch's attention, and each sequence all its own
blocks.

Shapes: N sequences, Hq query heads, Hkv key/value heads, D head size, C = Hkv*D, E tokens of a prefix, S behind it.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .work_list import shared_blocks

# Keys gathered at one time: 2 MiB in float32, so that they are near the core when they are multiplied.
GATHER_ELEMENTS = 1 << 19
# With more key heads the block-diagonal queries below would spend more on zeros than they save.
MAX_KV_HEADS = 4


class _Prefix(NamedTuple):
    """What groups of a chunk share."""

    blocks: Tensor  # [g, blocks] int64, padded
    mask: Tensor  # [g, 1, E] float32: 0 where a key counts, -inf where it does not
    # [n] int64: where each row sits among the g x m places of the groups; None where it is the same
    place: Tensor | None
    places: int  # g x m


class _Chunk(NamedTuple):
    """Neighbouring rows that are computed together."""

    rows: slice
    prefix: _Prefix | None
    suffix: Tensor  # [n, blocks] int64: each row's own blocks, padded
    mask: Tensor  # [n, 1, S] as that of a prefix
    values: Tensor  # [n*Hq*(E+S)] int32: rows of [tokens*Hkv,D] that hold the values of each head
    starts: Tensor  # [n*Hq] int32: where each head begins among them


class CascadeDecode:
    """One decoding step for many layers: a query for each sequence against the paged cache.

    Args:
        block_size: tokens in a block.
        heads: (Hq, Hkv).
        head_size: D.
        device: where queries and cache are.
    """

    def __init__(self, block_size: int, heads: tuple[int, int], head_size: int, device: torch.device) -> None:
        self._block_size, self._heads, self._head_size = block_size, heads, head_size
        self._device = device
        self._chunks: list[_Chunk] = []
        self._wide: Tensor | None = None  # [N,Hkv,Hq/Hkv,Hkv,D]

    def set(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Plans a step.

        Args:
            tables: [N, blocks] block tables; rows that share a prefix should be neighbours; unused cells name any
                block.
            lengths: [N] tokens in the cache, the new one included, at least 1.
        """
        wide = tables.astype(np.int64)
        groups, shared = shared_blocks(wide, (lengths - 1) // self._block_size)
        if self._heads[1] > MAX_KV_HEADS:
            shared[:] = 0
        used = -(-lengths // self._block_size)
        self._chunks = []
        start = 0
        limit = max(1, GATHER_ELEMENTS // (self._block_size * self._heads[1] * self._head_size))  # blocks
        while start < len(wide):
            blocks = np.maximum.accumulate((used - shared)[start:]) * np.arange(1, len(wide) - start + 1)
            rows = slice(start, start + max(1, int(np.searchsorted(blocks, limit, side="right"))))
            self._chunks.append(self._chunk(rows, wide[rows], lengths[rows], groups[rows], shared[rows]))
            start = rows.stop

    def _chunk(
        self,
        rows: slice,
        tables: NDArray[np.int64],
        lengths: NDArray[np.int64],
        groups: NDArray[np.int64],
        shared: NDArray[np.int64],
    ) -> _Chunk:
        size, count = self._block_size, len(tables)
        blocks = int((-(-lengths // size) - shared).max())
        columns = np.minimum(shared[:, None] + np.arange(blocks), tables.shape[1] - 1)
        suffix = tables[np.arange(count)[:, None], columns]
        mask = _mask(lengths - shared * size, blocks * size)
        prefix = None
        both = suffix if self._heads[1] <= MAX_KV_HEADS else suffix[:0]
        if shared.any():
            prefix_blocks = int(shared.max())
            group = groups - groups[0]
            first = np.searchsorted(group, np.arange(group[-1] + 1))  # members of a group are neighbours
            member = np.arange(count) - first[group]
            width = int(member.max()) + 1
            place = None if len(first) * width == count else self._tensor(group * width + member)
            prefix = _Prefix(
                self._tensor(tables[first, :prefix_blocks]),
                self._tensor(_mask(shared[first] * size, prefix_blocks * size)),
                place,
                len(first) * width,
            )
            both = np.concatenate((tables[:, :prefix_blocks], suffix), 1)
        values, starts = (self._tensor(array) for array in _bags(both, size, *self._heads))
        return _Chunk(rows, prefix, self._tensor(suffix), self._tensor(mask), values, starts)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attention of the new tokens in one layer.

        Args:
            q: [N,Hq,D] floating point.
            k_cache: [num_blocks, block_size, Hkv, D], finite everywhere, the new tokens' keys in their places.
            v_cache: as k_cache.

        Returns:
            [N,Hq,D]; scores are scaled by D**-0.5.
        """
        (count, heads, size), kv_heads = q.shape, k_cache.shape[2]
        if kv_heads > MAX_KV_HEADS:
            parts = [_attend_by_head(q[chunk.rows], k_cache, v_cache, chunk) for chunk in self._chunks]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        # Queries in a block-diagonal [Hq,C] make all heads one product over the cache as it lies.
        if self._wide is None or len(self._wide) != count:
            self._wide = q.new_zeros(count, kv_heads, heads // kv_heads, kv_heads, size)
        diagonal = self._wide.diagonal(dim1=1, dim2=3)  # what lies beside it stays 0 from layer to layer
        diagonal.copy_((q * size**-0.5).view(count, kv_heads, -1, size).permute(0, 2, 3, 1))
        wide, keys, values = self._wide.view(count, heads, -1), k_cache.flatten(1), v_cache.view(-1, size)
        parts = [_attend(wide[chunk.rows], keys, values, chunk) for chunk in self._chunks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(count, heads, size)


def _mask(lengths: NDArray[np.int64], width: int) -> NDArray[np.float32]:  # [n] -> [n,1,width]
    return np.where(np.arange(width) < lengths[:, None, None], np.float32(0), np.float32(-np.inf))


def _bags(
    blocks: NDArray[np.int64], block_size: int, heads: int, kv_heads: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """``values`` and ``starts`` of a chunk whose rows attend to ``blocks`` [n, blocks]."""
    head = np.arange(heads) // (heads // kv_heads)
    tokens = blocks[:, None, :, None] * block_size + np.arange(block_size)
    # int32 halves what every layer reads of them; a cache of 2**31 rows has no place in memory.
    rows = (tokens * kv_heads + head[:, None, None]).astype(np.int32)
    starts = np.arange(len(blocks) * heads, dtype=np.int32) * np.int32(blocks.shape[1] * block_size)
    return rows.reshape(-1), starts


def _scores(q: Tensor, keys: Tensor, blocks: Tensor, mask: Tensor) -> Tensor:  # q [n,R,C], blocks [n,b] -> [n,R,b*bs]
    # An embedding look-up is the fastest gather of rows on a CPU.
    found = F.embedding(blocks, keys).view(len(blocks), -1, q.shape[2])
    return torch.baddbmm(mask.to(q.dtype), q, found.transpose(1, 2))


def _attend(q: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk) -> Tensor:  # q [n,Hq,C] -> [n*Hq,D]
    scores = _scores(q, keys, chunk.suffix, chunk.mask)  # [n,Hq,S]
    if chunk.prefix is not None:
        blocks, mask, place, places = chunk.prefix
        together = q
        if place is not None:
            together = q.new_zeros(places, *q.shape[1:]).index_copy_(0, place, q)
        shared = _scores(together.view(len(blocks), -1, q.shape[2]), keys, blocks, mask)
        shared = shared.view(places, q.shape[1], -1)
        if place is not None:
            shared = shared.index_select(0, place)
        scores = torch.cat((shared, scores), 2)  # [n,Hq,E+S]
    chances = scores.softmax(2).view(-1)
    return F.embedding_bag(chunk.values, values, chunk.starts, mode="sum", per_sample_weights=chances)


def _attend_by_head(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _Chunk) -> Tensor:  # q, out: [n,Hq,D]
    kv_heads, size = k_cache.shape[2:]
    keys, values = (
        F.embedding(chunk.suffix, x.flatten(1)).view(len(q), -1, kv_heads, size).transpose(1, 2)
        for x in (k_cache, v_cache)
    )
    mask = chunk.mask[:, None].to(q.dtype)
    return F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)), keys, values, attn_mask=mask).flatten(1, 2)
