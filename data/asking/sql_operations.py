"""What can be asked of a database: one row of SQL_OPERATIONS is one thing, its wordings, its query, its answer.

The answer is computed by loops over the tables' values (`gold`), never by running the query, so that the one can be
tested against the other.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..databases import Database, present
from . import sql_slots as bind
from .questions import Question
from .sql_slots import Bind, Slots, by_group, chained, joined

Rows = list[tuple[Any, ...]]
Gold = Callable[[Slots], Rows]
NAMES = re.compile(r"\{([A-Z])\}")


@dataclass(frozen=True)
class SqlOperation:
    """One thing to ask of a database; `wordings`, `thought`, `sql`, `slip` and `header` are templates over the slots.

    Args:
        name, task_type: its name and that of its type.
        bind: chooses tables, columns and values.
        wordings: at least two.
        thought: what to do, in a few words.
        sql: the query.
        header: the names of the result's columns.
        gold: the rows of the result.
        slip: what a plausible wrong query gives, in words, and that query; it runs, and its result is another.
        ordered: whether the order of the rows is asked for.
    """

    name: str
    task_type: str
    bind: Bind
    wordings: tuple[str, ...]
    thought: str
    sql: str
    header: tuple[str, ...]
    gold: Gold
    slip: tuple[str, str]
    ordered: bool = False

    def ask(self, database: Database, rng: Random) -> Question | None:
        """A question about `database`, or None if it does not allow one with a single clear answer."""
        slots = self.bind(database, rng)
        if slots is None:
            return None
        rows = self.gold(slots)
        if not 0 < len(rows) <= bind.MAX_ANSWER_ROWS:
            return None
        wording = rng.randrange(len(self.wordings))
        return Question(
            operation=self.name,
            task_type=self.task_type,
            wording=wording,
            text=self.wordings[wording].format(**slots),
            answer=_to_csv([tuple(name.format(**slots) for name in self.header), *rows]),
            answer_type="ordered_table" if self.ordered else "table",
            thought=self.thought.format(**slots),
            code=self.sql.format(**slots),
            slip=(self.slip[0].format(**slots), self.slip[1].format(**slots)),
            columns=tuple(dict.fromkeys(slots[key.lower()] for key in NAMES.findall(self.sql) if key != "V")),
            asked=self.sql.format(**slots),
        )


def _to_csv(rows: Sequence[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def _column(slots: Slots, key: str) -> list[Any]:
    return list(slots["one"].column(slots[key]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sum(values: Sequence[float]) -> float:
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)


def _count(values: Sequence[bool]) -> Rows:
    return [(sum(values),)]


def _groups(slots: Slots) -> dict[Any, list[Any]]:
    return by_group(_column(slots, "g"), _column(slots, "a"))


def _top(rows: Rows, slots: Slots) -> Rows:
    return sorted(rows, key=lambda row: -row[1])[: slots["n"]]


def _partners(slots: Slots) -> Rows:
    """The parent's label and the number of its rows in the child, where there are any."""
    sizes = Counter(slots["child"].column(slots["k"]))
    pairs = zip(slots["parent"].column(slots["r"]), slots["parent"].column(slots["l"]), strict=True)
    return [(label, sizes[key]) for key, label in pairs if key in sizes]


def _above_mean(slots: Slots) -> Rows:
    values = present(_column(slots, "a"))
    mean = _mean(values)
    return _count([value > mean for value in values])


def _extreme(slots: Slots) -> Rows:
    pairs = zip(_column(slots, "l"), _column(slots, "a"), strict=True)
    return [(max((pair for pair in pairs if pair[1] is not None), key=lambda pair: pair[1])[0],)]


def _between(slots: Slots) -> Rows:
    return _count([slots["start"] <= value[:10] <= slots["end"] for value in present(_column(slots, "d"))])


def _per_year(slots: Slots) -> Rows:
    return sorted(Counter(value[:4] for value in present(_column(slots, "d"))).items())


def _alone(slots: Slots) -> Rows:
    used = set(slots["child"].column(slots["k"]))
    return _count([key not in used for key in slots["parent"].column(slots["r"])])


JOINED = "FROM {C} JOIN {P} ON {C}.{K} = {P}.{R}"
APART = "FROM {P} LEFT JOIN {C} ON {C}.{K} = {P}.{R}"

SQL_OPERATIONS: tuple[SqlOperation, ...] = (
    SqlOperation(
        "rows", "counting", bind.table,
        ('How many rows does the table "{t}" have?', 'Count the rows of "{t}".', 'How many entries are in "{t}"?'),
        "Count all rows of {t}.", "SELECT count(*) AS n FROM {T}", ("n",),
        lambda s: [(s["one"].rows,)],
        ("number of different {g}", "SELECT count(DISTINCT {G}) AS n FROM {T}"),
    ),
    SqlOperation(
        "average", "aggregation", bind.number,
        ('What is the average "{a}" in "{t}"?', 'Give the mean of "{a}" over all rows of "{t}".'),
        "Average of {a}.", "SELECT avg({A}) AS average FROM {T}", ("average",),
        lambda s: [(_mean(present(_column(s, "a"))),)],
        ("sum", "SELECT sum({A}) AS average FROM {T}"),
    ),
    SqlOperation(
        "total_where", "aggregation", bind.group_value_number,
        ('What is the total "{a}" of the rows of "{t}" with "{g}" {v}?',
         'Add up "{a}" in "{t}" where "{g}" is {v}.'),
        "Sum of {a} where {g} is {v}.", "SELECT sum({A}) AS total FROM {T} WHERE {G} = {V}", ("total",),
        lambda s: [(_sum(_groups(s)[s["value"]]),)],
        ("sum of all rows", "SELECT sum({A}) AS total FROM {T}"),
    ),
    SqlOperation(
        "count_above", "counting", bind.cut,
        ('How many rows of "{t}" have "{a}" above {v}?', 'In how many rows of "{t}" is "{a}" greater than {v}?'),
        "Count rows with {a} > {v}.", "SELECT count(*) AS n FROM {T} WHERE {A} > {V}", ("n",),
        lambda s: _count([value > s["value"] for value in present(_column(s, "a"))]),
        ("number of rows below", "SELECT count(*) AS n FROM {T} WHERE {A} < {V}"),
    ),
    SqlOperation(
        "per_group", "distribution", bind.table,
        ('How many rows of "{t}" are there for each "{g}"?', 'Count the rows of "{t}" by "{g}".'),
        "Group {t} by {g} and count.", "SELECT {G}, count(*) AS n FROM {T} GROUP BY {G}", ("{g}", "n"),
        lambda s: list(Counter(_column(s, "g")).items()),
        ("number of all rows", "SELECT {G}, count(*) AS n FROM {T}"),
    ),
    SqlOperation(
        "group_having", "comparison", bind.having,
        ('What is the average "{a}" for each "{g}" that has at least {n} rows in "{t}"?',
         'For every "{g}" with {n} or more rows in "{t}", give the mean "{a}".'),
        "Group {t} by {g}, keep groups of {n} rows or more, average {a}.",
        "SELECT {G}, avg({A}) AS average FROM {T} GROUP BY {G} HAVING count(*) >= {n}", ("{g}", "average"),
        lambda s: [(key, _mean(values)) for key, values in _groups(s).items()
                   if _column(s, "g").count(key) >= s["n"]],
        ("average of all groups", "SELECT {G}, avg({A}) AS average FROM {T} GROUP BY {G}"),
    ),
    SqlOperation(
        "top_rows", "ranking", bind.top_rows,
        ('Which {n} rows of "{t}" have the highest "{a}"? Give "{l}" and "{a}", the highest first.',
         'List "{l}" and "{a}" of the {n} rows of "{t}" with the largest "{a}", in descending order.'),
        "Order {t} by {a}, highest first, and take {n}.",
        "SELECT {L}, {A} FROM {T} ORDER BY {A} DESC LIMIT {n}", ("{l}", "{a}"),
        lambda s: _top([pair for pair in zip(_column(s, "l"), _column(s, "a"), strict=True)
                        if pair[1] is not None], s),
        ("lowest rows", "SELECT {L}, {A} FROM {T} ORDER BY {A} LIMIT {n}"), ordered=True,
    ),
    SqlOperation(
        "top_groups", "ranking", bind.top_groups,
        ('Which {n} values of "{g}" in "{t}" have the highest total "{a}"? Give both, the highest first.',
         'List the {n} "{g}" of "{t}" with the largest sum of "{a}" and that sum, in descending order.'),
        "Sum {a} by {g}, order by it, highest first, and take {n}.",
        "SELECT {G}, sum({A}) AS total FROM {T} GROUP BY {G} ORDER BY sum({A}) DESC LIMIT {n}", ("{g}", "total"),
        lambda s: _top([(key, _sum(values)) for key, values in _groups(s).items()], s),
        ("lowest groups", "SELECT {G}, sum({A}) AS total FROM {T} GROUP BY {G} ORDER BY sum({A}) LIMIT {n}"),
        ordered=True,
    ),
    SqlOperation(
        "distinct", "data preprocessing", bind.repeated,
        ('How many different values does "{x}" of "{t}" have?', 'Count the distinct "{x}" in "{t}".'),
        "Count different {x}.", "SELECT count(DISTINCT {X}) AS n FROM {T}", ("n",),
        lambda s: [(len(set(present(_column(s, "x")))),)],
        ("number of values, repeated ones too", "SELECT count({X}) AS n FROM {T}"),
    ),
    SqlOperation(
        "values", "descriptive", bind.table,
        ('Which values of "{g}" occur in "{t}"? Name each once.', 'List the distinct values of "{g}" in "{t}".'),
        "Select the different {g}.", "SELECT DISTINCT {G} FROM {T}", ("{g}",),
        lambda s: [(value,) for value in dict.fromkeys(_column(s, "g"))],
        ("column with repetitions", "SELECT {G} FROM {T}"),
    ),
    SqlOperation(
        "missing", "data preprocessing", bind.gappy,
        ('How many rows of "{t}" have no "{x}"?', 'In how many rows of "{t}" is "{x}" missing?'),
        "Count rows where {x} is null.", "SELECT count(*) AS n FROM {T} WHERE {X} IS NULL", ("n",),
        lambda s: _count([value is None for value in _column(s, "x")]),
        ("number of rows equal to null, which none is", "SELECT count(*) AS n FROM {T} WHERE {X} = NULL"),
    ),
    SqlOperation(
        "share", "distribution", bind.group,
        ('What percentage of the rows of "{t}" have "{g}" {v}?', 'In what percent of the rows of "{t}" is "{g}" {v}?'),
        "Rows with {g} {v} as a percentage of all rows.",
        "SELECT 100.0 * sum(CASE WHEN {G} = {V} THEN 1 ELSE 0 END) / count(*) AS percent FROM {T}", ("percent",),
        lambda s: [(100 * _column(s, "g").count(s["value"]) / s["one"].rows,)],
        ("whole-number division",
         "SELECT sum(CASE WHEN {G} = {V} THEN 1 ELSE 0 END) / count(*) * 100 AS percent FROM {T}"),
    ),
    SqlOperation(
        "above_average", "multi-hop numerical", bind.above_mean,
        ('How many rows of "{t}" have "{a}" above its average?',
         'In how many rows of "{t}" is "{a}" greater than the mean of all rows?'),
        "Count rows with {a} above the average, which a nested query gives.",
        "SELECT count(*) AS n FROM {T} WHERE {A} > (SELECT avg({A}) FROM {T})", ("n",), _above_mean,
        ("number of rows below the average", "SELECT count(*) AS n FROM {T} WHERE {A} < (SELECT avg({A}) FROM {T})"),
    ),
    SqlOperation(
        "at_largest", "multi-hop numerical", bind.extreme,
        ('What is "{l}" in the row of "{t}" with the largest "{a}"?', 'Which "{l}" of "{t}" has the highest "{a}"?'),
        "Find {l} where {a} is the maximum.",
        "SELECT {L} FROM {T} WHERE {A} = (SELECT max({A}) FROM {T})", ("{l}",), _extreme,
        ("row with the smallest value", "SELECT {L} FROM {T} WHERE {A} = (SELECT min({A}) FROM {T})"),
    ),
    SqlOperation(
        "between", "time-based calculation", bind.between,
        ('How many rows of "{t}" have "{d}" from {start} to {end}, both days included?',
         'Count the rows of "{t}" with "{d}" between {start} and {end} (inclusive).'),
        "Count rows with the day of {d} from {start} to {end}.",
        "SELECT count(*) AS n FROM {T} WHERE date({D}) BETWEEN '{start}' AND '{end}'", ("n",), _between,
        ("number of rows from the first day on", "SELECT count(*) AS n FROM {T} WHERE date({D}) >= '{start}'"),
    ),
    SqlOperation(
        "per_year", "time-based calculation", bind.dated,
        ('How many rows of "{t}" fall in each year of "{d}"? Order them by year.',
         'Count the rows of "{t}" by the year of "{d}", the earliest year first.'),
        "Group {t} by the year of {d} and count.",
        "SELECT strftime('%Y', {D}) AS year, count(*) AS n FROM {T} WHERE {D} IS NOT NULL GROUP BY 1 ORDER BY 1",
        ("year", "n"), _per_year,
        ("number by month", "SELECT strftime('%m', {D}) AS year, count(*) AS n FROM {T} GROUP BY 1 ORDER BY 1"),
        ordered=True,
    ),
    SqlOperation(
        "join_count", "counting", bind.link,
        ('How many rows of "{c}" belong to each "{l}" of "{p}"? Leave out those without any.',
         'For each "{l}" of "{p}" that has rows in "{c}", count them.'),
        "Join {c} with {p} and count by {l}.",
        "SELECT {P}.{L}, count(*) AS n " + JOINED + " GROUP BY {P}.{R}", ("{l}", "n"), _partners,
        ("number of all joined rows", "SELECT {P}.{L}, count(*) AS n " + JOINED),
    ),
    SqlOperation(
        "join_top", "ranking", bind.link_top,
        ('Which {n} "{l}" of "{p}" have the most rows in "{c}"? Give the number too, the highest first.',
         'List the {n} "{l}" of "{p}" with the most rows in "{c}" and how many, in descending order.'),
        "Join {c} with {p}, count by {l}, highest first, and take {n}.",
        "SELECT {P}.{L}, count(*) AS n " + JOINED + " GROUP BY {P}.{R} ORDER BY count(*) DESC LIMIT {n}",
        ("{l}", "n"), lambda s: _top(_partners(s), s),
        ("fewest rows", "SELECT {P}.{L}, count(*) AS n " + JOINED + " GROUP BY {P}.{R} ORDER BY count(*) LIMIT {n}"),
        ordered=True,
    ),
    SqlOperation(
        "join_average", "aggregation", bind.link_number,
        ('What is the average "{a}" of the rows of "{c}" whose "{p}" has "{l}" {v}?',
         'Give the mean "{a}" in "{c}" for the "{p}" with "{l}" {v}.'),
        "Join {c} with {p}, keep {l} {v}, average {a}.",
        "SELECT avg({C}.{A}) AS average " + JOINED + " WHERE {P}.{L} = {V}", ("average",),
        lambda s: [(_mean(joined(s)[s["value"]]),)],
        ("average of all rows", "SELECT avg({C}.{A}) AS average " + JOINED),
    ),
    SqlOperation(
        "chain_count", "multi-hop numerical", bind.chain,
        ('How many rows of "{c}" lead over "{p}" to the "{q}" with "{l}" {v}?',
         'Count the rows of "{c}" whose "{p}" belongs to the "{q}" with "{l}" {v}.'),
        "Join {c}, {p} and {q}, and count rows with {l} {v}.",
        "SELECT count(*) AS n " + JOINED + " JOIN {Q} ON {P}.{J} = {Q}.{S} WHERE {Q}.{L} = {V}", ("n",),
        lambda s: [(chained(s)[s["value"]],)],
        ("number of all joined rows", "SELECT count(*) AS n " + JOINED + " JOIN {Q} ON {P}.{J} = {Q}.{S}"),
    ),
    SqlOperation(
        "alone", "anomaly detection", bind.alone,
        ('How many rows of "{p}" have no row in "{c}"?', 'Count the rows of "{p}" that no row of "{c}" refers to.'),
        "Left join {p} with {c} and count rows without a partner.",
        "SELECT count(*) AS n " + APART + " WHERE {C}.{K} IS NULL", ("n",), _alone,
        ("number of rows with a partner", "SELECT count(DISTINCT {P}.{R}) AS n " + JOINED),
    ),
)  # fmt: skip
