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

from .slots import Slots
from .views import View

DECIMALS = 3
Gold = Callable[[pd.DataFrame, Slots], "float | int | str | bool"]


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


@dataclass(frozen=True)
class Operation:
    """One thing to ask; `wordings`, `thought`, `expression` and `slip` are templates over the slots that `bind` fills.

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

    def ask(self, view: View, rng: Random) -> Question | None:
        """A question about `view`, or None if the view does not allow one with a single clear answer."""
        slots = self.bind(view, rng)
        if slots is None:
            return None
        answer = spoken(self.gold(view.frame, slots), self.shape)
        if answer is None:
            return None
        wording = rng.randrange(len(self.wordings))
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
            columns=tuple(str(slots[key]) for key in "abglt" if key in slots),
        )

    def _print(self, expression: str, slots: Slots) -> str:
        if not expression:
            return ""
        text = expression.format(**slots)
        if self.shape == "number":
            return f"print(round({text}, {DECIMALS}))"
        return f'print("yes" if {text} else "no")' if self.shape == "check" else f"print({text})"


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
