"""Grouped log-probability: the head's product and its log-softmax in one pass, without a [T,V] tensor.

Shapes: T tokens, H hidden, V vocabulary, S slices of the vocabulary, C columns of a backward chunk.

Forward: a program takes a tile of rows and a slice of the vocabulary, makes logits tile by tile and folds them into a
running maximum, sum of exponentials, sum of exponential times logit (for the entropy) and target logit; a second
kernel joins the slices in their order. Backward: chunk by chunk of the vocabulary the logits are made again and turned
into their gradient, and two products with it follow. How the vocabulary is cut depends on V alone, never on T, and
nothing is added atomically: a result is the same to the bit in every run.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .dispatch import jit, tl, triton, triton_serves
from .eager import IGNORE

# Columns of a forward slice. Partial results take 16 bytes a token and slice: 4.9 MB at T 8,192 and V 152,064.
SLICE_COLUMNS = 4096
# Columns of logits whose gradient exists at one time: 64 MiB in bf16 at T 8,192.
CHUNK_COLUMNS = 4096


class Tiles(NamedTuple):
    """Sizes of one program's tile and how it is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# bf16 and float16, by kernel and architecture, never by T. Chosen as the largest that spill no register.
TILES = {
    ("forward", "sm_90"): Tiles(128, 256, 64, 8, 3),
    ("gradient", "sm_90"): Tiles(128, 128, 64, 8, 3),
    ("forward", "sm_80"): Tiles(128, 128, 64, 8, 3),
    ("gradient", "sm_80"): Tiles(128, 128, 64, 8, 3),
    ("forward", "gfx942"): Tiles(128, 128, 64, 8, 2),
    ("gradient", "gfx942"): Tiles(128, 128, 64, 8, 2),
}
# Multiplied without tensor cores.
FLOAT32_TILES = Tiles(64, 64, 16, 8, 2)
# The interpreter's time goes by operations, not by elements.
INTERPRETER_TILES = Tiles(32, 512, 64, 4, 1)


def tiles(kernel: str, dtype: torch.dtype, architecture: str) -> Tiles:
    """Settings of "forward" or "gradient" on "sm_90", "sm_80" (also what lies between), "gfx942" or "cpu"."""
    if architecture == "cpu":
        return INTERPRETER_TILES
    return FLOAT32_TILES if dtype == torch.float32 else TILES[kernel, architecture]


@cache
def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


@jit
def _logits_tile(  # type: ignore[no-untyped-def]
    hidden, weight, rows, columns, num_tokens, column_end, num_hidden, scale,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scaled logits [ROWS, COLUMNS] in float32; rows and columns outside read as zero vectors."""
    depth = tl.arange(0, DEPTH)
    hidden_at = hidden + rows.to(tl.int64)[:, None] * num_hidden + depth[None, :]
    weight_at = weight + columns.to(tl.int64)[None, :] * num_hidden + depth[:, None]
    row_in = (rows < num_tokens)[:, None]
    column_in = (columns < column_end)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, num_hidden, DEPTH):
        inside = depth < num_hidden - start
        a = tl.load(hidden_at + start, mask=row_in & inside[None, :], other=0.0)
        b = tl.load(weight_at + start, mask=column_in & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc * scale


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, targets, part_max, part_sum, part_dot, part_target, num_tokens, num_vocab, num_hidden, scale,
    SLICE: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of rows by one slice of the vocabulary -> its part of the sums, [S,T] each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slice_id = tl.program_id(1)
    begin = slice_id * SLICE
    end = tl.minimum(begin + SLICE, num_vocab)
    row_in = rows < num_tokens
    target = tl.load(targets + rows, mask=row_in, other=-1)
    running_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([ROWS], dtype=tl.float32)
    running_dot = tl.zeros([ROWS], dtype=tl.float32)
    target_logit = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = _logits_tile(hidden, weight, rows, columns, num_tokens, end, num_hidden, scale, DEPTH, ROWS, COLUMNS)
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
    num_tokens, column_begin, column_end, num_hidden, scale, d_logits_stride,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of a chunk of the vocabulary again -> their gradient x scale, [T,C] in the products' dtype."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = column_begin + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_in = rows < num_tokens
    logits = _logits_tile(
        hidden, weight, rows, columns, num_tokens, column_end, num_hidden, scale, DEPTH, ROWS, COLUMNS
    )
    target = tl.load(targets + rows, mask=row_in, other=-1)
    gain = tl.load(d_logprob + rows, mask=row_in, other=0.0)
    logprobs = logits - tl.load(log_sum + rows, mask=row_in, other=0.0)[:, None]
    slope = tl.zeros([ROWS, COLUMNS], dtype=tl.float32) + gain[:, None]
    if ENTROPY:
        spread = tl.load(entropy + rows, mask=row_in, other=0.0)
        slope += tl.load(d_entropy + rows, mask=row_in, other=0.0)[:, None] * (logprobs + spread[:, None])
    gradient = tl.where(columns[None, :] == target[:, None], gain[:, None], 0.0) - tl.exp(logprobs) * slope
    at = d_logits + rows.to(tl.int64)[:, None] * d_logits_stride + (columns - column_begin)[None, :]
    inside = row_in[:, None] & (columns < column_end)[None, :]
    tl.store(at, (gradient * scale).to(d_logits.dtype.element_ty), mask=inside)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprob, log-sum-exp, entropy or None), [T] float32 each."""
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
    tile = tiles("forward", hidden.dtype, _architecture(device))
    _forward_kernel[(triton.cdiv(num_tokens, tile.rows), num_slices)](
        hidden, weight, targets, part_max, part_sum, part_dot, part_target,
        num_tokens, num_vocab, num_hidden, 1.0 / temperature,
        SLICE=SLICE_COLUMNS, ENTROPY=entropy, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _join_kernel[(triton.cdiv(num_tokens, 128),)](
        part_max, part_sum, part_dot, part_target, logprob, log_sum, logprob if entropies is None else entropies,
        num_tokens, num_slices, ENTROPY=entropy, ROWS=128, num_warps=4,
    )  # fmt: skip
    return logprob, log_sum, entropies


def _backward(
    hidden: Tensor, weight: Tensor, per_row: list[Any], temperature: float, need_hidden: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden (summed in float32, in the order of the vocabulary) and weight (each row written once).

    ``per_row``: targets, log-sum-exp, entropy or None, and the gradients of logprob and of entropy or None, [T] each.
    """
    targets, log_sum, entropies, d_logprob, d_entropy = per_row
    num_tokens, num_hidden = hidden.shape
    num_vocab = weight.shape[0]
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
    d_weight = torch.zeros_like(weight) if need_weight else None
    if num_tokens == 0:
        return d_hidden, d_weight
    tile = tiles("gradient", hidden.dtype, _architecture(hidden.device))
    chunk = hidden.new_empty(num_tokens, min(CHUNK_COLUMNS, num_vocab))
    for begin in range(0, num_vocab, CHUNK_COLUMNS):
        end = min(begin + CHUNK_COLUMNS, num_vocab)
        _logit_gradient_kernel[(triton.cdiv(num_tokens, tile.rows), triton.cdiv(end - begin, tile.columns))](
            hidden, weight, targets, log_sum, log_sum if entropies is None else entropies, d_logprob,
            d_logprob if d_entropy is None else d_entropy, chunk,
            num_tokens, begin, end, num_hidden, 1.0 / temperature, chunk.stride(0),
            ENTROPY=d_entropy is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        d_logits = chunk[:, : end - begin]
        if d_hidden is not None:
            _add_product(d_hidden, d_logits, weight[begin:end])
        if d_weight is not None:
            torch.mm(d_logits.t(), hidden, out=d_weight[begin:end])
    return d_hidden, d_weight


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        out.addmm_(a.float(), b.float())


class GroupedLogprob(torch.autograd.Function):
    """The Triton form. Rows without a target, and in the backward pass rows without a gradient, are left out."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        live = targets != IGNORE
        logprob, log_sum, entropies = _forward(hidden, weight, targets, temperature, entropy)
        logprob = logprob.where(live, 0.0)
        entropies = None if entropies is None else entropies.where(live, 0.0)
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropies)
        ctx.temperature = temperature
        return logprob, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, *per_row = ctx.saved_tensors
        per_row += [d_logprob, d_entropy if per_row[2] is not None else None]
        targets, d_logprob, d_entropy = per_row[0], per_row[3], per_row[4]
        incoming = d_logprob != 0 if d_entropy is None else (d_logprob != 0) | (d_entropy != 0)
        live = (incoming & (targets != IGNORE)).nonzero().squeeze(1)
        some_hidden = hidden
        if len(live) < len(hidden):
            some_hidden, *per_row = (None if x is None else x[live] for x in (hidden, *per_row))
        per_row = [None if x is None else x.contiguous() for x in per_row]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_rows, d_weight = _backward(some_hidden, weight, per_row, ctx.temperature, need_hidden, need_weight)
        d_hidden = None if d_rows is None else d_rows.to(hidden.dtype)
        if d_hidden is not None and len(live) < len(hidden):
            d_hidden = torch.zeros_like(hidden).index_copy_(0, live, d_hidden)
        return d_hidden, d_weight, None, None, None


def grouped_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), without a [T,V] tensor.

    Differentiable in hidden and weight, through the entropy too; repeatable to the bit.

    Args:
        hidden: [T,H] floating point.
        weight: [V,H] of the same dtype, the output layer.
        targets: [T] int64 in [0,V), or -100 for a row that counts for nothing: results 0, no gradient.
        temperature: divides the logits; positive.
        entropy: also return the entropy of each row's distribution, in nats.

    Returns:
        (logprob [T], entropy [T] or None), float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a target out of range, a temperature that is
            not a positive number.
    """
    _check(hidden, weight, targets, temperature)
    if triton_serves("grouped_logprob", hidden):
        return GroupedLogprob.apply(
            hidden.contiguous(), weight.contiguous(), targets.contiguous(), temperature, entropy
        )
    return eager.grouped_logprob(hidden, weight, targets, temperature=temperature, entropy=entropy)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
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
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"grouped_logprob: temperature is {temperature}; expected a positive number")
    # A graph being captured cannot be asked for a value.
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= weight.shape[0]))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"grouped_logprob: target {int(targets[at])} of row {at} is outside the vocabulary; expected 0 to "
            f"{weight.shape[0] - 1}, or {IGNORE} for a row to ignore"
        )
