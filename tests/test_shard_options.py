"""What sharding can be asked for: each option leaves the numbers alone, and moves the bytes that it should."""

import dataclasses

import pytest
import torch
from distributed import CountingMesh, run_ranks
from test_shard import close, gradients, whole_units
from toys import CONFIG, Toy, alone, small_batches, small_loss, small_model, toy_batch, toy_loss

from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.optim import AdamW, clip_grad_norm
from groupwise.engine.shard import ShardedModel


def grid(mesh, shard_size):
    """More meshes over the one process group."""
    return Mesh(rank=mesh.rank, world_size=mesh.world_size, backend="gloo", group=mesh.group, shard_size=shard_size)


# --- bytes ---


def traffic(mesh):
    """Two micro-batches under each option: elements and types of what travels, and those of the units."""
    results = {}
    for shard_size, reduce_dtype, every in (
        (4, torch.float32, True),
        (4, torch.bfloat16, True),
        (4, torch.float32, False),
        (2, torch.float32, True),
        (2, torch.bfloat16, False),
        (1, torch.float32, True),
    ):
        counting = CountingMesh(grid(mesh, shard_size))
        policy = ShardedModel(Toy(), counting, compute_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        for last in (False, True):
            policy.backward(toy_loss(policy, toy_batch(mesh.rank + 4 * last)), reduce=every or last)
        units = [unit.flat.numel() for unit in policy._all]
        counted = dict(counting.calls), dict(counting.elements), counting.dtypes
        results[shard_size, reduce_dtype, every] = *counted, units, gradients(policy), len(whole_units(policy))
    return results


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(traffic, 4)


def test_bytes_that_travel_are_those_of_the_formula(four_ranks):
    for (shard_size, reduce_dtype, every), (calls, elements, dtypes, units, _, left) in four_ranks[1].items():
        root, blocks, passes = units[0], sum(units[1:]), 2
        reductions = passes if every else 1
        kinds = {"gather": torch.bfloat16, "scatter": reduce_dtype, "replicas": reduce_dtype}
        expected = {"gather": passes * (1 + 2 * 3), "scatter": reductions * 4, "replicas": reductions * 4}
        volume = {
            "gather": passes * (root + 2 * blocks),
            "scatter": reductions * (root + blocks),
            "replicas": reductions * (root + blocks) // shard_size,
        }
        absent = {"replicas"} if shard_size == 4 else set()
        assert calls == {kind: count for kind, count in expected.items() if kind not in absent}
        assert elements == {kind: count for kind, count in volume.items() if kind not in absent}
        assert dtypes == {(kind, dtype) for kind, dtype in kinds.items() if kind not in absent}
        assert left == 0


def test_every_option_gives_the_same_gradient(four_ranks):
    """As close to float32 as plain bfloat16 summed in float32 is, or, where sums are in bfloat16, as those are."""
    truth, plain = Toy(), Toy().to(torch.bfloat16)
    summed = {name: torch.zeros_like(p) for name, p in truth.named_parameters()}
    coarse = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in truth.named_parameters()}
    for seed in range(8):
        plain.zero_grad()
        toy_loss(truth, toy_batch(seed)).backward()
        toy_loss(plain, toy_batch(seed)).backward()
        for name, parameter in plain.named_parameters():
            summed[name] += parameter.grad.float()
            coarse[name] += parameter.grad
    for rank in four_ranks:
        for (_, reduce_dtype, _), (*_, ours, _) in rank.items():
            expected = summed if reduce_dtype == torch.float32 else coarse
            for name, parameter in truth.named_parameters():
                error, allowed = (ours[name] - parameter.grad).norm(), (expected[name] - parameter.grad).norm()
                assert error <= 1.5 * allowed + 1e-6, (name, reduce_dtype)


# --- where weights live and come from ---


def trained(mesh, module, **options):
    """Losses and weights of three steps of two micro-batches."""
    policy = ShardedModel(module, mesh, **options)
    optimizer = AdamW(policy.shards, lr=0.01, weight_decay=0.1)
    batches = [batch for seed in range(6) for batch in small_batches(seed)][mesh.rank : 8 : mesh.world_size]
    losses = []
    for _ in range(3):
        policy.zero_grad()
        for batch in batches[:2]:
            loss, _ = small_loss(policy, batch)
            policy.backward(loss)
            losses.append(loss.item())
        clip_grad_norm(policy.shards, 0.5, mesh)
        optimizer.step()
    return losses, dict(policy.state_dict_full())


def offloaded(mesh):
    plain = trained(mesh, small_model())
    kept = trained(mesh, small_model(), offload=True)
    policy = ShardedModel(small_model(), mesh, offload=True)
    apart = all(unit.flat.data_ptr() != unit.shard.data.data_ptr() for unit in policy._all)
    same = plain[0] == kept[0] and all(torch.equal(kept[1][name], tensor) for name, tensor in plain[1].items())
    return same, apart, len(whole_units(policy))


@pytest.mark.parametrize("world_size", [1, 2])
def test_offloaded_shards_learn_the_same_to_the_bit(world_size):
    for same, apart, left in run_ranks(offloaded, 2) if world_size == 2 else [offloaded(alone())]:
        assert same
        assert apart
        assert left == 0


def from_nothing(mesh):
    with torch.device("meta"):
        model = Model(CONFIG)
    policy = ShardedModel(model, mesh)
    policy.fill(model.initial_weights(3))
    whole = Model(CONFIG)
    whole.init_weights(3)
    equal = dict(policy.state_dict_full()).keys() == dict(whole.named_parameters()).keys() and all(
        torch.equal(tensor, whole.get_parameter(name)) for name, tensor in policy.state_dict_full()
    )
    batch = small_batches(mesh.rank)[0]
    loss, _ = small_loss(policy, batch)
    policy.backward(loss)
    expected, _ = small_loss(whole, batch)
    tied = policy.module.output_weight is policy.module.model.embed_tokens.weight
    return equal, loss.item() == expected.item(), tied, gradients(policy)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_made_on_the_meta_device_is_filled_shard_by_shard(world_size):
    ranks = run_ranks(from_nothing, 3) if world_size == 3 else [from_nothing(alone())]
    whole = Model(CONFIG)
    whole.init_weights(3)
    for rank in range(world_size):
        small_loss(whole, small_batches(rank)[0])[0].backward()
    for equal, same_loss, tied, grads in ranks:
        assert equal
        assert same_loss
        assert tied
        close(grads, {name: parameter.grad for name, parameter in whole.named_parameters()})


def test_what_does_not_fill_the_model_is_named():
    policy = ShardedModel(Toy(), alone())
    weights = dict(Toy(seed=4).named_parameters())
    with pytest.raises(ValueError, match=r"no values for layers\.2\.up\.weight"):
        policy.fill((name, weight) for name, weight in weights.items() if name != "layers.2.up.weight")
    with pytest.raises(ValueError, match=r"other of shape \[3\] is no parameter"):
        policy.fill({**weights, "other": torch.zeros(3)}.items())
    with pytest.raises(ValueError, match=r"norm\.weight of shape \[3\]"):
        policy.fill({**weights, "norm.weight": torch.zeros(3)}.items())
    policy.fill(weights.items())
    close(dict(policy.module.named_parameters()), weights)
    with torch.device("meta"):
        buffered = Toy()
    with pytest.raises(ValueError, match=r"buffer scale is on the meta"):
        ShardedModel(buffered, alone())


# --- recomputation ---


def test_recomputed_blocks_keep_their_inputs_alone():
    """The backward pass runs each block once more, and until then nothing of its inside is kept."""
    plain, recomputed = recomputation(False), recomputation(True)
    assert plain[0] == [2] * 4
    assert recomputed[0] == [3] * 4
    assert recomputed[1] < plain[1] / 2
    for name, gradient in plain[2].items():
        assert torch.equal(gradient, recomputed[2][name])


def recomputation(recompute):
    """How often each block ran in a step and a forward without a graph, what was kept between, and the gradients."""
    module, runs, kept = Toy(blocks=4), [0] * 4, []

    def count(index):
        runs[index] += 1

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    for index, layer in enumerate(module.layers):
        layer.up.register_forward_hook(lambda *_, i=index: count(i))
    policy = ShardedModel(module, alone(), activation_checkpointing=recompute)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = toy_loss(policy, toy_batch(0))
    policy.backward(loss)
    with torch.no_grad():
        policy(*toy_batch(0))
    return runs, sum(kept), gradients(policy)


# --- the head's gradient over micro-batches ---


def accumulate(mesh, tied, together):
    """The gradient of three micro-batches, summed on the rank first or one step each; who was lent a place for sums."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    policy = ShardedModel(Model(config), mesh, compute_dtype=torch.bfloat16)
    batches, lent, total = small_batches(3) + small_batches(4) + small_batches(5), [], 0.0
    for number, batch in enumerate(batches):
        loss, _ = small_loss(policy, batch)
        lent.append(getattr(policy.module.output_weight, "main_grad", None) is not None)
        policy.backward(loss, reduce=not together or number == len(batches) - 1)
        if not together:
            total = total + torch.cat([shard.grad.clone() for shard in policy.shards])
            policy.zero_grad()
    return torch.cat([shard.grad for shard in policy.shards]) if together else total, lent


def accumulate_both_ways(mesh, tied):
    return accumulate(mesh, tied, True), accumulate(mesh, tied, False)


@pytest.mark.parametrize("tied", [True, False])
def test_later_micro_batches_add_the_heads_gradient_to_the_sum_itself(tied):
    for results in (run_ranks(accumulate_both_ways, 2, tied), [accumulate_both_ways(alone(), tied)]):
        for (summed, lent), (apart, never) in results:
            assert lent[0] is False
            assert all(lent[1:])
            assert not any(never)
            torch.testing.assert_close(summed, apart, rtol=2e-2, atol=2e-3)  # gradients of bfloat16 micro-batches
            assert summed.abs().max() > 0.05
