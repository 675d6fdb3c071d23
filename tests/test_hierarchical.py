"""The hierarchical reward: its formula and rules, its labels, and trajectories through the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from scripted import Characters, answer, code, rollout, task
from toys import CONFIG, alone

from groupwise.engine.config import ModelConfig
from groupwise.engine.hf import save_hf
from groupwise.engine.scorer import Scorer
from groupwise.rewards.answer import answer_correct
from groupwise.rewards.calibration import auc, calibration
from groupwise.rewards.hierarchical import (
    HierarchicalReward,
    hierarchical_reward,
    model_score,
    step_labels,
    step_sequence,
)
from groupwise.rollout.trajectory import Span, Trajectory

probability = st.floats(0, 1)


def naive_reward(steps: list[float], pairs: list[float], errors: list[bool]) -> float:
    """Methods 4.1, word by word."""
    s = sum(steps) / len(steps)
    score = 2 * (0.5 * s + 0.5 * sum(pairs) / len(pairs)) - 1 if pairs else 2 * s - 1
    executed = list(enumerate(errors))
    if executed and executed[-1][1]:
        score = min(score, -0.1)
    if any(errors) and all(any(not later for j, later in executed if j > i) for i, failed in executed if failed):
        score = max(score, 0.1)
    return score


@given(st.lists(st.tuples(probability, probability), min_size=1, max_size=6), st.lists(st.booleans(), max_size=6))
def test_the_reward_is_that_of_the_definition(scores: list[tuple[float, float]], errors: list[bool]) -> None:
    steps, pairs = [s for s, _ in scores], [p for _, p in scores[1:]]
    reward = hierarchical_reward(steps, pairs, errors)
    assert reward == pytest.approx(naive_reward(steps, pairs, errors))
    assert -1 <= reward <= 1
    if not any(errors):
        assert reward == model_score(steps, pairs)


def test_rules_hold_at_both_ends_and_leave_what_lies_between() -> None:
    assert hierarchical_reward([1.0, 1.0], [1.0], [False, True]) == -0.1
    assert hierarchical_reward([0.0, 0.0], [0.0], [False, True]) == -1.0
    assert hierarchical_reward([0.0, 0.0], [0.0], [True, False]) == 0.1
    assert hierarchical_reward([1.0, 1.0], [1.0], [True, False]) == 1.0
    assert hierarchical_reward([0.75], [], []) == 0.5
    assert hierarchical_reward([], [], []) == -1.0


@pytest.mark.parametrize(
    ("outcomes", "right", "mistakes", "binary", "graded"),
    [
        ([True, None], True, [], [1, 1], [1, 1]),
        ([False, True, None], True, [], [0, 1, 1], [0, 1, 1]),
        ([True, True, None], True, [0], [0, 1, 1], [0, 1, 1]),
        ([True, False, None], False, [], [0, 0, 0], [0.5, 0, 0]),
        ([True, None], False, [1], [0, 0], [0.5, 0]),
        ([None], True, [], [1], [1]),
    ],
)
def test_labels(outcomes, right: bool, mistakes: list[int], binary: list[float], graded: list[float]) -> None:
    assert step_labels(outcomes, right=right, kind="binary", mistakes=mistakes) == binary
    assert step_labels(outcomes, right=right, kind="graded", mistakes=mistakes) == graded


def trajectories() -> list[Trajectory]:
    """Right at once; corrected; wrong to the end; void at once; a step that was cut; a turn of an opening."""
    scripts = [
        [code("a"), answer("3")],
        [code("bad"), code("a"), answer("3")],
        [code("a"), code("bad"), answer("4")],
        ["no tags"],
        [code("a"), code("y" * 250)],
    ]
    found = [rollout(script)[0][0].trajectories[0] for script in scripts]
    found.append(rollout({(0, 1): answer("3")}, openings=[["<think>t</think>\n<code>\na\n"]])[0][0].trajectories[0])
    return [*found, Trajectory(task(), 0, [Span("prompt", [91, 93])], "token_limit")]


def test_a_step_is_a_turn_with_its_observation() -> None:
    for trajectory in trajectories():
        sequence = step_sequence(trajectory.spans)
        assert sequence.token_ids == trajectory.token_ids
        prompt = len(trajectory.spans[0].token_ids)
        assert sequence.prompt_tokens == prompt
        texts = []
        for first, end in zip([prompt, *(end + 1 for end in sequence.ends)], sequence.ends, strict=False):
            texts.append(Characters().decode(sequence.token_ids[first : end + 1]))
        assert len(texts) == trajectory.turns
        assert "".join(texts) == Characters().decode(trajectory.token_ids[prompt:])
        executed = len(trajectory.executions)
        assert all(text.endswith("</interpreter>\n") for text in texts[:executed])
        assert not any("<interpreter>" in text for text in texts[executed:])


def test_labels_of_rollouts() -> None:
    found = []
    for trajectory in trajectories():
        outcomes: list[bool | None] = [execution.ok for execution in trajectory.executions]
        outcomes += [None] * (trajectory.turns - len(outcomes))
        right = answer_correct(trajectory.answer, trajectory.task)
        found.append(step_sequence(trajectory.spans, step_labels(outcomes, right=right, kind="graded")))
    labels = [[1, 1], [0, 1, 1], [0.5, 0, 0], [0], [0.5, 0], [1, 1], []]
    assert [sequence.step_labels for sequence in found] == labels
    assert [sequence.pair_labels for sequence in found] == [[None, *row[1:]] if row else [] for row in labels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that reads characters."""
    config = ModelConfig(**{**CONFIG.__dict__, "vocab_size": 128, "max_position_embeddings": 1024})
    scorer, generator = Scorer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    path = tmp_path_factory.mktemp("scorer")
    save_hf(scorer, path)
    return path


def score_on(mesh, folder: Path, tokens: int):
    """The first rank has all trajectories but one, the second that one, others none."""
    found = trajectories()
    mine = {0: found[:-2] if mesh.world_size > 1 else found, 1: found[-2:]}.get(mesh.rank, [])
    reward = HierarchicalReward(folder, mesh, tokens_per_microbatch=tokens)
    return [(scores.steps, scores.pairs) for scores in reward.scores(mine)], reward(mine)


def test_trajectories_are_scored_alike_packed_alone_and_on_two_ranks(folder: Path) -> None:
    scores, rewards = score_on(alone(), folder, 3000)
    one = HierarchicalReward(folder, alone(), tokens_per_microbatch=900)
    for trajectory, (steps, pairs), reward in zip(trajectories(), scores, rewards, strict=True):
        assert (len(steps), len(pairs)) == (trajectory.turns, max(0, trajectory.turns - 1))
        assert one([trajectory])[0] == pytest.approx(reward, abs=1e-5)
        errors = [not execution.ok for execution in trajectory.executions]
        assert reward == pytest.approx(naive_reward(steps, pairs, errors) if steps else -1)
        [score] = one.scores([trajectory])
        assert score.model_score == pytest.approx(model_score(steps, pairs), abs=1e-5)
    assert rewards[2] <= -0.1
    assert rewards[1] >= 0.1
    assert len({round(reward, 4) for reward in rewards}) > 4
    (left, left_rewards), (right, right_rewards) = run_ranks(score_on, 2, folder, 900)
    assert left_rewards + right_rewards == pytest.approx(rewards, abs=1e-5)
    assert len(left + right) == len(scores)


def test_samples_of_one_task_share_their_prompt_and_nothing_else(folder: Path) -> None:
    first, second, *_ = trajectories()
    other = replace(first, task=task(1))
    reward = HierarchicalReward(folder, alone(), tokens_per_microbatch=3000)
    together = reward([first, second, other, first])
    assert together == pytest.approx([reward([t])[0] for t in (first, second, other, first)], abs=1e-5)


@given(st.lists(st.tuples(probability, st.booleans()), min_size=1, max_size=40))
def test_calibration_is_that_of_the_definitions(rows: list[tuple[float, bool]]) -> None:
    probabilities, truth = [p for p, _ in rows], [y for _, y in rows]
    found = calibration(probabilities, truth)
    ece = 0.0
    for low in range(10):
        inside = [(p, y) for p, y in rows if min(int(p * 10), 9) == low]
        if inside:
            gap = np.mean([p for p, _ in inside]) - np.mean([y for _, y in inside])
            ece += len(inside) / len(rows) * abs(gap)
    assert found["ece"] == pytest.approx(ece, abs=1e-9)
    assert found["brier"] == pytest.approx(sum((p - y) ** 2 for p, y in rows) / len(rows))
    assert found["accuracy"] == pytest.approx(sum((p > 0.5) == y for p, y in rows) / len(rows))
    assert calibration([], []) == {"count": 0}


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8))
def test_auc_counts_pairs(higher: list[int], lower: list[int]) -> None:
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in higher for b in lower]
    assert auc(higher, lower) == (pytest.approx(sum(wins) / len(wins)) if wins else None)
