"""Total rewards against loops over the published formulas."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from groupwise.engine.config import RewardConfig
from groupwise.engine.errors import UserError
from groupwise.rewards import curriculum
from groupwise.rewards.curriculum import score, structure_schedule
from groupwise.rewards.verdict import Question
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Span, Trajectory


class Characters:
    """A tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TOKENIZER = Characters()
GOOD = "<think>a</think>\n<answer>{}</answer>"
BARE = "<answer>{}</answer>"  # no thought: R_tag 0.8


def group(*texts: tuple[str, str | None], gold: str = "5") -> Group:
    task = Task("t", "q", (), "", gold, "number", "counting", "reflection")
    members = [
        Trajectory(task, i, [Span("prompt", [1]), Span("model", TOKENIZER.encode(form.format(answer)))], answer=answer)
        for i, (form, answer) in enumerate(texts)
    ]
    return Group(task, members)


def test_datarus_is_the_sum_of_its_parts() -> None:
    settings = RewardConfig(kind="datarus", answer_weight=0.7, length_coef=0.2, length_target=20)
    texts = [(GOOD, "5"), (GOOD, "6"), (BARE, "5"), (BARE, "9" * 40)]
    scored = group(*texts)
    score([scored], tokenizer=TOKENIZER, settings=settings, structure_weight=0.35)  # type: ignore[arg-type]
    tags = np.array([1.0, 1.0, 0.8, 0.8])
    mean, std = tags.sum() / 4, math.sqrt(sum((t - tags.mean()) ** 2 for t in tags) / 3)
    for i, (form, answer) in enumerate(texts):
        tokens = len(form.format(answer))
        cost = min(0.5, 0.2 * max(0.0, tokens / 20 - 1))
        expected = 0.35 * (tags[i] - mean) / (std + 1e-6) + 0.7 * (answer == "5") - cost
        member = scored.trajectories[i]
        assert member.reward == pytest.approx(expected, rel=1e-9)
        assert member.rewards["tag"] == pytest.approx(tags[i])
        assert member.rewards["answer"] == (answer == "5")
        assert set(member.rewards) == {"tag", "tag_norm", "answer", "length_cost"}


def test_datarus_structure_is_nothing_where_the_group_agrees() -> None:
    scored = group((BARE, "5"), (BARE, "6"), (BARE, "5"))
    score([scored], tokenizer=TOKENIZER, settings=RewardConfig(), structure_weight=0.9)  # type: ignore[arg-type]
    assert [t.reward for t in scored.trajectories] == [1.0, 0.0, 1.0]
    alone = group((BARE, "5"))
    score([alone], tokenizer=TOKENIZER, settings=RewardConfig(), structure_weight=0.9)  # type: ignore[arg-type]
    assert alone.trajectories[0].rewards["tag_norm"] == 0.0


def test_datamind_has_three_levels_and_the_length() -> None:
    scored = group((GOOD, "5"), (BARE, "5"), (GOOD, "6"), (BARE, "6"), (GOOD, "5." + "0" * 638))
    score([scored], tokenizer=TOKENIZER, settings=RewardConfig(kind="datamind"))  # type: ignore[arg-type]
    assert [t.reward for t in scored.trajectories] == pytest.approx([1.0, 1.0, 0.0, -0.1, 0.75])
    assert scored.trajectories[3].rewards == {"format": 0.0, "answer": 0.0, "length": 1.0}


def test_a_reward_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum, "length_cost", lambda *_: math.nan)
    with pytest.raises(UserError, match="length_cost reward of sample 0 of task 't' is nan"):
        score([group((GOOD, "5"))], tokenizer=TOKENIZER, settings=RewardConfig())  # type: ignore[arg-type]


def test_groups_of_unequal_size_are_refused() -> None:
    with pytest.raises(UserError, match="1 and 2 trajectories"):
        score([group((GOOD, "5")), group((GOOD, "5"), (BARE, "5"))], tokenizer=TOKENIZER, settings=RewardConfig())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        score([group()], tokenizer=TOKENIZER, settings=RewardConfig())  # type: ignore[arg-type]
    score([], tokenizer=TOKENIZER, settings=RewardConfig())  # type: ignore[arg-type]


def standardised(values: list[float]) -> list[float]:
    """A loop over the formula."""
    mean = sum(values) / len(values)
    if max(values) == min(values):
        return [0.0] * len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / (std + 1e-6) for value in values]


@pytest.mark.parametrize("seed", range(6))
def test_structure_meaning_answer_and_lengths_are_added(seed: int) -> None:
    rng = random.Random(seed)
    settings = RewardConfig(answer_weight=0.6, length_coef=0.3, length_target=30, overlong_buffer=25)
    texts = [(rng.choice([GOOD, BARE]), rng.choice(["5", "6", "5" * rng.randrange(1, 40)])) for _ in range(5)]
    groups = [group(*texts), group(*reversed(texts))]
    sound = {(g, i): rng.choice([-1.0, 0.25, rng.uniform(-1, 1)]) for g in range(2) for i in range(5)}
    calls = []

    def semantic(trajectories: Sequence[Trajectory]) -> list[float]:
        calls.append(len(trajectories))
        return list(sound.values())

    score(
        groups,
        tokenizer=TOKENIZER,
        settings=settings,
        structure_weight=0.7,
        max_trajectory_tokens=60,
        semantic=semantic,
    )  # type: ignore[arg-type]
    assert calls == [10]  # all ranks take part in it once
    for g, scored in enumerate(groups):
        tags = standardised([1.0 if form == GOOD else 0.8 for form, _ in (texts if g == 0 else texts[::-1])])
        meanings = standardised([sound[g, i] for i in range(5)])
        for i, member in enumerate(scored.trajectories):
            written = sum(len(span.token_ids) for span in member.spans if span.writer == "model")
            cost = min(0.5, 0.3 * max(0.0, written / 30 - 1))
            overlong = min(1.0, max(0.0, (written + 1 - 35) / 25))
            right = 0.6 * (member.answer == "5")
            assert member.reward == pytest.approx(0.7 * tags[i] + 0.3 * meanings[i] + right - cost - overlong, abs=1e-9)


class Verdicts:
    """A judge of few words."""

    def __init__(self, *verdicts: bool | None) -> None:
        self.asked: list[str] = []
        self._verdicts = verdicts

    def verdicts(self, questions: Sequence[Question]) -> list[bool | None]:
        self.asked += [question.answer for question in questions]
        return list(self._verdicts)


@pytest.mark.parametrize("kind", ["datarus", "datamind"])
def test_a_sample_without_a_verdict_changes_nothing_for_its_group(kind: Literal["datarus", "datamind"]) -> None:
    settings = RewardConfig(kind=kind)
    whole = free(group((GOOD, "red"), (BARE, "a red one"), (GOOD, "unclear"), (GOOD, "blue"), gold="red"))
    judge = Verdicts(True, None, False)
    score([whole], tokenizer=TOKENIZER, settings=settings, structure_weight=0.5, judge=judge)  # type: ignore[arg-type]
    assert judge.asked == ["a red one", "unclear", "blue"]  # the first is the gold to the letter
    assert [t.scored for t in whole.trajectories] == [True, True, False, True]
    assert not any(whole.trajectories[2].to_example().loss_mask)
    smaller = free(group((GOOD, "red"), (BARE, "a red one"), (GOOD, "blue"), gold="red"))
    score([smaller], tokenizer=TOKENIZER, settings=settings, structure_weight=0.5, judge=Verdicts(True, False))  # type: ignore[arg-type]
    kept = [t.reward for t in whole.trajectories if t.scored]
    assert kept == [t.reward for t in smaller.trajectories]
    assert [t.rewards["answer"] for t in smaller.trajectories] == [1.0, 1.0, 0.0]


def free(scored: Group) -> Group:
    task = dataclasses.replace(scored.task, answer_type="free")
    for trajectory in scored.trajectories:
        trajectory.task = task
    return Group(task, scored.trajectories)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "the hrm reward has 1 values for 2 trajectories"),
        ([0.5, math.nan], "hrm reward of sample 1 of task 't' is nan"),
    ],
)
def test_a_reward_of_another_count_or_that_is_no_number_is_named(values: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(
            [group((GOOD, "5"), (GOOD, "6"))],
            tokenizer=TOKENIZER,
            settings=RewardConfig(),
            semantic=lambda _: values,  # type: ignore[arg-type]
        )


def test_structure_schedule_never_reaches_zero() -> None:
    weights = structure_schedule(RewardConfig(), steps=30)
    assert weights(0) == 0.9
    assert weights(30) == pytest.approx(0.1)
    assert all(weights(t) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi * t / 30))) for t in range(31))
    with pytest.raises(UserError, match=r"lambda_min 0\.95"):
        structure_schedule(RewardConfig(lambda_min=0.95), steps=3)
