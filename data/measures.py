"""Statistics of an evaluation: pass@k, intervals, significance, and the ways in which a run ends.

The unit is the task: its runs share what makes it hard, so intervals and tests draw tasks, each with all of its runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ..rewards.answer import has_form
from ..rollout.sandbox import Execution
from ..rollout.trajectory import Trajectory

Values = Sequence[float] | npt.NDArray[np.float64]

RESAMPLES = 10_000
AT_ONCE = 2**22  # numbers of a block of resamples
EXACT_TASKS = 16  # up to 2**16 patterns of signs are counted, not drawn
SAME = 1e-9  # between sums of the same numbers in another order
RAISED = re.compile(r"^cell \d+, line \d+.*\n(?!cell \d)([A-Za-z_][\w.]*)", re.MULTILINE)


def pass_at_k(runs: int, right: int, k: int) -> float:
    """The probability that of ``k`` of a task's runs, drawn without replacement, one at least is right.

    Unbiased for any number of runs: 1 - C(runs - right, k) / C(runs, k) (Chen et al., 2021, arXiv 2107.03374).

    Raises:
        ValueError: fewer runs than k, or ``right`` is not between 0 and ``runs``.
    """
    if not 0 < k <= runs or not 0 <= right <= runs:
        raise ValueError(f"pass@{k} of {runs} runs with {right} right; expected 0 < k <= runs and 0 <= right <= runs")
    return 1.0 - math.comb(runs - right, k) / math.comb(runs, k)


def bootstrap_interval(
    points: Values, weights: Values | None = None, *, share: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``sum(points) / sum(weights)`` when tasks are drawn with replacement (Efron, 1979).

    Args:
        points: [n] of each task, all its runs together.
        weights: [n] what each task's points are out of; None: 1 each, so that the interval is of a mean.
        share: of the resamples that lie within.
        resamples: how often n tasks are drawn.
        seed: of the draws.
    """
    values = np.asarray(points, dtype=float)
    divisors = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    generator = np.random.default_rng(seed)
    found: list[npt.NDArray[np.float64]] = []
    block = max(1, AT_ONCE // len(values))
    for start in range(0, resamples, block):
        drawn = generator.integers(len(values), size=(min(block, resamples - start), len(values)))
        found.append(values[drawn].sum(1) / divisors[drawn].sum(1))
    low, high = np.quantile(np.concatenate(found), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def paired_p_value(differences: Values, *, flips: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a permutation test: under the null, the sign of each task's difference is a fair coin.

    Exact for up to 16 tasks that differ; beyond that from ``flips`` draws, of which the observed one is counted as one
    more (Phipson and Smyth, 2010), so that it is never 0.

    Args:
        differences: [n] of each task, one evaluation minus the other.
        seed: of the draws.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    bound = abs(values.sum()) - SAME * np.abs(values).sum()
    if len(values) <= EXACT_TASKS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= bound))
    generator = np.random.default_rng(seed)
    extreme = 0
    block = max(1, AT_ONCE // len(values))
    for start in range(0, flips, block):
        signs = generator.integers(0, 2, size=(min(block, flips - start), len(values))) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ values) >= bound))
    return (extreme + 1) / (flips + 1)


def ending(trajectory: Trajectory, correct: bool | None) -> str:
    """How a run ended, in one word of an error taxonomy.

    ``right``; ``not_judged``, free text that no judge saw; ``wrong_value``, an answer of the gold's form;
    ``wrong_format``, one of another form; else, without an answer, the trajectory's status (``void``, ``turn_limit``,
    ``token_limit``, ``time_limit``, ``error_limit``, ``failed``).
    """
    if correct:
        return "right"
    if trajectory.answer is None:
        return trajectory.status
    if correct is None:
        return "not_judged"
    return "wrong_value" if has_form(trajectory.answer, trajectory.task) else "wrong_format"


def code_errors(executions: Iterable[Execution]) -> list[str]:
    """What went wrong in each execution that failed: the exception's class, or else the sandbox's verdict."""
    return [_error(execution) for execution in executions if not execution.ok]


def _error(execution: Execution) -> str:
    raised = RAISED.findall(execution.output)
    return raised[-1].rpartition(".")[2] if raised and execution.verdict == "error" else execution.verdict
