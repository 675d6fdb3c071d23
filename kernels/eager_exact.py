"""The exact mode's attention in PyTorch, for float32 on a CPU; what it promises is told in ``exact_attention.py``.

A token that is decoded alone, in a chunk of a prompt, or in a packed batch of the trainer attends by the same sums in
the same order. The keys of a sequence are laid out by absolute position, those of a shared prompt first, and filled up
to whole chunks. Scores are sums over the head size alone. A softmax over a row does not change by a bit when masked
keys follow. Values are summed inside each chunk and then chunk by chunk, so further masked chunks add exactly zero. And
no product has fewer rows than those from which MKL sums every row alike.

Shapes: T tokens, N sequences, n of them at one time, Q queries of a sequence, R rows of a product, L
laid out keys, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager_attention import GATHER_ELEMENTS, SCORE_ELEMENTS, _groups, _padding, _SharedPrefix, _similar, _slices

CHUNK = 128
# Rows of a product are a multiple of these: of one that is alone, threads share the rows.
ROWS_OF_MANY, ROWS_OF_ONE = 4, 16

Places = Callable[[Tensor, Tensor], Tensor]  # numbers of sequences [n], positions [L] -> rows of the keys [n,L]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention inside packed segments; arguments and result as ``kernels.packed_attention``."""
    numbers = [-1] * (len(cu_seqlens) - 1) if prefix is None else prefix.tolist()
    return _Exact.apply(q, k, v, tuple(cu_seqlens.tolist()), tuple(numbers))


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
    """Attention of new tokens to a paged cache; arguments and result as ``exact_paged_attention``."""
    size = k_cache.shape[1]
    last_column = block_tables.shape[1] - 1

    def places(chosen: Tensor, positions: Tensor) -> Tensor:
        column = (positions // size).clamp(max=last_column)
        # Unused entries may be negative; what they lead to is masked.
        return block_tables[chosen][:, column].long().clamp(min=0) * size + positions % size

    keys, values = (cache.flatten(0, 1) for cache in (k_cache, v_cache))
    return _attend(q, keys, values, cu_seqlens_q.tolist(), context_lens.tolist(), places, False)[0]


class _Exact(_SharedPrefix):
    """Its gradient needs the output and the log-sum-exps alone, so it is that of the usual form."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], prefix: tuple[int, ...]
    ) -> Tensor:
        starts, lengths = bounds[:-1], [stop - start for start, stop in pairwise(bounds)]
        shared = [lengths[m] if m >= 0 else 0 for m in prefix]
        shared_start = [starts[m] if m >= 0 else 0 for m in prefix]
        table = torch.tensor([shared, shared_start, starts, lengths]).view(4, -1, 1)

        def places(chosen: Tensor, positions: Tensor) -> Tensor:
            before, home, start, length = table[:, chosen]
            own = start + torch.minimum(positions - before, length - 1)
            return torch.where(positions < before, home + positions, own)

        contexts = [a + b for a, b in zip(shared, lengths, strict=True)]
        out, log_sum = _attend(q, k, v, list(bounds), contexts, places, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.plan, ctx.groups = _padding(bounds, q.device), _groups(bounds, prefix)
        return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], contexts: list[int], places: Places, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of the queries ``bounds[n]`` to ``bounds[n+1]``, the last of the ``contexts[n]`` tokens of sequence n.

    k and v [S,Hkv,D] hold the keys at the rows that ``places`` tells. Returns [T,Hq,D] and log-sum-exps [T,Hq].
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    out, sums = torch.zeros_like(q), q.new_zeros(q.shape[:2]) if with_sums else None
    k, v = k.flatten(1), v.flatten(1)
    order = sorted((stop - start, contexts[n], n) for n, (start, stop) in enumerate(pairwise(bounds)) if stop > start)
    for block in _similar([length for length, *_ in order]):
        longest, span = order[block.stop - 1][0], max(order[i][1] for i in block)
        for members in _slices([order[i][2] for i in block], GATHER_ELEMENTS // (span * k.shape[1])):
            chosen = torch.tensor(members)
            start = torch.tensor([bounds[n] for n in members])[:, None]
            length = torch.tensor([bounds[n + 1] for n in members])[:, None] - start
            context = torch.tensor([contexts[n] for n in members])[:, None]
            positions = torch.arange(_whole_chunks(max(contexts[n] for n in members)))
            index = places(chosen, positions)
            # An embedding look-up is the fastest gather of rows on a CPU.
            keys, values = (F.embedding(index, x).unflatten(2, (kv_heads, -1)) for x in (k, v))  # [n,L,Hkv,D]
            step = max(1, SCORE_ELEMENTS // (len(members) * len(positions) * (heads // kv_heads)))
            for first in range(0, longest, step):
                row = torch.arange(first, min(first + step, longest))
                real = row < length
                row = torch.minimum(row, length - 1)  # [n,Q]
                last = context - length + row
                seen = _whole_chunks(int(last.max()) + 1)
                rows = start + row
                part, part_sums = _attend_block(q[rows], keys[:, :seen], values[:, :seen], last, with_sums)
                out[rows[real]] = part[real]
                if sums is not None and part_sums is not None:
                    sums[rows[real]] = part_sums[real]
    return out, sums


def _attend_block(
    q: Tensor, keys: Tensor, values: Tensor, last: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Queries that see the positions up to ``last``: [n,Q,Hq,D], [n,L,Hkv,D] twice, [n,Q] -> [n,Q,Hq,D], [n,Q,Hq]."""
    (count, queries, heads, size), kv_heads = q.shape, keys.shape[2]
    group = heads // kv_heads
    rows = queries * group
    filler = -rows % (ROWS_OF_ONE if count == 1 else ROWS_OF_MANY)
    last = F.pad(last.repeat_interleave(group, 1), (0, filler))
    unseen = torch.arange(keys.shape[1]) > last[:, :, None]  # [n,R,L]
    outputs, sums = [], []
    for head in range(kv_heads):
        own = q[:, :, head * group : (head + 1) * group].reshape(count, rows, size) * size**-0.5
        scores = torch.bmm(F.pad(own, (0, 0, 0, filler)), keys[:, :, head].transpose(1, 2))  # [n,R,L]
        chances = scores.masked_fill_(unseen, -torch.inf).softmax(2)
        total = torch.zeros(count, rows + filler, size)
        for start in range(0, keys.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            total += torch.bmm(chances[:, :, chunk], values[:, chunk, head])
        outputs.append(total[:, :rows].view(count, queries, group, size))
        if with_sums:
            sums.append(scores.logsumexp(2)[:, :rows].view(count, queries, group))
    return torch.cat(outputs, 2), torch.cat(sums, 2) if with_sums else None


def _whole_chunks(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK
