"""Bytes between ranks against those that a training step hands to its collectives, and the page against its command."""

from dataclasses import replace
from pathlib import Path

import pytest
from distributed import CountingMesh, run_ranks
from toys import CONFIG, small_batches, small_loss, small_model

from groupwise.bench import scaling
from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.shard import ShardedModel
from groupwise.engine.traffic import count_traffic

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
DATARUS = load_config("datarus")


def with_settings(config, shard_size, **optimizer):
    return replace(scaling.sharded(config, shard_size), optimizer=replace(config.optimizer, **optimizer))


def bytes_of_a_micro_batch(mesh, shard_size, reshard):
    counting = CountingMesh(Mesh(rank=mesh.rank, world_size=4, group=mesh.group, shard_size=shard_size))
    policy = ShardedModel(small_model(), counting, reshard_after_forward=reshard)
    loss, _ = small_loss(policy, small_batches(1)[0])
    policy.backward(loss)
    return {kind: 4 * count for kind, count in counting.elements.items()}


@pytest.mark.parametrize(("shard_size", "reshard"), [(0, True), (2, False)])
def test_bytes_are_those_that_a_step_hands_to_its_collectives(shard_size, reshard):
    config = with_settings(replace(load_config(), model=CONFIG), shard_size, reshard_after_forward=reshard)
    traffic = count_traffic(config, 4, 2, "cpu")
    counted = run_ranks(bytes_of_a_micro_batch, 4, shard_size, reshard)[0]
    assert counted["gather"] == traffic.gathered
    assert counted["scatter"] == traffic.scattered
    assert counted.get("replicas", 0) == traffic.summed


def rings(size, hosts, ranks_per_host):
    """Bytes received by all ranks of a host, from it and from others, in a ring all-gather that goes host by host.

    One ring for each rank of a host, with its share of the bytes, enters the host at that rank.
    """
    total = hosts * ranks_per_host
    entering = 1 if hosts > 1 else 0  # of the ranks, by each ring
    received = size / ranks_per_host * (total - 1) / total  # by a rank, of a ring
    return ranks_per_host * (ranks_per_host - entering) * received, ranks_per_host * entering * received


@pytest.mark.parametrize("hosts", [1, 2, 128])
def test_no_more_is_received_than_rings_bring_and_no_less_than_is_missing(hosts):
    traffic = count_traffic(scaling.sharded(DATARUS, 0), 8 * hosts, 8, "cuda")
    size = traffic.gathered + traffic.scattered
    within, between = rings(size, hosts, 8)
    assert 8 * (traffic.within + traffic.between) == pytest.approx(within + between)
    assert 8 * traffic.between <= between * (1 + 1e-9)
    assert 8 * traffic.between == pytest.approx(size * (1 - 1 / hosts))  # what other hosts have


def test_copies_exchange_their_shards_alone():
    traffic = count_traffic(scaling.sharded(DATARUS, 8), 64, 8, "cuda")
    assert traffic.between == pytest.approx(2 * (1 - 1 / 8) * traffic.summed)  # a ring of 8 hosts, there and back
    both = count_traffic(scaling.sharded(DATARUS, 4), 64, 8, "cuda")  # two copies a host add theirs up first
    assert both.between == pytest.approx(traffic.between)
    assert count_traffic(scaling.sharded(DATARUS, 8), 8, 8, "cuda").summed == 0


def test_ranks_that_do_not_fill_hosts_are_refused():
    with pytest.raises(UserError, match="12 ranks, 12 for each copy of the model, do not fill hosts of 8 evenly"):
        count_traffic(scaling.sharded(DATARUS, 0), 12, 8, "cuda")


@pytest.mark.slow
def test_the_page_has_what_its_command_writes():
    first, last = scaling.MARKS
    assert PAGE.read_text().partition(first)[2].partition(last)[0].strip() == scaling.tables(DATARUS)
