"""What the policy is trained for: pure functions, from rewards to the loss of one micro-batch.

Sums and one global count. Every loss is a sum of weight x token loss, and the weights already hold the divisor, which
is a count over all ranks and micro-batches known before the backward pass: so no split can change a gradient.

    advantages = group_advantages(rewards)                            # per group
    counts = count(examples).summed(mesh)                             # per step, over the ranks
    weigh(examples, counts, loss_type="dapo")                         # per token
    loss_fn = functools.partial(policy_loss, clip_low=0.2, clip_high=0.28)
    update = optimise(policy, optimizer, pack(examples, budget), loss_fn, ...)
    metrics = summarise(update.stats)

A loss function takes ``(policy, batch)`` and returns a scalar with a graph and 0-dim statistics that add up over
micro-batches and ranks, save those that end in ``_max`` or ``_min``, which are extremes. T tokens of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.clamped_delta import clamped_delta_loss
from .batch import Batch, Example
from .errors import UserError
from .model import PackedAttention

LOSS_TYPES = ("dapo", "grpo", "dr_grpo")
IMPORTANCE_CORRECTIONS = ("none", "truncated", "mask")
EPSILON = 1e-6  # keeps an advantage finite where a group hardly varies

Stats = dict[str, Tensor]


class Reducer(Protocol):
    """What ``Counts.summed`` needs of a mesh."""

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor: ...


def group_advantages(rewards: Sequence[float] | Tensor, scale_rewards: bool = True) -> Tensor:
    """How much better each member did than its group.

    ``(R - mean) / (std + 1e-6)`` with the sample deviation (n - 1); without ``scale_rewards`` only ``R - mean``, as in
    Dr. GRPO. A group of one, and a group whose rewards are all equal, give exactly 0.
    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.

    Args:
        rewards: [n] of one group.

    Returns:
        [n] float64.

    Raises:
        UserError: a reward is NaN or infinite.
    """
    values = torch.as_tensor(rewards, dtype=torch.float64).cpu()
    if not bool(torch.isfinite(values).all()):
        member = int((~torch.isfinite(values)).nonzero()[0])
        value = values[member].item()
        raise UserError(f"reward of member {member} of a group is {value}; rewards must be finite numbers")
    if not informative(values.tolist()):
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / (values.std() + EPSILON) if scale_rewards else centred


def informative(values: Sequence[float]) -> bool:
    """Whether a group has something to compare: its answers are neither all right nor all wrong.

    Args:
        values: correctness of each member or, where the answer is not rewarded, its total reward.
    """
    return len(values) > 0 and max(values) != min(values)


@dataclass(frozen=True)
class Counts:
    """The divisors of one optimisation step.

    Args:
        tokens: sum of the loss weights of policy-gradient tokens.
        sequences: policy-gradient sequences, masked ones included.
        expert_tokens: sum of the loss weights of expert tokens.
    """

    tokens: float
    sequences: float
    expert_tokens: float

    def summed(self, mesh: Reducer) -> "Counts":
        """The same over all ranks. Collective."""
        mine = torch.tensor([self.tokens, self.sequences, self.expert_tokens], dtype=torch.float64, device=mesh.device)
        return Counts(*mesh.all_reduce(mine).tolist())


def count(examples: Sequence[Example]) -> Counts:
    """The counts of this rank's examples."""
    policy = [example for example in examples if not example.expert]
    expert = [example for example in examples if example.expert]
    return Counts(
        tokens=math.fsum(weight for example in policy for weight in example.loss_mask),
        sequences=float(len(policy)),
        expert_tokens=math.fsum(weight for example in expert for weight in example.loss_mask),
    )


def token_weights(
    loss_type: str, loss_mask: Sequence[float], counts: Counts, *, max_completion_tokens: int = 0
) -> list[float]:
    """Weights by which a plain sum of token losses becomes the mean of ``loss_type``.

    dapo: one mean over all tokens of the global batch (DAPO, arXiv 2503.14476, eq. 12). grpo: mean over a sequence's
    tokens, then over sequences (arXiv 2402.03300, eq. 3). dr_grpo: sum over tokens by the constant
    ``sequences x max_completion_tokens`` (arXiv 2503.20783). A sequence without loss has weights 0.

    Args:
        loss_mask: [n] weights of one sequence's tokens before the mean, usually 0 or 1.
        counts: over all ranks.
        max_completion_tokens: the constant of dr_grpo; the others do not look at it.
    """
    if loss_type == "dapo":
        divisor = counts.tokens
    elif loss_type == "grpo":
        divisor = math.fsum(loss_mask) * counts.sequences
    elif loss_type == "dr_grpo":
        if max_completion_tokens < 1:
            raise UserError(f"max_completion_tokens is {max_completion_tokens}; dr_grpo divides by it, give at least 1")
        divisor = counts.sequences * max_completion_tokens
    else:
        raise UserError(f"loss_type {loss_type!r} is unknown; use one of {', '.join(LOSS_TYPES)}")
    return [weight / divisor if weight else 0.0 for weight in loss_mask]


def weigh(
    examples: Sequence[Example], counts: Counts, *, loss_type: str = "dapo", max_completion_tokens: int = 0
) -> None:
    """Divides the loss masks in place: policy tokens as ``token_weights``, expert tokens by their own global count."""
    for example in examples:
        kind = "dapo" if example.expert else loss_type
        own = Counts(counts.expert_tokens, 0.0, 0.0) if example.expert else counts
        example.loss_mask = token_weights(kind, example.loss_mask, own, max_completion_tokens=max_completion_tokens)


def sft_loss(policy: Any, batch: Batch) -> tuple[Tensor, Stats]:
    """Minus the log-likelihood of the batch's targets, each by its weight (which holds 1 / global count).

    Args:
        policy: called as ``engine.model.Model``, sharded or not.
    """
    logprob, _ = _forward(policy, batch, temperature=1.0, entropy=False)
    loss = -(logprob * batch.weight).sum()
    return loss, {"sft_loss": loss.detach(), "sft_tokens": (batch.weight != 0).sum().float()}


def policy_loss(
    policy: Any,
    batch: Batch,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    beta: float = 0.0,
    delta_max: float = 4.0,
    importance_correction: str = "none",
    importance_cap: float = 2.0,
    gamma: float = 0.0,
    entropy: bool = True,
) -> tuple[Tensor, Stats]:
    """``gamma * SFT + (1 - gamma) * RL``: expert tokens by their likelihood, the others by the clamped policy gradient.

    RL is ``kernels.clamped_delta_loss``: with d = clamp(logp - logp_old, -delta_max, delta_max) and r = exp(d), a token
    costs ``-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * k3``, w its importance weight. Where
    ``batch.old_logprob`` is None this is the first update on these samples, and the old log-probabilities are the
    policy's own. A token with a non-finite input makes the loss NaN, without a gradient from this batch.
    Source: DAPO, arXiv 2503.14476, eq. 10, for the two clips; DataMind, arXiv 2509.25084, for the mix.

    Args:
        policy: called as ``engine.model.Model``, sharded or not.
        temperature: of the rollout.
        dual_clip: bound of the ratio of tokens of negative advantage; None: no bound.
        importance_correction: as ``importance_weights``, which has ``importance_cap`` for its ``cap``.
        gamma: share of the SFT term; 0 where the batch has no expert tokens to learn from.
        entropy: whether the policy's entropy is measured on the way.
    """
    logprob, entropies = _forward(policy, batch, temperature=temperature, entropy=entropy)
    old = logprob.detach() if batch.old_logprob is None else batch.old_logprob
    weight = batch.weight.masked_fill(batch.expert, 0.0)
    reinforce, stats = clamped_delta_loss(
        logprob,
        old,
        batch.advantage,
        weight,
        ref_logprob=batch.ref_logprob,
        importance_weight=importance_weights(old, batch.rollout_logprob, importance_correction, importance_cap),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        beta=beta,
        delta_max=delta_max,
    )
    expert_weight = batch.weight.masked_fill(~batch.expert, 0.0)
    imitate = -(logprob * expert_weight).sum()
    loss = gamma * imitate + (1.0 - gamma) * reinforce
    loss = loss.masked_fill(stats["nonfinite"] > 0, math.nan)
    stats = {**stats, **mismatch(old, batch.rollout_logprob, weight)}
    stats |= {"sft_loss": imitate.detach(), "policy_loss": reinforce.detach()}
    stats["sft_tokens"] = (expert_weight != 0).sum().float()
    stats["ref_tokens"] = stats["tokens"] * (batch.ref_logprob is not None)
    if entropies is not None:
        stats["entropy_sum"] = entropies.detach().masked_fill(weight == 0, 0.0).sum()
    return loss, stats


@torch.no_grad()
def importance_weights(old_logprob: Tensor, rollout_logprob: Tensor, correction: str, cap: float) -> Tensor | None:
    """What the policy terms of tokens are multiplied by, since the sampler and not the trainer drew them; None: 1.

    With r = exp(old_logprob - rollout_logprob), truncated: min(r, cap); mask: r up to ``cap``, and 0 beyond.
    Source: truncated importance sampling, as in ``token_truncate`` and ``token_mask`` of TRL's GRPOTrainer.

    Raises:
        UserError: ``correction`` is none of IMPORTANCE_CORRECTIONS.
    """
    if correction not in IMPORTANCE_CORRECTIONS:
        raise UserError(
            f"importance_correction {correction!r} is unknown; use one of {', '.join(IMPORTANCE_CORRECTIONS)}"
        )
    if correction == "none":
        return None
    ratio = (old_logprob - rollout_logprob).exp()
    return ratio.clamp(max=cap) if correction == "truncated" else ratio.masked_fill(ratio > cap, 0.0)


@torch.no_grad()
def mismatch(old_logprob: Tensor, rollout_logprob: Tensor, weight: Tensor) -> Stats:
    """How far trainer and sampler are apart on tokens that bear loss (weight not 0), as sums and extremes."""
    live = weight != 0
    delta = (old_logprob - rollout_logprob).masked_fill(~live, 0.0)
    ratio = delta.exp()
    gap = delta.abs()
    return {
        "logp_difference_max": gap.max(),
        "logp_difference_sum": gap.sum(),
        "rollout_kl_sum": (ratio - 1.0 - delta).sum(),
        "importance_sum": ratio.masked_fill(~live, 0.0).sum(),
        "importance_square_sum": ratio.square().masked_fill(~live, 0.0).sum(),
    }


def summarise(stats: Mapping[str, float]) -> dict[str, float]:
    """Metrics by the names practitioners read, from statistics summed over the step's micro-batches and ranks.

    A mean over no tokens is left out. ``sampling/ess`` is the effective sample size of the importance weights as a
    share of the tokens, (sum w)² / (n sum w²).
    """
    names = {"policy_loss": "loss/policy", "sft_loss": "loss/sft"}
    out = {name: stats[key] for key, name in names.items() if key in stats}
    tokens = stats.get("tokens", 0.0)
    if tokens > 0:
        means = {
            "clip_low": "clip_ratio/low_mean",
            "clip_high": "clip_ratio/high_mean",
            "dual_clip": "clip_ratio/dual_mean",
            "clamped": "clip_ratio/clamped_mean",
            "entropy_sum": "entropy",
            "ratio_sum": "ratio/mean",
            "logp_difference_sum": "sampling/logp_difference_mean",
            "rollout_kl_sum": "sampling/kl",
        }
        out |= {name: stats[key] / tokens for key, name in means.items() if key in stats}
        extremes = {
            "ratio_max": "ratio/max",
            "ratio_min": "ratio/min",
            "logp_difference_max": "sampling/logp_difference_max",
        }
        out |= {name: stats[key] for key, name in extremes.items() if key in stats}
        if stats.get("ref_tokens", 0.0) > 0:
            out["kl"] = stats["kl_sum"] / stats["ref_tokens"]
        if stats.get("importance_square_sum", 0.0) > 0:
            out["sampling/ess"] = stats["importance_sum"] ** 2 / (tokens * stats["importance_square_sum"])
        out["tokens/policy"] = tokens
    if stats.get("sft_tokens", 0.0) > 0:
        out["tokens/sft"] = stats["sft_tokens"]
    return out


def _forward(policy: Any, batch: Batch, *, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    return policy(batch.input_ids, batch.positions, attention, batch.targets, temperature, entropy)
