"""Objective: every formula against a loop in NumPy, and no split that changes it."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from bigram import Bigram, make_examples
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import alone, small_model

from groupwise.engine.batch import Batch, Example, balance, empty_batch, pack
from groupwise.engine.errors import UserError
from groupwise.engine.objective import (
    LOSS_TYPES,
    Counts,
    count,
    group_advantages,
    importance_weights,
    informative,
    mismatch,
    policy_loss,
    sft_loss,
    summarise,
    token_weights,
    weigh,
)
from groupwise.engine.optim import AdamW
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import optimise


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.booleans())
def test_group_advantages(rewards: list[float], scale: bool) -> None:
    n = len(rewards)
    mean = sum(rewards) / n
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1)) if n > 1 else 0.0
    expected = [(r - mean) / ((std + 1e-6) if scale else 1.0) for r in rewards]
    got = group_advantages(rewards, scale)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    if len(set(rewards)) == 1:
        assert got.tolist() == [0.0] * n
    for i, j in zip(range(n), range(1, n), strict=False):  # ties stay ties
        assert (rewards[i] == rewards[j]) <= (got[i] == got[j])


def test_equal_rewards_give_exactly_nothing() -> None:
    for value in (0.1, 1 / 3, -7.7, 1e9):
        for n in (1, 3, 8):
            assert group_advantages([value] * n).tolist() == [0.0] * n
            assert group_advantages([value] * n, scale_rewards=False).tolist() == [0.0] * n
    with pytest.raises(UserError, match="member 1 of a group is nan"):
        group_advantages([0.0, math.nan])


def test_informative() -> None:
    assert informative([0, 1, 1])
    assert informative([0.5, 0.7])
    assert not informative([1, 1])
    assert not informative([0.0])
    assert not informative([])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights(loss_type: str) -> None:
    examples = make_examples(3)
    counts = count(examples)
    values = [[float(i + t) for t in range(len(e))] for i, e in enumerate(examples)]
    masks = [e.loss_mask for e in examples]
    if loss_type in ("dapo", "cispo"):
        total = sum(v * m for vs, ms in zip(values, masks, strict=True) for v, m in zip(vs, ms, strict=True))
        expected = total / sum(map(sum, masks))
    elif loss_type in ("grpo", "gspo"):
        means = [np.dot(v, m) / max(sum(m), 1) for v, m in zip(values, masks, strict=True)]
        expected = np.mean(means)
    else:
        expected = sum(np.dot(v, m) for v, m in zip(values, masks, strict=True)) / (len(examples) * 50)
    weights = [token_weights(loss_type, m, counts, max_completion_tokens=50) for m in masks]
    assert sum(np.dot(v, w) for v, w in zip(values, weights, strict=True)) == pytest.approx(expected)


def test_token_weights_refuse_what_is_unknown() -> None:
    with pytest.raises(UserError, match="'ppo' is unknown; use one of dapo, grpo, dr_grpo, gspo, cispo"):
        token_weights("ppo", [0.0, 1.0], Counts(1, 1, 0))
    with pytest.raises(UserError, match="max_completion_tokens"):
        token_weights("dr_grpo", [0.0, 1.0], Counts(1, 1, 0))
    assert token_weights("dapo", [0.0, 0.0], Counts(0, 1, 0)) == [0.0, 0.0]  # nothing to learn from: no division


def test_importance_weights_refuse_what_is_unknown() -> None:
    assert importance_weights(torch.zeros(2), torch.zeros(2), "none", 2.0) is None
    with pytest.raises(UserError, match="'sequence' is unknown; use one of none, truncated, mask"):
        importance_weights(torch.zeros(2), torch.zeros(2), "sequence", 2.0)


def test_dual_clip_bounds_what_a_bad_sample_costs() -> None:
    policy = Bigram()
    examples = make_examples(7)
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    logprob, _ = policy(batch.input_ids, None, None, batch.targets)
    batch.advantage, batch.old_logprob = -batch.advantage.abs(), logprob.detach() - 2.0
    loss, stats = policy_loss(policy, batch, dual_clip=3.0)
    assert loss.item() == pytest.approx(-3.0 * (batch.advantage * batch.weight).sum().item(), rel=1e-5)
    assert bool((torch.autograd.grad(loss, policy.table)[0] == 0).all())
    metrics = summarise({key: value.item() for key, value in stats.items()})
    assert (metrics["clip_ratio/dual_mean"], metrics["clip_ratio/high_mean"]) == (1.0, 0.0)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("broken", ["advantage", "old_logprob", "ref_logprob", "weight", "rollout_logprob"])
def test_what_is_not_finite_makes_the_loss_nan_and_moves_nothing(broken: str, loss_type: str) -> None:
    policy = Bigram()
    examples = make_examples(7)
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    for name in ("old_logprob", "ref_logprob"):
        setattr(batch, name, batch.rollout_logprob.clone())
    place = int((batch.weight != 0).nonzero()[3])
    getattr(batch, broken)[place] = math.nan
    correction = "truncated" if broken == "rollout_logprob" else "none"
    options = {"importance_correction": correction, "beta": 0.1, "entropy_coef": 0.1}
    loss, stats = policy_loss(policy, batch, loss_type=loss_type, **options)
    loss.backward()
    assert loss.isnan()
    assert (stats["nonfinite"], stats["nonfinite_min"]) == (1, place)
    assert stats["policy_loss"].isfinite()
    assert bool((policy.table.grad == 0).all())


def test_first_update_is_on_policy() -> None:
    """Without old log-probabilities the ratio is 1 and the gradient is that of -A log p."""
    policy = Bigram()
    examples = make_examples(7)
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    loss, stats = policy_loss(policy, batch)
    loss.backward()
    gradient, policy.table.grad = policy.table.grad.clone(), None
    logprob, _ = policy(batch.input_ids, None, None, batch.targets)
    (-(logprob * batch.advantage * batch.weight).sum()).backward()
    torch.testing.assert_close(gradient, policy.table.grad, rtol=1e-5, atol=1e-7)
    assert loss.item() == pytest.approx(-(batch.advantage * batch.weight).sum().item(), abs=1e-6)
    assert stats["clip_low"] == stats["clip_high"] == 0
    assert stats["ratio_max"] == 1


def test_equal_rewards_move_nothing() -> None:
    policy = Bigram()
    examples = make_examples(7)
    for example, advantage in zip(examples, group_advantages([0.1] * len(examples)).tolist(), strict=True):
        example.advantage = advantage
    weigh(examples, count(examples))
    loss, _ = policy_loss(policy, pack(examples, 1000)[0])
    loss.backward()
    assert loss.item() == 0.0
    assert bool((policy.table.grad == 0).all())


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(10, 60), st.sampled_from(LOSS_TYPES))
def test_no_split_changes_loss_gradient_or_statistics(seed: int, budget: int, loss_type: str) -> None:
    loss_fn = functools.partial(policy_loss, loss_type=loss_type, gamma=0.3, entropy_coef=0.1)

    def run(budget: int) -> tuple[float, torch.Tensor, dict[str, float]]:
        policy, examples = Bigram(), make_examples(seed, 8, expert=True)
        weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=9)
        batches: list[Batch] = [*pack(examples, budget), empty_batch()]
        sums: dict[str, float] = {}
        for batch in batches:
            if not batch.is_empty:
                batch.old_logprob = batch.rollout_logprob
            loss, stats = loss_fn(policy, batch)
            loss.backward()
            for key, value in {**stats, "loss": loss.detach()}.items():
                assert value.ndim == 0
                assert not value.requires_grad
                join = max if key.endswith("_max") else min if key.endswith("_min") else float.__add__
                sums[key] = join(sums[key], value.item()) if key in sums else value.item()
        return sums["loss"], policy.table.grad.clone(), sums

    whole, split = run(10_000), run(budget)
    assert split[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-5, atol=1e-8)
    assert split[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-6)


def test_sft_loss_is_the_mean_over_its_tokens() -> None:
    policy = Bigram()
    examples = make_examples(9)
    raw = [list(e.loss_mask) for e in examples]
    weigh(examples, count(examples))
    loss, stats = sft_loss(policy, pack(examples, 1000)[0])
    terms = [
        (-policy.logprob(e.token_ids[i - 1], e.token_ids[i]), mask[i])
        for e, mask in zip(examples, raw, strict=True)
        for i in range(1, len(e))
    ]
    assert loss.item() == pytest.approx(sum(v * m for v, m in terms) / sum(m for _, m in terms), rel=1e-6)
    assert stats["sft_loss"] == loss.item()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_masks_give_zero_with_a_gradient(loss_type: str) -> None:
    policy = Bigram()
    examples = [Example([1, 2, 3], [0.0, 0.0, 0.0], 1.0, [0.0, -9.0, -9.0])]
    weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=2)
    for batch in (*pack(examples, 8), empty_batch()):
        reinforced = policy_loss(policy, batch, loss_type=loss_type, entropy_coef=0.1)
        for loss, stats in (reinforced, sft_loss(policy, batch)):
            policy.table.grad = None
            loss.backward()
            assert loss.item() == 0.0
            assert bool((policy.table.grad == 0).all())
            metrics = summarise({key: value.item() for key, value in stats.items()})
            assert all(math.isfinite(value) for value in metrics.values())
            assert "kl" not in metrics
            assert "entropy" not in metrics


def test_mismatch_and_summary() -> None:
    draw = np.random.default_rng(1)
    old, rollout = -draw.random(40), -draw.random(40)
    weight = (draw.random(40) < 0.6).astype(float)
    old[weight == 0] = np.nan  # what bears no loss may hold anything
    stats = {k: v.item() for k, v in mismatch(*(torch.tensor(x) for x in (old, rollout, weight))).items()}
    deltas = [a - b for a, b, w in zip(old, rollout, weight, strict=True) if w]
    ratios = [math.exp(d) for d in deltas]
    metrics = summarise({**stats, "policy_tokens": float(len(deltas)), "ref_tokens": 0.0, "kl_sum": 0.0})
    assert metrics["sampling/logp_difference_max"] == pytest.approx(max(map(abs, deltas)))
    assert metrics["sampling/logp_difference_mean"] == pytest.approx(np.mean(np.abs(deltas)))
    assert metrics["sampling/kl"] == pytest.approx(np.mean([r - 1 - d for r, d in zip(ratios, deltas, strict=True)]))
    assert metrics["sampling/ess"] == pytest.approx(sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios)))
    assert "kl" not in metrics


def test_summary_of_a_policy_step() -> None:
    policy = Bigram()
    examples = make_examples(11)
    weigh(examples, count(examples))
    (batch,) = pack(examples, 1000)
    batch.old_logprob = batch.rollout_logprob
    batch.ref_logprob, _ = policy(batch.input_ids, None, None, batch.targets)
    batch.ref_logprob = batch.ref_logprob.detach()
    _, stats = policy_loss(policy, batch)
    metrics = summarise({key: value.item() for key, value in stats.items()})
    live = batch.weight != 0
    _, entropies = policy(batch.input_ids, None, None, batch.targets, entropy=True)
    assert metrics["entropy"] == pytest.approx(entropies[live].mean().item(), rel=1e-5)
    assert metrics["kl"] == 0.0
    assert 0.0 < metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] < 1.0


class Pair:
    """Two ranks that hold the same counts."""

    device = torch.device("cpu")

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return tensor * 2


def test_counts_are_sums_over_ranks_and_kinds() -> None:
    examples = [
        Example([1, 2, 3], [0.0, 1.0, 1.0]),
        Example([1, 2], [0.0, 0.0]),
        Example([1, 2], [0.0, 0.25], expert=True),
    ]
    assert count(examples) == Counts(tokens=2.0, sequences=2.0, expert_tokens=0.25)
    assert count(examples).summed(Pair()) == Counts(4.0, 4.0, 0.5)


def test_reward_rises_on_a_task_with_a_known_optimum() -> None:
    """A bandit: after token 0 the token 7 earns 1, all others nothing."""
    policy = Bigram()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([policy.table], lr=2.0)

    def chance() -> float:
        return math.exp(policy.logprob(0, 7))

    before = chance()
    for _ in range(40):
        tokens = torch.multinomial(policy.table[0].detach().softmax(-1), 16, True, generator=generator).tolist()
        advantages = group_advantages([float(token == 7) for token in tokens]).tolist()
        examples = [
            Example([0, token], [0.0, 1.0], advantage, [0.0, policy.logprob(0, token)])
            for token, advantage in zip(tokens, advantages, strict=True)
        ]
        weigh(examples, count(examples))
        loss, _ = policy_loss(policy, pack(examples, 64)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.3
    assert chance() > 0.95


def train_policy(mesh: Any, steps: int = 6) -> list[tuple[float, dict[str, float]]]:
    """Losses and metrics of a mixed SFT and RL run of a real model, its examples dealt to the ranks."""
    policy = ShardedModel(small_model(), mesh)
    optimizer = AdamW(policy.shards, lr=0.01)
    out = []
    for step in range(steps):
        loss_type = ("grpo", "gspo", "cispo")[step % 3]
        mine = balance(make_examples(step, 7, expert=True), mesh.world_size)[mesh.rank]
        weigh(mine, count(mine).summed(mesh), loss_type=loss_type)
        batches = pack(mine, 24)
        for batch in batches:
            batch.old_logprob = policy.logprobs(batch) - 0.1  # a ratio that is not 1
        loss_fn = functools.partial(policy_loss, loss_type=loss_type, gamma=0.3, entropy_coef=0.1)
        update = optimise(policy, optimizer, batches, loss_fn, mesh=mesh, lr=0.01, max_grad_norm=1.0)
        out.append((update.loss, summarise(update.stats)))
    return out


def test_one_and_two_ranks_have_the_same_losses_and_metrics() -> None:
    single = train_policy(alone())
    for ranks in run_ranks(train_policy, 2):
        assert [loss for loss, _ in ranks] == pytest.approx([loss for loss, _ in single], rel=1e-5, abs=1e-6)
        for (_, ours), (_, theirs) in zip(single, ranks, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    assert single[-1][0] != single[0][0]
