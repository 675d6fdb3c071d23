"""The policy loss of every type: value, gradient and statistics against a loop in Python, and what each type is for."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bigram import VOCABULARY, Bigram
from torch import Tensor

from groupwise.engine.batch import Batch, Example, empty_batch, pack
from groupwise.engine.errors import UserError
from groupwise.engine.objective import LOSS_TYPES, count, group_advantages, policy_loss, summarise, weigh
from groupwise.kernels import grouped_logprob

LOW, HIGH, CONSTANT = 0.2, 0.28, 9
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.3, "gamma": 0.4, "entropy_coef": 0.2},
    {"delta_max": 0.3, "beta": 0.1, "temperature": 0.7},
    {"importance_correction": "truncated", "importance_cap": 1.2, "beta": 0.1, "entropy_coef": -0.1},
    {"importance_correction": "mask", "gamma": 0.7, "dual_clip": 1.5},
]


def make_groups(seed: int, sampler: Bigram) -> list[Example]:
    """Groups of one to four with a common prompt and rewards that tie or are all equal, and experts.

    Loss masks hold zeros, ones and fractions, or zeros alone; completions of one token are among them.
    """
    draw = np.random.default_rng(seed)
    out = []
    for group in range(8):
        prompt = draw.integers(0, VOCABULARY, draw.integers(1, 4)).tolist()
        size = int(draw.integers(1, 5))
        advantages = group_advantages(draw.choice([0.0, 0.5, 1.0], size)).tolist()
        for member, advantage in enumerate(advantages):
            own = draw.integers(0, VOCABULARY, draw.choice([1, 3, 6])).tolist()
            mask = draw.choice([0.0, 1.0, 1.0, 0.5], len(own)) * (draw.random() < 0.9)
            ids = [*prompt, *own]
            old = [0.0, *(sampler.logprob(*pair) for pair in itertools.pairwise(ids))]
            out.append(Example(ids, [0.0] * len(prompt) + mask.tolist(), advantage, old, group, expert=member == 3))
    return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def weights_by_the_loop(examples: list[Example], loss_type: str) -> list[list[float]]:
    """What a token counts, by the definition of the mean."""
    policy = [e for e in examples if not e.expert]
    out = []
    for example in examples:
        tokens = sum(sum(e.loss_mask) for e in (examples if example.expert else policy) if e.expert == example.expert)
        divisor = {
            "dapo": tokens,
            "cispo": tokens,
            "grpo": len(policy) * sum(example.loss_mask),
            "gspo": len(policy) * sum(example.loss_mask),
            "dr_grpo": len(policy) * CONSTANT,
        }["dapo" if example.expert else loss_type]
        out.append([mask / divisor if mask else 0.0 for mask in example.loss_mask])
    return out


def by_the_loop(
    logits: np.ndarray, fixed: np.ndarray, old: np.ndarray, sampler: np.ndarray, reference: np.ndarray,
    examples: list[Example], loss_type: str, beta: float = 0.0, gamma: float = 0.0, entropy_coef: float = 0.0,
    delta_max: float = 4.0, temperature: float = 1.0, dual_clip: float = math.inf, importance_correction: str = "none",
    importance_cap: float = 2.0,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Loss and statistics of a bigram policy with these ``logits``; what has no gradient is of the logits ``fixed``."""
    now, stopped, old, reference = (log_softmax(x / temperature) for x in (logits, fixed, old, reference))
    drawn = log_softmax(sampler)
    reinforce = imitate = bonus = 0.0
    sums = ("clip_low", "clip_high", "dual_clip", "clamped", "kl_sum", "ratio_sum", "policy_tokens", "sft_tokens")
    stats = dict.fromkeys((*sums, "entropy_sum", "ratio_max"), 0.0) | {"ratio_min": math.inf}
    for example, weights in zip(examples, weights_by_the_loop(examples, loss_type), strict=True):
        pairs = itertools.pairwise(example.token_ids)
        tokens = [(at, weight) for at, weight in zip(pairs, weights[1:], strict=True) if weight]
        mean = sum(weight * (stopped[at] - old[at]) for at, weight in tokens) / (sum(w for _, w in tokens) or 1.0)
        gain = example.advantage
        for at, weight in tokens:
            if example.expert:
                imitate -= weight * now[at]
                stats["sft_tokens"] += 1
                continue
            delta = mean + now[at] - stopped[at] if loss_type == "gspo" else now[at] - old[at]
            ratio = math.exp(min(max(delta, -delta_max), delta_max))
            clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
            if loss_type == "cispo":
                constant = math.exp(min(max(stopped[at] - old[at], -delta_max), delta_max))
                surrogate = min(constant, 1 + HIGH) * gain * now[at]
                stats["clip_high"] += gain != 0 and ratio > 1 + HIGH
            else:
                surrogate = min(ratio * gain, clipped * gain)
                surrogate = max(surrogate, dual_clip * gain) if gain < 0 else surrogate
                stats["clip_high"] += gain > 0 and ratio > 1 + HIGH
                stats["clip_low"] += gain < 0 and ratio < 1 - LOW
                stats["dual_clip"] += gain < 0 and ratio > dual_clip
            favour = math.exp(old[at] - drawn[at])
            favour = {
                "none": 1.0,
                "truncated": min(favour, importance_cap),
                "mask": favour if favour <= importance_cap else 0.0,
            }[importance_correction]
            gap = min(max(reference[at] - now[at], -delta_max), delta_max)
            kl = math.exp(gap) - gap - 1
            row = now[at[0]]
            entropy = -float((np.exp(row) * row).sum())
            reinforce += weight * (beta * kl - favour * surrogate)
            bonus += weight * entropy
            for name, value in {"kl_sum": kl, "ratio_sum": ratio, "policy_tokens": 1, "entropy_sum": entropy}.items():
                stats[name] += value
            stats["clamped"] += abs(delta) > delta_max
            stats["ratio_max"] = max(stats["ratio_max"], ratio)
            stats["ratio_min"] = min(stats["ratio_min"], ratio)
    stats |= {"policy_loss": reinforce, "sft_loss": imitate}
    return gamma * imitate + (1 - gamma) * (reinforce - entropy_coef * bonus), stats


def slope(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient by central differences."""
    out = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[place] = step
        out[place] = (function(at + moved) - function(at - moved)) / (2 * step)
    return out


def joined(loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]], policy: Bigram, batches: list[Batch]):  # type: ignore[no-untyped-def]
    """Loss and statistics over micro-batches; the gradients add up in the policy."""
    total, stats = 0.0, {}
    for batch in batches:
        loss, part = loss_fn(policy, batch)
        loss.backward()
        total += loss.item()
        for name, value in part.items():
            join = {"_max": max, "_min": min}.get(name[-4:], float.__add__)
            stats[name] = join(stats[name], value.item()) if name in stats else value.item()
    return total, stats


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_gradient_and_statistics_equal_the_loop(loss_type: str, setting: dict[str, Any], first: bool) -> None:
    """Over micro-batches that share prompts; ``first`` has no old log-probabilities: they are the policy's own."""
    seed = 6 + LOSS_TYPES.index(loss_type) + 10 * first
    policy, reference, sampler, old = (Bigram(seed + i, torch.float64) for i in range(4))
    for bigram in (sampler, old):  # not far from the policy
        bigram.table = (policy.table + 0.5 * bigram.table).detach()
    old = policy if first else old
    examples = make_groups(seed, sampler)
    arrays = [bigram.table.detach().numpy() for bigram in (policy, old, sampler, reference)]
    naive = functools.partial(by_the_loop, fixed=arrays[0], old=arrays[1], sampler=arrays[2], reference=arrays[3])
    naive = functools.partial(naive, examples=[Example(**vars(e)) for e in examples], loss_type=loss_type, **setting)
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=CONSTANT)
    batches = [*pack(examples, 40), empty_batch()]
    assert len(batches) > 2
    temperature = setting.get("temperature", 1.0)
    for batch in batches:
        batch.old_logprob = None if first else old.score(batch.input_ids, batch.targets, temperature)
        batch.ref_logprob = reference.score(batch.input_ids, batch.targets, temperature)
    loss_fn = functools.partial(policy_loss, loss_type=loss_type, clip_low=LOW, clip_high=HIGH, **setting)
    loss, stats = joined(loss_fn, policy, batches)
    expected, true_stats = naive(arrays[0])
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    true_gradient = slope(lambda logits: naive(logits)[0], arrays[0])
    np.testing.assert_allclose(policy.table.grad, true_gradient, rtol=1e-5, atol=1e-7)
    assert np.abs(true_gradient).max() > 1e-3
    assert {name: stats[name] for name in true_stats} == pytest.approx(true_stats, rel=1e-5, abs=1e-6)
    assert stats["ref_tokens"] == stats["policy_tokens"] > 0
    if not first:
        assert stats["clip_high"] > 0
        assert (stats["clip_low"] > 0) == (loss_type != "cispo")


SMOOTH = {"dapo": (0.1, -0.1, 0.5, -0.5), "cispo": (0.5, 5.0, -5.0)}  # of cispo, ratios that a bound makes constant


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_the_numerical_ones_in_float64(loss_type: str) -> None:
    """From hidden states and head, away from the kinks of the clips: gspo's gradient by the token is the true one."""
    generator = torch.Generator().manual_seed(1)
    examples = make_groups(1, Bigram())[:7]
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=CONSTANT)
    (batch,) = pack(examples, 1000)
    hidden, head = (
        torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (batch.num_tokens, VOCABULARY)
    )
    logprob = grouped_logprob(hidden, head, batch.targets)[0].detach()
    deltas = torch.tensor(SMOOTH.get(loss_type, SMOOTH["dapo"]))
    batch.old_logprob = logprob - deltas[batch.sequence_ids % len(deltas)]
    batch.ref_logprob = logprob + torch.randn(len(logprob), generator=generator)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        def policy(ids: Tensor, positions: Tensor, attention: Any, targets: Tensor, *options: Any) -> Any:
            return grouped_logprob(hidden, head, targets, temperature=options[0], entropy=options[1])

        return policy_loss(policy, batch, loss_type=loss_type, beta=0.2, entropy_coef=0.1, gamma=0.3, dual_clip=3.0)[0]

    assert torch.autograd.gradcheck(loss, (hidden, head))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_entropy_that_is_only_measured_is_in_no_graph(loss_type: str) -> None:
    examples = make_groups(3, Bigram())
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=CONSTANT)
    (batch,) = pack(examples, 1000)
    bigram = Bigram()
    results = bigram(batch.input_ids, None, None, batch.targets, entropy=True)
    losses = [
        policy_loss(lambda *_: results, batch, loss_type=loss_type, entropy=coef == 0, entropy_coef=coef)
        for coef in (0.0, 0.1)
    ]
    (plain, stats), (with_bonus, _) = losses
    assert torch.autograd.grad(plain, results[1], allow_unused=True, retain_graph=True) == (None,)
    (d_entropy,) = torch.autograd.grad(with_bonus, results[1], retain_graph=True)
    policy_weight = batch.weight.masked_fill(batch.expert, 0.0)
    torch.testing.assert_close(d_entropy, -0.1 * policy_weight)
    assert (d_entropy != 0).sum() == stats["policy_tokens"] < batch.num_tokens  # the others cost no backward pass


def test_a_bonus_is_computed_where_no_measure_is_asked_for() -> None:
    examples = make_groups(3, Bigram())
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    (plain, stats), (bonus, measured) = (
        policy_loss(Bigram(), batch, entropy=False, entropy_coef=coef) for coef in (0.0, 0.1)
    )
    assert "entropy_sum" not in stats
    assert measured["entropy_sum"] > 0
    assert bonus < plain


def test_an_entropy_bonus_makes_a_policy_without_rewards_uniform() -> None:
    policy = Bigram()
    examples = [Example([token, 0], [0.0, 1.0], 0.0, [0.0, -1.0]) for token in range(VOCABULARY)]
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    optimizer = torch.optim.SGD([policy.table], lr=50.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss, stats = policy_loss(policy, batch, entropy_coef=1.0)
        loss.backward()
        optimizer.step()
    metrics = summarise({name: value.item() for name, value in stats.items()})
    assert metrics["entropy"] == pytest.approx(math.log(VOCABULARY), rel=1e-3)


def passes(loss_type: str, number: int) -> list[tuple[dict[str, float], Tensor, Tensor]]:
    """Statistics, gradient and weights of each pass with a large step over a batch whose old log-probabilities stay."""
    policy = Bigram()
    pairs = [(token, (3 * token + 1) % VOCABULARY) for token in range(VOCABULARY)]  # no two that pull at one row
    examples = [Example([*pair], [0.0, 1.0], (-1.0) ** pair[0], [0.0, -1.0]) for pair in pairs]
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=1)
    (batch,) = pack(examples, 1000)
    batch.old_logprob = policy.score(batch.input_ids, batch.targets)
    optimizer = torch.optim.SGD([policy.table], lr=2.0)
    out = []
    for _ in range(number):
        optimizer.zero_grad()
        loss, stats = policy_loss(policy, batch, loss_type=loss_type)
        loss.backward()
        optimizer.step()
        values = {name: value.item() for name, value in stats.items()}
        out.append((values, policy.table.grad.clone(), policy.table.detach().clone()))
    return out


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_passes_over_one_batch_move_the_ratio_until_the_clip_holds(loss_type: str) -> None:
    history = passes(loss_type, 40)
    stats, gradient, _ = history[0]
    assert stats["ratio_max"] == stats["ratio_min"] == 1.0
    assert stats["clip_low"] == stats["clip_high"] == 0
    assert bool((gradient != 0).any())
    assert history[1][0]["ratio_max"] > 1.0 > history[1][0]["ratio_min"]
    (stats, gradient, weights), before = history[-1], history[-2][2]
    if loss_type == "cispo":  # no token is ever left out: a clipped one goes on with the bound for its ratio
        assert stats["clip_high"] == (VOCABULARY + 1) // 2
        assert bool((gradient != 0).any())
    else:
        assert stats["clip_high"] + stats["clip_low"] == stats["policy_tokens"] == VOCABULARY
        assert bool((gradient == 0).all())
        assert torch.equal(weights, before)


@pytest.mark.parametrize("loss_type", ["gspo", "cispo"])
def test_first_update_has_the_gradient_of_the_likelihood(loss_type: str) -> None:
    policy = Bigram()
    examples = make_groups(2, Bigram(1))
    weigh(examples, count(examples), loss_type=loss_type)
    (batch,) = pack(examples, 1000)
    loss, stats = policy_loss(policy, batch, loss_type=loss_type)
    (gradient,) = torch.autograd.grad(loss, policy.table)
    logprob, _ = policy(batch.input_ids, None, None, batch.targets)
    weight = batch.weight.masked_fill(batch.expert, 0.0)
    (true,) = torch.autograd.grad(-(logprob * batch.advantage * weight).sum(), policy.table)
    torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-8)
    assert stats["ratio_max"] == stats["ratio_min"] == 1


def test_gspo_clips_whole_sequences() -> None:
    """Two tokens whose ratios are far from 1 and undo each other: grpo clips both, gspo neither."""
    examples = [Example([0, 1, 2], [0.0, 1.0, 1.0], 1.0, [0.0, -1.0, -1.0])]
    weigh(examples, count(examples), loss_type="gspo")
    (batch,) = pack(examples, 8)
    policy = Bigram()
    batch.old_logprob = policy.score(batch.input_ids, batch.targets) + torch.tensor([1.0, -1.0, 0.0])
    for loss_type, clipped in (("grpo", 1), ("gspo", 0)):
        _, stats = policy_loss(policy, batch, loss_type=loss_type)
        assert stats["clip_high"] == clipped
        assert stats["ratio_max"].item() == pytest.approx(math.e if clipped else 1.0, rel=1e-5)


def test_an_unknown_loss_type_is_refused() -> None:
    with pytest.raises(UserError, match="'ppo' is unknown; use one of dapo, grpo, dr_grpo, gspo, cispo"):
        policy_loss(Bigram(), empty_batch(), loss_type="ppo")
