"""What is told of a table within a budget: each column's type, range or frequent values, gaps, and the first rows.

Where the budget is short, rows go first, then what is told of each column, then columns, of which a count is left.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd

from .tables import kind

SAMPLE_ROWS = (5, 3, 1, 0)
TOP_VALUES = 3
MAX_CELL = 40


def describe_fully(file: str, frame: pd.DataFrame, budget: int, *, count_tokens: Callable[[str], int] = len) -> str:
    """The metadata text of a table that fits a budget.

    Args:
        file: the base name under which code opens it.
        frame: the table.
        budget: the most that `count_tokens` may give for the text; where nothing fits, the shortest form comes.
        count_tokens: the measure of a text; its characters by default.
    """
    words = [kind(frame.iloc[:, place]) for place in range(len(frame.columns))]
    plain = [f'"{name}" {word}' for name, word in zip(frame.columns, words, strict=True)]
    head = f'read_csv("{file}"), {len(frame)} rows, {len(frame.columns)} columns:'

    def forms() -> Iterator[str]:
        full = [_column(frame, place) for place in range(len(words))]
        for columns, counts in ((full, SAMPLE_ROWS), (plain, SAMPLE_ROWS[1:])):
            for count in counts:
                yield "\n".join([head, *columns, *first_rows(frame, count)])

    def part(count: int) -> str:
        rest = ", ".join(f"{number} {word}" for word, number in sorted(Counter(words[count:]).items()))
        return "\n".join([head, *plain[:count], f"... {len(plain) - count} more columns: {rest}"])

    return richest(forms(), part, len(plain) - 1, budget, count_tokens)


def richest(
    forms: Iterable[str], part: Callable[[int], str], most: int, budget: int, count_tokens: Callable[[str], int]
) -> str:
    """The first of `forms` that fits, else `part(n)` with the largest n, 0 to `most`, that does, else `part(0)`.

    `part(n)` must grow with n.
    """
    for form in forms:
        if count_tokens(form) <= budget:
            return form
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(part(middle)) <= budget else (low, middle - 1)
    return part(low)


def _column(frame: pd.DataFrame, place: int) -> str:
    column, name = frame.iloc[:, place], frame.columns[place]
    word = kind(column)
    values = column.dropna()
    facts = [word]
    if word in ("int", "float") and len(values):
        facts.append(f"{cell(values.min())} to {cell(values.max())}")
    counts = values.value_counts()
    facts.append(f"{len(counts)} unique")
    if missing := len(column) - len(values):
        facts.append(f"{missing} missing")
    text = f'"{name}" {", ".join(facts)}'
    if word in ("int", "float") or counts.empty or counts.iloc[0] < 2:
        return text
    # Of values that are as frequent as each other the first in the table comes first, on every version of pandas.
    first = {value: number for number, value in reversed(list(enumerate(values)))}
    top = sorted(first, key=lambda value: (-int(counts[value]), first[value]))[:TOP_VALUES]
    return text + ": " + ", ".join(f"{cell(value)} ({counts[value]})" for value in top)


def first_rows(frame: pd.DataFrame, count: int) -> list[str]:
    """The first rows as lines of .csv under a heading, long values cut; no line at all for 0 rows."""
    if not count or frame.empty:
        return []
    return ["First rows:", *csv_lines(frame.head(count).itertuples(index=False, name=None))]


def csv_lines(rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows as lines of .csv, each value cut to MAX_CELL characters and kept on its line."""
    lines = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow([cell(value) for value in row])
        lines.append(text.getvalue())
    return lines


def cell(value: object) -> str:
    """A value in a few characters: numbers without needless digits, "" where it is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = f"{value:.6g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."
