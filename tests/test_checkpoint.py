"""Checkpoints: resumed to the last bit, on any number of ranks, whole or not at all, and never of another model."""

import errno
import json
import logging
import os
import random
import shutil

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from toys import Toy, alone, toy_batch, toy_loss

from groupwise.engine import checkpoint as module
from groupwise.engine.checkpoint import latest, load_checkpoint, save_checkpoint
from groupwise.engine.errors import UserError
from groupwise.engine.optim import AdamW
from groupwise.engine.shard import ShardedModel


def fresh(mesh, seed=0):
    policy = ShardedModel(Toy(seed=seed), mesh)
    return policy, AdamW(policy.shards, lr=0.02, weight_decay=0.1)


def train(mesh, policy, optimizer, steps):
    for step in steps:
        policy.zero_grad()
        for seed in range(6)[mesh.rank :: mesh.world_size]:
            toy_loss(policy, toy_batch(100 * step + seed)).backward()
        optimizer.step()


def save(folder, policy, optimizer, step, mesh, **options):
    return save_checkpoint(folder, model=policy, optimizer=optimizer, state={"step": step}, mesh=mesh, **options)


def load(folder, policy, optimizer, mesh):
    return load_checkpoint(folder, model=policy, optimizer=optimizer, mesh=mesh)


def draws():
    return random.random(), float(np.random.rand()), torch.rand(()).item(), torch.randn(()).item(), random.gauss(0, 1)


def interrupted(mesh, folder):
    policy, optimizer = fresh(mesh)
    torch.manual_seed(mesh.rank)
    random.gauss(0, 1)
    train(mesh, policy, optimizer, range(3))
    optimizer.skip()
    state = {"step": 3, "position": [1, {"file": "ä"}], "rate": 0.1, "none": None}
    path = save_checkpoint(folder, model=policy, optimizer=optimizer, state=state, mesh=mesh)
    drawn = draws()
    train(mesh, policy, optimizer, range(3, 6))
    again, moments = fresh(mesh, seed=9)
    back = load(folder, again, moments, mesh)
    counters = moments.steps, moments.skipped, moments.skipped_in_row
    redrawn = draws()
    train(mesh, again, moments, range(3, 6))
    same = all(torch.equal(a.data, b.data) for a, b in zip(policy.shards, again.shards, strict=True))
    return same, back == state, drawn == redrawn, counters, path.name, drawn, dict(policy.state_dict_full())


@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_as_if_nothing_had_happened(world_size, tmp_path):
    ranks = run_ranks(interrupted, 2, tmp_path) if world_size == 2 else [interrupted(alone(), tmp_path)]
    for same, state, random_state, counters, name, *_ in ranks:
        assert same
        assert state
        assert random_state
        assert counters == (3, 1, 1)
        assert name == "checkpoint-000001-step-3"
    assert len({rank[5][2] for rank in ranks}) == world_size
    names = {f"part-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)} | {"manifest.json"}
    assert {path.name for path in (tmp_path / "checkpoint-000001-step-3").iterdir()} == names


def resumed(mesh, folder):
    policy, optimizer = fresh(mesh, seed=5)
    state = load(folder, policy, optimizer, mesh)
    train(mesh, policy, optimizer, range(3, 6))
    return state["step"], dict(policy.state_dict_full())


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_any_number_of_ranks_resumes(before, after, tmp_path):
    saved = run_ranks(interrupted, before, tmp_path) if before > 1 else [interrupted(alone(), tmp_path)]
    ranks = run_ranks(resumed, after, tmp_path) if after > 1 else [resumed(alone(), tmp_path)]
    for step, weights in ranks:
        assert step == 3
        for name, tensor in saved[0][6].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_are_safetensors_files(tmp_path):
    policy, optimizer = fresh(alone())
    path = save(tmp_path, policy, optimizer, 1, alone())
    tensors = load_file(path / "part-00000-of-00001.safetensors")
    assert torch.equal(tensors["weight/layers.1"], policy.shards[2].data)
    assert torch.equal(tensors["exp_avg_sq/"], optimizer.exp_avg_sq[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def other_number(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 7'))


PART = "part-00000-of-00001.safetensors"
DAMAGES = [(flip, PART), (cut, PART), (os.remove, PART), (cut, "manifest.json"), (os.remove, "manifest.json")]
DAMAGES += [(other_number, "manifest.json")]


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, file, tmp_path, caplog):
    policy, optimizer = fresh(alone())
    first = save(tmp_path, policy, optimizer, 1, alone())
    second = save(tmp_path, policy, optimizer, 2, alone())
    assert latest(tmp_path) == second
    damage(second / file)
    assert latest(tmp_path) == first
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, policy, optimizer, alone()) == {"step": 1}
    assert str(second / file) in caplog.text
    shutil.rmtree(first)
    assert latest(tmp_path) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        load(tmp_path, policy, optimizer, alone())
    assert save(tmp_path, policy, optimizer, 3, alone()).name == "checkpoint-000003-step-3"


def test_the_newest_are_kept(tmp_path):
    policy, optimizer = fresh(alone())
    for step in (10, 20, 20, 5):
        newest = save(tmp_path, policy, optimizer, step, alone(), keep=2)
    names = ["checkpoint-000003-step-20", "checkpoint-000004-step-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert latest(tmp_path) == newest
    assert latest(tmp_path / names[0]) == tmp_path / names[0]
    with pytest.raises(UserError, match="keep"):
        save(tmp_path, policy, optimizer, 1, alone(), keep=0)
    assert latest(tmp_path / "absent") is None


def full_disk(mesh, folder, failing):
    policy, optimizer = fresh(mesh)
    save(folder, policy, optimizer, 1, mesh)
    before = sorted((path.name, path.stat().st_size) for path in folder.rglob("*"))
    mesh.barrier()
    flush = module._flush

    def no_room(file):
        if failing in file.name and mesh.rank == (1 if failing == "part" else 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    module._flush = no_room
    try:
        save(folder, policy, optimizer, 2, mesh)
        message = "it was saved"
    except UserError as error:
        message = str(error)
    finally:
        module._flush = flush
    mesh.barrier()
    return message, before == sorted((path.name, path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("failing", ["part", "manifest"])
def test_a_full_disk_is_one_sentence_and_leaves_the_former_checkpoint(failing, tmp_path):
    ranks = run_ranks(full_disk, 2, tmp_path, failing)
    assert ranks[0] == ranks[1]
    message, untouched = ranks[0]
    assert untouched
    assert "No space left on device" in message
    assert "\n" not in message
    assert latest(tmp_path).name == "checkpoint-000001-step-1"


def test_a_save_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    policy, optimizer = fresh(alone())
    first = save(tmp_path, policy, optimizer, 1, alone())
    monkeypatch.setattr(module.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, policy, optimizer, 2, alone())
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [first]
    (tmp_path / ".saving").mkdir()  # as a killed process leaves it
    (tmp_path / ".saving" / PART).write_bytes(b"half")
    assert latest(tmp_path) == first
    assert latest(tmp_path) != save(tmp_path, policy, optimizer, 2, alone())


def test_another_model_is_refused_by_name_and_changes_nothing(tmp_path):
    policy, optimizer = fresh(alone())
    path = save(tmp_path, policy, optimizer, 1, alone())
    for other, name in ((Toy(blocks=4), "layers.3"), (Toy(blocks=2), "layers.2"), (Toy(), "norm.weight")):
        if name == "norm.weight":
            other.norm = torch.nn.LayerNorm(13)
        theirs = ShardedModel(other, alone())
        before = [shard.data.clone() for shard in theirs.shards]
        with pytest.raises(UserError, match="another model") as raised:
            load(tmp_path, theirs, AdamW(theirs.shards, lr=0.1), alone())
        assert name in str(raised.value)
        assert str(path) in str(raised.value)
        assert all(torch.equal(a, shard.data) for a, shard in zip(before, theirs.shards, strict=True))
    regrouped = ShardedModel(Toy(), alone(), units=lambda toy: toy.layers[:2])
    with pytest.raises(UserError, match="other units"):
        load(tmp_path, regrouped, None, alone())


def test_weights_alone(tmp_path):
    policy, _ = fresh(alone())
    save_checkpoint(tmp_path, model=policy, optimizer=None, state={}, mesh=alone())
    other, moments = fresh(alone(), seed=4)
    with pytest.raises(UserError, match="holds no moments"):
        load(tmp_path, other, moments, alone())
    assert load(tmp_path, other, None, alone()) == {}
    assert all(torch.equal(a.data, b.data) for a, b in zip(policy.shards, other.shards, strict=True))
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, model=policy, optimizer=None, state={"x": object()}, mesh=alone())
    assert json.loads((latest(tmp_path) / "manifest.json").read_text())["body"]["world_size"] == 1
