"""Steps by three roads: our sharding, PyTorch's ``fully_shard``, and the unsharded model with torch.optim.AdamW.

float32 on gloo. The three add the same numbers: where they add them in the same order, losses are equal to the bit.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from toys import Toy, alone, small_batches, small_loss, small_model, toy_batch, toy_loss

from groupwise.engine.mesh import Mesh
from groupwise.engine.optim import AdamW, clip_grad_norm
from groupwise.engine.shard import ShardedModel

MICRO_BATCHES = 4  # of all ranks together: each takes as many in turn
LR, DECAY, MAX_NORM = 0.002, 0.1, 0.5


@dataclass(frozen=True)
class Road:
    """How a model is sharded and trained."""

    model: str = "ours"
    reshard: bool = True
    recompute: bool = False
    reduce_every_microbatch: bool = True
    exact: bool = False  # plain descent without clipping: no rounding depends on where an element lies
    steps: int = 3


def parts(road):
    if road.model == "toy":
        return Toy, [toy_batch(seed) for seed in range(MICRO_BATCHES)], toy_loss
    batches = [batch for seed in range(6) for batch in small_batches(seed)][:MICRO_BATCHES]
    return small_model, batches, lambda model, batch: small_loss(model, batch)[0]


def train_ours(mesh, road):
    make, batches, loss_fn = parts(road)
    mine = batches[mesh.rank :: mesh.world_size]
    policy = ShardedModel(make(), mesh, reshard_after_forward=road.reshard, activation_checkpointing=road.recompute)
    optimizer = AdamW(policy.shards, lr=LR, weight_decay=DECAY)
    losses, norms = [], []
    for _ in range(road.steps):
        policy.zero_grad()
        total = torch.zeros(())
        for number, batch in enumerate(mine, 1):
            loss = loss_fn(policy, batch)
            policy.backward(loss, reduce=road.reduce_every_microbatch or number == len(mine))
            total += loss.detach()
        losses.append(mesh.all_reduce(total).item())
        if road.exact:
            for shard in policy.shards:
                shard.data.sub_(shard.grad * LR)
            continue
        norms.append(clip_grad_norm(policy.shards, MAX_NORM, mesh))
        optimizer.step()
    return losses, norms, dict(policy.state_dict_full())


def train_theirs(mesh, road):
    """The same with ``fully_shard``; gradients are summed, as ours are, and not averaged."""
    make, batches, loss_fn = parts(road)
    mine = batches[mesh.rank :: mesh.world_size]
    model = make()
    if road.recompute:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    shape = (mesh.num_replicas, mesh.shard_size) if mesh.num_replicas > 1 else (mesh.shard_size,)
    grid = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for module in [*model.layers, model]:
        fully_shard(module, mesh=grid, reshard_after_forward=road.reshard)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    optimizer = torch.optim.AdamW(groups(model), lr=LR, fused=True)
    losses, norms = [], []
    for _ in range(road.steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for number, batch in enumerate(mine, 1):
            model.set_requires_gradient_sync(road.reduce_every_microbatch or number == len(mine))
            loss = loss_fn(model, batch)
            loss.backward()
            total += loss.detach()
        losses.append(mesh.all_reduce(total).item())
        if road.exact:
            descend(model)
            continue
        norms.append(clip_grad_norm_(model.parameters(), MAX_NORM).full_tensor().item())
        optimizer.step()
    return losses, norms


def train_unsharded(road):
    make, batches, loss_fn = parts(road)
    model = make()
    optimizer = torch.optim.AdamW(groups(model), lr=LR, fused=True)
    losses, norms = [], []
    for _ in range(road.steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = loss_fn(model, batch)
            loss.backward()
            total += loss.detach()
        losses.append(total.item())
        if road.exact:
            descend(model)
            continue
        norms.append(clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def descend(model):
    for parameter in model.parameters():
        parameter.sub_(parameter.grad * LR)


def groups(model):
    """Decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]


ROADS = [
    Road("toy"),
    Road(),
    Road(recompute=True),
    Road(reduce_every_microbatch=False),
    Road(recompute=True, reduce_every_microbatch=False, reshard=False),
]
EXACT = [Road("toy", exact=True), Road(exact=True), Road(exact=True, recompute=True, reshard=False)]
LONG = [replace(road, steps=20) for road in ROADS]
FOUR = [replace(road, steps=6) for road in (ROADS[0], ROADS[1], Road(recompute=True, reduce_every_microbatch=False))]
HYBRID = [Road("toy", recompute=True), Road(reduce_every_microbatch=False)]


def both(mesh, roads):
    return [(train_ours(mesh, road), train_theirs(mesh, road)) for road in roads]


def with_copies(mesh, roads, shard_size):
    """The same ranks as a grid of copies of the model."""
    grid = Mesh(rank=mesh.rank, world_size=mesh.world_size, backend="gloo", group=mesh.group, shard_size=shard_size)
    return both(grid, roads)


def check(ranks, roads):
    for number, road in enumerate(roads):
        plain_losses, plain_norms, plain_weights = train_unsharded(road)
        for rank in ranks:
            (losses, norms, weights), (their_losses, their_norms) = rank[number]
            assert losses == ranks[0][number][0][0]
            assert losses == pytest.approx(their_losses, rel=1e-6), road
            assert losses == pytest.approx(plain_losses, rel=1e-6), road
            assert norms == pytest.approx(their_norms, rel=1e-5), road
            assert norms == pytest.approx(plain_norms, rel=1e-5), road
            for name, weight in plain_weights.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("world_size", "roads"),
    [
        (2, ROADS),
        pytest.param(2, LONG, marks=pytest.mark.slow),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_fully_shard_and_the_unsharded_model(world_size, roads):
    check(run_ranks(both, world_size, roads), roads)


@pytest.mark.parametrize("shard_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_so_do_copies_of_the_model(shard_size):
    check(run_ranks(with_copies, 4, HYBRID, shard_size), HYBRID)


def test_the_same_sums_in_the_same_order_are_equal_to_the_bit():
    """Two ranks add as fully_shard does, and one rank as the model without sharding."""
    for rank in run_ranks(both, 2, EXACT):
        for ours, theirs in rank:
            assert ours[0] == theirs[0]
    for road in EXACT:
        assert train_ours(alone(), road)[0] == train_unsharded(road)[0], road
