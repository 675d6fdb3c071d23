"""The mesh: one rank without a process group, several ranks with one, and a clean end."""

import os
import subprocess
import sys
import tempfile

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


def fails_on_one(mesh):
    if mesh.rank == 1:
        raise ValueError("this rank breaks")
    mesh.barrier()


def test_a_rank_that_fails_ends_the_others_and_is_reported():
    with pytest.raises(RuntimeError, match="this rank breaks"):
        run_ranks(fails_on_one, 2)


def test_processes_end_cleanly():
    """The interpreter's own end is part of it: run_ranks' processes skip that."""
    program = (
        "import sys, torch\n"
        "from groupwise.engine.mesh import Mesh\n"
        "mesh = Mesh.create(timeout_s=200, init_method='file://' + sys.argv[1])\n"
        "works = [mesh.all_gather_into(torch.zeros(4), torch.ones(2)) for _ in range(3)]\n"
        "[work.wait() for work in works]\n"
        "mesh.close()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            launch = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
            env = os.environ | {name: str(value) for name, value in launch.items()} | {"CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-c", program, f"{folder}/rendezvous"]
            ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            ends = [(rank.communicate(timeout=240)[1], rank.returncode) for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
    assert [status for _, status in ends] == [0, 0], ends
