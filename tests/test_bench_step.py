"""The whole step of the benchmark: ours learns, and TRL has the same loss and gradient norm for its completions."""

import math
from pathlib import Path

import pytest
import torch

from groupwise.bench.step import PHASES, WARM, Ours, Turns, config_of, make_trainer, random_prompts, time_phases
from groupwise.engine import Mesh, Model
from groupwise.engine.hf import save_hf
from groupwise.engine.metrics import Timer

SHAPE = (2, 32, 48, 4, 2, 64, 2, 4, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("step")
    for seed, kind in enumerate(("reference", "policy")):
        model = Model(config_of(SHAPE))
        model.init_weights(seed)
        save_hf(model, root / kind)
    return root


def test_a_step_moves_the_policy_and_not_the_reference(folder: Path) -> None:
    ours = Ours(SHAPE, Mesh(), folder)
    policy, reference = ([s.data.clone() for s in x.shards] for x in (ours.policy, ours.reference.sharded))
    timer = Timer()
    update = ours.step(random_prompts(SHAPE, 0), 0, timer)
    assert not update.skipped
    assert math.isfinite(update.loss)
    assert update.grad_norm > 0
    assert set(timer.seconds) == set(PHASES)
    assert update.stats["policy_tokens"] == update.stats["ref_tokens"] == 2 * 4 * 6
    assert all(not torch.equal(s.data, old) for s, old in zip(ours.policy.shards, policy, strict=True))
    assert all(torch.equal(s.data, old) for s, old in zip(ours.reference.sharded.shards, reference, strict=True))


def test_both_sides_agree_and_take_turns(folder: Path) -> None:
    """The benchmark ends the process where loss or gradient norm differ, or a completion has another length."""
    turns = Turns(Ours(SHAPE, Mesh(), folder))
    trainer = make_trainer(SHAPE, "cpu", folder, WARM + 1, turns.reward, [turns])
    time_phases(trainer, turns)
    trainer.train()
    for steps in turns.seconds.values():
        assert len(steps) == WARM + 1
        assert all(each["step"] == pytest.approx(sum(each[phase] for phase in PHASES)) for each in steps)
        assert all(each[phase] > 0 for each in steps for phase in PHASES)
