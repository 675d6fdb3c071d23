"""AdamW on shards equals torch.optim.AdamW, decays matrices alone, and clips by the norm of the whole model."""

import math

import pytest
import torch
from distributed import run_ranks
from toys import Toy, alone, toy_batch, toy_loss

from groupwise.engine import optim
from groupwise.engine.errors import UserError
from groupwise.engine.optim import AdamW, clip_grad_norm
from groupwise.engine.shard import ShardedModel


def decay_only(mesh):
    """Without a gradient only the decay moves a weight."""
    policy = ShardedModel(Toy(), mesh)
    optimizer = AdamW(policy.shards, lr=0.1, weight_decay=0.5)
    for shard in policy.shards:
        shard.grad = torch.zeros_like(shard.data)
    optimizer.step()
    return dict(policy.state_dict_full())


@pytest.mark.parametrize("world_size", [1, 3])
def test_only_matrices_decay(world_size):
    after = run_ranks(decay_only, 3)[0] if world_size > 1 else decay_only(alone())
    for name, parameter in Toy().named_parameters():
        expected = parameter.detach() * (0.95 if parameter.ndim >= 2 else 1.0)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0, msg=name)


def test_the_step_uses_its_learning_rate_and_counts():
    policy = ShardedModel(Toy(), alone())
    optimizer = AdamW(policy.shards, lr=1.0, betas=(0.8, 0.9), eps=1e-7)
    twin = Toy()
    theirs = torch.optim.AdamW(twin.parameters(), lr=1.0, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.0)
    for step in range(4):
        for model in (policy, twin):
            model.zero_grad()
            toy_loss(model, toy_batch(step)).backward()
        optimizer.step(0.01 * step)
        theirs.param_groups[0]["lr"] = 0.01 * step
        theirs.step()
    assert optimizer.steps == 4
    for name, tensor in policy.state_dict_full():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_state_dict_continues_to_the_last_bit():
    def run(interrupted):
        policy = ShardedModel(Toy(), alone())
        optimizer = AdamW(policy.shards, lr=0.01)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = AdamW(policy.shards, lr=0.01)
                optimizer.load_state_dict(state)
            policy.zero_grad()
            toy_loss(policy, toy_batch(step)).backward()
            optimizer.step()
        return torch.cat([shard.data for shard in policy.shards])

    assert torch.equal(run(True), run(False))


def clipped(mesh, max_norm):
    policy = ShardedModel(Toy(), mesh)
    toy_loss(policy, toy_batch(mesh.rank)).backward()
    before = clip_grad_norm(policy.shards, max_norm, mesh)
    return before, clip_grad_norm(policy.shards, 0.0, mesh)


def clipped_twice(mesh):
    return clipped(mesh, 0.01), clipped(mesh, 100.0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_norm_is_that_of_the_whole_model(world_size):
    model = Toy()
    sum(toy_loss(model, toy_batch(rank)) for rank in range(world_size)).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    for low, high in run_ranks(clipped_twice, 2) if world_size == 2 else [clipped_twice(alone())]:
        assert low == pytest.approx((norm, 0.01), rel=1e-4)
        assert high == pytest.approx((norm, norm), rel=1e-5)


def test_a_norm_that_is_not_finite_scales_nothing():
    policy = ShardedModel(Toy(), alone())
    toy_loss(policy, toy_batch(0)).backward()
    policy.shards[1].grad[3] = math.nan
    before = [shard.grad.clone() for shard in policy.shards]
    assert math.isnan(clip_grad_norm(policy.shards, 1e-3, alone()))
    assert all(torch.equal(a.nan_to_num(7), s.grad.nan_to_num(7)) for a, s in zip(before, policy.shards, strict=True))
    assert policy.shards[1].nonfinite() == ["layers.0.up.weight"]


def test_misuse_is_said():
    policy = ShardedModel(Toy(), alone())
    with pytest.raises(RuntimeError, match="no gradient"):
        AdamW(policy.shards, lr=0.1).step()
    for wrong in ({"lr": -1.0}, {"lr": math.nan}, {"lr": 0.1, "betas": (0.9, 1.0)}):
        with pytest.raises(UserError):
            AdamW(policy.shards, **wrong)


@pytest.mark.parametrize("chunk", [2**24, 7])
def test_bfloat16_moments_are_rounded_after_each_step_and_used_in_float32(chunk, monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", chunk)
    policy = ShardedModel(Toy(), alone())
    optimizer = AdamW(policy.shards, lr=0.01, betas=(0.9, 0.95), moments_dtype=torch.bfloat16)
    expected = [shard.data.double() for shard in policy.shards]
    first, second = ([torch.zeros_like(data) for data in expected] for _ in range(2))
    for step in range(1, 4):
        policy.zero_grad()
        toy_loss(policy, toy_batch(step)).backward()
        for index, shard in enumerate(policy.shards):
            grad = shard.grad.double()
            m, v = 0.9 * first[index] + 0.1 * grad, 0.95 * second[index] + 0.05 * grad**2
            expected[index] -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            first[index], second[index] = (moment.bfloat16().double() for moment in (m, v))
        optimizer.step()
    for index, shard in enumerate(policy.shards):
        assert optimizer.exp_avg[index].dtype == optimizer.exp_avg_sq[index].dtype == torch.bfloat16
        torch.testing.assert_close(shard.data.double(), expected[index], rtol=1e-3, atol=1e-4)


def test_moments_that_would_stand_still_are_refused():
    policy = ShardedModel(Toy(), alone())
    with pytest.raises(UserError, match="bfloat16 moments stand still"):
        AdamW(policy.shards, lr=0.1, betas=(0.9, 0.999), moments_dtype=torch.bfloat16)
    for beta, falls in ((0.996, True), (0.998, False)):
        value = torch.arange(128, 256).bfloat16()  # every mantissa
        assert (value * beta < value).all() == falls
