"""Runs that are killed in the middle of a save, again and again, and lose nothing that had been saved."""

import collections
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from distributed import PRELOAD, _rank, run_ranks
from torch import nn
from toys import Toy

from groupwise.engine.checkpoint import load_checkpoint, save_checkpoint
from groupwise.engine.manifest import list_checkpoints
from groupwise.engine.mesh import Mesh
from groupwise.engine.optim import AdamW
from groupwise.engine.saver import Saver
from groupwise.engine.shard import ShardedModel

FORKS = multiprocessing.get_context("forkserver")  # of a server that has torch imported: 200 lives are affordable
FORKS.set_forkserver_preload(PRELOAD)
SAVE_S = 0.08  # about what a save and the step beside it take


class Wide(nn.Module):
    """Parts of 12 MB, which take tens of milliseconds to hash and to flush; no unit has padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(4))


def life(mesh, folder, stop, sender=None):
    """Train from where the folder says, by gradients that hang on the random states, and save after every step."""

    def tell(what, step):
        if mesh.rank == 0 and sender is not None:
            sender.send((what, step))

    policy = ShardedModel(Wide(), mesh)
    optimizer = AdamW(policy.shards, lr=0.01)
    torch.manual_seed(mesh.rank)
    random.seed(mesh.rank)
    step = 0
    if mesh.broadcast_object(bool(list_checkpoints(folder))):
        step = load_checkpoint(folder, model=policy, optimizer=optimizer, mesh=mesh)["step"]
    tell("resumed", step)
    saver = Saver(folder, mesh)
    while step < stop:
        for shard in policy.shards:
            shard.grad = torch.randn_like(shard.data).mul_(random.random())
        optimizer.step()
        step += 1
        if saver.wait() is not None:
            tell("committed", step - 1)
        saver.save(policy, optimizer, {"step": step})
        tell("saving", step)
    saver.wait()
    return [shard.data for shard in policy.shards], optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps


class Life:
    """The ranks of one life, which tell what they did."""

    def __init__(self, world_size, *args):
        self.folder = tempfile.TemporaryDirectory()
        self.receiver, sender = FORKS.Pipe(duplex=False)
        self.ranks = [
            FORKS.Process(target=_rank, args=(life, rank, world_size, self.folder.name, (*args, sender)), daemon=True)
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()
        sender.close()

    def hear(self, what):
        """The step of the next word, which must be ``what``."""
        try:
            assert self.receiver.poll(60), "no word from the run"
            word, step = self.receiver.recv()
        except EOFError:
            raise AssertionError([path.read_text() for path in Path(self.folder.name).glob("error-*")]) from None
        assert word == what
        return step

    def kill(self):
        """SIGKILL to all ranks; return the steps that had been committed."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        steps = []
        while self.receiver.poll(0):
            try:
                steps.append(self.receiver.recv())
            except EOFError:
                break
        self.folder.cleanup()
        return [step for word, step in steps if word == "committed"]


def phase(folder):
    """How far a save had come, by what it left."""
    saving = {path.name for path in folder.glob(".saving/*")}
    if not (folder / ".saving").exists():
        return "between saves"
    return "naming" if "manifest.json" in saving else "writing" if saving else "beginning"


def newest_step(folder):
    return max((int(path.name.split("-")[-1]) for path in list_checkpoints(folder)), default=0)


@pytest.mark.parametrize(
    ("world_size", "kills"),
    [
        (1, 6),
        (2, 6),
        pytest.param(1, 100, marks=pytest.mark.slow),
        pytest.param(2, 100, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_of_a_save_ends_as_if_never_killed(world_size, kills, tmp_path):
    rng, committed, named, phases = random.Random(kills), 0, 0, collections.Counter()
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    for _ in range(kills):
        alive = Life(world_size, folder, 10**9)
        resumed = alive.hear("resumed")
        assert resumed == named >= committed  # what has a name is whole
        alive.hear("saving")
        time.sleep(rng.uniform(0, 2 * SAVE_S))
        committed = max(resumed, *alive.kill(), 0)
        named = newest_step(folder)
        phases[phase(folder)] += 1
    print(f"{kills} kills of {world_size} ranks, {committed} steps committed, at the kill: {dict(phases)}")
    stop = named + 3
    ended = run_ranks(life, world_size, folder, stop)
    for killed, never_killed in zip(ended, run_ranks(life, world_size, whole, stop), strict=True):
        for mine, wanted in zip(killed[:3], never_killed[:3], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert killed[3] == never_killed[3] == stop
    assert newest_step(folder) == stop


def filled(value):
    policy = ShardedModel(Toy(), Mesh())
    for shard in policy.shards:
        shard.data.fill_(value)
    return policy


def killed_before(operation, folder, step):
    """Save, and die where the system is asked to open, make, rename or remove a file for the ``operation``-th time."""
    left = operation

    def count(event, _):
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    policy = filled(step)
    sys.addaudithook(count)
    save_checkpoint(folder, model=policy, optimizer=None, state={"step": step}, mesh=Mesh(), keep=1)
    os._exit(0)


def test_a_kill_before_each_operation_of_a_save_leaves_whole_checkpoints(tmp_path):
    save_checkpoint(tmp_path, model=filled(1), optimizer=None, state={"step": 1}, mesh=Mesh())
    step, seen, operation, status = 1, set(), 0, None
    while status != 0:
        named = newest_step(tmp_path)
        dying = FORKS.Process(target=killed_before, args=(operation, tmp_path, step + 1))
        dying.start()
        dying.join()
        status = dying.exitcode
        assert status in (0, -signal.SIGKILL)
        seen.add(newest_step(tmp_path) - named)
        for path in list_checkpoints(tmp_path):
            policy = filled(0)
            step = load_checkpoint(path, model=policy, optimizer=None, mesh=Mesh())["step"]
            assert all((shard.data[: shard.numel] == step).all() for shard in policy.shards)
            assert path.name.endswith(f"-step-{step}")
        step = newest_step(tmp_path)
        operation += 1
    assert seen == {0, 1}
    assert operation > 10
    assert len(list_checkpoints(tmp_path)) == 1
