"""Runs of an evaluation and what they come to: scores with intervals, by type and level; two evaluations compared."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..engine.errors import UserError
from ..rollout.sandbox import Execution
from ..rollout.trajectory import Trajectory
from .benchmarks import BenchmarkItem
from .measures import bootstrap_interval, code_errors, ending, paired_p_value, pass_at_k
from .scorers import score


@dataclass(frozen=True)
class Outcome:
    """One run of one task.

    Args:
        task, task_type, level: id, type and level of the task.
        correct: None where only a judge could tell, and none did.
        ending: how it ended, see ``measures.ending``.
        tokens: that the model wrote.
        turns: of the model.
        code_errors: what went wrong in each failed execution.
        measures: the benchmark's own, each as (points, out of).
    """

    task: str
    task_type: str
    level: str
    correct: bool | None
    ending: str
    tokens: int
    turns: int
    code_errors: tuple[str, ...] = ()
    measures: Mapping[str, tuple[float, float]] | None = None

    @classmethod
    def of_record(cls, item: BenchmarkItem, record: Mapping[str, Any]) -> Outcome:
        """The outcome of a run from its line on disk, whose reward is 1 where it is right."""
        executions = [Execution(**execution) for execution in record["executions"]]
        trajectory = Trajectory(
            item.task, record["sample"], [], record["status"], answer=record["answer"], executions=executions
        )
        correct = record["reward"] > 0 if record["scored"] else None
        return cls(
            task=item.task.id,
            task_type=item.task.task_type,
            level=item.level,
            correct=correct,
            ending=ending(trajectory, correct),
            tokens=record["completion_tokens"],
            turns=record["turns"],
            code_errors=tuple(code_errors(executions)),
            measures=score(item.rule, trajectory).measures,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Outcome:
        """The inverse of ``to_dict``."""
        return cls(**{**fields, "code_errors": tuple(fields["code_errors"])})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


# The words of the benchmarks for how hard a question is, in their order.
LEVELS = (("easy", "simple"), ("medium", "moderate"), ("hard", "challenging"))

Part = Callable[[Outcome], tuple[float, float]]


def summarise(outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """Scores and means of the runs.

    Returns:
        ``pass_at_1`` (mean over all runs that were judged), ``pass_at_k`` (``k`` the most runs of a task), ``pass_at``
        for k of 1, 2, 4 … and k; ``measures``, the benchmark's own; ``intervals``, of 95 %, of all these;
        ``num_tasks``, ``num_runs``, ``not_judged`` (runs), ``answered`` (share of runs), mean ``tokens`` and ``turns``
        of all runs and of the right ones (``tokens_right``, ``turns_right``, None where none is); ``endings`` and
        ``code_errors``, how often each; ``by_type`` and ``by_level`` with pass@1, its interval and the number of tasks.

    Raises:
        UserError: there is no run, or none could be judged.
    """
    if not outcomes:
        raise UserError("there is no task to evaluate; give data.num_eval_tasks or evaluate.benchmark some")
    judged = [outcome for outcome in outcomes if outcome.correct is not None]
    if not judged:
        raise UserError(f"none of {len(outcomes)} answers could be judged; set reward.judge to a model that can judge")
    runs = _by(judged, lambda outcome: outcome.task)
    most = max(map(len, runs.values()))
    counts = sorted({1, most, *(2**power for power in range(1, most.bit_length()) if 2**power < most)})
    passes = {k: _pass_at(runs.values(), k) for k in counts}
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.measures or {}))
    measures = {name: _sums(outcomes, _measure(name)) for name in names}
    intervals = {"pass_at_1": _interval(_sums(judged, _correct), seed)}
    intervals |= {f"pass_at_{k}": bootstrap_interval(values, seed=seed) for k, values in passes.items() if k > 1}
    intervals |= {name: _interval(sums, seed) for name, sums in measures.items()}
    right = [outcome for outcome in judged if outcome.correct]
    result = {
        "pass_at_1": fmean(bool(outcome.correct) for outcome in judged),
        "pass_at_k": fmean(passes[most]),
        "k": most,
        "pass_at": {str(k): fmean(values) for k, values in passes.items()},
        "measures": {name: _ratio(sums) for name, sums in measures.items()},
        "intervals": intervals,
        "num_tasks": len({outcome.task for outcome in outcomes}),
        "num_runs": len(outcomes),
        "not_judged": len(outcomes) - len(judged),
        "answered": fmean(outcome.ending in ANSWERED for outcome in outcomes),
        "tokens": fmean(outcome.tokens for outcome in outcomes),
        "turns": fmean(outcome.turns for outcome in outcomes),
        "tokens_right": fmean(outcome.tokens for outcome in right) if right else None,
        "turns_right": fmean(outcome.turns for outcome in right) if right else None,
        "endings": dict(Counter(outcome.ending for outcome in outcomes).most_common()),
        "code_errors": dict(Counter(error for outcome in outcomes for error in outcome.code_errors).most_common()),
        "by_type": _breakdown(judged, lambda outcome: outcome.task_type, seed),
    }
    if any(outcome.level for outcome in judged):
        result["by_level"] = _breakdown(judged, lambda outcome: outcome.level, seed)
    return result


ANSWERED = frozenset({"right", "wrong_value", "wrong_format", "not_judged"})


def compare(one: Sequence[Outcome], other: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """Two evaluations of the same tasks, task by task.

    Returns:
        ``num_tasks`` that both have, ``only_one``, ``only_other`` (numbers of tasks), and ``rows``: for pass@1, each
        measure of the benchmark and the tokens, the values ``one`` and ``other`` on the common tasks, ``difference``
        (the other's minus the one's), its ``interval`` of 95 % (paired bootstrap) and ``p_value`` (paired permutation
        test).

    Raises:
        UserError: they have no judged task in common.
    """
    first, second = (_by(outcomes, lambda outcome: outcome.task) for outcomes in (one, other))
    common = [task for task in first if task in second]
    names = dict.fromkeys(name for task in common for outcome in first[task] for name in outcome.measures or {})
    parts = {"pass_at_1": _correct, **{name: _measure(name) for name in names}, "tokens": _tokens}
    rows = {name: row for name, part in parts.items() if (row := _paired(first, second, common, part, seed))}
    if "pass_at_1" not in rows:
        raise UserError("the two results have no judged task in common; compare results of one benchmark")
    return {
        "num_tasks": len(common),
        "only_one": len(first) - len(common),
        "only_other": len(second) - len(common),
        "rows": rows,
    }


def _paired(
    first: Mapping[str, Sequence[Outcome]],
    second: Mapping[str, Sequence[Outcome]],
    tasks: Collection[str],
    part: Part,
    seed: int,
) -> dict[str, Any] | None:
    """A row of ``compare``; None where no task has the measure in both."""
    points: list[tuple[float, float]] = []
    weights: list[float] = []
    for task in tasks:
        found = [[value for outcome in runs[task] if (value := part(outcome))[1]] for runs in (first, second)]
        if all(found):
            # A mean over runs: the two may have run a task a different number of times.
            weights.append(fmean(weight for _, weight in found[0]))
            points.append((fmean(value for value, _ in found[0]), fmean(value for value, _ in found[1])))
    if not points:
        return None
    differences = [after - before for before, after in points]
    total = sum(weights)
    return {
        "one": sum(before for before, _ in points) / total,
        "other": sum(after for _, after in points) / total,
        "difference": sum(differences) / total,
        "interval": bootstrap_interval(differences, weights, seed=seed),
        "p_value": paired_p_value(differences, seed=seed),
    }


def _by(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[key(outcome)].append(outcome)
    return dict(found)


def _correct(outcome: Outcome) -> tuple[float, float]:
    return float(bool(outcome.correct)), float(outcome.correct is not None)


def _tokens(outcome: Outcome) -> tuple[float, float]:
    return float(outcome.tokens), 1.0


def _measure(name: str) -> Part:
    return lambda outcome: (outcome.measures or {}).get(name, (0.0, 0.0))


def _sums(outcomes: Iterable[Outcome], part: Part) -> list[tuple[float, float]]:
    """(points, out of) of each task that has any."""
    tasks = _by(outcomes, lambda outcome: outcome.task).values()
    sums = [tuple(map(sum, zip(*map(part, runs), strict=True))) for runs in tasks]
    return [(points, weight) for points, weight in sums if weight]


def _ratio(sums: Sequence[tuple[float, float]]) -> float:
    return sum(points for points, _ in sums) / sum(weight for _, weight in sums)


def _interval(sums: Sequence[tuple[float, float]], seed: int) -> tuple[float, float]:
    return bootstrap_interval([points for points, _ in sums], [weight for _, weight in sums], seed=seed)


def _pass_at(tasks: Iterable[Sequence[Outcome]], k: int) -> list[float]:
    """pass@k of each task that was run k times at least."""
    return [pass_at_k(len(runs), sum(bool(run.correct) for run in runs), k) for runs in tasks if len(runs) >= k]


def _breakdown(judged: Sequence[Outcome], key: Callable[[Outcome], str], seed: int) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "pass_at_1": fmean(bool(run.correct) for run in runs),
            "num_tasks": len({run.task for run in runs}),
            "interval": _interval(_sums(runs, _correct), seed),
        }
        for name, runs in sorted(_by(judged, key).items(), key=lambda group: (_rank(group[0]), group[0]))
    }


def _rank(level: str) -> int:
    return next((place for place, words in enumerate(LEVELS) if level in words), -1)
