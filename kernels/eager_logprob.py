"""Grouped log-probability in plain PyTorch: the oracle of the tests, and what serves a CPU.

Shapes: T tokens, H hidden, V vocabulary; N rows that count; R rows and C columns of a tile of logits.

A short vocabulary is taken whole, block of rows by block of rows. A long one is cut into slices, whose sums are joined
in their order with a running maximum (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3); the backward pass goes
through the slices again, so that each slice of the weight is cast once, and its gradient is summed in one place and
written once. Which of the two, and where a slice begins, depends on V alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import product, transposed_product

IGNORE = -100

# So many log-probabilities are kept for the backward pass, 32 MiB in float32; the others are computed again.
KEPT_ELEMENTS = 1 << 23
# Logits of a tile: 4 MiB in float32, which stay near the core until the products that follow have read them.
TILE_ELEMENTS = 1 << 20
# Columns of a slice of the vocabulary; one that is not longer is taken whole.
SLICE_COLUMNS = 4096

LOG2_E = 1.0 / math.log(2.0)


def grouped_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target; arguments and results as ``kernels.grouped_logprob``.

    Results are float64 for float64 inputs, so that gradients can be checked.
    """
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _GroupedLogprob.apply(hidden, weight, targets, temperature, entropy, main_grad, keep)


def rows_with_gradient(
    targets: Tensor, d_logprob: Tensor | None, d_entropy: Tensor | None
) -> Tensor:  # [T] each -> [N]
    """Rows that have a target and an incoming gradient: the others have none to give."""
    incoming = torch.zeros_like(targets, dtype=torch.bool)
    for gradient in (d_logprob, d_entropy):
        if gradient is not None:
            incoming |= gradient != 0
    return (incoming & (targets != IGNORE)).nonzero().squeeze(1)


def spread_rows(values: Tensor, rows: Tensor, total: int) -> Tensor:  # [N,...], [N] -> [T,...]
    """Values of some rows among zeros for the others; themselves where they are all rows."""
    if len(rows) == total:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


class _Sums(NamedTuple):
    """What a forward pass finds of the rows that count."""

    logprob: Tensor  # [N]
    entropy: Tensor | None  # [N]
    log_sum: Tensor | None  # [N] log of the sum of exponentials, where the vocabulary is not whole
    kept: Tensor  # [N,K] log-probabilities of the first columns, whole slices, as many as may be kept


class _GroupedLogprob(torch.autograd.Function):
    """Keeps some log-probabilities and computes the others again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        main_grad: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        live = (targets != IGNORE).nonzero().squeeze(1)
        num_kept = kept_columns(len(live), len(weight)) if keep else 0
        kept = hidden.new_empty(len(live), num_kept, dtype=_summed_in(hidden))
        form = _whole if len(weight) <= SLICE_COLUMNS else _in_slices
        sums = form(hidden, weight, targets, live, temperature, entropy, kept)
        ctx.save_for_backward(hidden, weight, targets, live, *sums[1:])
        ctx.temperature, ctx.main_grad = temperature, main_grad  # which is there to be changed: no saved tensor
        ctx.set_materialize_grads(False)
        entropies = None if sums.entropy is None else spread_rows(sums.entropy, live, len(targets))
        return spread_rows(sums.logprob, live, len(targets)), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, live, *of_live = ctx.saved_tensors
        rows = rows_with_gradient(targets, d_logprob, d_entropy)
        if len(rows) < len(live):
            chosen = torch.searchsorted(live, rows)
            of_live = [None if x is None else x[chosen] for x in of_live]
        dtype = _summed_in(hidden)
        gain = rows.new_zeros(len(rows), dtype=dtype) if d_logprob is None else d_logprob[rows].to(dtype)
        tilt = None if d_entropy is None else d_entropy[rows].to(dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_rows = hidden.new_zeros(len(rows), hidden.shape[1], dtype=dtype) if need_hidden else None
        main_grad = ctx.main_grad if need_weight else None
        d_weight = torch.zeros_like(weight) if need_weight and main_grad is None else None
        total = d_weight if main_grad is None else main_grad
        _backward(hidden, weight, _Rows(rows, targets, gain, tilt, *of_live), ctx.temperature, d_rows, total)
        d_hidden = None if d_rows is None else spread_rows(d_rows.to(hidden.dtype), rows, len(hidden))
        return d_hidden, d_weight, None, None, None, None, None


class _Rows(NamedTuple):
    """What a backward pass knows of the rows that have a gradient; the last three are those of _Sums."""

    rows: Tensor  # [N]
    targets: Tensor  # [T] of all rows
    gain: Tensor  # [N] gradient of the log-probability
    tilt: Tensor | None  # [N] gradient of the entropy
    entropy: Tensor | None = None
    log_sum: Tensor | None = None
    kept: Any = None


def _whole(
    hidden: Tensor, weight: Tensor, targets: Tensor, live: Tensor, temperature: float, entropy: bool, kept: Tensor
) -> _Sums:
    """``kept`` is all or nothing."""
    dtype, num_vocab = _summed_in(hidden), len(weight)
    chosen = torch.empty(len(live), dtype=dtype, device=hidden.device)
    entropies = torch.empty_like(chosen) if entropy else None
    weight_up = weight.to(dtype)
    size = min(TILE_ELEMENTS // num_vocab, len(live))
    for place, part in _blocks(live, len(targets), size):
        rows = hidden[part].to(dtype)
        logits = product(rows / temperature, weight_up)
        logprobs = torch.log_softmax(logits, 1)
        if kept.numel():
            kept[place] = logprobs
        chosen[place] = logprobs.gather(1, targets[part, None]).squeeze(1)
        if entropies is not None:
            entropies[place] = -torch.exp(logprobs, out=logits).mul_(logprobs).sum(1)
        del logits, logprobs  # while the next ones are made, these must not stay
    return _Sums(chosen, entropies, None, kept)


def _in_slices(
    hidden: Tensor, weight: Tensor, targets: Tensor, live: Tensor, temperature: float, entropy: bool, kept: Tensor
) -> _Sums:
    dtype = _summed_in(hidden)
    total_max = torch.full((len(live),), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
    total, target_logit = torch.zeros_like(total_max), torch.zeros_like(total_max)
    dot = torch.zeros_like(total_max) if entropy else None  # of the powers with (logit - maximum)
    size = min(TILE_ELEMENTS // SLICE_COLUMNS, len(live))
    for columns in _slices(len(weight)):
        weight_up = weight[columns].to(dtype)
        for place, part in _blocks(live, len(targets), size):
            logits = product(hidden[part].to(dtype) / temperature, weight_up)
            if columns.stop <= kept.shape[1]:
                kept[place, columns] = logits
            column, inside = _targets_in(columns, targets[part, None])
            target_logit[place] += logits.gather(1, column).where(inside, 0.0).squeeze(1)
            new_max = torch.maximum(total_max[place], logits.amax(1))
            moved = total_max[place] - new_max
            shifted = logits.sub_(new_max[:, None])
            power = _exp(shifted, shifted if dot is None else None)
            if dot is not None:
                dot[place] = (dot[place] + total[place] * moved) * moved.exp() + shifted.mul_(power).sum(1)
            total[place] = total[place] * moved.exp() + power.sum(1)
            total_max[place] = new_max
            del logits, shifted, power  # while the next ones are made, these must not stay
        del weight_up
    log_total = total.log()
    log_sum = total_max + log_total
    # Grouped so that a target far below a large maximum loses nothing of the difference.
    logprob = (target_logit - total_max) - log_total
    return _Sums(logprob, None if dot is None else log_total - dot / total, log_sum, kept.sub_(log_sum[:, None]))


def _backward(
    hidden: Tensor, weight: Tensor, per_row: _Rows, temperature: float, d_rows: Tensor | None, d_weight: Tensor | None
) -> None:
    """Add the gradient of the rows to d_rows [N,H], and that of the weight to d_weight [V,H]."""
    rows, targets, gain, tilt, entropies, log_sum, kept = per_row
    dtype = _summed_in(hidden)
    width = min(len(weight), SLICE_COLUMNS)
    # Whole rows that are kept are not made again, so there is no tile to keep near the core: products can be large.
    few = log_sum is None and kept.shape[1]
    size = min((KEPT_ELEMENTS // 2 if few else TILE_ELEMENTS) // width, len(rows))
    gain = gain / temperature
    tilt = None if tilt is None else tilt / temperature
    for columns in _slices(len(weight)):
        weight_up = weight[columns].to(dtype)
        sums = None  # a dtype of few bits takes the sum when it is complete
        is_kept = columns.stop <= kept.shape[1]
        for place, part in _blocks(rows, len(targets), size):
            x = hidden[part].to(dtype)
            if is_kept:
                logprobs = kept[place, columns]
            elif log_sum is None:
                logprobs = torch.log_softmax(product(x / temperature, weight_up), 1)
            else:
                logprobs = product(x / temperature, weight_up).sub_(log_sum[place, None])
            slope = gain[place, None]
            if tilt is not None and entropies is not None:
                slope = slope + tilt[place, None] * (logprobs + entropies[place, None])
            out = None if is_kept else logprobs
            d_logits = torch.exp(logprobs, out=out) if log_sum is None else _exp(logprobs, out)
            d_logits.mul_(-slope)
            column, inside = _targets_in(columns, targets[part, None])
            d_logits.scatter_add_(1, column, gain[place, None].where(inside, 0.0))
            if d_rows is not None:
                d_rows[place].add_(product(d_logits, weight_up.t()))
            if d_weight is not None:
                d_part = transposed_product(d_logits, x)
                sums = d_part if sums is None else sums.add_(d_part)
                del d_part
            del logprobs, d_logits, out, slope  # while the next ones are made, these must not stay
        if d_weight is not None and sums is not None:
            d_weight[columns].add_(sums.contiguous())
        del weight_up, sums


def kept_columns(num_rows: int, num_vocab: int) -> int:
    """Columns of a vocabulary whose log-probabilities are kept: all, or as many whole slices as there is room for."""
    if num_rows * num_vocab <= KEPT_ELEMENTS:
        return num_vocab
    return KEPT_ELEMENTS // num_rows // SLICE_COLUMNS * SLICE_COLUMNS


def _summed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slices(num_vocab: int) -> Iterator[slice]:
    return (slice(begin, min(begin + SLICE_COLUMNS, num_vocab)) for begin in range(0, num_vocab, SLICE_COLUMNS))


def _blocks(rows: Tensor, total: int, size: int) -> Iterator[tuple[slice, Any]]:
    """Nearly equal blocks of at most ``size`` rows: their place among these rows and among all ``total`` rows.

    Equal, for a product of only a few rows may be summed in another order than the same rows in a larger one.
    """
    num_blocks = -(-len(rows) // max(size, 1))
    for block in range(num_blocks):
        place = slice(len(rows) * block // num_blocks, len(rows) * (block + 1) // num_blocks)
        yield place, place if len(rows) == total else rows[place]  # a slice copies nothing


def _targets_in(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target lies in a slice of the vocabulary, and whether it does; some place there if it does not."""
    column = targets - columns.start
    last = columns.stop - columns.start - 1
    return column.clamp(0, last), (column >= 0) & (column <= last)


def _exp(x: Tensor, out: Tensor | None) -> Tensor:
    """e to the x by way of exp2, which takes PyTorch a third of the time on a CPU."""
    return torch.mul(x, LOG2_E, out=out).exp2_()
