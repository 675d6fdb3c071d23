"""GRPO's update, from sampling to the weights: it climbs where there is something to climb and else does nothing."""

from functools import partial

import pytest

from groupwise.engine.batch import Example, pack
from groupwise.engine.config import ModelConfig
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.objective import LOSS_TYPES, count, group_advantages, policy_loss, summarise, weigh
from groupwise.engine.optim import AdamW
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import merged, optimise
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.sampler import Sampler

WANTED = 7  # the one token that is rewarded
CONFIG = ModelConfig(
    vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


class Letters:
    """As much of a tokenizer as sampling needs."""

    vocab_size, eos_id = 16, 15

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + token) for token in ids)


def learn(steps: int, group_size: int, loss_type: str, passes: int = 1) -> list[tuple[float, dict[str, float]]]:
    """Rewards the share of WANTED among four sampled tokens; returns each step's mean reward and metrics."""
    mesh = Mesh()
    model = Model(CONFIG)
    model.init_weights(3)
    policy = ShardedModel(model, mesh)
    optimizer = AdamW(policy.shards, lr=0.01)
    sampler = Sampler(model, Letters(), kv_memory=0.001, block_size=4)
    history = []
    for step in range(steps):
        with policy.gathered():
            sampler.flush()
            params = SamplingParams(temperature=1.0, max_tokens=4, seed=step)
            samples = sampler.generate([[1, 2, 3]] * group_size, params)
        rewards = [sum(token == WANTED for token in sample.token_ids) / 4 for sample in samples]
        examples = [
            Example(
                [1, 2, 3, *sample.token_ids],
                [0.0] * 3 + [1.0] * len(sample.token_ids),
                advantage=advantage,
                old_logprobs=[0.0] * 3 + sample.logprobs,
            )
            for sample, advantage in zip(samples, group_advantages(rewards).tolist(), strict=True)
        ]
        weigh(examples, count(examples), loss_type=loss_type, max_completion_tokens=4)
        loss_fn = partial(policy_loss, loss_type=loss_type)
        batches = pack(examples, 64)
        for batch in batches:
            batch.old_logprob = policy.logprobs(batch)
        updates = [
            optimise(policy, optimizer, batches, loss_fn, mesh=mesh, lr=0.01, max_grad_norm=1.0) for _ in range(passes)
        ]
        history.append((sum(rewards) / len(rewards), summarise(merged(updates).stats)))
    return history


@pytest.mark.parametrize(
    "loss_type",
    [pytest.param(name, marks=[] if name == "dapo" else pytest.mark.slow) for name in LOSS_TYPES],
)
def test_the_reward_rises_to_the_known_optimum(loss_type: str) -> None:
    passes = 1 if loss_type == "dapo" else 2
    history = learn(steps=40 // passes, group_size=32, loss_type=loss_type, passes=passes)
    assert history[0][0] < 0.2
    assert sum(reward for reward, _ in history[-3:]) / 3 > 0.9
    assert (max(metrics["ratio/max"] for _, metrics in history) > 1.1) == (passes > 1)


def test_the_sampler_and_the_trainer_agree_on_every_trained_token() -> None:
    for _, metrics in learn(steps=8, group_size=16, loss_type="dapo"):
        assert metrics["sampling/logp_difference_max"] < 1e-4
