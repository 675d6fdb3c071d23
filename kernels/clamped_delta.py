"""The clamped-delta policy loss: value, gradient and statistics from one launch that reads each token once.

Per token, with the log-ratio d = clamp(logprob - old, -delta_max, delta_max) and r = exp(d), the clipped surrogate of
PPO (arXiv 1707.06347, eq. 7) with DAPO's two clip bounds (arXiv 2503.14476, eq. 8) and a third for tokens of negative
advantage (dual clip, arXiv 1912.09729, eq. 5), and Schulman's k3 estimate of the KL divergence from the reference as in
GRPO (arXiv 2402.03300, eq. 4) on a log-ratio clamped alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .dispatch import jit, tl, triton, triton_serves

# The columns of a warp's partial results, in the kernel's order.
SUMS = ("loss", "clip_low", "clip_high", "dual_clip", "clamped", "kl_sum", "tokens", "ratio_sum", "nonfinite")
MAXIMA = ("ratio_max",)
MINIMA = ("ratio_min", "nonfinite_min")
COLUMNS = (*SUMS, *MAXIMA, *MINIMA)
# A launch of T = 32,768 moves 0.8 MB, which takes 0.2 us at an H200's 4.3 TB/s; so its time is that of its steps, one
# after the other: three trips to memory (tokens; partial results and the count; partial results of all) with reductions
# between. A warp's 128 tokens are one load of 16 bytes for each lane and input, all on their way at once, and its sums
# need no shared memory. Blocks of four warps are 64, each on one of the 132 SMs for itself, and leave 256 rows of
# partial results: ROWS, which the last block reads at once.
TOKENS = 128
WIDTH = 16  # of a row, the next power of two above its columns
CONSTANTS = {"TOKENS": TOKENS, "ROWS": 256, "WIDTH": WIDTH, "NUM_SUMS": len(SUMS), "NUM_MAXIMA": len(MAXIMA)}
# AMD's barrier does not wait until the stores of other warps have arrived, and the count releases its own warp's only.
NUM_WARPS = {"cuda": 4, "hip": 1}
NUM_COUNTERS = 4096  # made at a time


@jit
def _load(tensor, at, inside):  # type: ignore[no-untyped-def]
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _finite(values):  # type: ignore[no-untyped-def]
    return tl.abs(values) < float("inf")


@jit
def _sum(values):  # type: ignore[no-untyped-def]
    return tl.sum(values, axis=1)[:, None]


@jit
def _count(tokens):  # type: ignore[no-untyped-def]
    return _sum(tokens.to(tl.float32))  # integer sums of booleans LLVM packs, for sm_90 through the stack


@jit
def _min(values):  # type: ignore[no-untyped-def]
    return tl.min(values, axis=1)[:, None]


@jit
def _clamp(values, bound):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(values, -bound), bound)


@jit
def _k3(gap, delta_max):  # type: ignore[no-untyped-def]
    """exp(e) - e - 1 for the clamped log-ratio e, and its derivative by e, 0 where the clamp holds."""
    e = _clamp(gap, delta_max)
    # By its series where the difference would cancel.
    series = 0.5 * e * e * (1.0 + e * (1 / 3) * (1.0 + e * (1 / 4) * (1.0 + e * (1 / 5))))
    kl = tl.where(tl.abs(e) < 0.0625, series, tl.exp(e) - 1.0 - e)
    return kl, tl.where(e == gap, kl + e, 0.0)


@jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    logprob, old_logprob, advantage, weight, ref_logprob, importance_weight,
    gradient, partial, loss, statistics, counter,
    num_tokens, low_bound, high_bound, dual_bound, beta, delta_max,
    HAS_REF: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, NUM_SUMS: tl.constexpr, NUM_MAXIMA: tl.constexpr,
):  # fmt: skip
    """A block of tokens -> their gradient [T] and the block's partial results; the last block joins those of all."""
    row = tl.program_id(0) * WARPS + tl.arange(0, WARPS)
    at = row[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    inside = at < num_tokens
    share = _load(weight, at, inside)
    new = _load(logprob, at, inside)
    old = _load(old_logprob, at, inside)
    gain = _load(advantage, at, inside)
    finite = _finite(share) & _finite(new) & _finite(old) & _finite(gain)
    if HAS_REF:
        reference = _load(ref_logprob, at, inside)
        finite &= _finite(reference)
    if HAS_IMPORTANCE:
        importance = _load(importance_weight, at, inside)
        finite &= _finite(importance)
    broken = (share != 0.0) & (finite == 0)
    live = (share != 0.0) & finite
    # What a token without weight, or with an input that is not finite, holds is replaced before it is used.
    share = tl.where(live, share, 0.0)
    gain = tl.where(live, gain, 0.0)
    delta = tl.where(live, new - old, 0.0)
    far = tl.abs(delta) > delta_max
    ratio = tl.exp(_clamp(delta, delta_max))
    low = (gain < 0.0) & (ratio < low_bound)
    high = (gain > 0.0) & (ratio > high_bound)
    dual = (gain < 0.0) & (ratio > dual_bound)
    bounded = tl.where(low, low_bound, tl.where(high, high_bound, tl.where(dual, dual_bound, ratio)))
    if HAS_IMPORTANCE:
        gain *= tl.where(live, importance, 0.0)
    value = -bounded * gain
    slope = tl.where(far | low | high | dual, 0.0, -ratio * gain)
    kl = tl.zeros([WARPS, TOKENS], dtype=tl.float32)
    if HAS_REF:
        kl, rise = _k3(tl.where(live, reference - new, 0.0), delta_max)
        value += beta * kl
        slope -= beta * rise
    column = tl.arange(0, WIDTH)[None, :]
    results = tl.where(column == 0, _sum(value * share), 0.0)
    results = tl.where(column == 1, _count(low), results)
    results = tl.where(column == 2, _count(high), results)
    results = tl.where(column == 3, _count(dual), results)
    results = tl.where(column == 4, _count(far), results)
    results = tl.where(column == 5, _sum(kl), results)
    results = tl.where(column == 6, _count(live), results)
    results = tl.where(column == 7, _sum(tl.where(live, ratio, 0.0)), results)
    results = tl.where(column == 8, _count(broken), results)
    results = tl.where(column == 9, tl.max(tl.where(live, ratio, 0.0), axis=1)[:, None], results)
    results = tl.where(column == 10, _min(tl.where(live, ratio, float("inf"))), results)
    results = tl.where(column == 11, _min(tl.where(broken, at.to(tl.float32), float("inf"))), results)
    tl.store(partial + row[:, None] * WIDTH + column, results)
    # The barrier puts the rows of all warps before the count that releases them; the last count acquires all others.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.store(gradient + at, slope * share, mask=inside)  # here, since the release would wait for it
    if arrived == tl.num_programs(0) - 1:
        # Which block is the last differs between runs, and what it does does not: it reads the rows of all blocks, its
        # own too, and joins them by their numbers in a tree that the constants fix, never in the order of arrival.
        _join(partial, loss, statistics, tl.num_programs(0) * WARPS, ROWS, WIDTH, NUM_SUMS, NUM_MAXIMA)
        tl.store(counter, 0)


@jit
def _join(  # type: ignore[no-untyped-def]
    partial, loss, statistics, num_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, NUM_SUMS: tl.constexpr, NUM_MAXIMA: tl.constexpr,
):  # fmt: skip
    """The partial results of all blocks -> the loss and the statistics [WIDTH], the loss again among them."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    largest = tl.zeros([WIDTH], dtype=tl.float32)
    smallest = tl.full([WIDTH], float("inf"), dtype=tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None]
        values = tl.load(partial + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        total += tl.sum(values, axis=0)
        largest = tl.maximum(largest, tl.max(values, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, values, float("inf")), axis=0))
    joined = tl.where(column < NUM_SUMS, total, tl.where(column < NUM_SUMS + NUM_MAXIMA, largest, smallest))
    tl.store(statistics + column, joined)
    tl.store(loss + column, joined, mask=column == 0)


def _counter(device: torch.device) -> Tensor:
    """Where the blocks of a launch count themselves in; 0 between launches, since the last block leaves it so.

    Launches that may run at the same time must not share one: each stream has its own, and so has each launch that a
    CUDA graph captures, for it runs on whatever stream the graph is replayed on.
    """
    if device.type != "cuda":
        return _counter_of(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return next(_unused(device))
    return _counter_of(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return next(_unused(device))


@cache
def _unused(device: torch.device) -> Iterator[Tensor]:
    while True:
        # 16 bytes each, since for another alignment the kernel would be compiled again. The copy has ended when it
        # returns, so a launch on any stream finds zeros; inside a capture CUDA refuses it: call once before.
        yield from torch.zeros(NUM_COUNTERS, 4, dtype=torch.int32).to(device)


class ClampedDeltaLoss(torch.autograd.Function):
    """The Triton form: the forward pass makes the gradient too, the backward pass multiplies it by the incoming one."""

    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, ref_logprob: Tensor | None,
        importance_weight: Tensor | None, clip_low: float, clip_high: float, dual_clip: float, beta: float,
        delta_max: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        num_tokens = logprob.shape[0]
        num_warps = NUM_WARPS["cuda" if torch.version.hip is None else "hip"]
        num_blocks = max(1, triton.cdiv(num_tokens, num_warps * TOKENS))
        gradient, partial, loss, statistics = (
            torch.empty(shape, dtype=torch.float32, device=logprob.device)
            for shape in (num_tokens, num_blocks * num_warps * WIDTH, (), WIDTH)
        )
        _loss_kernel[(num_blocks,)](
            logprob, old_logprob, advantage, weight, logprob if ref_logprob is None else ref_logprob,
            logprob if importance_weight is None else importance_weight,
            gradient, partial, loss, statistics, _counter(logprob.device),
            num_tokens, 1.0 - clip_low, 1.0 + clip_high, dual_clip, beta, delta_max,
            HAS_REF=ref_logprob is not None, HAS_IMPORTANCE=importance_weight is not None, WARPS=num_warps,
            **CONSTANTS, num_warps=num_warps,
        )  # fmt: skip
        ctx.save_for_backward(gradient)
        ctx.dtype = logprob.dtype
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_loss).to(ctx.dtype), *(None,) * 10


def clamped_delta_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    importance_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    beta: float = 0.0,
    delta_max: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of weight x (-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta k3).

    r = exp(clamp(logprob - old_logprob, -delta_max, delta_max)), for A < 0 at most dual_clip; w = importance_weight;
    k3 = exp(e) - e - 1 with e = clamp(ref_logprob - logprob, -delta_max, delta_max). Where a clamp, or a clip that
    lowers the objective, holds, the gradient of that term is exactly 0. A token with a non-finite input is left out of
    the loss, the gradient and the statistics, and reported by its index.
    Sources: arXiv 1707.06347 eq. 7, 2402.03300 eq. 4, 2503.14476 eq. 8, and for dual_clip 1912.09729 eq. 5, where it is
    c; the two-sided clipping of INTELLECT-2, arXiv 2505.07291, where it is delta.

    Args:
        logprob: [T] floating point; the only argument with a gradient.
        old_logprob: [T], of the policy that the update started from.
        advantage: [T].
        weight: [T]; carries the aggregation (``dapo``, ``grpo``, ``dr_grpo``). A token of weight 0 is not looked at.
        ref_logprob: [T] of the reference policy, or None: no KL term and ``kl_sum`` 0.
        importance_weight: [T], multiplies the policy term and not the KL term; None: 1.
        clip_low: how far below 1 the ratio may move the objective, in [0,1].
        clip_high: how far above 1, not negative.
        dual_clip: bound of the ratio of tokens of negative advantage, above 1 + clip_high; None: no bound.
        beta: coefficient of the KL term, not negative; needs ref_logprob.
        delta_max: bound of the log-ratios, positive.

    Returns:
        (loss, stats): a float32 scalar, and float32 scalars over the tokens of weight other than 0 that join over
        micro-batches and ranks: sums ``clip_low``, ``clip_high`` and ``dual_clip`` (tokens whose clip holds),
        ``clamped``, ``kl_sum``, ``tokens``, ``ratio_sum``, ``nonfinite`` (tokens with an input that is NaN or infinite,
        which no other statistic counts), the maximum ``ratio_max`` (of no token: 0), the minimum ``ratio_min`` (of no
        token: infinite), and ``nonfinite_min``, the smallest index of such a token (of none: infinite; exact up to
        2^24, float32's whole numbers).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a setting out of its range.
    """
    tensors = {"logprob": logprob, "old_logprob": old_logprob, "advantage": advantage, "weight": weight}
    optional = {"ref_logprob": ref_logprob, "importance_weight": importance_weight}
    _check(tensors | {name: tensor for name, tensor in optional.items() if tensor is not None})
    _check_settings(clip_low, clip_high, dual_clip, beta, delta_max, ref_logprob is not None)
    if triton_serves("clamped_delta_loss", logprob):
        inputs = [x if x is None else x.contiguous() for x in (*tensors.values(), *optional.values())]
        bounds = (clip_low, clip_high, math.inf if dual_clip is None else dual_clip, beta, delta_max)
        loss, statistics = ClampedDeltaLoss.apply(*inputs, *map(float, bounds))
        stats = dict(zip(COLUMNS, statistics.unbind(), strict=False))
        del stats["loss"]
        return loss, stats
    return eager.clamped_delta_loss(
        logprob, old_logprob, advantage, weight, ref_logprob=ref_logprob, importance_weight=importance_weight,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, beta=beta, delta_max=delta_max,
    )  # fmt: skip


def _check(tensors: dict[str, Tensor]) -> None:
    logprob = tensors["logprob"]
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.shape != logprob.shape:
            raise ValueError(
                f"clamped_delta_loss: {name} has shape {list(tensor.shape)}; expected [T] with T {logprob.numel()} as "
                "in logprob"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"clamped_delta_loss: {name} is {tensor.dtype}; cast it to a floating-point dtype")
        if tensor.device != logprob.device:
            raise ValueError(
                f"clamped_delta_loss: {name} is on {tensor.device} and logprob on {logprob.device}; "
                "move them to one device"
            )


def _check_settings(
    clip_low: float, clip_high: float, dual_clip: float | None, beta: float, delta_max: float, has_ref: bool
) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clamped_delta_loss: clip_low is {clip_low}; expected a number from 0 to 1")
    for name, value in (("clip_high", clip_high), ("beta", beta)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"clamped_delta_loss: {name} is {value}; expected a number of at least 0")
    if dual_clip is not None and not 1.0 + clip_high < dual_clip < math.inf:
        raise ValueError(
            f"clamped_delta_loss: dual_clip is {dual_clip}; expected None or a number above 1 + clip_high, "
            f"{1.0 + clip_high:g}"
        )
    if not 0.0 < delta_max < math.inf:
        raise ValueError(f"clamped_delta_loss: delta_max is {delta_max}; expected a positive number")
    if beta > 0.0 and not has_ref:
        raise ValueError(
            f"clamped_delta_loss: beta is {beta} but ref_logprob is None; give ref_logprob or set beta to 0"
        )
