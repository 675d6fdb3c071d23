"""Decode attention in PyTorch: a shared prefix is read once a group, and what all layers have in common is done once.

A step of a small model on a CPU is bound by reading keys and values and by the count of operations. Sequences whose
tables begin with the same blocks (the samples of one prompt) meet the keys there in one product; only what differs is
gathered for each sequence. Both parts go through one softmax, so nothing is approximated. A model with many key heads
takes PyTorch's attention, and each sequence all its own blocks.

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


class _Chunk(NamedTuple):
    """Neighbouring rows that are computed together."""

    rows: slice
    prefix: Tensor | None  # [g, blocks] int64: the shared beginning of each group, padded
    # [n] int64: where each row sits among the g x m places of the groups; None where it is the same
    place: Tensor | None
    places: int  # g x m
    suffix: Tensor  # [n, blocks] int64: each row's own blocks, padded
    mask: Tensor  # [n, 1, E+S] float32: 0 where a key counts, -inf where it does not


class CascadeDecode:
    """One decoding step for many layers: a query for each sequence against the paged cache.

    Args:
        block_size: tokens in a block.
        num_key_heads: Hkv.
        head_size: D.
        device: where queries and cache are.
    """

    def __init__(self, block_size: int, num_key_heads: int, head_size: int, device: torch.device) -> None:
        self._block_size, self._num_key_heads, self._head_size = block_size, num_key_heads, head_size
        self._device = device
        self._chunks: list[_Chunk] = []

    def set(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Plans a step.

        Args:
            tables: [N, blocks] block tables; rows that share a prefix should be neighbours; unused cells name any
                block.
            lengths: [N] tokens in the cache, the new one included, at least 1.
        """
        wide = tables.astype(np.int64)
        groups, shared = shared_blocks(wide, (lengths - 1) // self._block_size)
        if self._num_key_heads > MAX_KV_HEADS:
            shared[:] = 0
        used = -(-lengths // self._block_size)
        self._chunks = []
        start = 0
        limit = max(1, GATHER_ELEMENTS // (self._block_size * self._num_key_heads * self._head_size))  # blocks
        while start < len(wide):
            blocks = np.maximum.accumulate((used - shared)[start:]) * np.arange(1, len(wide) - start + 1)
            rows = slice(start, start + max(1, int(np.searchsorted(blocks, limit, side="right"))))
            self._chunks.append(self._chunk(rows, wide[rows], lengths[rows], groups[rows], shared[rows]))
            start = rows.stop

    # The same rows some tokens later are a new plan here.
    update = set

    def _chunk(
        self,
        rows: slice,
        tables: NDArray[np.int64],
        lengths: NDArray[np.int64],
        groups: NDArray[np.int64],
        shared: NDArray[np.int64],
    ) -> _Chunk:
        size, count = self._block_size, len(tables)
        prefix_blocks = int(shared.max())
        suffix_blocks = int((-(-lengths // size) - shared).max())
        columns = np.minimum(shared[:, None] + np.arange(suffix_blocks), tables.shape[1] - 1)
        suffix = tables[np.arange(count)[:, None], columns]
        mask = np.zeros((count, 1, (prefix_blocks + suffix_blocks) * size), np.float32)
        mask[:, 0, prefix_blocks * size :][
            np.arange(suffix_blocks * size) >= (lengths - shared * size)[:, None]
        ] = -np.inf
        prefix = place = None
        places = 0
        if prefix_blocks:
            group = groups - groups[0]
            first = np.searchsorted(group, np.arange(group[-1] + 1))  # members of a group are neighbours
            member = np.arange(count) - first[group]
            width = int(member.max()) + 1
            places = len(first) * width
            prefix = self._tensor(tables[first, :prefix_blocks])
            if places != count:
                place = self._tensor(group * width + member)
            mask[:, 0, : prefix_blocks * size][np.arange(prefix_blocks * size) >= (shared * size)[:, None]] = -np.inf
        return _Chunk(rows, prefix, place, places, self._tensor(suffix), self._tensor(mask))

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
        wide = q.new_zeros(count, kv_heads, heads // kv_heads, kv_heads, size)
        wide.diagonal(dim1=1, dim2=3).copy_((q * size**-0.5).view(count, kv_heads, -1, size).permute(0, 2, 3, 1))
        wide = wide.view(count, heads, -1)
        keys, values = k_cache.flatten(1), v_cache.flatten(1)
        parts = [_attend(wide[chunk.rows], keys, values, chunk) for chunk in self._chunks]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(count, kv_heads, -1, kv_heads, size)
        return out.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(count, heads, size)


def _gather(cache: Tensor, blocks: Tensor, channels: int) -> Tensor:  # [num_blocks,bs*C], [n,b] -> [n,b*bs,C]
    # An embedding look-up is the fastest gather of rows on a CPU.
    return F.embedding(blocks, cache).view(len(blocks), -1, channels)


def _attend(q: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk) -> Tensor:  # q, out: [n,Hq,C]
    heads, channels = q.shape[1:]
    scores = torch.bmm(q, _gather(keys, chunk.suffix, channels).transpose(1, 2))  # [n,Hq,S]
    if chunk.prefix is None:
        chances = scores.add_(chunk.mask).softmax(2)
        return torch.bmm(chances, _gather(values, chunk.suffix, channels))
    groups = len(chunk.prefix)
    together = q
    if chunk.place is not None:
        together = q.new_zeros(chunk.places, heads, channels).index_copy_(0, chunk.place, q)
    prefix_keys = _gather(keys, chunk.prefix, channels)  # [g,E,C]
    prefix = torch.bmm(together.view(groups, -1, channels), prefix_keys.transpose(1, 2))
    prefix = prefix.view(chunk.places, heads, -1)
    if chunk.place is not None:
        prefix = prefix.index_select(0, chunk.place)
    chances = torch.cat((prefix, scores), 2).add_(chunk.mask).softmax(2)  # [n,Hq,E+S]
    split = prefix.shape[2]
    out = torch.bmm(chances[:, :, split:], _gather(values, chunk.suffix, channels))
    head = chances[:, :, :split]
    if chunk.place is not None:
        head = head.new_zeros(chunk.places, heads, split).index_copy_(0, chunk.place, head)
    head = torch.bmm(head.reshape(groups, -1, split), _gather(values, chunk.prefix, channels))
    head = head.view(chunk.places, heads, channels)
    return out.add_(head if chunk.place is None else head.index_select(0, chunk.place))


def _attend_by_head(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _Chunk) -> Tensor:  # q, out: [n,Hq,D]
    kv_heads, size = k_cache.shape[2:]
    keys, values = (
        _gather(x.flatten(1), chunk.suffix, kv_heads * size).unflatten(2, (kv_heads, size)).transpose(1, 2)
        for x in (k_cache, v_cache)
    )
    mask = chunk.mask[:, None].to(q.dtype)
    return F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)), keys, values, attn_mask=mask).flatten(1, 2)
