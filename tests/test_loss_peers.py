"""The loss that is trained against published ones: TRL's GRPOTrainer and Liger-Kernel's, values and gradients.

Small steps, so that our clamp of log-ratios, which they have not, holds nowhere. They know GSPO as "grpo" with
importance sampling by the sequence, and bound CISPO's ratio by ``epsilon_high``, where we have 1 + it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.engine.batch import Example, pack
from groupwise.engine.objective import LOSS_TYPES, count, policy_loss, weigh
from groupwise.kernels import grouped_logprob

LENGTHS = (12, 1, 7, 12, 5)  # completion tokens of each sequence
STEPS = (0.6, 0.0, -0.5, 0.4, 0.0)  # mean log-ratios, so that whole sequences are beyond each clip
EPSILON, EPSILON_HIGH, CAP, CONSTANT = 0.15, 0.3, 1.4, 20
VOCABULARY, HIDDEN, TEMPERATURE = 19, 8, 0.8
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.3},
    {"dual_clip": 1.5},
    {"importance_correction": "truncated"},
    {"beta": 0.3, "dual_clip": 1.5, "importance_correction": "truncated"},
    {"beta": 0.3, "dual_clip": 1.5, "importance_correction": "mask"},
]
CASES = [
    (loss_type, setting)
    for loss_type in LOSS_TYPES
    for setting in SETTINGS
    if loss_type != "cispo" or "dual_clip" not in setting  # which it has no use for
]


@dataclass
class Samples:
    """B completions padded to L; a tool wrote some of their tokens, and all of the last one's."""

    completion_ids: Tensor  # [B,L] int64
    completion_mask: Tensor  # [B,L], 1 for tokens of a completion
    tool_mask: Tensor  # [B,L], 1 for tokens of the model
    advantages: Tensor  # [B]
    sampled: Tensor  # [B,L], the sampler's log-probabilities
    old: Tensor  # [B,L]
    reference: Tensor  # [B,L]

    def packed(self, padded: Tensor) -> Tensor:  # [B,L,...] -> [T,...]
        """As a batch has it: the tokens of each completion, and a row for the last one, which predicts nothing."""
        blank = torch.zeros_like(padded[0, :1])
        return torch.cat([part for row, n in zip(padded, LENGTHS, strict=True) for part in (row[:n], blank)])


def make_samples(logprob: Tensor) -> Samples:
    """Around these log-probabilities [B,L] of the policy."""
    generator = torch.Generator().manual_seed(4)
    B, L = logprob.shape

    def near(x: Tensor) -> Tensor:
        return x + 0.4 * torch.randn(B, L, generator=generator)

    tool_mask = (torch.rand(B, L, generator=generator) < 0.8).float()
    tool_mask[-1] = 0.0
    old = near(logprob.detach()) - torch.tensor(STEPS)[:, None]
    return Samples(
        completion_ids=torch.randint(VOCABULARY, (B, L), generator=generator),
        completion_mask=(torch.arange(L) < torch.tensor(LENGTHS)[:, None]).float(),
        tool_mask=tool_mask,
        advantages=torch.randn(B, generator=generator),
        sampled=near(old),
        old=old,
        reference=near(logprob.detach()),
    )


def ours(
    forward: Callable[[Tensor], Tensor], samples: Samples, loss_type: str, setting: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Through weights, packing and the loss of a training step; ``forward`` is given the targets [T]."""
    rows = zip(samples.completion_ids, samples.tool_mask, samples.advantages, samples.sampled, LENGTHS, strict=True)
    examples = [
        Example([0, *ids[:n].tolist()], [0.0, *mask[:n].tolist()], advantage.item(), [0.0, *sampled[:n].tolist()])
        for ids, mask, advantage, sampled, n in rows
    ]
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=CONSTANT)
    (batch,) = pack(examples, 1000)
    batch.old_logprob = samples.packed(samples.old)
    batch.ref_logprob = samples.packed(samples.reference)

    def policy(ids: Tensor, positions: Tensor, attention: Any, targets: Tensor, *_: Any) -> tuple[Tensor, None]:
        return forward(targets), None

    clips = {"clip_low": EPSILON, "clip_high": EPSILON_HIGH, "delta_max": 20.0, "importance_cap": CAP}
    return policy_loss(policy, batch, loss_type=loss_type, **clips, **setting)


def published(loss_type: str) -> dict[str, Any]:
    """A loss type by their names."""
    return {
        "loss_type": "grpo" if loss_type == "gspo" else loss_type,
        "importance_sampling_level": "sequence" if loss_type == "gspo" else "token",
        "epsilon_high": EPSILON_HIGH + (loss_type == "cispo"),
    }


def importance(samples: Samples, setting: dict[str, Any]) -> Tensor | None:
    ratio = torch.exp(samples.old - samples.sampled)
    known = {"truncated": ratio.clamp(max=CAP), "mask": ratio * (ratio <= CAP)}
    return known.get(setting.get("importance_correction", "none"))


def trl_loss(logprob: Tensor, samples: Samples, loss_type: str, setting: dict[str, Any]) -> Tensor:
    """TRL's own function on a trainer that is given its log-probabilities."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    ratio = importance(samples, setting)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros_like(logprob), None),
        accelerator=accelerator,
        args=SimpleNamespace(delta=setting.get("dual_clip"), use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=setting.get("beta", 0.0),
        current_gradient_accumulation_steps=1,
        epsilon_low=EPSILON,
        **published(loss_type),
        max_completion_length=CONSTANT,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": samples.completion_ids,
        "completion_mask": samples.completion_mask,
        "tool_mask": samples.tool_mask,
        "advantages": samples.advantages,
        "num_items_in_batch": (samples.completion_mask * samples.tool_mask).sum(),
        "old_per_token_logps": samples.old,
        "ref_per_token_logps": samples.reference,
        "importance_sampling_ratio": ratio,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def same_gradient(loss_type: str, setting: dict[str, Any]) -> bool:
    """Not that of gspo with a correction: ours weighs a token's gradient by its own importance, as GSPO-token would.

    Theirs has in each token's gradient the mean importance of its sequence. The values are the same.
    """
    return loss_type != "gspo" or "importance_correction" not in setting


def clips_of(loss_type: str, setting: dict[str, Any]) -> set[str]:
    """The clips that must have held somewhere for a comparison to mean something."""
    return {"clip_high"} if loss_type == "cispo" else {"clip_low", "clip_high"} | ({"dual_clip"} & setting.keys())


def check_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(("loss_type", "setting"), CASES, ids=str)
def test_trl(loss_type: str, setting: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    logprob = -torch.randn(len(LENGTHS), max(LENGTHS), generator=generator).abs().requires_grad_()
    samples = make_samples(logprob)
    loss, stats = ours(lambda _: samples.packed(logprob), samples, loss_type, setting)
    true = trl_loss(logprob, samples, loss_type, setting)
    check_close(loss, true)
    if same_gradient(loss_type, setting):
        (gradient,), (true_gradient,) = (torch.autograd.grad(x, logprob) for x in (loss, true))
        check_close(gradient, true_gradient)
    for held in clips_of(loss_type, setting):
        assert 0 < stats[held] < stats["policy_tokens"]


@pytest.mark.parametrize(("loss_type", "setting"), CASES, ids=str)
def test_liger_kernel(loss_type: str, setting: dict[str, Any]) -> None:
    """From hidden states and the output weight on, so that the log-probabilities are compared too."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(LENGTHS), max(LENGTHS), HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    ids = make_samples(torch.zeros(hidden.shape[:2])).completion_ids
    samples = make_samples((hidden @ weight.T / TEMPERATURE).log_softmax(-1).gather(2, ids[..., None]).squeeze(2))
    form = LigerFusedLinearGRPOLoss(
        beta=setting.get("beta", 0.0),
        compiled=False,
        use_ref_model="beta" in setting,
        epsilon_low=EPSILON,
        **published(loss_type),
        max_completion_length=CONSTANT,
        temperature=TEMPERATURE,
        delta=setting.get("dual_clip"),
    )
    true, _ = form(
        hidden,
        weight,
        samples.completion_ids,
        samples.completion_mask * samples.tool_mask,
        samples.advantages,
        ref_per_token_logps=samples.reference,
        old_per_token_logps=samples.old,
        vllm_is_ratio=importance(samples, setting),
    )

    def forward(targets: Tensor) -> Tensor:
        return grouped_logprob(samples.packed(hidden), weight, targets, temperature=TEMPERATURE)[0]

    loss, stats = ours(forward, samples, loss_type, setting)
    check_close(loss, true)
    if same_gradient(loss_type, setting):
        slopes = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, true))
        for gradient, true_gradient in zip(*slopes, strict=True):
            check_close(gradient, true_gradient)
    assert 0 < stats["clip_low"] + stats["clip_high"] < stats["policy_tokens"]
