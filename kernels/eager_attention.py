"""Attention in plain PyTorch: the oracle of the tests, and what serves a CPU.

Shapes: T tokens, N sequences, L padded length, Hq query heads, Hkv key/value heads, G = Hq/Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Keys (and values) gathered from the cache at one time: 2 MiB in float32, to stay near the core.
GATHER_ELEMENTS = 1 << 19
# Attention scores of one block of a prefill: 32 MiB in float32.
SCORE_ELEMENTS = 1 << 23


def masked_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: Tensor | None = None) -> Tensor:
    """``kernels.packed_attention`` by its definition: a [T,T] mask and one softmax; q [T,Hq,D] -> [T,Hq,D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~_seen(cu_seqlens, prefix, len(q)), -torch.inf)
    chances = scores.softmax(2, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("hij,jhd->ihd", chances, v)


def _seen(cu_seqlens: Tensor, prefix: Tensor | None, num_tokens: int) -> Tensor:
    """[T,T] whether row i sees row j."""
    numbers = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    segment = numbers.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    row = torch.arange(num_tokens, device=cu_seqlens.device)
    seen = (segment[:, None] == segment) & (row[:, None] >= row)
    return seen if prefix is None else seen | (prefix[segment][:, None] == segment)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention inside packed segments; arguments and result as ``kernels.packed_attention``.

    Segments of similar length are padded together and given to PyTorch's attention; differentiable. A prefix is met by
    all that see it in one product on a CPU, and goes through a mask elsewhere.
    """
    bounds = tuple(cu_seqlens.tolist())
    groups = () if prefix is None else _groups(bounds, tuple(prefix.tolist()))
    if groups and q.device.type != "cpu":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(cu_seqlens, prefix, q.shape[2]))
        return out[0].transpose(0, 1)
    plan = _padding(bounds, q.device)
    if groups:
        return _SharedPrefix.apply(q, k, v, plan, groups)
    padded = [x if plan.source is None else _Rows.apply(x, plan.source, plan.place, None) for x in (q, k, v)]
    outputs = [_causal(*(x[rows].unflatten(0, shape) for x in padded)) for rows, shape in plan.blocks()]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if plan.source is None else _Rows.apply(out, plan.place, plan.source, plan.filler)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N,L,Hq,D], [N,L,Hkv,D] twice -> [N*L,Hq,D]
    q, k, v = _repeated(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[N,L,Hq,D], [N,L,Hkv,D] twice -> [N,Hq,L,D] each."""
    heads = q.shape[2]
    # Repeating keys here takes two thirds of the time of enable_gqa on a CPU.
    k, v = (x[:, :, :, None].expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3) for x in (k, v))
    return [x.transpose(1, 2) for x in (q, k, v)]


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

    def blocks(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Padded rows and shape of each block."""
        start = 0
        for count, length in self.shapes:
            yield slice(start, start + count * length), (count, length)
            start += count * length

    def pad(self, x: Tensor) -> Tensor:
        return x if self.source is None else x.index_select(0, self.source)

    def unpad(self, x: Tensor) -> Tensor:
        return x if self.place is None else x.index_select(0, self.place)


@lru_cache(maxsize=16)  # every layer of a model, forward and backward, asks for the same plan
def _padding(bounds: tuple[int, ...], device: torch.device) -> _Padding:
    segments = sorted((stop - start, start) for start, stop in pairwise(bounds) if stop > start)
    if len({length for length, _ in segments}) <= 1:
        return _Padding([(len(segments), segments[0][0])] if segments else [(1, 0)], None, None, None)
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


@lru_cache(maxsize=16)
def _groups(bounds: tuple[int, ...], prefix: tuple[int, ...]) -> tuple[tuple[slice, slice], ...]:
    """Rows of each prefix, and of the segments behind it that see it."""
    groups = []
    for number, members in groupby(range(len(prefix)), key=lambda n: prefix[n]):
        first, *others = members
        keys, rows = slice(bounds[number], bounds[number + 1]), slice(bounds[first], bounds[first + len(others) + 1])
        if number >= 0 and keys.start < keys.stop and rows.start < rows.stop:
            groups.append((keys, rows))
    return tuple(groups)


class _SharedPrefix(torch.autograd.Function):
    """Attention inside the segments and that of a prefix's followers to its keys, joined by their log-sum-exps.

    The backward pass of a part is that of an attention by itself which is given the joint output and log-sum-exp: its
    probabilities are then those of the joint softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Padding, groups: tuple[tuple[slice, slice], ...]
    ) -> Tensor:
        padded = [plan.pad(x) for x in (q, k, v)]
        parts = []
        for rows, shape in plan.blocks():
            part = _flash(*_repeated(*(x[rows].unflatten(0, shape) for x in padded)), is_causal=True)
            parts.append([x.transpose(1, 2).flatten(0, 1) for x in part])
        out, log_sum = (plan.unpad(torch.cat(part)) for part in zip(*parts, strict=True))  # [T,Hq,D], [T,Hq]
        for keys, rows in groups:
            part = _flash(*_beside(q[rows], k[keys], v[keys]))
            shared, shared_sum = (x.movedim(2, 0).flatten(1, 2) for x in part)
            joint = torch.logaddexp(log_sum[rows], shared_sum)
            own_share, prefix_share = ((x - joint).exp()[..., None] for x in (log_sum[rows], shared_sum))
            out[rows] = out[rows] * own_share + shared * prefix_share
            log_sum[rows] = joint
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.plan, ctx.groups = plan, groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        plan, kv_heads = ctx.plan, k.shape[1]
        padded = [plan.pad(x) for x in (q, k, v, out, log_sum, d_out)]
        if plan.filler is not None:
            padded[-1].masked_fill_(plan.filler[:, None, None], 0)
        parts = []
        for rows, shape in plan.blocks():
            block = [x[rows].unflatten(0, shape) for x in padded]
            joint, joint_sum, d_part = (x.transpose(1, 2) for x in block[3:])
            d_heads = _flash_backward(d_part, *_repeated(*block[:3]), joint, joint_sum, 0.0, True)
            d_query, *d_keys = (x.transpose(1, 2).flatten(0, 1) for x in d_heads)
            parts.append([d_query, *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in d_keys)])
        d_q, d_k, d_v = (plan.unpad(torch.cat(part)) for part in zip(*parts, strict=True))
        for keys, rows in ctx.groups:
            joint, joint_sum, d_part = (_by_key_head(x[rows], kv_heads) for x in (out, log_sum, d_out))
            d_heads = _flash_backward(d_part, *_beside(q[rows], k[keys], v[keys]), joint, joint_sum, 0.0, False)
            d_q[rows] += d_heads[0].movedim(2, 0).flatten(1, 2)
            d_k[keys] += d_heads[1].sum(1).transpose(0, 1)
            d_v[keys] += d_heads[2].sum(1).transpose(0, 1)
        return d_q, d_k, d_v, None, None


# PyTorch's attention on a CPU, with the log-sum-exps.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:  # [R,Hq,...] -> [Hkv,G,R,...]
    return x.unflatten(1, (kv_heads, -1)).movedim(0, 2)


def _beside(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[R,Hq,D], [P,Hkv,D] twice -> [Hkv,G,R,D], [Hkv,G,P,D] twice; nothing is copied."""
    query = _by_key_head(q, k.shape[1])
    return [query, *(x.transpose(0, 1)[:, None].expand(-1, query.shape[1], -1, -1) for x in (k, v))]


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
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    contexts = context_lens.tolist()
    sequences = sorted((stop - start, n) for n, (start, stop) in enumerate(pairwise(bounds)) if stop > start)
    for block in _similar([length for length, _ in sequences]):
        longest = sequences[block.stop - 1][0]
        members = sorted((sequences[i][1] for i in block), key=contexts.__getitem__)
        for alike in _similar([contexts[n] for n in members]):
            span = contexts[members[alike.stop - 1]]
            limit = min(
                SCORE_ELEMENTS // (q.shape[1] * longest * span), GATHER_ELEMENTS // (span * k_cache[0, 0].numel())
            )
            for chosen in _slices([members[i] for i in alike], limit):
                index = torch.tensor(chosen, device=q.device)
                start = cu_seqlens_q[index].long()
                length = cu_seqlens_q[index + 1].long() - start
                row = torch.arange(longest, device=q.device)
                real = row < length[:, None]
                rows = start[:, None] + torch.minimum(row, length[:, None] - 1)  # [n,Q]
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
