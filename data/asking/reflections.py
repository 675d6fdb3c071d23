"""More that is answered from a table's description alone; see `operations.REFLECTIONS` for the basic set."""

from __future__ import annotations

from ..tables import kind
from . import slots as bind
from .questions import Operation

MORE_REFLECTIONS: tuple[Operation, ...] = (
    Operation(
        "number_columns", "counting", "count", bind.nothing,
        ("How many columns hold numbers (int or float)?", "How many of the columns are of type int or float?"),
        "Count the columns of type int and float.", "",
        lambda f, s: sum(kind(f[name]) in ("int", "float") for name in f),
    ),
    Operation(
        "nth_column", "descriptive", "choice", bind.column_place,
        ("What is the {nth} column?", "Name the {nth} column of the table."),
        "Count the names up to the {nth}.", "", lambda f, s: str(f.columns[s["n"] - 1]),
    ),
    Operation(
        "has_column", "fact checking", "check", bind.column_or_not,
        ('Is there a column named "{a}"?', 'Does the table have a column "{a}"?'),
        'Look for "{a}" among the names.', "", lambda f, s: s["a"] in list(f.columns),
    ),
    Operation(
        "cell_count", "arithmetic", "count", bind.nothing,
        (
            "How many cells does the table have, empty ones included?",
            "What is the number of rows times the number of columns?",
        ),
        "{rows} rows times the number of columns.", "", lambda f, s: f.shape[0] * f.shape[1],
    ),
)  # fmt: skip
