"""Training that stops, resumes and hears of its checkpoints' fate."""

import resource
import signal
from functools import partial

import pytest
import torch
from toys import CONFIG, small_batches, small_loss, small_model

from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.manifest import list_checkpoints
from groupwise.engine.mesh import Mesh
from groupwise.engine.shard import ShardedModel
from groupwise.recipes.policy import Policy
from groupwise.recipes.run import Run, Stopped
from groupwise.recipes.training import Training


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of so small a model wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_training(folder, stop=6, overrides=()):
    run = Run(load_config(None, [f"run.folder={folder}", "run.checkpoint_every=2", *overrides]), Mesh())
    return Training(run, Policy(ShardedModel(small_model(), run.mesh), CONFIG, None), "sft", stop, lambda step: 0.01)


def train(training, until=None, at=None):
    """The steps that were made; before the end of step ``until``, ``at`` happens."""
    made = []
    for step in training.steps():
        training.update(step, small_batches(step), small_loss)
        made.append(step)
        if step == until:
            at()
    return made


def given_up(training, at, number):
    """The steps that were made before a signal came while step ``at`` was being sampled, and how training ended."""
    made = []
    try:
        for step in training.steps():
            if step == at:
                training.run.on_signal(number, None)
                assert training.run.agree_to_stop()
                continue
            training.update(step, small_batches(step), small_loss)
            made.append(step)
    except Stopped as stopped:
        return made, stopped.number


def weights(training):
    return torch.cat([shard.data for shard in training.policy.model.shards])


def test_a_stopped_run_ends_as_one_that_never_stopped(tmp_path):
    whole, stopped = new_training(tmp_path / "whole"), new_training(tmp_path / "stopped")
    assert train(whole) == list(range(6))
    with pytest.raises(KeyboardInterrupt):
        train(stopped, until=2, at=partial(stopped.run.on_signal, signal.SIGTERM, None))
    assert list_checkpoints(stopped.folder / "checkpoints")[0].name.endswith("-step-3")
    del stopped
    resumed = new_training(tmp_path / "stopped")
    assert train(resumed) == [3, 4, 5]
    assert torch.equal(weights(whole), weights(resumed))
    names = [path.name.split("-")[-1] for path in list_checkpoints(resumed.folder / "checkpoints")]
    assert names == ["4", "3"]


def test_a_step_given_up_is_repeated_after_the_resume(tmp_path):
    training = new_training(tmp_path)
    assert given_up(training, 3, signal.SIGTERM) == ([0, 1, 2], signal.SIGTERM)
    assert list_checkpoints(training.folder / "checkpoints")[0].name.endswith("-step-3")
    before = weights(training)
    del training
    resumed = new_training(tmp_path)
    assert torch.equal(weights(resumed), before)
    assert train(resumed) == [3, 4, 5]


def test_a_step_given_up_before_anything_was_done_leaves_no_checkpoint(tmp_path):
    training = new_training(tmp_path)
    assert given_up(training, 0, signal.SIGINT) == ([], signal.SIGINT)
    assert list_checkpoints(training.folder / "checkpoints") == []


def test_damage_to_every_checkpoint_is_said_and_nothing_starts_anew(tmp_path):
    train(training := new_training(tmp_path))
    paths = list_checkpoints(training.folder / "checkpoints")
    del training
    for path in paths:
        (path / "part-00000-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*part-00000-of"):
        new_training(tmp_path)


def test_a_full_disk_is_heard_of_while_training_goes_on(tmp_path):
    training = new_training(tmp_path)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"cannot write a checkpoint in .*File too large"):
            train(training, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, room[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert [path.name for path in list_checkpoints(training.folder / "checkpoints")] == ["checkpoint-000001-step-2"]


def test_two_runs_of_one_name_never_mix(tmp_path):
    config = load_config(None, [f"run.folder={tmp_path}"])
    first = Run(config, Mesh())
    with pytest.raises(UserError, match=f"{first.folder} is being written by another run at this moment"):
        Run(config, Mesh())
    Run(config, Mesh(), claim=False)
    del first
    Run(config, Mesh())
