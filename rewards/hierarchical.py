"""R_hrm: how sound the steps of a trajectory are, by the hierarchical reward model; and the labels it learns from.

A step is a turn with the observation that follows it. The model (``engine/scorer.py``) gives the probability s_i that
step i is sound, and p_i that it is sound as one with the step before it: wrong and then right counts as right.
Source: Datarus-R1, arXiv 2508.13382, whose equations are not public; the reward's form is this project's. Hierarchical
scores of steps and merged steps: arXiv 2503.13551.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from ..engine.hf import load_weights, read_config
from ..engine.mesh import Mesh
from ..engine.scorer import Scorer, StepSequence, score_steps
from ..engine.shard import ShardedModel
from ..rollout.trajectory import Span, Trajectory, turn_starts

MOST_AFTER_ERROR, LEAST_CORRECTED = -0.1, 0.1
NO_STEPS = -1.0  # nothing was done: the least of all rewards

Labels = Literal["binary", "graded"]


@dataclass(frozen=True)
class StepScores:
    """What the model says of one trajectory.

    Args:
        steps: s_i of its steps, each in [0, 1].
        pairs: p_i from the second step on.
        errors: whether each executed step failed, in order.
    """

    steps: list[float]
    pairs: list[float]
    errors: list[bool]

    @property
    def model_score(self) -> float:
        """The reward before its rules: what the model alone says."""
        return model_score(self.steps, self.pairs)

    @property
    def reward(self) -> float:
        """R_hrm."""
        return hierarchical_reward(self.steps, self.pairs, self.errors)


def model_score(step_scores: Sequence[float], pair_scores: Sequence[float]) -> float:
    """2 (mean s / 2 + mean p / 2) - 1, in [-1, 1]; one step alone has no p and gives 2 s - 1, no step gives -1."""
    if not step_scores:
        return NO_STEPS
    steps = fmean(step_scores)
    return steps + (fmean(pair_scores) if pair_scores else steps) - 1.0


def hierarchical_reward(step_scores: Sequence[float], pair_scores: Sequence[float], errors: Sequence[bool]) -> float:
    """R_hrm: ``model_score``, held to what the executions show.

    A trajectory whose last executed step failed has at most -0.1; one with errors, each of which was followed by a
    success, at least 0.1.

    Args:
        step_scores: s_i, probabilities.
        pair_scores: p_i from the second step on.
        errors: whether each executed step failed, in order.
    """
    score = model_score(step_scores, pair_scores)
    if not any(errors):
        return score
    return min(score, MOST_AFTER_ERROR) if errors[-1] else max(score, LEAST_CORRECTED)


class HierarchicalReward:
    """A trained model, frozen and sharded, that rewards trajectories.

    Args:
        folder: what ``recipes.hrm`` wrote.
        mesh: the ranks.
        tokens_per_microbatch: packed tokens of one forward pass, at least the longest trajectory.
        dtype: of the shards and of the arithmetic.
        offload: the shards live in the host's memory.

    Raises:
        UserError: a file or tensor is missing or has another shape.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        tokens_per_microbatch: int,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        with torch.device("meta"):
            scorer = Scorer(read_config(folder))
        self._scorer = ShardedModel(scorer, mesh, compute_dtype=dtype, trainable=False, offload=offload)
        self._tokens_per_microbatch = tokens_per_microbatch
        load_weights(self._scorer, folder)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """R_hrm of each of this rank's trajectories, in [-1, 1]; every rank must call it."""
        return [scores.reward for scores in self.scores(trajectories)]

    def scores(self, trajectories: Sequence[Trajectory]) -> list[StepScores]:
        """What the model says of each of this rank's trajectories; every rank must call it."""
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(trajectory.task.id, len(numbers)) for trajectory in trajectories]
        sequences = [step_sequence(t.spans, group=group) for t, group in zip(trajectories, groups, strict=True)]
        with_steps = [sequence for sequence in sequences if sequence.ends]
        found = iter(score_steps(self._scorer, with_steps, self._tokens_per_microbatch))
        return [
            StepScores(*(next(found) if sequence.ends else ([], [])), [not e.ok for e in trajectory.executions])
            for sequence, trajectory in zip(sequences, trajectories, strict=True)
        ]


def step_sequence(spans: Sequence[Span], labels: Sequence[float] = (), *, group: int = -1) -> StepSequence:
    """A trajectory for the scorer.

    Args:
        spans: the prompt first.
        labels: one for each step, to learn from; a merged pair has that of its later step.
        group: trajectories of one group may share their prompt.
    """
    bounds = [0, *accumulate(len(span.token_ids) for span in spans)]
    starts = turn_starts([span.writer for span in spans])
    ends = [bounds[stop] - 1 for _, stop in pairwise([*starts, len(spans)])]
    return StepSequence(
        token_ids=[token for span in spans for token in span.token_ids],
        prompt_tokens=bounds[starts[0]] if starts else bounds[-1],
        ends=ends,
        step_labels=list(labels),
        pair_labels=[None, *labels[1:]] if labels else [],
        group=group,
    )


def step_labels(
    outcomes: Sequence[bool | None], *, right: bool, kind: Labels, mistakes: Collection[int] = ()
) -> list[float]:
    """How sound each step is, as far as executions and the final answer tell.

    A step that failed has 0, and so has one that was wrong on purpose. Of the others, one that ran has 1 if the final
    answer is right and else 0 ("binary") or 1/2 ("graded": it may have been sound all the same); one that runs nothing
    (the answer, or a turn that is neither code nor answer) has 1 or 0 as the answer is right or wrong.

    Args:
        outcomes: of each step whether its code ran without an error, None where nothing was executed.
        right: whether the trajectory ends with the right answer.
        kind: what a step is worth that ran and led to a wrong answer.
        mistakes: indices of the steps that a teacher did wrong on purpose.
    """
    ran = 1.0 if right else 0.5 if kind == "graded" else 0.0
    labels = [float(right) if ok is None else ran if ok else 0.0 for ok in outcomes]
    return [0.0 if index in mistakes else label for index, label in enumerate(labels)]
