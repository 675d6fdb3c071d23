"""What the policy is trained for: pure functions, from rewards to the loss of one micro-batch.

Sums and one global count. Every loss is a sum of weight x token loss, and the weights already hold the divisor, which
is a count over all ranks and micro-batches known before the backward pass: so no split can change a gradient.

    advantages = group_advantages(rewards)                            # per group
    counts = count(examples).summed(mesh)                             # per step, over the ranks
    weigh(examples, counts, loss_type="dapo")                         # per token
    loss_fn = functools.partial(policy_loss, loss_type="dapo", clip_low=0.2, clip_high=0.28)
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

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
IMPORTANCE_CORRECTIONS = ("none", "truncated", "mask")
IMPORTANCE_CAP = 2.0  # bound of a token's importance weight
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

    dapo, cispo: one mean over all tokens of the global batch (DAPO, arXiv 2503.14476, eq. 12). grpo, gspo: mean over a
    sequence's tokens, then over sequences (arXiv 2402.03300, eq. 3). dr_grpo: sum over tokens by the constant
    ``sequences x max_completion_tokens`` (arXiv 2503.20783). A sequence without loss has weights 0.

    Args:
        loss_mask: [n] weights of one sequence's tokens before the mean, usually 0 or 1.
        counts: over all ranks.
        max_completion_tokens: the constant of dr_grpo; the others do not look at it.
    """
    _check_loss_type(loss_type)
    if loss_type in ("dapo", "cispo"):
        divisor = counts.tokens
    elif loss_type in ("grpo", "gspo"):
        divisor = math.fsum(loss_mask) * counts.sequences
    else:
        if max_completion_tokens < 1:
            raise UserError(f"max_completion_tokens is {max_completion_tokens}; dr_grpo divides by it, give at least 1")
        divisor = counts.sequences * max_completion_tokens
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
    loss_type: str = "dapo",
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    beta: float = 0.0,
    delta_max: float = 4.0,
    importance_correction: str = "none",
    importance_cap: float = IMPORTANCE_CAP,
    entropy_coef: float = 0.0,
    gamma: float = 0.0,
    entropy: bool = True,
) -> tuple[Tensor, Stats]:
    """``gamma * SFT + (1 - gamma) * RL``: expert tokens by their likelihood, the others by the clamped policy gradient.

    RL is ``kernels.clamped_delta_loss``, for gspo with the ratio of the sequence (``sequence_old_logprob``), or
    ``cispo_loss``, less ``entropy_coef`` times the weighted sum of the tokens' entropies. Where ``batch.old_logprob``
    is None this is the first update on these samples, and the old log-probabilities are the policy's own. A token with
    a non-finite input makes the loss NaN, without a gradient from this batch.
    Source: DataMind, arXiv 2509.25084, for the mix.

    Args:
        policy: called as ``engine.model.Model``, sharded or not.
        loss_type: that of the batch's weights, see ``weigh``; here gspo and cispo alone differ from the others.
        temperature: of the rollout.
        dual_clip: bound of the ratio of tokens of negative advantage; None: no bound.
        importance_correction: as ``importance_weights``, which has ``importance_cap`` for its ``cap``.
        entropy_coef: of the entropy bonus; the weights are those of the policy term, so it is a mean as that one is.
        gamma: share of the SFT term; 0 where the batch has no expert tokens to learn from.
        entropy: whether the policy's entropy is measured on the way; a bonus needs it in any case.

    Raises:
        UserError: ``loss_type`` is none of LOSS_TYPES, or ``importance_correction`` none of IMPORTANCE_CORRECTIONS.
    """
    _check_loss_type(loss_type)
    logprob, entropies = _forward(policy, batch, temperature=temperature, entropy=entropy or entropy_coef != 0.0)
    old = logprob.detach() if batch.old_logprob is None else batch.old_logprob
    weight = batch.weight.masked_fill(batch.expert, 0.0)
    token_loss = cispo_loss if loss_type == "cispo" else clamped_delta_loss
    reinforce, stats = token_loss(
        logprob,
        sequence_old_logprob(logprob, old, weight, batch.cu_seqlens) if loss_type == "gspo" else old,
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
    imitate = -(logprob * batch.weight.masked_fill(~batch.expert, 0.0)).sum()
    loss = gamma * imitate + (1.0 - gamma) * reinforce
    if entropies is not None and entropy_coef:  # else the entropy is in no graph, and the backward pass is spared it
        loss = loss - (1.0 - gamma) * entropy_coef * (entropies * weight.nan_to_num(0.0, 0.0, 0.0)).sum()
    loss = loss.masked_fill(stats["nonfinite"] > 0, math.nan)
    stats |= {"sft_loss": imitate.detach(), "policy_loss": reinforce.detach()}
    return loss, stats | _measured(batch, old, weight, entropies, stats.pop("tokens"))


@torch.no_grad()
def sequence_old_logprob(logprob: Tensor, old_logprob: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Old log-probabilities from which every token of a sequence has the ratio of the sequence.

    That is s = exp(mean of logprob - old_logprob) over the sequence's tokens by their weights, and each token's own
    gradient of it: GSPO-token, arXiv 2507.18071, eq. 14, of which GSPO, eq. 5, is the case of one advantage a sequence.

    Args:
        logprob: [T] of the policy.
        old_logprob: [T].
        weight: [T]; a token of weight 0 counts for nothing.
        cu_seqlens: [N+1], bounds of the segments: a sequence's loss lies in one, and that one has no other's.

    Returns:
        [T] of logprob's dtype; not finite where a token's own difference is not, which spoils no other token.
    """
    delta = logprob - old_logprob
    used = weight.where((weight != 0) & delta.isfinite() & weight.isfinite(), 0.0).double()
    lengths = cu_seqlens.diff()
    # Sums by segment, and not by index, whose order on a GPU differs from run to run.
    sums, total = (
        torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
        for values in (used * delta.where(used != 0, 0.0), used)
    )
    mean = sums / total.masked_fill(total == 0, 1.0)
    mean = mean.repeat_interleave(lengths, output_size=len(delta)).to(logprob.dtype)
    return torch.where(delta.isfinite(), logprob - mean, delta)


def cispo_loss(
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
) -> tuple[Tensor, Stats]:
    """Sum over tokens of weight x (-w min(r, 1 + clip_high) A logprob + beta k3), the bounded ratio a constant.

    So a token beyond the clip keeps a gradient. Arguments, results and errors as ``kernels.clamped_delta_loss``, but
    there is no lower bound, and ``dual_clip`` lies above the upper one, so never binds. ``clip_high`` of the statistics
    counts the bounded ratios for either sign of A; ``clip_low`` and ``dual_clip`` are 0.
    Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, without the lower bound, as there.
    """
    importance = torch.ones_like(weight) if importance_weight is None else importance_weight
    # The KL term and the statistics: importance 0 takes the other policy term out, and |A| has the upper clip alone.
    divergence, stats = clamped_delta_loss(
        logprob,
        old_logprob,
        advantage.abs(),
        weight,
        ref_logprob=ref_logprob,
        importance_weight=0.0 * importance,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        beta=beta,
        delta_max=delta_max,
    )
    with torch.no_grad():
        ratio = (logprob - old_logprob).clamp(-delta_max, delta_max).exp().clamp(max=1.0 + clip_high)
        gain = weight * importance * ratio * advantage
        live = (weight != 0) & gain.isfinite() & logprob.isfinite()
    return divergence - (gain.where(live, 0.0) * logprob.where(live, 0.0)).sum(), stats


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
    tokens = stats.get("policy_tokens", 0.0)
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


def _measured(batch: Batch, old: Tensor, weight: Tensor, entropies: Tensor | None, tokens: Tensor) -> Stats:
    """What ``policy_loss`` says beside its terms; ``tokens`` are those of the policy term."""
    stats = {"policy_tokens": tokens, **mismatch(old, batch.rollout_logprob, weight)}
    stats["sft_tokens"] = (batch.expert & (batch.weight != 0)).sum().float()
    stats["ref_tokens"] = tokens * (batch.ref_logprob is not None)
    if entropies is not None:
        stats["entropy_sum"] = entropies.detach().masked_fill(weight == 0, 0.0).sum()
    return stats


def _check_loss_type(loss_type: str) -> None:
    if loss_type not in LOSS_TYPES:
        raise UserError(f"loss_type {loss_type!r} is unknown; use one of {', '.join(LOSS_TYPES)}")


def _forward(policy: Any, batch: Batch, *, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    return policy(batch.input_ids, batch.positions, attention, batch.targets, temperature, entropy)
