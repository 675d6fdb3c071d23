"""The total reward of a trajectory, its parts, and how their weights move during training."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from ..engine.config import RewardConfig
from ..engine.errors import UserError
from ..engine.objective import group_advantages
from ..engine.schedule import Schedule
from ..engine.tokenizer import Tokenizer
from ..rollout.trajectory import Group, Trajectory
from .answer import needs_judge, trajectory_correct
from .length import length_cost, length_reward, overlong_cost
from .tags import format_right, tag_reward
from .verdict import Question

FORMAT_WRONG = -0.1  # DataMind: neither the answer nor the format is right

Semantic = Callable[[Sequence[Trajectory]], Sequence[float]]  # trajectories -> R_hrm of each, in [-1, 1]


class Judge(Protocol):
    """What ``score`` needs of a judge; ``rewards.judge`` has one."""

    def verdicts(self, questions: Sequence[Question]) -> Sequence[bool | None]: ...


def structure_schedule(settings: RewardConfig, steps: int) -> Schedule:
    """lambda(t): the weight of R_tag, from ``lambda_max`` to ``lambda_min``, which it never falls below.

    Source: Datarus-R1, arXiv 2508.13382; cosine: lambda_min + (lambda_max - lambda_min) (1 + cos(pi t / T)) / 2.

    Raises:
        UserError: ``lambda_min`` is above ``lambda_max``.
    """
    if settings.lambda_min > settings.lambda_max:
        raise UserError(
            f"reward.lambda_min {settings.lambda_min} is above reward.lambda_max {settings.lambda_max}; swap them"
        )
    return Schedule(settings.lambda_schedule, start=settings.lambda_max, end=settings.lambda_min, steps=steps)


def score(
    groups: Sequence[Group],
    *,
    tokenizer: Tokenizer,
    settings: RewardConfig,
    structure_weight: float = 1.0,
    max_trajectory_tokens: int = 0,
    semantic: Semantic | None = None,
    judge: Judge | None = None,
) -> None:
    """Fills ``rewards`` (the parts, by name), ``reward`` and ``scored`` of every trajectory.

    datarus: ``w norm(R_tag) + (1 - w) norm(R_hrm) + answer_weight R_answer - c_len`` with w the ``structure_weight``,
    norm standardising within the group (a constant group gives 0); without ``semantic`` there is no second term. Parts:
    tag, tag_norm, hrm, hrm_norm, answer, length_cost. Source: Datarus-R1, arXiv 2508.13382.
    datamind: r_len if the answer is right, 0 if only the format is, -0.1 if neither. Parts: format, answer, length.
    Source: DataMind, arXiv 2509.25084.
    Both lose ``overlong_cost`` where ``settings.overlong_buffer`` is set; part: overlong_cost.

    A trajectory whose free text the judge gives no verdict on is not ``scored``: its group goes on without it.

    Args:
        groups: all of one size.
        settings: ``kind`` chooses the form.
        structure_weight: lambda of this step, see ``structure_schedule``; datamind has none.
        max_trajectory_tokens: at which a trajectory is cut, for the overlong cost.
        semantic: gives R_hrm; it is called once, with all trajectories. datamind has none.
        judge: of answers in free text; None: they are compared exactly.

    Raises:
        UserError: groups differ in size or are empty, or a part of a reward is not a finite number or has the wrong
            count.
    """
    sizes = sorted({len(group.trajectories) for group in groups})
    if len(sizes) > 1 or sizes == [0]:
        found = " and ".join(map(str, sizes))
        raise UserError(f"groups have {found} trajectories; all must have the same number, at least 1")
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    for trajectory, right in zip(trajectories, _answers(trajectories, judge), strict=True):
        trajectory.scored = right is not None
        trajectory.rewards = {"answer": float(bool(right))}
    if settings.kind == "datamind":
        for trajectory in trajectories:
            _score_datamind(trajectory, tokenizer)
    else:
        _add_part("tag", trajectories, [tag_reward(trajectory, tokenizer) for trajectory in trajectories])
        if semantic is not None:
            _add_part("hrm", trajectories, semantic(trajectories))
        for group in groups:
            _score_datarus(group, settings, structure_weight)
    for trajectory in trajectories:
        if settings.overlong_buffer:
            tokens = len(trajectory.token_ids)
            cost = overlong_cost(tokens, max_trajectory_tokens, settings.overlong_buffer)
            trajectory.rewards["overlong_cost"] = cost
            trajectory.reward -= cost
        _check(trajectory)


def _answers(trajectories: Sequence[Trajectory], judge: Judge | None) -> list[bool | None]:
    """Whether each answer is right; None without a verdict."""
    found: list[bool | None] = [trajectory_correct(trajectory) for trajectory in trajectories]
    if judge is None:
        return found
    asked = [index for index, t in enumerate(trajectories) if not found[index] and needs_judge(t.answer, t.task)]
    questions = [Question(t.task.question, t.task.answer, t.answer or "") for t in (trajectories[i] for i in asked)]
    for index, verdict in zip(asked, judge.verdicts(questions), strict=True):
        found[index] = verdict
    return found


def _add_part(name: str, trajectories: Sequence[Trajectory], values: Sequence[float]) -> None:
    if len(values) != len(trajectories):
        raise UserError(
            f"the {name} reward has {len(values)} values for {len(trajectories)} trajectories; it must give one each"
        )
    for trajectory, value in zip(trajectories, values, strict=True):
        trajectory.rewards[name] = float(value)
        _check(trajectory)


def _score_datarus(group: Group, settings: RewardConfig, structure_weight: float) -> None:
    members = [trajectory for trajectory in group.trajectories if trajectory.scored]
    for trajectory in group.trajectories:
        trajectory.reward = 0.0
    for name, weight in (("tag", structure_weight), ("hrm", 1.0 - structure_weight)):
        if any(name not in trajectory.rewards for trajectory in members):
            continue
        normed = group_advantages([trajectory.rewards[name] for trajectory in members]).tolist()
        for trajectory, value in zip(members, normed, strict=True):
            trajectory.rewards[f"{name}_norm"] = value
            trajectory.reward += weight * value
    for trajectory in group.trajectories:
        cost = length_cost(trajectory.completion_tokens, settings.length_coef, settings.length_target)
        trajectory.rewards["length_cost"] = cost
        trajectory.reward += settings.answer_weight * trajectory.rewards["answer"] - cost


def _score_datamind(trajectory: Trajectory, tokenizer: Tokenizer) -> None:
    well_formed = format_right(trajectory, tokenizer)
    length = length_reward(len(tokenizer.encode(trajectory.answer or "")))
    trajectory.rewards |= {"format": float(well_formed), "length": length}
    trajectory.reward = length if trajectory.rewards["answer"] else 0.0 if well_formed else FORMAT_WRONG


def _check(trajectory: Trajectory) -> None:
    for name, value in {**trajectory.rewards, "total": trajectory.reward}.items():
        if not math.isfinite(value):
            raise UserError(
                f"the {name} reward of sample {trajectory.sample} of task {trajectory.task.id!r} is {value}; "
                "a reward must be a finite number"
            )
