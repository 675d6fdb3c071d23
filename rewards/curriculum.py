"""The total reward of a trajectory, its parts, and how their weights move during training."""

import math
from collections.abc import Sequence

from ..engine.config import RewardConfig
from ..engine.errors import UserError
from ..engine.objective import group_advantages
from ..engine.schedule import Schedule
from ..engine.tokenizer import Tokenizer
from ..rollout.trajectory import Group, Trajectory
from .answer import answer_correct
from .length import length_cost, length_reward
from .tags import format_right, tag_reward

FORMAT_WRONG = -0.1  # DataMind: neither the answer nor the format is right


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
    groups: Sequence[Group], *, tokenizer: Tokenizer, settings: RewardConfig, structure_weight: float = 1.0
) -> None:
    """Fills ``rewards`` (the parts, by name) and ``reward`` of every trajectory.

    datarus: ``structure_weight * norm(R_tag) + answer_weight * R_answer - c_len``, norm standardising within the group
    (a constant group gives 0). Parts: tag, tag_norm, answer, length_cost. Source: Datarus-R1, arXiv 2508.13382.
    datamind: r_len if the answer is right, 0 if only the format is, -0.1 if neither. Parts: format, answer, length.
    Source: DataMind, arXiv 2509.25084.

    Args:
        groups: all of one size.
        settings: ``kind`` chooses the form.
        structure_weight: lambda of this step, see ``structure_schedule``; datamind has none.

    Raises:
        UserError: groups differ in size or are empty, or a part of a reward is not a finite number.
    """
    sizes = sorted({len(group.trajectories) for group in groups})
    if len(sizes) > 1 or sizes == [0]:
        found = " and ".join(map(str, sizes))
        raise UserError(f"groups have {found} trajectories; all must have the same number, at least 1")
    for group in groups:
        if settings.kind == "datamind":
            _score_datamind(group, tokenizer)
        else:
            _score_datarus(group, tokenizer, settings, structure_weight)
        for trajectory in group.trajectories:
            _check(trajectory)


def _score_datarus(group: Group, tokenizer: Tokenizer, settings: RewardConfig, structure_weight: float) -> None:
    tags = [tag_reward(trajectory, tokenizer) for trajectory in group.trajectories]
    for trajectory, tag, tag_norm in zip(group.trajectories, tags, group_advantages(tags).tolist(), strict=True):
        answer = float(answer_correct(trajectory.answer, group.task))
        cost = length_cost(trajectory.completion_tokens, settings.length_coef, settings.length_target)
        trajectory.rewards = {"tag": tag, "tag_norm": tag_norm, "answer": answer, "length_cost": cost}
        trajectory.reward = structure_weight * tag_norm + settings.answer_weight * answer - cost


def _score_datamind(group: Group, tokenizer: Tokenizer) -> None:
    for trajectory in group.trajectories:
        right = answer_correct(trajectory.answer, group.task)
        well_formed = format_right(trajectory, tokenizer)
        length = length_reward(len(tokenizer.encode(trajectory.answer or "")))
        trajectory.rewards = {"format": float(well_formed), "answer": float(right), "length": length}
        trajectory.reward = length if right else 0.0 if well_formed else FORMAT_WRONG


def _check(trajectory: Trajectory) -> None:
    for name, value in {**trajectory.rewards, "total": trajectory.reward}.items():
        if not math.isfinite(value):
            raise UserError(
                f"the {name} reward of sample {trajectory.sample} of task {trajectory.task.id!r} is {value}; "
                "a reward must be a finite number"
            )
