"""The kernels in plain PyTorch: the oracle of the tests, and what serves a CPU.

Shapes: T tokens, H hidden, V vocabulary, N sequences, L padded length, Hq query heads, Hkv key/value heads, G = Hq/Hkv,
D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager_logprob import IGNORE as IGNORE
from .eager_logprob import grouped_logprob as grouped_logprob

# Keys (and values) gathered from the cache at one time by a decoding step: 2 MiB in float32, to stay near the core.
GATHER_ELEMENTS = 1 << 19
# Attention scores of one block of a prefill: 32 MiB in float32.
SCORE_ELEMENTS = 1 << 23


def clamped_delta_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
    delta_max: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of weight x clipped policy loss; arguments and results as ``kernels.clamped_delta_loss``."""
    counted = weight != 0
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=logprob.device)
    # A token without weight may hold anything, NaN too: it is replaced before it is used.
    delta = torch.where(counted, logprob.to(dtype) - old_logprob, zero)
    advantage = torch.where(counted, advantage.to(dtype), zero)
    ratio = _clamp(delta, delta_max).exp()
    low = counted & (advantage < 0) & (ratio < 1.0 - clip_low)
    high = counted & (advantage > 0) & (ratio > 1.0 + clip_high)
    bounded = torch.where(low, 1.0 - clip_low, torch.where(high, 1.0 + clip_high, ratio))
    token_loss = -bounded * advantage
    kl = zero
    if ref_logprob is not None:
        gap = _clamp(torch.where(counted, ref_logprob - logprob.to(dtype), zero), delta_max)
        kl = gap.expm1() - gap
        if beta != 0.0:
            token_loss = token_loss + beta * kl
    loss = (token_loss * weight).sum()
    with torch.no_grad():
        seen = ratio[counted] if counted.any() else None
        stats = {
            "clip_low": low.sum(),
            "clip_high": high.sum(),
            "clamped": (delta.abs() > delta_max).sum(),
            "kl_sum": kl.sum(),
            "tokens": counted.sum(),
            "ratio_max": zero if seen is None else seen.amax(),
            "ratio_min": zero + torch.inf if seen is None else seen.amin(),
            "ratio_sum": zero if seen is None else seen.sum(),
        }
    return loss, {name: value.float() for name, value in stats.items()}


def _clamp(x: Tensor, bound: float) -> Tensor:
    """torch.clamp, but a NaN keeps its gradient too, so that it cannot pass for a clamped token."""
    return torch.where(x > bound, bound, torch.where(x < -bound, -bound, x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [...,H], [H] -> [...,H]
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32 (float64 for float64 inputs)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T,heads,D], [T,1,D] twice -> [T,heads,D]
    """Each pair of channels i and i + D/2 turned by its angle; the sine carries the sign of its half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; in the memory of gate where no gradient is needed."""
    if gate.requires_grad or up.requires_grad:
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal grouped-query attention inside each packed segment; q [T,Hq,D], k and v [T,Hkv,D] -> [T,Hq,D].

    Segments of similar length are padded together and given to PyTorch's attention; differentiable.
    """
    plan = _padding(tuple(cu_seqlens.tolist()), q.device)
    if not plan.shapes:
        return torch.zeros_like(q)
    padded = [x if plan.source is None else _Rows.apply(x, plan.source, plan.place, None) for x in (q, k, v)]
    outputs = []
    start = 0
    for count, length in plan.shapes:
        rows = slice(start, start + count * length)
        outputs.append(_causal(*(x[rows].unflatten(0, (count, length)) for x in padded)).flatten(0, 1))
        start = rows.stop
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if plan.source is None else _Rows.apply(out, plan.place, plan.source, plan.filler)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N,L,Hq,D], [N,L,Hkv,D] twice -> [N,L,Hq,D]
    heads = q.shape[2]
    # Repeating keys here takes two thirds of the time of enable_gqa on a CPU.
    k, v = (x[:, :, :, None].expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


class _Rows(torch.autograd.Function):
    """x[index] whose backward is the gather by the inverse index: no scattered addition.

    Padding reads some rows twice, but a filler's gradient is exactly zero (nothing that counts attends to it), so a
    row's gradient is that of its one real copy; ``filler`` marks padded rows where the gradient must be made zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, filler: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, filler)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inverse, filler = ctx.saved_tensors
        d_x = d_out.index_select(0, inverse)
        return d_x if filler is None else d_x.masked_fill_(filler[:, None, None], 0), None, None, None


class _Padding(NamedTuple):
    """Where packed rows go when segments of similar length are padded to one block each."""

    shapes: list[tuple[int, int]]  # (segments, padded length) of each block
    source: Tensor | None  # [P] the packed row of each padded row; None when nothing moves
    place: Tensor | None  # [T] the padded row of each packed row
    filler: Tensor | None  # [P] whether a padded row is padding


@lru_cache(maxsize=16)  # every layer of a model, forward and backward, asks for the same plan
def _padding(bounds: tuple[int, ...], device: torch.device) -> _Padding:
    segments = sorted((stop - start, start) for start, stop in pairwise(bounds) if stop > start)
    if len({length for length, _ in segments}) <= 1:
        return _Padding([(len(segments), segments[0][0])] if segments else [], None, None, None)
    shapes, source, filler = [], [], []
    place = torch.empty(bounds[-1], dtype=torch.int64)
    padded_rows = 0
    for block in _similar([length for length, _ in segments]):
        longest = segments[block.stop - 1][0]
        shapes.append((len(block), longest))
        for length, start in (segments[i] for i in block):
            row = torch.arange(longest)
            source.append(start + row.clamp(max=length - 1))
            filler.append(row >= length)
            place[start : start + length] = padded_rows + row[:length]
            padded_rows += longest
    return _Padding(shapes, torch.cat(source).to(device), place.to(device), torch.cat(filler).to(device))


def _similar(lengths: list[int]) -> Iterator[range]:
    """Cut ascending lengths into ranges in which the longest is at most a quarter (and 16) above the shortest."""
    start = 0
    for i, length in enumerate(lengths):
        if length > lengths[start] + lengths[start] // 4 + 16:
            yield range(start, i)
            start = i
    if lengths:
        yield range(start, len(lengths))


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
    """Attention of new tokens to a paged cache that already holds them; q [T,Hq,D] -> [T,Hq,D].

    Query i of sequence n is at position context_lens[n] - len_q[n] + i. Caches are [num_blocks,block_size,Hkv,D] and
    hold finite numbers everywhere (what lies behind a sequence's end is multiplied by zero); block_tables
    [N,max_blocks].
    """
    if max_seqlen_q == 1 and len(q) == len(context_lens):
        return _paged_decode(q, k_cache, v_cache, block_tables, context_lens)
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    contexts = context_lens.tolist()
    sequences = sorted((stop - start, n) for n, (start, stop) in enumerate(pairwise(bounds)) if stop > start)
    for block in _similar([length for length, _ in sequences]):
        longest = sequences[block.stop - 1][0]
        members = [sequences[i][1] for i in block]
        span = max(contexts[n] for n in members)
        for chosen in _slices(members, SCORE_ELEMENTS // (q.shape[1] * longest * span)):
            index = torch.tensor(chosen, device=q.device)
            start = cu_seqlens_q[index].long()
            length = cu_seqlens_q[index + 1].long() - start
            row = torch.arange(longest, device=q.device)
            real = row < length[:, None]
            rows = start[:, None] + torch.minimum(row, length[:, None] - 1)  # [n,Q]
            if longest == 1:
                part = _paged_decode(q[rows[:, 0]], k_cache, v_cache, block_tables[index], context_lens[index])[:, None]
            else:
                position = (context_lens[index].long() - length)[:, None] + rows - start[:, None]
                part = _paged_prefill(q[rows], k_cache, v_cache, block_tables[index], position, span)
            out[rows[real]] = part[real]
    return out


def _slices(items: list[int], size: int) -> Iterator[list[int]]:
    size = max(1, size)
    return (items[i : i + size] for i in range(0, len(items), size))


def _gather(cache: Tensor, block_tables: Tensor, tokens: int) -> Tensor:
    """The first ``tokens`` cached positions (rounded up to whole blocks) of each sequence, [n,L,Hkv,D]."""
    num_blocks = -(-tokens // cache.shape[1])
    # An embedding look-up is the fastest gather of rows on a CPU; unused table entries may be negative.
    blocks = F.embedding(block_tables[:, :num_blocks].clamp(min=0), cache.view(len(cache), -1))
    return blocks.view(len(block_tables), num_blocks * cache.shape[1], *cache.shape[2:])


def _paged_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, position: Tensor, span: int
) -> Tensor:  # q [n,Q,Hq,D], position [n,Q] -> [n,Q,Hq,D]
    keys, values = (_gather(cache, block_tables, span) for cache in (k_cache, v_cache))  # [n,L,Hkv,D]
    (count, length, heads, size), kv_heads = q.shape, keys.shape[2]
    seen = torch.arange(keys.shape[1], device=q.device) <= position[:, :, None]  # [n,Q,L]
    # The G queries of a key head stand side by side as rows, so that no key is repeated.
    queries = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(count, kv_heads, -1, size)
    mask = seen.repeat(1, heads // kv_heads, 1)[:, None]
    out = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
    return out.view(count, heads, length, size).transpose(1, 2)


def _paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor
) -> Tensor:  # one new token a sequence, q [B,Hq,D] -> [B,Hq,D]
    out = torch.empty_like(q)
    order = context_lens.argsort()
    spans = context_lens[order].tolist()
    kv_size = k_cache.shape[2] * k_cache.shape[3]
    start = 0
    while start < len(spans):
        # Neighbours in length share a chunk, so little padding is gathered.
        stop = start + max(1, GATHER_ELEMENTS // (spans[start] * kv_size))
        index = order[start:stop]
        span = spans[min(stop, len(spans)) - 1]
        out[index] = _decode_chunk(q[index], k_cache, v_cache, block_tables[index], context_lens[index], span)
        start = stop
    return out


def _decode_chunk(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, span: int
) -> Tensor:  # q [n,Hq,D] -> [n,Hq,D]
    keys, values = (_gather(cache, block_tables, span) for cache in (k_cache, v_cache))  # [n,L,Hkv,D]
    (count, heads, size), kv_heads = q.shape, keys.shape[2]
    grouped = q.view(count, kv_heads, -1, size)  # [n,Hkv,G,D]
    unseen = torch.arange(keys.shape[1], device=q.device) >= context_lens[:, None]  # [n,L]
    if kv_heads > 4:
        mask = ~unseen[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        return out.reshape(count, heads, size)
    # Queries in a block-diagonal [Hq, Hkv*D] make all heads one product over the cache as it lies: a few idle
    # multiplications in place of a product, or a transposed copy of the keys, for each head.
    wide = q.new_zeros(count, kv_heads, heads // kv_heads, kv_heads, size)
    wide.diagonal(dim1=1, dim2=3).copy_((grouped * size**-0.5).permute(0, 2, 3, 1))
    scores = torch.bmm(wide.view(count, heads, -1), keys.flatten(2).transpose(1, 2))  # [n,Hq,L]
    chances = scores.masked_fill_(unseen[:, None], -torch.inf).softmax(2, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(chances, values.flatten(2)).view_as(wide)
    return out.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(count, heads, size)
