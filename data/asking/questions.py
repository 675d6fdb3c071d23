"""Questions with known answers.

An operation binds columns and values of a view to slots, writes a question in one of its wordings, the one pandas
expression that answers it, and the answer itself. The answer comes from numpy on the columns' values (`gold`), never
from running the expression, so that the one can be tested against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import pandas as pd

from ..views import View
from .slots import Slots

DECIMALS = 3
Gold = Callable[[pd.DataFrame, Slots], "float | int | str | bool"]


@dataclass(frozen=True)
class Step:
    """One computation of a program and its result.

    Args:
        thought: what to do, in a few words.
        name: the variable that holds the result where a later step needs it.
        forms: programs that compute the same, the shortest first; the last line of each is the expression of the
            result, those before it are statements.
        shape: how the result is printed, see `Operation`.
        answer: the result as text.
        slips: what plausible wrong programs compute, in words, and those programs, in the form of `forms`.
        columns: the names that the program uses.
    """

    thought: str
    name: str
    forms: tuple[str, ...]
    shape: str
    answer: str
    slips: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question about one view.

    Args:
        operation, task_type: names of the operation and of its type.
        wording: which of the operation's wordings the text is in, from 0.
        text: the question.
        answer, answer_type: the right answer as text; "number" or "choice".
        thought: what to do, in a few words.
        code: the line that prints the answer once the table is in `df`; "" when no code is needed.
        slip: what a plausible wrong line computes, in words, and that line.
        columns: the names that the code uses.
        steps: the computations that lead to the answer, one after the other; () where the code is no Python.
        asked: what is asked, whatever the wording: two questions of one operation about one view with the same text
            here are the same question.
    """

    operation: str
    task_type: str
    wording: int
    text: str
    answer: str
    answer_type: str
    thought: str
    code: str
    slip: tuple[str, str]
    columns: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    asked: str = ""


@dataclass(frozen=True)
class Operation:
    """One thing to ask; all texts are templates over the slots that `bind` fills.

    `expression` gives the answer once the table is in `df`, and so does each of `forms`, the last line of which is an
    expression. `slip` is what a plausible wrong expression computes, in words, and that expression.

    `shape` is how the expression is printed: "number" rounded, "count" and "choice" as it is, "check" as yes or no.
    """

    name: str
    task_type: str
    shape: str
    bind: Callable[[View, Random], Slots | None]
    wordings: tuple[str, ...]
    thought: str
    expression: str
    gold: Gold
    slip: tuple[str, str] = ("", "")
    forms: tuple[str, ...] = ()

    def ask(self, view: View, rng: Random) -> Question | None:
        """A question about `view`, or None if the view does not allow one with a single clear answer."""
        slots = self.bind(view, rng)
        if slots is None:
            return None
        answer = spoken(self.gold(view.frame, slots), self.shape)
        if answer is None:
            return None
        wording = rng.randrange(len(self.wordings))
        columns = tuple(str(slots[key]) for key in "abcglt" if key in slots)
        return Question(
            operation=self.name,
            task_type=self.task_type,
            wording=wording,
            text=self.wordings[wording].format(**slots),
            answer=answer,
            answer_type="number" if self.shape in ("number", "count") else "choice",
            thought=self.thought.format(**slots),
            code=self._print(self.expression, slots),
            slip=(self.slip[0].format(**slots), self._print(self.slip[1], slots)),
            columns=columns,
            steps=(self._step(slots, answer, columns),) if self.expression else (),
            # Sorted: the correlation of b and a is that of a and b.
            asked=" ".join(sorted(repr(value) for value in slots.values() if isinstance(value, str | int | float))),
        )

    def _step(self, slots: Slots, answer: str, columns: tuple[str, ...]) -> Step:
        forms = tuple(form.format(**slots) for form in (self.expression, *self.forms))
        what, wrong = self.slip
        slips = ((what.format(**slots), wrong.format(**slots)),)
        return Step(self.thought.format(**slots), "result", forms, self.shape, answer, slips, columns)

    def _print(self, expression: str, slots: Slots) -> str:
        return printed(expression.format(**slots), self.shape) if expression else ""


def printed(program: str, shape: str) -> str:
    """A program whose last line is an expression, with that expression printed as a question's code prints it."""
    before, newline, expression = program.rpartition("\n")
    if shape == "number":
        expression = f"round({expression}, {DECIMALS})"
    elif shape == "check":
        expression = f'"yes" if {expression} else "no"'
    return f"{before}{newline}print({expression})"


def spoken(value: float | int | str | bool, shape: str) -> str | None:
    """An answer as text; None for a number that is undefined, too long to write, or lost by rounding to DECIMALS."""
    if shape == "check":
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number) or abs(number) >= 1e8:
        return None
    if shape == "count" or number == int(number):
        return str(int(number))
    if abs(round(number, DECIMALS) - number) > 0.005 * abs(number):
        return None
    return np.format_float_positional(number, precision=6, unique=True, trim="-")
