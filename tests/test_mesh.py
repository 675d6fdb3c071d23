"""The mesh: one rank without a process group, several ranks with one, and a clean end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks

from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh


@pytest.fixture
def no_launch(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_world_of_one_has_no_group_and_changes_nothing(no_launch):
    mesh = Mesh.create()
    assert (mesh.rank, mesh.world_size, mesh.group, mesh.device.type) == (0, 1, None, "cpu")
    tensor = torch.tensor([1.0, 2.0])
    assert mesh.all_reduce(tensor, "max") is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert mesh.all_gather_object("x") == ["x"]
    assert mesh.broadcast_object(3) == 3
    mesh.barrier()
    mesh.close()
    mesh.close()
    assert "no GPU" in mesh.describe()


def test_fewer_gpus_than_ranks_is_said(no_launch):
    no_launch.setattr(torch.cuda, "is_available", lambda: True)
    no_launch.setattr(torch.cuda, "device_count", lambda: 1)
    no_launch.setattr(torch, "set_num_threads", lambda n: None)
    no_launch.setenv("LOCAL_WORLD_SIZE", "2")
    mesh = Mesh.create()
    assert mesh.device.type == "cpu"
    assert "1 GPU for 2 ranks" in mesh.describe()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", "5")])
def test_a_broken_environment_is_named(no_launch, name, value):
    no_launch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        Mesh.create()


def collectives(mesh):
    tensor = torch.tensor([float(mesh.rank + 1), -float(mesh.rank)])
    sums, high, low = (mesh.all_reduce(tensor.clone(), op).tolist() for op in ("sum", "max", "min"))
    whole = torch.zeros(2 * mesh.world_size)
    own = whole[2 * mesh.rank : 2 * mesh.rank + 2]
    own.copy_(tensor)
    mesh.all_gather_into(whole, own).wait()
    summed = whole + mesh.rank
    mesh.reduce_scatter(summed).wait()
    part = summed[2 * mesh.rank : 2 * mesh.rank + 2]
    return sums, high, low, whole, part, mesh.all_gather_object({"r": mesh.rank}), mesh.broadcast_object(mesh.rank, 2)


def test_collectives_of_three_ranks():
    for rank, (sums, high, low, whole, part, objects, source) in enumerate(run_ranks(collectives, 3)):
        assert sums == [6.0, -3.0]
        assert high == [3.0, 0.0]
        assert low == [1.0, -2.0]
        assert whole.tolist() == [1.0, 0.0, 2.0, -1.0, 3.0, -2.0]
        assert part.tolist() == [3.0 * (rank + 1) + 3, -3.0 * rank + 3]
        assert objects == [{"r": 0}, {"r": 1}, {"r": 2}]
        assert source == 2


def in_a_grid(mesh):
    """What each kind of collective gives on a rank that contributes 10 ** rank."""
    own = torch.full((2,), 10.0**mesh.rank)
    sums = {over: mesh.all_reduce(own.clone(), over=over)[0].item() for over in ("world", "shards", "replicas")}
    whole, summed, column = torch.zeros(2 * mesh.shard_size), own.repeat(mesh.shard_size), own.clone()
    works = [mesh.all_gather_into(whole, own), mesh.reduce_scatter(summed), mesh.sum_replicas(column)]
    assert [work is None for work in works] == [mesh.shard_size == 1] * 2 + [mesh.num_replicas == 1]
    for work in works:
        if work is not None:
            work.wait()
    first, last = (mesh.broadcast(own.clone(), rank)[0].item() for rank in (0, mesh.shard_size - 1))
    part = summed[2 * mesh.shard_rank :]
    place = (mesh.shard_rank, mesh.replica_rank)
    return place, sums, whole[::2].tolist(), part[0].item(), column[0].item(), first, last


# gloo in the forms that suit it, and in those of other backends
GRIDS = [(size, backend) for size in (1, 2, 4) for backend in ("gloo", "other")]


def grids(mesh):
    # More meshes over the one process group: its rendezvous is for one alone.
    return [
        in_a_grid(Mesh(rank=mesh.rank, world_size=4, group=mesh.group, shard_size=size, backend=backend))
        for size, backend in GRIDS
    ]


def test_every_collective_is_over_its_row_or_its_column():
    for rank, results in enumerate(run_ranks(grids, 4)):
        for (size, _), (place, sums, whole, part, column, first, last) in zip(GRIDS, results, strict=True):
            row = [10.0**peer for peer in range(4) if peer // size == rank // size]
            down = [10.0**peer for peer in range(4) if peer % size == rank % size]
            assert place == (rank % size, rank // size)
            assert sums == {"world": 1111.0, "shards": sum(row), "replicas": sum(down)}
            assert whole == (row if size > 1 else [0.0])
            assert part == sum(row)
            assert column == sum(down)
            assert (first, last) == (row[0], row[-1])


@pytest.mark.parametrize(("ranks", "shard_size"), [(4, 3), (4, 8), (1, 2)])
def test_a_shard_size_that_does_not_divide_is_refused_before_the_ranks_meet(no_launch, ranks, shard_size):
    no_launch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=f"shard_size is {shard_size}, which does not divide the {ranks} ranks"):
        Mesh.create(shard_size=shard_size, init_method="file:///dev/null/nowhere")


def test_copies_of_the_model_are_described():
    mesh = Mesh(world_size=4, rank=3, shard_size=2, backend="gloo")
    assert "4 ranks over gloo (2 copies of the model, each on 2)" in mesh.describe()


def fails_on_one(mesh):
    if mesh.rank == 1:
        raise ValueError("this rank breaks")
    mesh.barrier()


def test_a_rank_that_fails_ends_the_others_and_is_reported():
    with pytest.raises(RuntimeError, match="this rank breaks"):
        run_ranks(fails_on_one, 2)


TRAINS_A_STEP = """
import sys, torch
from groupwise.engine import AdamW, Mesh, Model, ShardedModel
from groupwise.engine.model import PackedAttention
from toys import CONFIG
mesh = Mesh.create(timeout_s=200, init_method='file://' + sys.argv[1])
model = ShardedModel(Model(CONFIG), mesh)
optimizer = AdamW(model.shards, lr=0.1)
ids = torch.arange(8)
logprob, _ = model(ids, ids, PackedAttention(torch.tensor([0, 8], dtype=torch.int32), 8), targets=ids)
model.backward(-logprob.sum())
optimizer.step()
mesh.close()
"""


def end_of_two_ranks(folder):
    """Status and errors of two interpreters that train one step; their own end is part of it."""
    ranks = []
    for rank in range(2):
        launch = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        env = os.environ | {name: str(value) for name, value in launch.items()}
        path = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", TRAINS_A_STEP, f"{folder}/rendezvous"]
        env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        return [(process.communicate(timeout=240)[1], process.returncode) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("launches", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_processes_end_cleanly(launches, tmp_path):
    unclean = []
    for launch in range(launches):
        folder = tmp_path / str(launch)
        folder.mkdir()
        ends = end_of_two_ranks(folder)
        if [status for _, status in ends] != [0, 0]:
            unclean.append(ends)
    assert not unclean, f"{len(unclean)} of {launches} launches: {unclean[0]}"
