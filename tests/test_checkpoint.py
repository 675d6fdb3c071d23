"""Checkpoints: resumed to the last bit, on any number of ranks, whole or not at all, and never of another model."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from toys import Toy, alone, toy_batch, toy_loss

from groupwise.engine import saver as module
from groupwise.engine.checkpoint import load_checkpoint, save_checkpoint
from groupwise.engine.errors import UserError
from groupwise.engine.lock import Lock
from groupwise.engine.manifest import list_checkpoints
from groupwise.engine.mesh import Mesh
from groupwise.engine.optim import AdamW
from groupwise.engine.saver import Saver
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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    damage(second / file)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, policy, optimizer, alone()) == {"step": 1}
    assert str(second / file) in caplog.text
    shutil.rmtree(first)
    with pytest.raises(UserError, match="is whole") as raised:
        load(tmp_path, policy, optimizer, alone())
    assert str(second / file) in str(raised.value)
    assert save(tmp_path, policy, optimizer, 3, alone()).name == "checkpoint-000003-step-3"


def test_the_newest_are_kept(tmp_path):
    policy, optimizer = fresh(alone())
    for step in (10, 20, 20, 5):
        newest = save(tmp_path, policy, optimizer, step, alone(), keep=2)
    names = ["checkpoint-000003-step-20", "checkpoint-000004-step-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *names]
    assert list_checkpoints(tmp_path) == [newest, tmp_path / names[0]]
    assert load(tmp_path / names[0], policy, optimizer, alone()) == {"step": 20}
    with pytest.raises(UserError, match="keep"):
        save(tmp_path, policy, optimizer, 1, alone(), keep=0)
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load(tmp_path / "absent", policy, optimizer, alone())


def full_disk(mesh, folder, failing, ask):
    policy, optimizer = fresh(mesh)
    saver = Saver(folder, mesh)
    save(folder, policy, optimizer, 1, mesh)
    before = contents(folder)
    mesh.barrier()
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = mesh.rank == (1 if failing == "part" else 0)
    if full and failing == "part":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, room[1]))
    train(mesh, policy, optimizer, [0])
    saver.save(policy, optimizer, {"step": 2})
    saver._writer.join()
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, room[1]))
    mesh.barrier()
    try:
        message = f"it was saved: {getattr(saver, ask)()}"
    except UserError as error:
        message = str(error)
    mesh.barrier()
    untouched = before == contents(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, room)
    mesh.barrier()
    saver.save(policy, optimizer, {"step": 3})
    return message, untouched, saver.wait().name


@pytest.mark.parametrize(("failing", "ask"), [("part", "poll"), ("manifest", "wait")])
def test_a_full_disk_is_one_sentence_and_leaves_the_former_checkpoint(failing, ask, tmp_path):
    """A limit on the size of files stands for it: the kernel refuses the write itself."""
    ranks = run_ranks(full_disk, 2, tmp_path, failing, ask)
    assert ranks[0] == ranks[1]
    message, untouched, after = ranks[0]
    assert untouched
    assert f"cannot write a checkpoint in {tmp_path}: File too large (rank {1 if failing == 'part' else 0})" in message
    assert "\n" not in message
    assert after == "checkpoint-000002-step-3"


def test_a_save_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    policy, optimizer = fresh(alone())
    first = save(tmp_path, policy, optimizer, 1, alone())
    monkeypatch.setattr(module.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, policy, optimizer, 2, alone())
    monkeypatch.undo()
    assert names_in(tmp_path) == [".lock", first.name]
    (tmp_path / ".saving").mkdir()  # as a killed process leaves it
    (tmp_path / ".saving" / PART).write_bytes(b"half")
    assert load(tmp_path, policy, optimizer, alone()) == {"step": 1}
    assert names_in(tmp_path) == [".lock", ".saving", first.name]
    second = save(tmp_path, policy, optimizer, 2, alone())
    assert names_in(tmp_path) == [".lock", first.name, second.name]


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
    assert json.loads((list_checkpoints(tmp_path)[0] / "manifest.json").read_text())["body"]["world_size"] == 1


def formula(shard, kind, dtype=torch.float32):
    """Numbers that tell the kind, the unit and the place in the unit, and that bfloat16 can hold."""
    place = torch.arange(shard.start, shard.start + shard.data.numel())
    salt = int(hashlib.md5(f"{kind}/{shard.name}".encode()).hexdigest()[:4], 16)
    return torch.where(place < shard.numel, (place * 31 + salt) % 251 - 125, 0).to(dtype)


def of_formula(mesh, shard_size, moments):
    grid = Mesh(rank=mesh.rank, world_size=mesh.world_size, group=mesh.group, shard_size=shard_size)
    policy, optimizer = fresh(grid, seed=mesh.world_size)
    optimizer.exp_avg = [tensor.to(moments) for tensor in optimizer.exp_avg]
    optimizer.exp_avg_sq = [tensor.to(moments) for tensor in optimizer.exp_avg_sq]
    tensors = [
        (tensor, formula(shard, kind, tensor.dtype))
        for index, shard in enumerate(policy.shards)
        for kind, tensor in (
            ("weight", shard.data),
            ("first", optimizer.exp_avg[index]),
            ("second", optimizer.exp_avg_sq[index]),
        )
    ]
    return grid, policy, optimizer, tensors


def save_formula(mesh, folder, shard_size, moments):
    grid, policy, optimizer, tensors = of_formula(mesh, shard_size, moments)
    for tensor, wanted in tensors:
        tensor.copy_(wanted)
    save(folder, policy, optimizer, 1, grid)


def load_formula(mesh, folder, shard_size, moments):
    grid, policy, optimizer, tensors = of_formula(mesh, shard_size, moments)
    load(folder, policy, optimizer, grid)
    return [torch.equal(tensor, wanted) for tensor, wanted in tensors]


@pytest.mark.parametrize(
    ("before", "after", "saved_as", "loaded_as"),
    [
        ((4, 2), (3, 3), torch.float32, torch.float32),
        ((4, 2), (4, 4), torch.bfloat16, torch.float32),
        ((3, 3), (4, 2), torch.float32, torch.bfloat16),
        ((2, 1), (2, 2), torch.float32, torch.float32),
        ((2, 2), (1, 1), torch.bfloat16, torch.bfloat16),
    ],
)
def test_any_grid_of_ranks_reads_any_other(before, after, saved_as, loaded_as, tmp_path):
    world_size, shard_size = before
    run_ranks(save_formula, world_size, tmp_path, shard_size, saved_as)
    parts = [load_file(path) for path in sorted(list_checkpoints(tmp_path)[0].glob("part-*"))]
    held = [{name: tensor for name, tensor in part.items() if not name.startswith("random")} for part in parts]
    assert all(held)  # the copies of the model share the writing
    written = [name for part in held for name in part]
    assert {written.count(name) for name in written} == {shard_size}  # and no shard is written twice
    assert {part["exp_avg/layers.0"].dtype for part in held if "exp_avg/layers.0" in part} == {saved_as}
    equal = run_ranks(load_formula, after[0], tmp_path, after[1], loaded_as)
    assert all(all(rank) for rank in equal)


def everything(policy, optimizer):
    tensors = [shard.data for shard in policy.shards] + optimizer.exp_avg + optimizer.exp_avg_sq
    return [tensor.clone() for tensor in tensors]


def equal_to(tensors, folder, mesh):
    policy, optimizer = fresh(mesh, seed=9)
    state = load(folder, policy, optimizer, mesh)
    return state, all(torch.equal(a, b) for a, b in zip(tensors, everything(policy, optimizer), strict=True))


def sentence(action):
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was raised"


def in_background(mesh, folder):
    gate, write = threading.Event(), module.write_tensors
    module.write_tensors = lambda *args: gate.wait() and write(*args)
    policy, optimizer = fresh(mesh)
    torch.manual_seed(mesh.rank)
    train(mesh, policy, optimizer, range(2))
    saver = Saver(folder, mesh)
    idle = saver.poll(), saver.wait()
    state = {"step": 2, "position": [0]}
    saver.save(policy, optimizer, state)
    if mesh.rank == 0:
        gate.set()  # the thread of the other rank cannot end yet
        saver._writer.join()
    then, drawn = everything(policy, optimizer), draws()
    state["position"][0] = 1
    train(mesh, policy, optimizer, range(2, 4))
    during = [saver.poll(), saver.poll(), list_checkpoints(folder)]
    refused = sentence(lambda: load(folder, policy, optimizer, mesh))
    gate.set()
    named = saver.wait().name
    restored = [*equal_to(then, folder, mesh), drawn == draws()]
    saver.save(policy, optimizer, {"step": 4})
    while saver.poll() is None:
        pass
    module.write_tensors = write
    return idle, during, refused, named, restored, equal_to(everything(policy, optimizer), folder, mesh)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    ranks = run_ranks(in_background, 2, tmp_path)
    assert ranks[0][2] == ranks[1][2]
    for idle, during, refused, named, restored, second in ranks:
        assert idle == (None, None)
        assert during == [None, None, []]
        assert f"{tmp_path} is being written by another run" in refused
        assert named == "checkpoint-000001-step-2"
        assert restored == [{"step": 2, "position": [0]}, True, True]
        assert second == ({"step": 4}, True)


def refused(mesh, folder):
    policy, optimizer = fresh(mesh)
    save(folder, policy, optimizer, 1, mesh)
    other = Lock(folder / ".lock") if mesh.rank == 0 else None
    (folder / ".saving").mkdir(exist_ok=True)
    (folder / ".saving" / PART).write_bytes(b"theirs")
    mesh.barrier()
    before = contents(folder)
    sentences = [
        sentence(lambda: save(folder, policy, optimizer, 2, mesh)),
        sentence(lambda: load(folder, policy, optimizer, mesh)),
    ]
    same = contents(folder) == before
    mesh.barrier()
    if other is not None:
        other.close()
    return sentences, same, save(folder, policy, optimizer, 2, mesh).name


def test_a_folder_that_another_run_writes_is_refused_on_every_rank(tmp_path):
    """A lock of its own stands for the other run: the kernel tells locks apart, not processes."""
    ranks = run_ranks(refused, 2, tmp_path)
    assert ranks[0] == ranks[1]
    sentences, same, after = ranks[0]
    assert same
    assert all(f"{tmp_path} is being written by another run at this moment; wait" in text for text in sentences)
    assert after == "checkpoint-000002-step-2"


def test_what_is_being_read_is_not_removed(tmp_path):
    policy, optimizer = fresh(alone())
    first = save(tmp_path, policy, optimizer, 1, alone())
    with Lock(first / "manifest.json", shared=True), Lock(first / "manifest.json", shared=True):
        second = save(tmp_path, policy, optimizer, 2, alone(), keep=1)
        assert list_checkpoints(tmp_path) == [second, first]
    third = save(tmp_path, policy, optimizer, 3, alone(), keep=1)
    assert list_checkpoints(tmp_path) == [third]


def test_all_is_on_the_device_before_the_name_is(tmp_path, monkeypatch):
    """Of each file the last write comes before its flush, and the rename after the flushes of all it covers."""
    flushed, renamed = {}, []
    fsync, rename = os.fsync, os.rename

    def note_flush(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed[path.name] = contents(path) if path.is_dir() else path.read_bytes()
        if renamed and path == tmp_path:
            renamed.append("its name is flushed")
        fsync(handle)

    def note_rename(source, target):
        if source.name == ".saving":
            on_device = [flushed.get(file.name) == data for file, data in contents(source).items()]
            renamed.append((sorted(flushed), all(on_device), flushed.get(".saving") == contents(source)))
        else:
            renamed.append("an old one goes")
        rename(source, target)

    policy, optimizer = fresh(alone())
    save(tmp_path, policy, optimizer, 1, alone())
    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    save(tmp_path, policy, optimizer, 2, alone(), keep=1)
    first, *then = renamed
    assert first == (sorted([".saving", "manifest.json", PART]), True, True)
    assert then == ["its name is flushed", "an old one goes"]


def hashed_files(mesh, folder):
    policy, optimizer = fresh(mesh)
    save(folder, policy, optimizer, 1, mesh)
    digest, names = hashlib.file_digest, []
    hashlib.file_digest = lambda file, kind: names.append(Path(file.name).name) or digest(file, kind)
    load(folder, policy, optimizer, mesh)
    hashlib.file_digest = digest
    return names


def test_ranks_share_the_search_for_damage(tmp_path):
    names = [name for rank in run_ranks(hashed_files, 2, tmp_path) for name in rank]
    assert sorted(names) == ["part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"]


@pytest.mark.gpu
def test_a_gpu_goes_on_while_its_checkpoint_is_written(tmp_path):
    mesh = Mesh(device=torch.device("cuda", 0))
    policy, optimizer = fresh(mesh)
    saver = Saver(tmp_path, mesh)
    for step in (1, 2):
        for tensor in [shard.data for shard in policy.shards] + optimizer.exp_avg:
            tensor.add_(1.0)
        saver.save(policy, optimizer, {"step": step})
        then, drawn = everything(policy, optimizer), torch.rand(3, device=mesh.device)
        for shard in policy.shards:
            shard.data.add_(1.0)
        assert saver.wait() is not None
        assert equal_to(then, tmp_path, mesh) == ({"step": step}, True)
        assert torch.equal(torch.rand(3, device=mesh.device), drawn)


def endless(file, *_):
    while True:
        file.write(b"x")
        time.sleep(1e-4)


def test_a_saver_that_is_dropped_takes_its_thread_along(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "write_tensors", endless)
    policy, optimizer = fresh(alone())
    saver = Saver(tmp_path, alone())
    saver.save(policy, optimizer, {})
    assert "checkpoint" in [thread.name for thread in threading.enumerate()]
    del saver
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    monkeypatch.undo()
    save(tmp_path, policy, optimizer, 1, alone())


LEAVING = """
import sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Saver, alone, endless, fresh, module
module.write_tensors = endless
saver = Saver(sys.argv[1], alone())
saver.save(*fresh(alone()), {})
assert saver.poll() is None
"""


def test_a_process_ends_cleanly_in_the_middle_of_a_save(tmp_path):
    command = [sys.executable, "-c", LEAVING, tmp_path, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert list_checkpoints(tmp_path) == []
