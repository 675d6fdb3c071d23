"""The reference: the policy's log-probabilities of the moment it was frozen, and nothing that could move it."""

import pytest
import torch
from distributed import run_ranks
from toys import Toy, alone, small_batches, small_loss, small_model

from groupwise.engine.batch import empty_batch
from groupwise.engine.reference import Reference
from groupwise.engine.shard import ShardedModel


def freeze(mesh):
    policy = ShardedModel(small_model(seed=1), mesh)
    reference = Reference(small_model(seed=2), mesh)
    half = Reference(small_model(seed=1), mesh, torch.bfloat16)
    batch = small_batches(0)[0] if mesh.rank == 0 else empty_batch()
    before = reference.logprobs(batch, 0.7)
    reference.load_from(policy)
    frozen = policy.logprobs(batch, 0.7)
    small_loss(policy, batch)[0].backward()
    for shard in policy.shards:
        shard.data.add_(shard.grad)
    results = before, frozen, reference.logprobs(batch, 0.7), policy.logprobs(batch, 0.7), half.logprobs(batch, 0.7)
    left = [p.untyped_storage().size() for p in reference.sharded.module.parameters()]
    assert not any(result.requires_grad for result in results)
    assert all(shard.data.dtype == torch.bfloat16 for shard in half.sharded.shards)
    return *results, sum(left)


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_when_loaded(world_size):
    ranks = run_ranks(freeze, 2) if world_size == 2 else [freeze(alone())]
    before, frozen, after, moved, half, left = ranks[0]
    plain = small_model(seed=1)
    batch = small_batches(0)[0]
    expected = ShardedModel(plain, alone()).logprobs(batch, 0.7)
    assert frozen.dtype == torch.float32
    torch.testing.assert_close(frozen, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, frozen)
    assert (before - frozen).abs().max() > 0.01
    assert (moved - frozen).abs().max() > 1e-4
    assert (half - frozen).abs().max() < 0.2
    assert world_size == 1 or left == 0


def test_a_policy_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="other parameters"):
        Reference(Toy(blocks=3), alone()).load_from(ShardedModel(small_model(), alone()))
