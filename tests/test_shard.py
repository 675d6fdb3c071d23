"""Sharding: equal to the unsharded module, few collectives, nothing left whole, no rank left hanging."""

import copy
from collections import Counter

import pytest
import torch
import torch.utils.checkpoint
from distributed import CountingMesh, run_ranks
from torch import nn
from toys import Block, Toy, alone, small_batches, small_loss, small_model, toy_batch, toy_loss

from groupwise.engine.optim import AdamW, clip_grad_norm
from groupwise.engine.shard import ShardedModel

MICRO_BATCHES = 6  # divisible by every world size here, so that each is dealt the same global batch
LR, DECAY = 0.01, 0.1


def whole_units(policy):
    return [unit.shard.name for unit in policy._all if unit.flat.untyped_storage().size() > 0]


def gradients(policy):
    """The whole gradient by parameter name, from the shards of all ranks."""
    weights = [shard.data for shard in policy.shards]
    for shard in policy.shards:
        shard.data = shard.grad
    whole = {name: tensor for unit in policy._all for name, tensor in unit.master()}
    for shard, data in zip(policy.shards, weights, strict=True):
        shard.data = data
    return whole


def close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance / 10, msg=name)


# --- equal to the unsharded model and torch.optim.AdamW ---


def cases():
    toy = (lambda: Toy(), [toy_batch(seed) for seed in range(MICRO_BATCHES)], toy_loss)
    batches = [batch for seed in range(6) for batch in small_batches(seed)][:MICRO_BATCHES]
    return {"toy": toy, "ours": (small_model, batches, lambda m, b: small_loss(m, b)[0])}


def train_sharded(mesh, case, reshard, steps):
    make, batches, loss_fn = cases()[case]
    policy = ShardedModel(make(), mesh, reshard_after_forward=reshard)
    optimizer = AdamW(policy.shards, lr=LR, weight_decay=DECAY)
    losses, norms = [], []
    for _ in range(steps):
        policy.zero_grad()
        total = torch.zeros(())
        for batch in batches[mesh.rank :: mesh.world_size]:
            loss = loss_fn(policy, batch)
            loss.backward()
            total += loss.detach()
        losses.append(mesh.all_reduce(total).item())
        norms.append(clip_grad_norm(policy.shards, 0.5, mesh))
        optimizer.step()
    return losses, norms, dict(policy.state_dict_full()), whole_units(policy)


def train_plain(case, steps):
    make, batches, loss_fn = cases()[case]
    model = make()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = loss_fn(model, batch)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())
    return losses, norms, weights


def train_all(mesh, steps):
    return {(case, reshard): train_sharded(mesh, case, reshard, steps) for case in cases() for reshard in (True, False)}


@pytest.mark.parametrize("steps", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_steps_on_ranks_that_cut_units_at_odd_places(steps):
    ranks = run_ranks(train_all, 3, steps)
    for case, reshard in ranks[0]:
        losses, norms, weights = train_plain(case, steps)
        for rank in ranks:
            ours = rank[case, reshard]
            assert ours[0] == pytest.approx(losses, rel=1e-5)
            assert ours[0] == ranks[0][case, reshard][0]
            assert ours[1] == pytest.approx(norms, rel=1e-4)
            close(ours[2], weights, 1e-4)
            assert ours[3] == []


# --- collectives ---


def count_collectives(mesh):
    counted = {}
    for reshard in (True, False):
        mesh.calls = Counter()
        counting = CountingMesh(mesh)
        policy = ShardedModel(Toy(), counting, reshard_after_forward=reshard)
        whole_during = []
        for layer in policy.module.layers:
            layer.up.register_forward_pre_hook(lambda *_, seen=whole_during, p=policy: seen.append(len(whole_units(p))))
        toy_loss(policy, toy_batch(0)).backward()
        counted[reshard] = dict(counting.calls), dict(counting.elements), whole_during, whole_units(policy)
        policy.zero_grad()
        with torch.no_grad():
            counting.calls.clear()
            policy(*toy_batch(0))
        counted[reshard] += (dict(counting.calls), whole_units(policy))
        padded = [unit.flat.numel() for unit in policy._all]
    return counted, padded


def test_two_gathers_and_one_scatter_a_block_and_step():
    counted, padded = run_ranks(count_collectives, 2)[0]
    root, blocks = padded[0], sum(padded[1:])
    calls, elements, whole_during, left, without_graph, left_without_graph = counted[True]
    assert calls == {"gather": 1 + 2 * 3, "scatter": 1 + 3}
    assert elements == {"gather": root + 2 * blocks, "scatter": root + blocks}
    assert max(whole_during) <= 3  # the root, the block that computes, and the next one
    assert left == left_without_graph == []
    assert without_graph == {"gather": 1 + 3}
    calls, elements, _, left, without_graph, left_without_graph = counted[False]
    assert calls == {"gather": 1 + 3, "scatter": 1 + 3}
    assert left == left_without_graph == []
    assert without_graph == {"gather": 1 + 3}


def record_order(mesh):
    counting = CountingMesh(mesh)
    policy = ShardedModel(Toy(), counting)
    for module in [*policy.module.layers, policy.module.norm]:
        weight = module.up.weight if isinstance(module, Block) else module.weight
        module.register_forward_pre_hook(lambda *_: counting.events.append("f"))
        weight.register_post_accumulate_grad_hook(lambda _: counting.events.append("b"))
    toy_loss(policy, toy_batch(0)).backward()
    return "".join(counting.events)


def test_collectives_run_while_the_neighbour_computes():
    """f and b: a block's forward and backward, or the head's; a G or S before it is under way while it computes."""
    assert run_ranks(record_order, 2)[0] == "GG" + "Gf" + "Gf" + "f" + "f" + "Gb" + "Gb" + "SGb" + "Sb" + "SS"


def unequal_work(mesh):
    """Rank 1 leaves blocks out, then has a loss that does not depend on the model, then one without a graph."""
    results = []
    policy = ShardedModel(Toy(), mesh)
    leave_out = [(), (1,), (0, 2), (0, 1, 2)]
    for skipped in leave_out:
        policy.zero_grad()
        policy.backward(toy_loss(policy, toy_batch(mesh.rank), leave_out=skipped if mesh.rank == 1 else ()))
        results.append(gradients(policy))
    for other in (torch.ones((), requires_grad=True) * 2, torch.ones(())):
        policy.zero_grad()
        loss = toy_loss(policy, toy_batch(mesh.rank))
        policy.backward(other if mesh.rank == 1 else loss)
        results.append(gradients(policy))
    return results, whole_units(policy)


def test_a_rank_without_work_for_a_block_hangs_nobody():
    (results, left), _ = run_ranks(unequal_work, 2)
    assert left == []
    skips = [(), (1,), (0, 2), (0, 1, 2), None, None]
    for ours, skipped in zip(results, skips, strict=True):
        model = Toy()
        loss = toy_loss(model, toy_batch(0))
        if skipped is not None:
            loss = loss + toy_loss(model, toy_batch(1), leave_out=skipped)
        loss.backward()
        close(ours, {name: p.grad for name, p in model.named_parameters()})


# --- order of passes ---


def fail(_gradient):
    raise ArithmeticError("in the middle of the backward")


def passes(mesh):
    """Forwards without a graph between forward and backward, abandoned graphs, errors half-way, recomputation."""
    results = {}
    for reshard in (True, False):
        policy = ShardedModel(Toy(), mesh, reshard_after_forward=reshard)
        loss = toy_loss(policy, toy_batch(0))
        with torch.no_grad():
            policy(*toy_batch(5))
            with policy.gathered() as module:
                assert module(*toy_batch(5))[0].shape == (10,)
        loss.backward()
        results["between", reshard] = gradients(policy)

        policy.zero_grad()
        toy_loss(policy, toy_batch(0))  # abandoned, and the weights change
        for shard in policy.shards:
            shard.data.mul_(0.5)
        with torch.no_grad():
            results["abandoned", reshard] = toy_loss(policy, toy_batch(0)).item()

        layer = policy.module.layers[1]
        hook = layer.register_forward_hook(lambda _module, _args, output: output.register_hook(fail) and None)
        with pytest.raises(ArithmeticError):
            toy_loss(policy, toy_batch(0)).backward()
        hook.remove()
        policy.zero_grad()
        toy_loss(policy, toy_batch(0)).backward()
        results["recovered", reshard] = gradients(policy)
        policy.zero_grad()
        toy_loss(policy, toy_batch(0), checkpoint=True).backward()
        results["checkpointed", reshard] = gradients(policy)
        assert mesh.world_size == 1 or whole_units(policy) == []
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_passes_in_any_order(world_size):
    results = run_ranks(passes, world_size)[0] if world_size > 1 else passes(alone())

    def plain(factor, **options):
        model = Toy()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        loss = toy_loss(model, toy_batch(0), **options)
        (loss * world_size).backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    for reshard in (True, False):
        close(results["between", reshard], plain(1.0)[1])
        assert results["abandoned", reshard] == pytest.approx(plain(0.5)[0], rel=1e-5)
        close(results["recovered", reshard], plain(0.5)[1])
        close(results["checkpointed", reshard], plain(0.5, checkpoint=True)[1])


def test_misuse_is_said():
    policy = ShardedModel(Toy(), alone())
    stale = toy_loss(policy, toy_batch(0))
    toy_loss(policy, toy_batch(1)).backward()
    with pytest.raises(RuntimeError, match="older forward"):
        stale.backward()
    stale = toy_loss(policy, toy_batch(0))
    toy_loss(policy, toy_batch(1))
    with pytest.raises(RuntimeError, match="older forward"):
        stale.backward()
    policy.module.layers.append(policy.module.layers[0])
    with pytest.raises(RuntimeError, match=r"layers\.0 ran twice"):
        toy_loss(policy, toy_batch(0))
    with pytest.raises(ValueError, match="sharded already"):
        ShardedModel(policy.module, alone())
    with pytest.raises(ValueError, match="no attribute 'layers'"):
        ShardedModel(nn.Linear(2, 2), alone())
    frozen = Toy()
    frozen.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        ShardedModel(frozen, alone())


def late_gradient(mesh):
    policy = ShardedModel(Toy(), mesh)
    with policy.gathered():
        early = (policy.module.layers[2].up.weight ** 2).sum()  # recorded before the forward, so its gradient is last
        loss = toy_loss(policy, toy_batch(0)) + early
        with pytest.raises(RuntimeError, match=r"layers\.2\.up\.weight"):
            loss.backward()


def test_a_gradient_that_comes_too_late_is_not_lost_in_silence():
    late_gradient(alone())
    run_ranks(late_gradient, 2)


# --- whole parameters ---


def gather_all(mesh):
    original = Toy(seed=3)
    counting = CountingMesh(mesh)
    policy = ShardedModel(copy.deepcopy(original), counting)
    with policy.gathered() as module:
        gathers = counting.calls["gather"]
        same = all(torch.equal(a, b) for a, b in zip(module.parameters(), original.parameters(), strict=True))
        homes = {p.untyped_storage().data_ptr() for p in module.parameters()}
        buffers = {unit.flat.untyped_storage().data_ptr() for unit in policy._all}
        with torch.no_grad():
            difference = (module(*toy_batch(0))[0] - original(*toy_batch(0))[0]).abs().max().item()
            policy(*toy_batch(0))
            with policy.gathered():
                pass
        inside = whole_units(policy)
    quiet = counting.calls["gather"] == gathers == 4
    full = dict(policy.state_dict_full())
    tied = original.state_dict()
    tied.pop("head.weight")
    named = full.keys() == tied.keys() and all(torch.equal(full[name], tied[name]) for name in full)
    return same, homes == buffers, difference, len(inside), quiet, whole_units(policy), named


def test_gathered_is_whole_without_a_copy_and_freed_after():
    for same, in_place, difference, inside, quiet, left, named in run_ranks(gather_all, 2):
        assert same
        assert in_place
        assert difference == 0
        assert inside == 4
        assert quiet
        assert left == []
        assert named


def test_a_world_of_one_is_the_module_itself():
    policy = ShardedModel(Toy(), alone())
    storages = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    assert storages == {shard.data.untyped_storage().data_ptr() for shard in policy.shards}
    toy_loss(policy, toy_batch(0)).backward()
    toy_loss(policy, toy_batch(0)).backward()
    model = Toy()
    (2 * toy_loss(model, toy_batch(0))).backward()
    close(gradients(policy), {name: p.grad for name, p in model.named_parameters()})
    policy.zero_grad()
    assert all(shard.grad is None for shard in policy.shards)


# --- precision and generality ---


def in_bfloat16(mesh):
    policy = ShardedModel(Toy(), mesh, compute_dtype=torch.bfloat16)
    seen = []
    policy.module.layers[0].register_forward_pre_hook(lambda m, _: seen.append(m.up.weight.dtype))
    for _ in range(2):
        toy_loss(policy, toy_batch(mesh.rank)).backward()
    dtypes = {shard.data.dtype for shard in policy.shards} | {shard.grad.dtype for shard in policy.shards}
    return gradients(policy), seen[0], dtypes, whole_units(policy)


@pytest.mark.parametrize("world_size", [1, 2])
def test_bfloat16_computes_and_float32_keeps(world_size):
    ours, computed, kept, left = run_ranks(in_bfloat16, 2)[0] if world_size == 2 else in_bfloat16(alone())
    assert computed == torch.bfloat16
    assert kept == {torch.float32}
    assert left == []
    truth, plain = Toy(), Toy().to(torch.bfloat16)
    expected = {name: torch.zeros_like(p) for name, p in truth.named_parameters()}
    for rank in range(world_size):
        plain.zero_grad()
        (toy_loss(truth, toy_batch(rank)) * 2).backward()
        toy_loss(plain, toy_batch(rank)).backward()
        for name, parameter in plain.named_parameters():
            expected[name] += 2 * parameter.grad.float()
    for name, parameter in truth.named_parameters():
        error, allowed = (ours[name] - parameter.grad).norm(), (expected[name] - parameter.grad).norm()
        assert error <= 1.5 * allowed + 1e-6, name


class Odd(nn.Module):
    """Blocks under another name, one weight in two blocks, no root parameter before them, dict out, float inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([Block(), nn.Sequential(Block(), Block()), Block()])
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"out": [x + self.bias]}


def odd_gradients(mesh):
    policy = ShardedModel(Odd(), mesh, units=lambda module: module.blocks)
    x = torch.arange(24.0).view(2, 12) / 24
    policy(x + mesh.rank)["out"][0].square().sum().backward()
    return gradients(policy), [slot.name for slot in policy.shards[0].slots]


def test_any_module_with_blocks():
    grads, root = run_ranks(odd_gradients, 2)[1]
    assert root == ["blocks.0.up.weight", "bias"]
    model = Odd()
    x = torch.arange(24.0).view(2, 12) / 24
    sum(model(x + rank)["out"][0].square().sum() for rank in range(2)).backward()
    close(grads, {name: p.grad for name, p in model.named_parameters()})


def test_without_blocks_everything_is_the_root():
    policy = ShardedModel(nn.Linear(3, 2), alone(), units=[])
    policy(torch.ones(1, 3)).sum().backward()
    assert [shard.name for shard in policy.shards] == [""]
    assert gradients(policy)["weight"].tolist() == [[1.0] * 3] * 2
