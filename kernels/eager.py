"""The kernels in plain PyTorch: the oracle of the tests, and what serves a CPU.

Shapes: T tokens, H hidden, V vocabulary, D head size. Attention, the log-probability and the draw
of tokens stand in files of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager_attention import masked_attention as masked_attention
from .eager_attention import packed_attention as packed_attention
from .eager_attention import paged_attention as paged_attention
from .eager_logprob import IGNORE as IGNORE
from .eager_logprob import grouped_logprob as grouped_logprob
from .eager_sampling import Drawn as Drawn
from .eager_sampling import sample_tokens as sample_tokens


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
    """Sum over tokens of weight x clipped policy loss; arguments and results as ``kernels.clamped_delta_loss``."""
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=logprob.device)
    finite = torch.isfinite(weight)
    for tensor in (logprob, old_logprob, advantage, ref_logprob, importance_weight):
        if tensor is not None:
            finite = finite & torch.isfinite(tensor)
    broken = ((weight != 0) & ~finite).nonzero()
    live = (weight != 0) & finite
    # What a token without weight, or with an input that is not finite, holds is replaced before it is used.
    weight = torch.where(live, weight, zero.to(weight.dtype))
    delta = torch.where(live, logprob.to(dtype) - old_logprob, zero)
    advantage = torch.where(live, advantage.to(dtype), zero)
    ratio = delta.clamp(-delta_max, delta_max).exp()
    dual_bound = torch.inf if dual_clip is None else dual_clip
    low = (advantage < 0) & (ratio < 1.0 - clip_low)
    high = (advantage > 0) & (ratio > 1.0 + clip_high)
    dual = (advantage < 0) & (ratio > dual_bound)
    bounded = torch.where(low, 1.0 - clip_low, torch.where(high, 1.0 + clip_high, ratio))
    bounded = torch.where(dual, dual_bound, bounded)
    token_loss = -bounded * advantage
    if importance_weight is not None:
        token_loss = token_loss * torch.where(live, importance_weight.to(dtype), zero)
    kl = zero
    if ref_logprob is not None:
        gap = torch.where(live, ref_logprob - logprob.to(dtype), zero).clamp(-delta_max, delta_max)
        kl = gap.expm1() - gap
        if beta != 0.0:
            token_loss = token_loss + beta * kl
    loss = (token_loss * weight).sum()
    with torch.no_grad():
        seen = ratio[live] if live.any() else None
        stats = {
            "clip_low": low.sum(),
            "clip_high": high.sum(),
            "dual_clip": dual.sum(),
            "clamped": (delta.abs() > delta_max).sum(),
            "kl_sum": kl.sum(),
            "tokens": live.sum(),
            "ratio_max": zero if seen is None else seen.amax(),
            "ratio_min": zero + torch.inf if seen is None else seen.amin(),
            "ratio_sum": zero if seen is None else seen.sum(),
            "nonfinite": zero + len(broken),
            "nonfinite_min": broken[0, 0] if len(broken) else zero + torch.inf,
        }
    return loss, {name: value.float() for name, value in stats.items()}


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
