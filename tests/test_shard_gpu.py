"""Sharding on a GPU: what lives in the host's memory, and the streams that bring it over, change no number."""

import pytest
import torch
from test_shard import whole_units
from toys import Toy, toy_batch, toy_loss

from groupwise.engine.mesh import Mesh
from groupwise.engine.optim import AdamW, clip_grad_norm
from groupwise.engine.shard import ShardedModel

pytestmark = pytest.mark.gpu


def trained(**options):
    """Losses and weights of five steps of two micro-batches in bfloat16, on one GPU."""
    mesh = Mesh(device=torch.device("cuda", 0))
    policy = ShardedModel(Toy(blocks=6), mesh, compute_dtype=torch.bfloat16, **options)
    optimizer = AdamW(policy.shards, lr=0.01, weight_decay=0.1)
    losses = []
    for step in range(5):
        policy.zero_grad()
        for number in range(2):
            loss = toy_loss(policy, toy_batch(2 * step + number).to(mesh.device))
            policy.backward(loss)
            losses.append(loss.item())
        clip_grad_norm(policy.shards, 0.5, mesh)
        optimizer.step()
    return losses, dict(policy.state_dict_full()), policy, optimizer


def test_offloaded_shards_are_pinned_and_learn_the_same():
    losses, weights, _, _ = trained()
    others, moved, policy, optimizer = trained(offload=True)
    kept = [*(shard.data for shard in policy.shards), *optimizer.exp_avg, *optimizer.exp_avg_sq]
    assert all(tensor.is_pinned() for tensor in kept)
    assert whole_units(policy) == []
    # AdamW on the host rounds in another order
    assert others == pytest.approx(losses, rel=1e-2)
    for name, weight in weights.items():
        torch.testing.assert_close(moved[name], weight, rtol=1e-2, atol=1e-3, msg=name)


def test_options_keep_the_losses():
    losses, _, _, _ = trained()
    for options in ({"reshard_after_forward": False}, {"activation_checkpointing": True}):
        assert trained(**options)[0] == losses, options


def test_an_offloaded_reference_equals_the_policy():
    _, _, policy, _ = trained()
    frozen = ShardedModel(Toy(blocks=6), policy.mesh, compute_dtype=torch.bfloat16, trainable=False, offload=True)
    for own, theirs in zip(frozen.shards, policy.shards, strict=True):
        own.data.copy_(theirs.data)
    batch = toy_batch(3).to(policy.mesh.device)
    with torch.no_grad():
        assert torch.equal(frozen(*batch)[0], policy(*batch)[0])
