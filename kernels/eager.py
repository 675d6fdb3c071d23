"""The kernels in plain PyTorch: the oracle of the tests, and what serves a CPU.

Shapes: T tokens, H hidden, V vocabulary, D head size. Attention stands in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager_attention import masked_attention as masked_attention
from .eager_attention import packed_attention as packed_attention
from .eager_attention import paged_attention as paged_attention

IGNORE = -100

# Logits that exist at one time: 16 MiB in float32. Up to this size a backward pass keeps them instead of recomputing.
CHUNK_ELEMENTS = 1 << 22
# Fewer rows than this would read the whole output weight for next to no arithmetic.
MIN_CHUNK_ROWS = 16


def grouped_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), over bounded chunks of rows.

    Args:
        hidden: [T,H] floating point.
        weight: [V,H] of the same dtype.
        targets: [T] int64 in [0,V), or -100 for a row that counts for nothing: 0 and no gradient.
        temperature: divides the logits; positive.
        entropy: also return the entropy of each row's distribution, in nats, differentiable too.
        chunk_elements: logits computed at one time; rows a chunk depend on V alone.

    Returns:
        (logprob [T], entropy [T] or None), float32 (float64 for float64 inputs, so that gradients can be checked).
    """
    return _GroupedLogprob.apply(hidden, weight, targets, temperature, entropy, chunk_elements)


class _GroupedLogprob(torch.autograd.Function):
    """Keeps the log-probabilities when they fit in one chunk, recomputes them chunk by chunk otherwise."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprob = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
        entropies = torch.zeros_like(logprob) if entropy else None
        live = (targets != IGNORE).nonzero().squeeze(1)
        weight_up = weight.to(dtype)
        rows = max(MIN_CHUNK_ROWS, chunk // weight.shape[0])
        kept = None
        for part in _parts(live, len(targets), rows):
            logprobs = _logprobs(hidden[part].to(dtype), weight_up, temperature)
            logprob[part] = logprobs.gather(1, targets[part, None]).squeeze(1)
            if entropies is not None:
                entropies[part] = _entropy(logprobs)
            kept = logprobs if len(live) <= rows and any(ctx.needs_input_grad[:2]) else None
        ctx.save_for_backward(hidden, weight, targets, live, entropies, kept)
        ctx.temperature, ctx.rows = temperature, rows
        return logprob, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, live, entropies, kept = ctx.saved_tensors
        if entropies is None:
            d_entropy = None
        incoming = d_logprob if d_entropy is None else (d_logprob != 0) | (d_entropy != 0)
        chosen = incoming[live].nonzero().squeeze(1)  # a row without an incoming gradient has none to give
        if kept is not None and len(chosen) < len(live):
            kept = kept[chosen]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        weight_up = weight.to(dtype)
        for part in _parts(live[chosen], len(targets), ctx.rows):
            rows = hidden[part].to(dtype)
            logprobs = _logprobs(rows, weight_up, ctx.temperature) if kept is None else kept
            gain = d_logprob[part, None].to(dtype)
            slope = gain
            if d_entropy is not None:
                slope = gain + d_entropy[part, None] * (logprobs + entropies[part, None])
            d_logits = logprobs.exp().mul_(-slope)
            d_logits.scatter_add_(1, targets[part, None], gain)
            if d_hidden is not None:
                d_hidden[part] = _product(d_logits, weight_up, ctx.temperature).to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), rows, alpha=1.0 / ctx.temperature)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _parts(index: Tensor, total: int, size: int) -> Iterator[Any]:
    """Chunks of a row index; slices, which copy nothing, where the index is all ``total`` rows."""
    if len(index) < total:
        return iter(index.split(size))
    return (slice(start, start + size) for start in range(0, total, size))


def _product(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """a @ b / temperature, the division done inside the product."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=1.0 / temperature)


def _logprobs(rows: Tensor, weight: Tensor, temperature: float) -> Tensor:  # [C,H], [V,H] -> [C,V]
    return torch.log_softmax(_product(rows, weight.t(), temperature), dim=1)


def _entropy(logprobs: Tensor) -> Tensor:  # [C,V] -> [C]
    return -(logprobs.exp() * logprobs).sum(1)


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
