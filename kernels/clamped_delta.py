"""The clamped-delta policy loss: value, gradient and statistics from one reading of the tokens.

Per token, with the log-ratio d = clamp(logprob - old, -delta_max, delta_max) and r = exp(d), the clipped surrogate of
PPO (arXiv 1707.06347, eq. 7) with DAPO's two clip bounds (arXiv 2503.14476, eq. 8), and Schulman's k3 estimate of the
KL divergence from the reference as in GRPO (arXiv 2402.03300, eq. 4) on a log-ratio clamped alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .dispatch import jit, tl, triton, triton_serves

# Sums, one column each in a block's partial results, in the kernels' order; the two extremes follow them.
SUMS = ("loss", "clip_low", "clip_high", "clamped", "kl_sum", "tokens", "ratio_sum")
EXTREMES = ("ratio_max", "ratio_min")
COLUMNS = len(SUMS) + len(EXTREMES)
BLOCK = 1024


@jit
def _tokens_kernel(  # type: ignore[no-untyped-def]
    logprob, old_logprob, advantage, weight, ref_logprob, gradient, partial,
    num_tokens, clip_low, clip_high, beta, delta_max,
    HAS_REF: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of tokens -> their gradient [T] and the block's sums and extremes [COLUMNS]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    share = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    counted = share != 0.0
    # A token without weight may hold anything, NaN too: it is not read.
    new = tl.load(logprob + at, mask=counted, other=0.0).to(tl.float32)
    old = tl.load(old_logprob + at, mask=counted, other=0.0).to(tl.float32)
    gain = tl.load(advantage + at, mask=counted, other=0.0).to(tl.float32)
    delta = new - old
    free = (delta >= -delta_max) & (delta <= delta_max)
    # Comparisons with NaN are false, so a NaN goes through every selection and shows in the loss.
    clamped = tl.where(delta > delta_max, delta_max, tl.where(delta < -delta_max, -delta_max, delta))
    ratio = tl.exp(clamped)
    low = counted & (gain < 0.0) & (ratio < 1.0 - clip_low)
    high = counted & (gain > 0.0) & (ratio > 1.0 + clip_high)
    bounded = tl.where(low, 1.0 - clip_low, tl.where(high, 1.0 + clip_high, ratio))
    loss = -bounded * gain
    slope = tl.where((free | (delta != delta)) & (low == 0) & (high == 0), -ratio * gain, 0.0)
    kl = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_REF:
        reference = tl.load(ref_logprob + at, mask=counted, other=0.0).to(tl.float32)
        gap = reference - new
        near = (gap >= -delta_max) & (gap <= delta_max)
        gap = tl.where(gap > delta_max, delta_max, tl.where(gap < -delta_max, -delta_max, gap))
        # exp(e) - 1 - e by its series where the difference would cancel.
        series = 0.5 * gap * gap * (1.0 + gap / 3.0 * (1.0 + gap / 4.0 * (1.0 + gap / 5.0)))
        small = tl.abs(gap) < 0.0625
        kl = tl.where(small, series, tl.exp(gap) - 1.0 - gap)
        loss += beta * kl
        rise = kl + gap
        slope += tl.where(near | (gap != gap), -beta * rise, 0.0)
    tl.store(gradient + at, tl.where(counted, slope * share, 0.0), mask=inside)
    out = partial + tl.program_id(0) * COLUMNS
    tl.store(out + 0, tl.sum(loss * share, axis=0))
    tl.store(out + 1, tl.sum(low.to(tl.float32), axis=0))
    tl.store(out + 2, tl.sum(high.to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum((tl.abs(delta) > delta_max).to(tl.float32), axis=0))
    tl.store(out + 4, tl.sum(kl, axis=0))
    tl.store(out + 5, tl.sum(counted.to(tl.float32), axis=0))
    tl.store(out + 6, tl.sum(tl.where(counted, ratio, 0.0), axis=0))
    tl.store(out + 7, tl.max(tl.where(counted, ratio, 0.0), axis=0))
    tl.store(out + 8, tl.min(tl.where(counted, ratio, float("inf")), axis=0))


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    partial, result, num_blocks,
    NUM_SUMS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the blocks' sums and extremes in their order -> [COLUMNS]."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    largest = tl.zeros([WIDTH], dtype=tl.float32)
    smallest = tl.full([WIDTH], float("inf"), dtype=tl.float32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        inside = (block < num_blocks)[:, None] & (column < COLUMNS)[None, :]
        at = partial + block[:, None] * COLUMNS + column[None, :]
        values = tl.load(at, mask=inside, other=0.0)
        total += tl.sum(values, axis=0)
        largest = tl.maximum(largest, tl.max(values, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, values, float("inf")), axis=0))
    joined = tl.where(column < NUM_SUMS, total, tl.where(column == NUM_SUMS, largest, smallest))
    tl.store(result + column, joined, mask=column < COLUMNS)


class ClampedDeltaLoss(torch.autograd.Function):
    """The Triton form: the forward pass makes the gradient too, the backward pass multiplies it by the incoming one."""

    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, ref_logprob: Tensor | None,
        clip_low: float, clip_high: float, beta: float, delta_max: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        num_tokens = logprob.shape[0]
        num_blocks = max(1, triton.cdiv(num_tokens, BLOCK))
        gradient = torch.empty(num_tokens, dtype=torch.float32, device=logprob.device)
        buffer = torch.empty(num_blocks + 1, COLUMNS, dtype=torch.float32, device=logprob.device)
        partial, result = buffer[:-1], buffer[-1]
        _tokens_kernel[(num_blocks,)](
            logprob, old_logprob, advantage, weight, logprob if ref_logprob is None else ref_logprob, gradient, partial,
            num_tokens, clip_low, clip_high, beta, delta_max,
            HAS_REF=ref_logprob is not None, BLOCK=BLOCK, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        _join_kernel[(1,)](
            partial, result, num_blocks, NUM_SUMS=len(SUMS), COLUMNS=COLUMNS, WIDTH=16, BLOCK=64, num_warps=4
        )
        ctx.save_for_backward(gradient)
        ctx.dtype = logprob.dtype
        ctx.mark_non_differentiable(result)
        return result[0].clone(), result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_loss).to(ctx.dtype), *(None,) * 8


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
    """Sum over tokens of weight x (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta k3).

    r = exp(clamp(logprob - old_logprob, -delta_max, delta_max)); k3 = exp(e) - e - 1 with
    e = clamp(ref_logprob - logprob, -delta_max, delta_max). Where a clamp, or a clip that lowers the objective, holds,
    the gradient of that term is exactly 0. Sources: arXiv 1707.06347 eq. 7, 2402.03300 eq. 4, 2503.14476 eq. 8.

    Args:
        logprob: [T] floating point; the only argument with a gradient.
        old_logprob: [T], of the policy that the update started from.
        advantage: [T].
        weight: [T]; carries the aggregation (``dapo``, ``grpo``, ``dr_grpo``) and importance weights. A token of
            weight 0 is not looked at.
        ref_logprob: [T] of the reference policy, or None: no KL term and ``kl_sum`` 0.
        clip_low: how far below 1 the ratio may move the objective, in [0,1].
        clip_high: how far above 1, not negative.
        beta: coefficient of the KL term, not negative; needs ref_logprob.
        delta_max: bound of the log-ratios, positive.

    Returns:
        (loss, stats): a float32 scalar, and float32 scalars over the tokens of weight other than 0 that join over
        micro-batches and ranks: sums ``clip_low`` and ``clip_high`` (tokens whose clip holds), ``clamped``, ``kl_sum``,
        ``tokens``, ``ratio_sum``, the maximum ``ratio_max`` (of no token: 0) and the minimum ``ratio_min`` (of no
        token: infinite).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a setting out of its range.
    """
    tensors = {"logprob": logprob, "old_logprob": old_logprob, "advantage": advantage, "weight": weight}
    _check(tensors if ref_logprob is None else tensors | {"ref_logprob": ref_logprob})
    _check_settings(clip_low, clip_high, beta, delta_max, ref_logprob is not None)
    if triton_serves("clamped_delta_loss", logprob):
        fixed = [x if x is None else x.detach().contiguous() for x in (old_logprob, advantage, weight, ref_logprob)]
        loss, result = ClampedDeltaLoss.apply(
            logprob.contiguous(), *fixed, float(clip_low), float(clip_high), float(beta), float(delta_max)
        )
        return loss, {name: result[i] for i, name in enumerate((*SUMS, *EXTREMES)) if name != "loss"}
    return eager.clamped_delta_loss(
        logprob, old_logprob, advantage, weight,
        ref_logprob=ref_logprob, clip_low=clip_low, clip_high=clip_high, beta=beta, delta_max=delta_max,
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


def _check_settings(clip_low: float, clip_high: float, beta: float, delta_max: float, has_ref: bool) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clamped_delta_loss: clip_low is {clip_low}; expected a number from 0 to 1")
    for name, value in (("clip_high", clip_high), ("beta", beta)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"clamped_delta_loss: {name} is {value}; expected a number of at least 0")
    if not 0.0 < delta_max < float("inf"):
        raise ValueError(f"clamped_delta_loss: delta_max is {delta_max}; expected a positive number")
    if beta > 0.0 and not has_ref:
        raise ValueError(
            f"clamped_delta_loss: beta is {beta} but ref_logprob is None; give ref_logprob or set beta to 0"
        )
