"""Do two tables hold the same rows: compared as wholes, in any order or in the gold's.

Execution match of text-to-SQL benchmarks (BIRD, arXiv 2305.03111), with three differences: duplicate rows count, a
table may be written as text, and numbers may be rounded to the digits that are shown.
"""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .value_match import equal_up_to_rounding, normalise, parse_date, parse_number

MISSING = frozenset({"", "nan", "null", "none", "<na>", "nat"})
INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
DECIMAL = re.compile(r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
RULE = re.compile(r":?-+:?")
SHOWN = 0.03  # rounding that moves a value by more hides what it is
EXACT = 99  # decimals of a number with an exponent

Rows = list[list[str]]
Cell = int | float | str


def same_table(prediction: str, gold: str, *, ordered: bool) -> bool:
    """Whether a text is the gold's table.

    The text is CSV, separated by tabs or by ``|``, or a Markdown table, alone or in one fence; lines around a Markdown
    table are passed over. Rows are compared as wholes, duplicates count, columns keep their order. The names in the
    header do not decide, unless the gold has no rows; the header may be left out.

    Cells are compared by value: whole numbers exactly, others up to rounding (1e-12 relative) or, where one of both
    columns shows fewer decimals, rounded to those, unless that hides more than 3 % of a value. So 3.14 is 3.14159,
    while 0.5 is not 0.54 and 3 is not 3.14. Dates by the day, NULL, NaN and an empty cell alike, texts after
    normalisation. Time is O(n log n) in the rows.

    Args:
        prediction: the answer's text.
        gold: CSV with a header.
        ordered: whether the rows must come in the gold's order.
    """
    read = _read_csv(gold)
    if read is None:
        return False
    header, *right = read
    return any(
        same_rows(body, right, ordered=ordered)
        for rows in _readings(prediction, len(header))
        for body in _bodies(rows, header, has_rows=bool(right))
    )


def same_result(result: str, gold: str, *, ordered: bool) -> bool:
    """Whether the CSV that a query wrote, header first, holds the gold's rows; compared as in ``same_table``."""
    said, right = _read_csv(result), _read_csv(gold)
    if said is None or right is None or len(said[0]) != len(right[0]):
        return False
    return same_rows(said[1:], right[1:], ordered=ordered)


def is_table(text: str, gold: str) -> bool:
    """Whether a text is itself a table of the gold's width, right or wrong: two lines or more."""
    right = _read_csv(gold)
    return right is not None and any(len(rows) > 1 for rows in _readings(text, len(right[0])))


def same_rows(prediction: Rows, gold: Rows, *, ordered: bool) -> bool:
    """Whether two lists of rows of one width hold the same rows, see ``same_table``.

    Rows whose rounded cells are equal are paired first. What is left (values on the edge between two roundings) is
    sorted and paired in order, so that each pair found is one, while a pairing may be missed.
    """
    if len(prediction) != len(gold):
        return False
    columns = [_compare(*pair) for pair in zip(zip(*prediction, strict=True), zip(*gold, strict=True), strict=True)]
    places = [column[2] for column in columns]
    said = list(zip(*(column[0] for column in columns), strict=True))
    right = list(zip(*(column[1] for column in columns), strict=True))
    if not ordered:
        said, right = _unpaired(said, right, places)
    return all(all(map(_same_cell, one, other, places)) for one, other in zip(said, right, strict=True))


def _unpaired(
    said: list[tuple[Cell, ...]], right: list[tuple[Cell, ...]], places: Sequence[int | None]
) -> tuple[list[tuple[Cell, ...]], list[tuple[Cell, ...]]]:
    """The rows of both tables without those that are equal after rounding; sorted."""
    waiting: dict[tuple[Cell, ...], list[tuple[Cell, ...]]] = defaultdict(list)
    for row in right:
        waiting[tuple(map(_rounded, row, places))].append(row)
    left = []
    for row in said:
        partners = waiting.get(tuple(map(_rounded, row, places)))
        if partners:
            partners.pop()
        else:
            left.append(row)
    return sorted(left, key=_order), sorted((row for rows in waiting.values() for row in rows), key=_order)


def _order(row: tuple[Cell, ...]) -> tuple[list[str], list[float]]:
    texts = [cell if isinstance(cell, str) else "" for cell in row]
    return texts, [0.0 if isinstance(cell, str) else cell for cell in row]


def _compare(said: Sequence[str], right: Sequence[str]) -> tuple[list[Cell], list[Cell], int | None]:
    """One column of both tables as values, and the decimals to which they are rounded (None: not at all)."""
    cells = [[_cell(text) for text in column] for column in (said, right)]
    shown = [max(map(_decimals, column, values)) for column, values in zip((said, right), cells, strict=True)]
    places = min(shown)
    longer = cells[shown.index(max(shown))]
    hides = any(
        not isinstance(value, str) and abs(round(value, places) - value) > SHOWN * abs(value) for value in longer
    )
    return cells[0], cells[1], None if places in (0, max(shown)) or hides else places


def _cell(text: str) -> Cell:
    text = text.strip()
    if text.casefold() in MISSING:
        return ""
    if INTEGER.fullmatch(text):
        return int(text)
    value = float(text) if DECIMAL.fullmatch(text) else parse_number(text)
    if value is not None and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if text.casefold() in ("inf", "-inf"):
        return text.casefold()  # its sign is no hyphen
    day = parse_date(text)
    return day.isoformat() if day is not None else normalise(text) or text


def _decimals(text: str, value: Cell) -> int:
    if isinstance(value, str) or text.isdigit():
        return 0
    if "e" in text.lower():
        return EXACT
    _, _, digits = text.strip().partition(".")
    return len(digits) - len(digits.lstrip("0123456789"))


def _rounded(cell: Cell, places: int | None) -> Cell:
    if places is None:
        return float(f"{cell:.12g}") if isinstance(cell, float) else cell
    return cell if isinstance(cell, str) else round(cell, places)


def _same_cell(one: Cell, other: Cell, places: int | None) -> bool:
    if one == other:
        return True
    if isinstance(one, str) or isinstance(other, str):
        return False
    half = 0.0 if places is None else 0.5 * 10.0**-places * (1 + 1e-9)
    return equal_up_to_rounding(one, other) or abs(one - other) <= half


def _bodies(rows: Rows, header: list[str], *, has_rows: bool) -> Iterator[Rows]:
    """The rows of a text without its header, and all of them, since it may have none."""
    if has_rows:
        # A number over a column whose name is none is a value.
        if all(
            isinstance(_cell(said), str) or not isinstance(_cell(name), str)
            for said, name in zip(rows[0], header, strict=True)
        ):
            yield rows[1:]
        yield rows
    elif list(map(normalise, rows[0])) == list(map(normalise, header)):
        yield rows[1:]


def _readings(text: str, width: int) -> Iterator[Rows]:
    """The text as a table of `width` columns, in each form in which it is one."""
    fenced = text.split("```")
    if len(fenced) == 3:
        text = fenced[1].partition("\n")[2]  # behind the fence stands the language
    for rows in (_read_bars(text), *(_read(text.strip(), delimiter) for delimiter in ",\t")):
        if rows and all(len(row) == width for row in rows):
            yield rows


def _read_csv(gold: str) -> Rows | None:
    rows = _read(gold, ",")
    return rows if rows and len({len(row) for row in rows}) == 1 else None


def _read(text: str, delimiter: str) -> Rows | None:
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row] or None
    except csv.Error:  # a field of more than 128 KiB
        return None


def _read_bars(text: str) -> Rows:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("|")] or lines
    rows = []
    for line in lines:
        if line.startswith("|"):
            line = line[1:-1] if line.endswith("|") and not line.endswith("\\|") and len(line) > 1 else line[1:]
        rows.append([cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)])
    if len(rows) > 1 and all(RULE.fullmatch(cell) for cell in rows[1]):
        del rows[1]
    return rows
