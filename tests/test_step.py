"""One optimisation step: the same for every split and number of ranks, and not at all where something is not finite."""

import logging
import math
from functools import partial

import pytest
import torch
from distributed import run_ranks
from toys import alone, small_batches, small_loss, small_model

from groupwise.engine.optim import AdamW
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import NonFiniteError, Update, merged, optimise

LENGTHS = [1, 3, 0]  # micro-batches of each rank


def setup(mesh):
    policy = ShardedModel(small_model(), mesh)
    return policy, AdamW(policy.shards, lr=0.01, weight_decay=0.1)


def everything(policy, optimizer):
    return [t.clone() for t in [*(s.data for s in policy.shards), *optimizer.exp_avg, *optimizer.exp_avg_sq]]


def batches_of(step, rank, world_size):
    """Four micro-batches a step, dealt unevenly."""
    batches = [batch for seed in range(4) for batch in small_batches(10 * step + seed)][:4]
    if world_size == 1:
        return batches
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    return batches[bounds[rank] : bounds[rank + 1]]


def train(mesh):
    policy, optimizer = setup(mesh)
    step = partial(optimise, policy, optimizer, loss_fn=small_loss, mesh=mesh, lr=0.01, max_grad_norm=0.5)
    updates = [step(batches_of(i, mesh.rank, mesh.world_size)) for i in range(4)]
    return updates, dict(policy.state_dict_full()), [shard.grad for shard in policy.shards]


def test_ranks_with_unequal_and_no_batches_learn_as_one():
    (single, weights, _), ranks = train(alone()), run_ranks(train, 3)
    for updates, theirs, grads in ranks:
        assert updates == ranks[0][0]
        assert grads == [None] * len(grads)
        assert [u.loss for u in updates] == pytest.approx([u.loss for u in single], rel=1e-5)
        assert [u.grad_norm for u in updates] == pytest.approx([u.grad_norm for u in single], rel=1e-4)
        for name in weights:
            torch.testing.assert_close(theirs[name], weights[name], rtol=1e-4, atol=1e-5, msg=name)
    for update, other in zip(single, ranks[0][0], strict=True):
        assert update.stats["tokens"] == other.stats["tokens"] > 50
        for extreme in ("entropy_max", "logprob_min"):
            assert update.stats[extreme] == pytest.approx(other.stats[extreme], rel=1e-4)


def test_stats_are_sums_and_extremes():
    policy, optimizer = setup(alone())
    batches = batches_of(0, 0, 1)
    expected = [{name: value.item() for name, value in small_loss(policy, batch)[1].items()} for batch in batches]
    update = optimise(policy, optimizer, batches, small_loss, mesh=alone(), lr=0.01, max_grad_norm=1.0)
    for name, combine in (("tokens", sum), ("entropy_max", max), ("logprob_min", min)):
        assert update.stats[name] == pytest.approx(combine(row[name] for row in expected), rel=1e-6)


def broken_loss(policy, batch, kind, rank):
    loss, stats = small_loss(policy, batch)
    if policy.mesh.rank == rank:
        if kind == "loss":
            loss = loss + math.inf
            stats |= {"nonfinite": torch.tensor(1.0), "nonfinite_min": torch.tensor(float(len(batch.input_ids) - 1))}
        else:
            loss = loss * 1.0
            loss.register_hook(lambda grad: grad * math.inf)
    return loss, stats


def skip(mesh):
    policy, optimizer = setup(mesh)
    settings = {"mesh": mesh, "lr": 0.01, "max_grad_norm": 0.5}
    optimise(policy, optimizer, small_batches(0), small_loss, **settings)
    before, updates = everything(policy, optimizer), []
    for kind in ("loss", "gradient"):
        broken = partial(broken_loss, kind=kind, rank=mesh.world_size - 1)
        updates.append(optimise(policy, optimizer, small_batches(1), broken, **settings))
    same = all(torch.equal(a, b) for a, b in zip(before, everything(policy, optimizer), strict=True))
    counters = optimizer.steps, optimizer.skipped, optimizer.skipped_in_row
    good = optimise(policy, optimizer, small_batches(2), small_loss, **settings)
    moved = not torch.equal(before[0], policy.shards[0].data)
    return [u.skipped for u in updates], same, counters, good.skipped, moved, optimizer.skipped_in_row


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(world_size):
    for result in run_ranks(skip, 2) if world_size == 2 else [skip(alone())]:
        assert result == ([True, True], True, (1, 2, 2), False, True, 0)


def test_five_bad_steps_in_a_row_end_the_run_with_names_and_each_is_kept(tmp_path, caplog):
    policy, optimizer = setup(alone())
    broken = partial(broken_loss, kind="gradient", rank=0)
    kept = []

    def keep(update):
        kept.append(update)
        return tmp_path / f"{len(kept)}"

    settings = {"mesh": alone(), "lr": 0.01, "max_grad_norm": 0.5, "keep": keep}
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert optimise(policy, optimizer, small_batches(0), broken, **settings).skipped
    assert "4 in a row" in caplog.text
    assert f"it is kept in {tmp_path / '4'}" in caplog.text
    with pytest.raises(NonFiniteError, match=f"5 in a row.*kept in {tmp_path / '5'}") as raised:
        optimise(policy, optimizer, small_batches(3), broken, **settings)
    assert "model.layers.0.mlp.up_proj.weight" in raised.value.names
    assert [update.skipped for update in kept] == [1] * 5


def test_a_step_left_out_names_the_first_token_that_the_loss_knows_of(caplog):
    policy, optimizer = setup(alone())
    batches = small_batches(1)
    with caplog.at_level(logging.WARNING):
        broken = partial(broken_loss, kind="loss", rank=0)
        optimise(policy, optimizer, batches, broken, mesh=alone(), lr=0.01, max_grad_norm=0.5)
    first = min(batch.num_tokens for batch in batches) - 1
    assert f"; tokens with a non-finite input: {len(batches)}, the first at index {first} of its" in caplog.text


def no_batches(mesh):
    policy, optimizer = setup(mesh)
    before = everything(policy, optimizer)
    update = optimise(policy, optimizer, [], small_loss, mesh=mesh, lr=0.01, max_grad_norm=1.0)
    return update, all(torch.equal(a, b) for a, b in zip(before, everything(policy, optimizer), strict=True))


def test_where_no_rank_has_a_batch_nothing_moves():
    assert run_ranks(no_batches, 2) == [(Update(0.0, 0.0, 0.01), True)] * 2


def test_a_zero_loss_moves_nothing_without_decay():
    policy = ShardedModel(small_model(), alone())
    optimizer = AdamW(policy.shards, lr=0.01)
    before = everything(policy, optimizer)

    def zero_loss(policy, batch):
        loss, stats = small_loss(policy, batch)
        return loss * 0.0, stats

    update = optimise(policy, optimizer, small_batches(0), zero_loss, mesh=alone(), lr=0.01, max_grad_norm=1.0)
    assert (update.loss, update.grad_norm, update.skipped) == (0.0, 0.0, False)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(policy, optimizer), strict=True))


def test_updates_of_one_step_are_one_record():
    """Means of what each update has once, sums of what it counts; a loss counts only where it had tokens."""
    first = {"policy_loss": 1.0, "policy_tokens": 30.0, "sft_loss": 0.0, "sft_tokens": 0.0, "x_max": 1.0, "x_min": 1.0}
    second = {"policy_loss": 2.5, "policy_tokens": 9.0, "sft_loss": 4.0, "sft_tokens": 7.0, "x_max": 1.5, "x_min": 0.5}
    both = {"policy_loss": 1.75, "policy_tokens": 39.0, "sft_loss": 4.0, "sft_tokens": 7.0, "x_max": 1.5, "x_min": 0.5}
    record = merged([Update(1.0, 0.5, 0.1, 0, first), Update(3.0, 1.0, 0.2, 0, second)])
    assert record == Update(loss=2.0, grad_norm=0.75, lr=0.2, skipped=0, stats=both)
    assert merged([record]) == record


def test_updates_that_were_skipped_or_had_no_batches_spoil_no_mean():
    good, nothing = Update(1.0, 0.5, 0.1, 0, {"tokens": 3.0, "ratio_max": 1.0}), Update(0.0, 0.0, 0.2)
    bad = Update(math.nan, math.inf, 0.2, 1, {"tokens": 4.0, "ratio_max": math.nan})
    assert merged([bad, good, nothing, bad]) == Update(1.0, 0.5, 0.2, 2, good.stats)
    assert merged([nothing, nothing]) == nothing
    record = merged([bad, bad])
    assert math.isnan(record.loss)
    assert (record.skipped, record.stats["tokens"]) == (2, 8.0)
