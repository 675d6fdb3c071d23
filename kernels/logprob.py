"""Grouped log-probability: the head's product and its log-softmax in one pass, without a [T,V] tensor.

Shapes: T tokens, H hidden, V vocabulary, S slices of the vocabulary, C columns of a backward chunk.

Forward: a program takes a tile of rows and a slice of the vocabulary, makes logits tile by tile and folds them into a
running maximum, sum of exponentials, sum of exponential times logit (for the entropy) and target logit; a second
kernel joins the slices in their order. Backward: chunk by chunk of the vocabulary the logits are made again and turned
into their gradient, and two products with it follow. How the vocabulary is cut depends on V alone, never on T, and
nothing is added atomically: a result is the same to the bit in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .dispatch import jit, tl, triton, triton_serves
from .eager_logprob import IGNORE, rows_with_gradient, spread_rows
from .product import make_plan, place, product_tile

# Columns of a forward slice. Partial results take 16 bytes a token and slice: 4.9 MB at T 8,192 and V 152,064.
SLICE_COLUMNS = 4096
# Columns of logits whose gradient exists at one time: 64 MiB in bf16 at T 8,192.
CHUNK_COLUMNS = 4096


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, targets, part_max, part_sum, part_dot, part_target,
    num_tokens, num_vocab, num_hidden, num_row_tiles, num_slices, num_group_tiles, scale,
    SLICE: tl.constexpr, ENTROPY: tl.constexpr, IGNORED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of rows by one slice of the vocabulary -> its part of the sums, [S,T] each."""
    row_tile, slice_id = place(num_row_tiles, num_slices, num_group_tiles)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    begin = slice_id * SLICE
    end = tl.minimum(begin + SLICE, num_vocab)
    row_in = rows < num_tokens
    target = tl.load(targets + rows, mask=row_in, other=IGNORED)
    end = tl.where(tl.max(target, axis=0) == IGNORED, begin, end)  # nothing to do for rows without a target
    running_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([ROWS], dtype=tl.float32)
    running_dot = tl.zeros([ROWS], dtype=tl.float32)
    target_logit = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(begin, end, COLUMNS):
        logits = scale * product_tile(
            hidden, weight, row_tile * ROWS, first, num_tokens, end, num_hidden, DESCRIPTORS, ROWS, COLUMNS, DEPTH
        )
        columns = first + tl.arange(0, COLUMNS)
        is_target = columns[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        logits = tl.where((columns < end)[None, :], logits, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        shifted = logits - new_max[:, None]
        power = tl.exp(shifted)
        shrink = tl.exp(running_max - new_max)
        if ENTROPY:
            # The sum of power x (logit - maximum) moves with the maximum; a power of 0 counts 0, its logit may be -inf.
            moved = tl.where(running_sum > 0.0, running_max - new_max, 0.0) * running_sum
            products = tl.where(power > 0.0, shifted, 0.0) * power
            running_dot = (running_dot + moved) * shrink + tl.sum(products, axis=1)
        running_sum = running_sum * shrink + tl.sum(power, axis=1)
        running_max = new_max
    at = slice_id.to(tl.int64) * num_tokens + rows
    tl.store(part_max + at, running_max, mask=row_in)
    tl.store(part_sum + at, running_sum, mask=row_in)
    tl.store(part_target + at, target_logit, mask=row_in)
    if ENTROPY:
        tl.store(part_dot + at, running_dot, mask=row_in)


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    part_max, part_sum, part_dot, part_target, logprob, log_sum, entropy, num_tokens, num_slices,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the slices of each row in their order -> logprob, log-sum-exp and entropy, [T] each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = rows < num_tokens
    total_max = tl.load(part_max + rows, mask=row_in, other=0.0)
    total = tl.load(part_sum + rows, mask=row_in, other=1.0)
    target = tl.load(part_target + rows, mask=row_in, other=0.0)
    dot = tl.zeros([ROWS], dtype=tl.float32)
    if ENTROPY:
        dot = tl.load(part_dot + rows, mask=row_in, other=0.0)
    at = rows.to(tl.int64)
    for _ in range(1, num_slices):
        at += num_tokens
        next_max = tl.load(part_max + at, mask=row_in, other=0.0)
        next_sum = tl.load(part_sum + at, mask=row_in, other=0.0)
        target += tl.load(part_target + at, mask=row_in, other=0.0)
        new_max = tl.maximum(total_max, next_max)
        shrink = tl.exp(total_max - new_max)
        grow = tl.exp(next_max - new_max)
        if ENTROPY:
            next_dot = tl.load(part_dot + at, mask=row_in, other=0.0)
            dot = (dot + total * (total_max - new_max)) * shrink
            dot += (next_dot + next_sum * (next_max - new_max)) * grow
        total = total * shrink + next_sum * grow
        total_max = new_max
    log_total = tl.log(total)
    tl.store(log_sum + rows, total_max + log_total, mask=row_in)
    # Grouped so that a target far below a large maximum loses nothing of the difference.
    tl.store(logprob + rows, (target - total_max) - log_total, mask=row_in)
    if ENTROPY:
        tl.store(entropy + rows, log_total - dot / total, mask=row_in)


@jit
def _logit_gradient_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, targets, log_sum, entropy, d_logprob, d_entropy, d_logits,
    num_tokens, column_begin, column_end, num_hidden, num_row_tiles, num_column_tiles, num_group_tiles, scale,
    d_logits_stride,
    ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of a chunk of the vocabulary again -> their gradient x scale, [T,C] in the products' dtype."""
    row_tile, column_tile = place(num_row_tiles, num_column_tiles, num_group_tiles)
    first_column = column_begin + column_tile * COLUMNS
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    row_in = rows < num_tokens
    logits = scale * product_tile(
        hidden, weight, row_tile * ROWS, first_column, num_tokens, column_end, num_hidden,
        DESCRIPTORS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    target = tl.load(targets + rows, mask=row_in, other=-1)
    gain = tl.load(d_logprob + rows, mask=row_in, other=0.0)
    logprobs = logits - tl.load(log_sum + rows, mask=row_in, other=0.0)[:, None]
    if ENTROPY:
        spread = tl.load(entropy + rows, mask=row_in, other=0.0)
        tilt = tl.load(d_entropy + rows, mask=row_in, other=0.0)
        slope = (gain + tilt * spread)[:, None] + tilt[:, None] * logprobs
    else:
        slope = gain[:, None]
    gradient = tl.where(columns[None, :] == target[:, None], gain[:, None], 0.0) - tl.exp(logprobs) * slope
    at = d_logits + rows.to(tl.int64)[:, None] * d_logits_stride + (columns - column_begin)[None, :]
    inside = row_in[:, None] & (columns < column_end)[None, :]
    tl.store(at, (gradient * scale).to(d_logits.dtype.element_ty), mask=inside)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprob, log-sum-exp, entropy or None), [T] float32 each; NaN where a whole tile of rows has no target."""
    num_tokens, num_hidden = hidden.shape
    num_vocab = weight.shape[0]
    device = hidden.device
    logprob = torch.empty(num_tokens, dtype=torch.float32, device=device)
    log_sum = torch.empty_like(logprob)
    entropies = torch.empty_like(logprob) if entropy else None
    if num_tokens == 0:
        return logprob, log_sum, entropies
    num_slices = triton.cdiv(num_vocab, SLICE_COLUMNS)
    parts = torch.empty(4 if entropy else 3, num_slices, num_tokens, dtype=torch.float32, device=device)
    part_max, part_sum, part_target = parts[:3]
    part_dot = parts[-1]
    plan = make_plan("forward", hidden, weight)
    _forward_kernel[(plan.num_row_tiles * num_slices,)](
        plan.x, plan.weight, targets, part_max, part_sum, part_dot, part_target,
        num_tokens, num_vocab, num_hidden, plan.num_row_tiles, num_slices, plan.num_group_tiles, 1.0 / temperature,
        SLICE=SLICE_COLUMNS, ENTROPY=entropy, IGNORED=IGNORE, **plan.options,
    )  # fmt: skip
    _join_kernel[(triton.cdiv(num_tokens, 128),)](
        part_max, part_sum, part_dot, part_target, logprob, log_sum, logprob if entropies is None else entropies,
        num_tokens, num_slices, ENTROPY=entropy, ROWS=128, num_warps=4,
    )  # fmt: skip
    return logprob, log_sum, entropies


def _backward(
    hidden: Tensor, weight: Tensor, per_row: list[Any], temperature: float,
    d_hidden: Tensor | None, d_weight: Tensor | None, main_grad: Tensor | None,
) -> None:  # fmt: skip
    """Add the gradient of hidden to d_hidden, in the order of the vocabulary, and that of weight to main_grad.

    Or write that of weight to d_weight, each row once. The first two are float32, d_weight is of weight's dtype.
    ``per_row``: targets, log-sum-exp, entropy or None, and the gradients of logprob and of entropy or None, [T] each.
    """
    targets, log_sum, entropies, d_logprob, d_entropy = per_row
    num_tokens, num_hidden = hidden.shape
    num_vocab = weight.shape[0]
    plan = make_plan("gradient" if d_entropy is None else "entropy gradient", hidden, weight)
    chunk = hidden.new_empty(num_tokens, min(CHUNK_COLUMNS, num_vocab))
    for begin in range(0, num_vocab, CHUNK_COLUMNS):
        end = min(begin + CHUNK_COLUMNS, num_vocab)
        num_column_tiles = triton.cdiv(end - begin, plan.num_columns)
        _logit_gradient_kernel[(plan.num_row_tiles * num_column_tiles,)](
            plan.x, plan.weight, targets, log_sum, log_sum if entropies is None else entropies, d_logprob,
            d_logprob if d_entropy is None else d_entropy, chunk,
            num_tokens, begin, end, num_hidden, plan.num_row_tiles, num_column_tiles, plan.num_group_tiles,
            1.0 / temperature, chunk.stride(0), ENTROPY=d_entropy is not None, **plan.options,
        )  # fmt: skip
        d_logits = chunk[:, : end - begin]
        if d_hidden is not None:
            _add_product(d_hidden, d_logits, weight[begin:end])
        if main_grad is not None:
            _add_product(main_grad[begin:end], d_logits.t(), hidden)
        elif d_weight is not None:
            torch.mm(d_logits.t(), hidden, out=d_weight[begin:end])


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


class GroupedLogprob(torch.autograd.Function):
    """The Triton form. Rows without a gradient are left out of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        main_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        live = targets != IGNORE
        logprob, log_sum, entropies = _forward(hidden, weight, targets, temperature, entropy)
        logprob = logprob.where(live, 0.0)
        entropies = None if entropies is None else entropies.where(live, 0.0)
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropies)
        ctx.temperature, ctx.main_grad = temperature, main_grad  # which is there to be changed: no saved tensor
        ctx.set_materialize_grads(False)
        return logprob, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum, entropies = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = rows_with_gradient(targets, d_logprob, d_entropy)
        d_logprob = torch.zeros_like(log_sum) if d_logprob is None else d_logprob
        per_row = [targets, log_sum, entropies, d_logprob, d_entropy]
        some_hidden = hidden
        if len(rows) < len(hidden):
            some_hidden, *per_row = (None if x is None else x[rows] for x in (hidden, *per_row))
        per_row = [None if x is None else x.contiguous() for x in per_row]
        d_rows = torch.zeros(some_hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
        main_grad = ctx.main_grad if need_weight else None
        d_weight = torch.empty_like(weight) if need_weight and main_grad is None else None
        if len(rows):
            _backward(some_hidden, weight, per_row, ctx.temperature, d_rows, d_weight, main_grad)
        elif d_weight is not None:
            d_weight.zero_()
        d_hidden = None if d_rows is None else spread_rows(d_rows.to(hidden.dtype), rows, len(hidden))
        return d_hidden, d_weight, None, None, None, None


def grouped_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    main_grad: Tensor | None = None,
    known_targets: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), without a [T,V] tensor.

    Differentiable in hidden and weight, through the entropy too; repeatable to the bit.

    Args:
        hidden: [T,H] floating point.
        weight: [V,H] of the same dtype, the output layer.
        targets: [T] int64 in [0,V), or -100 for a row that counts for nothing: results 0, no gradient.
        temperature: divides the logits; positive.
        entropy: also return the entropy of each row's distribution, in nats.
        main_grad: [V,H] float32, as Megatron-LM names it: the backward pass adds the gradient of weight to it, summed
            in float32, and weight itself gets none. So it is not rounded for each micro-batch, nor held twice.
        known_targets: none is out of range; the host need not wait for the device to tell.

    Returns:
        (logprob [T], entropy [T] or None), float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a target out of range, a temperature that is
            not a positive number.
    """
    _check(hidden, weight, targets, temperature, main_grad)
    if not known_targets:
        _check_range(targets, weight.shape[0])
    if triton_serves("grouped_logprob", hidden):
        return GroupedLogprob.apply(
            hidden.contiguous(), weight.contiguous(), targets.contiguous(), temperature, entropy, main_grad
        )
    return eager.grouped_logprob(hidden, weight, targets, temperature=temperature, entropy=entropy, main_grad=main_grad)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, main_grad: Tensor | None) -> None:
    shapes = f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"grouped_logprob: hidden, weight and targets have shapes {shapes}; expected [T,H], [V,H] and [T]"
        )
    if hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"grouped_logprob: hidden, weight and targets have shapes {shapes}; hidden and weight need the same H, "
            "and V and H at least 1"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"grouped_logprob: hidden is {hidden.dtype} and weight {weight.dtype}; cast them to one float dtype"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"grouped_logprob: targets are {targets.dtype}; expected torch.int64")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"grouped_logprob: hidden, weight and targets are on {hidden.device}, {weight.device} and "
            f"{targets.device}; move them to one device"
        )
    if main_grad is not None and (
        main_grad.shape != weight.shape
        or main_grad.dtype != torch.float32
        or main_grad.device != weight.device
        or weight.dtype == torch.float64
    ):
        raise ValueError(
            f"grouped_logprob: main_grad is {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}, for a "
            f"weight of {weight.dtype} {list(weight.shape)} on {weight.device}; expected float32, the weight's shape "
            "and device, and no float64 weight"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"grouped_logprob: temperature is {temperature}; expected a positive number")


def _check_range(targets: Tensor, num_vocab: int) -> None:
    # A graph being captured cannot be asked for a value.
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= num_vocab))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"grouped_logprob: target {int(targets[at])} of row {at} is outside the vocabulary; expected 0 to "
            f"{num_vocab - 1}, or {IGNORE} for a row to ignore"
        )
