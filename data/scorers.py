"""How benchmarks score an answer: each by its own published rule, on top of `rewards.answer`.

    score("dabench", trajectory).correct, score("dabench", trajectory).measures

A measure is a pair (points, points that there were), and a benchmark's value of it is the sum of the first over the sum
of the second, over all its runs.

What differs from the published programs: TableBench's exact match is taken after the normalisation of
`rewards.value_match`, so that quotes, case and thousands separators do not decide; QRData's answer may be a sentence
with one number and not only begin with it; of BIRD's rows, numbers may be rounded to the digits that are shown.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Literal

from ..rewards.answer import named_result, trajectory_correct
from ..rewards.table_match import same_result
from ..rewards.value_match import parse_number, same_number, same_value
from ..rollout.trajectory import Trajectory

Rule = Literal[
    "answer", "dabench", "exact_match", "exact_match_10_percent", "rouge_l", "execution_match", "number",
]  # fmt: skip

LABEL = re.compile(r"@(\w+)\[(.*?)\]")  # as DABench reads an answer
LABEL_TOLERANCE = 1e-6
WORD = re.compile(r"[a-z0-9]+")
HALF_UP = Context(prec=1000, rounding=ROUND_HALF_UP)
MAX_WORDS = 1000  # of an answer, for a longest common subsequence


@dataclass(frozen=True)
class Score:
    """What a run earns: whether it is right (None: only a judge can tell), and its part of the benchmark's measures."""

    correct: bool | None
    measures: dict[str, tuple[float, float]] = field(default_factory=dict)


def score(rule: Rule, trajectory: Trajectory) -> Score:
    """Scores the answer with which a trajectory ended."""
    return RULES[rule](trajectory)


def labels_met(answer: str | None, gold: str) -> dict[str, bool]:
    """Which of DABench's named values an answer has: the gold's text, or a number within 1e-6 of it.

    Source: ``eval_closed_form.py`` of InfiAgent-DABench, arXiv 2401.05507.

    Args:
        answer, gold: texts with ``@name[value]``.
    """
    said = dict(LABEL.findall(answer or ""))
    return {name: name in said and _is_label(said[name], value) for name, value in LABEL.findall(gold)}


def _is_label(said: str, label: str) -> bool:
    try:
        return said == label or abs(float(said) - float(label)) < LABEL_TOLERANCE
    except ValueError:
        return False


def parts_met(answer: str, gold: str, *, tolerance: float) -> float:
    """The share of the gold's parts, separated by commas, that stand at their places in an answer.

    Source: ``custom_em_metric.py`` of TableBench, arXiv 2408.09174.

    Args:
        tolerance: largest difference of two numbers as a share of the gold's; 0: they are rounded to the fewest
            decimals that a number of the gold has.
    """
    if same_value(answer, gold, tolerance=tolerance):
        return 1.0
    said, right = ([part.strip() for part in text.split(",")] for text in (answer, gold))
    numbers = [part for part in right if parse_number(part) is not None and "%" not in part]
    places = min((len(part.partition(".")[2]) for part in numbers), default=0)
    met = [_is_part(one, other, tolerance, places) for one, other in zip(said, right, strict=False)]
    return sum(met) / len(right)


def _is_part(said: str, right: str, tolerance: float, places: int) -> bool:
    if same_value(said, right, tolerance=tolerance):
        return True
    one, other = parse_number(said), parse_number(right)
    if tolerance or one is None or other is None or "%" in said + right:
        return False
    step = Decimal(1).scaleb(-places)
    return len({Decimal(repr(value)).quantize(step, context=HALF_UP) for value in (one, other)}) == 1


def rouge_l(answer: str, gold: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004), in lower case and without punctuation or articles."""
    said, right = (
        [word for word in WORD.findall(text.lower()) if word not in ("a", "an", "the")][:MAX_WORDS]
        for text in (answer, gold)
    )
    row = [0] * (len(right) + 1)
    for one in said:
        last = row[:]
        for place, other in enumerate(right, 1):
            row[place] = last[place - 1] + 1 if one == other else max(last[place], row[place - 1])
    return 2 * row[-1] / (len(said) + len(right)) if row[-1] else 0.0


# ---- the rules -------------------------------------------------------------------------------------------------------


def _answer(trajectory: Trajectory) -> Score:
    correct = trajectory_correct(trajectory)
    open_text = trajectory.task.answer_type == "free" and bool((trajectory.answer or "").strip())
    return Score(None if open_text and not correct else correct)


def _dabench(trajectory: Trajectory) -> Score:
    met = labels_met(trajectory.answer, trajectory.task.answer).values()
    right, pairs = sum(met), len(met)
    measures = {
        "accuracy_by_question": (float(right == pairs), 1.0),
        "proportional_accuracy_by_question": (right / pairs, 1.0),
        "accuracy_by_sub_question": (float(right), float(pairs)),
        "accuracy_within_3_percent": (float(trajectory_correct(trajectory)), 1.0),
    }
    return Score(right == pairs, measures)


def _exact_match(trajectory: Trajectory, tolerance: float = 0.0) -> Score:
    share = parts_met(trajectory.answer or "", trajectory.task.answer, tolerance=tolerance)
    name = "exact_match_10_percent" if tolerance else "exact_match"
    return Score(share == 1.0, {name: (share, 1.0), "tablebench_score": (share, 1.0)})


def _rouge_l(trajectory: Trajectory) -> Score:
    share = rouge_l(trajectory.answer or "", trajectory.task.answer)
    return Score(_answer(trajectory).correct, {"rouge_l": (share, 1.0), "tablebench_score": (share, 1.0)})


def _execution_match(trajectory: Trajectory) -> Score:
    """BIRD compares sets of rows (arXiv 2305.03111): neither order nor repetition counts."""
    met = trajectory_correct(trajectory)
    if not met and (result := named_result(trajectory.answer, trajectory.executions, trajectory.task)) is not None:
        met = same_result(_distinct(result), _distinct(trajectory.task.answer), ordered=False)
    return Score(met, {"execution_accuracy": (float(met), 1.0)})


def _distinct(table: str) -> str:
    """A table as CSV with each row once, or as it is where a field is too long to be read."""
    try:
        header, *rows = csv.reader(io.StringIO(table, newline=""))
    except csv.Error:
        return table
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([header, *dict.fromkeys(map(tuple, rows))])
    return written.getvalue()


def _number(trajectory: Trajectory) -> Score:
    return Score(same_number(trajectory.answer or "", trajectory.task.answer, tolerance=0.0))


RULES: Mapping[Rule, Callable[[Trajectory], Score]] = {
    "answer": _answer,
    "dabench": _dabench,
    "exact_match": _exact_match,
    "exact_match_10_percent": lambda trajectory: _exact_match(trajectory, 0.1),
    "rouge_l": _rouge_l,
    "execution_match": _execution_match,
    "number": _number,
}
