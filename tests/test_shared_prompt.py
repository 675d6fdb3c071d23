"""A group whose prompt is laid once has the loss, the statistics and the gradients of one whose members repeat it."""

import operator
import random

import pytest
import torch
from toys import VOCABULARY, small_model

from groupwise.engine.batch import Example, pack
from groupwise.engine.model import PackedAttention
from groupwise.engine.objective import count, policy_loss, weigh

Result = tuple[float, dict[str, float], list[torch.Tensor], int]


def make_examples(seed: int, loss_type: str) -> list[Example]:
    """Groups with a prompt each, observations without loss inside their completions, and an expert of the first."""
    rng = random.Random(seed)
    out = []
    for group in range(3):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 9))]
        for _ in range(rng.randint(2, 4)):
            own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
            mask = [0.0] * len(prompt) + [1.0, *(rng.choice((0.0, 1.0)) for _ in own[1:])]
            logprobs = [-rng.random() for _ in mask]
            out.append(Example([*prompt, *own], mask, rng.gauss(0.0, 1.0), logprobs, group))
    out.append(Example(list(out[0].token_ids), list(out[0].loss_mask), group=-1, expert=True))
    weigh(out, count(out), loss_type=loss_type)
    return out


def train_once(examples: list[Example], budget: int, loss_type: str) -> Result:
    """Loss, statistics and gradients in float64, summed over the micro-batches, and the tokens that were computed."""
    policy, reference = small_model().double(), small_model(seed=1).double()
    total, totals = 0.0, {}
    batches = pack(examples, budget)
    for batch in batches:
        attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
        with torch.no_grad():
            batch.ref_logprob, _ = reference(batch.input_ids, batch.positions, attention, batch.targets)
        batch.old_logprob = batch.rollout_logprob.double()
        loss, stats = policy_loss(policy, batch, loss_type=loss_type, beta=0.04, gamma=0.3, entropy_coef=0.1)
        loss.backward()
        total += loss.item()
        for name, value in stats.items():
            join = {"_max": max, "_min": min}.get(name[-4:], operator.add)
            totals[name] = join(totals[name], value.item()) if name in totals else value.item()
    gradients = [parameter.grad for parameter in policy.parameters()]
    return total, totals, gradients, sum(batch.num_tokens for batch in batches)


@pytest.mark.parametrize("budget", [400, 40, 25])
@pytest.mark.parametrize(("seed", "loss_type"), list(enumerate(("dapo", "gspo", "cispo"))))
def test_sharing_changes_no_number(seed: int, loss_type: str, budget: int) -> None:
    examples = make_examples(seed, loss_type)
    loss, stats, gradients, tokens = train_once(examples, budget, loss_type)
    for example in examples:
        example.group = -1
    own_loss, own_stats, own_gradients, own_tokens = train_once(examples, budget, loss_type)
    assert tokens < own_tokens
    assert loss == pytest.approx(own_loss, rel=1e-6)
    assert stats == pytest.approx(own_stats, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(gradients, own_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
