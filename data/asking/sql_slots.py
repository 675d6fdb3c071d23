"""Binding for SQL: which tables, columns and values of a database fill a question, so that its answer is clear.

Each function returns the slots of one question, or None if the database lacks what it needs. A name stands under a
small letter as the question says it and under the capital as SQL writes it: `t` a table, `c` a table whose foreign key
`k` holds values of `r` in table `p`; `a` a column of numbers, `g` of groups, `l` of labels, `d` of days, `x` any.
`v` is a value, in the question's quotes, and `V` in SQL's; `one`, `child` and `parent` are the tables themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

from ..databases import Database, ForeignKey, StoredTable, present, sql_name
from ..tables import quotable
from .slots import literal, shorten

Slots = dict[str, Any]
Bind = Callable[[Database, Random], Slots | None]
MAX_ANSWER_ROWS = 100


def names(**chosen: str) -> Slots:
    """Each name as the question and as SQL write it."""
    return {**chosen, **{key.upper(): sql_name(name) for key, name in chosen.items()}}


def value_slots(value: Any) -> Slots:
    """A value as the question and as SQL write it."""
    in_sql = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else literal(value)
    return {"value": value, "v": literal(value), "V": in_sql}


def by_group(groups: list[Any], values: list[Any]) -> dict[Any, list[Any]]:
    """The values of each group, missing ones left out; groups in the order of their first rows."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found[group] += [] if value is None else [value]
    return dict(found)


def _pick(choices: list[Slots], rng: Random) -> Slots | None:
    return rng.choice(choices) if choices else None


def _link(child: StoredTable, parent: StoredTable, key: ForeignKey) -> Slots:
    return {
        "child": child,
        "parent": parent,
        **names(c=child.name, p=parent.name, k=key.columns[0], r=key.targets[0]),
    }


def table(database: Database, rng: Random) -> Slots | None:
    """A table, with a column of groups to be miscounted by."""
    found = [{"one": one, **names(t=one.name, g=g)} for one in database.usable for g in one.roles.groups]
    return _pick(found, rng)


def number(database: Database, rng: Random) -> Slots | None:
    """A column of numbers, none of whose sums is its mean."""
    found = [{"one": one, **names(t=one.name, a=a)} for one in database.usable for a in one.roles.numbers]
    slots = _pick(found, rng)
    values = slots and present(slots["one"].column(slots["a"]))
    return slots if values and sum(values) and len(values) > 1 else None


def cut(database: Database, rng: Random) -> Slots | None:
    """A column of numbers and a short value: more or fewer rows are above than below, some on each side."""
    slots = number(database, rng)
    if slots is None:
        return None
    values = sorted(present(slots["one"].column(slots["a"])))
    value = shorten(values[int(len(values) * rng.uniform(0.15, 0.85))])
    above, below = sum(item > value for item in values), sum(item < value for item in values)
    return {**slots, **value_slots(value)} if above and below and above != below else None


def group(database: Database, rng: Random) -> Slots | None:
    """A column of groups and one of its values, which is not all of the table."""
    slots = table(database, rng)
    if slots is None:
        return None
    sizes = Counter(slots["one"].column(slots["g"]))
    return {**slots, **value_slots(rng.choice(sorted(sizes)))}


def group_number(database: Database, rng: Random) -> Slots | None:
    """A column of groups and another of numbers; each group has a number."""
    found = [
        {"one": one, **names(t=one.name, g=g, a=a)}
        for one in database.usable
        for g in one.roles.groups
        for a in one.roles.numbers
        if g != a
    ]
    slots = _pick(found, rng)
    if slots is None:
        return None
    groups = by_group(slots["one"].column(slots["g"]), slots["one"].column(slots["a"]))
    return slots if all(groups.values()) else None


def group_value_number(database: Database, rng: Random) -> Slots | None:
    """As `group_number`, and one of the groups, whose sum is not that of the whole column."""
    slots = group_number(database, rng)
    if slots is None:
        return None
    groups = by_group(slots["one"].column(slots["g"]), slots["one"].column(slots["a"]))
    value = rng.choice(sorted(groups))
    others = sum(sum(values) for key, values in groups.items() if key != value)
    return {**slots, **value_slots(value)} if abs(others) > 1e-6 else None


def having(database: Database, rng: Random) -> Slots | None:
    """As `group_number`, and a number of rows `n` that some groups have and some have not."""
    slots = group_number(database, rng)
    if slots is None:
        return None
    sizes = sorted(set(Counter(slots["one"].column(slots["g"])).values()))
    return {**slots, "n": rng.choice(sizes[1:])} if len(sizes) > 1 else None


def top_groups(database: Database, rng: Random) -> Slots | None:
    """As `group_number`, and a number `n` of groups whose sums, and that of the next one, are all different."""
    slots = group_number(database, rng)
    if slots is None:
        return None
    groups = by_group(slots["one"].column(slots["g"]), slots["one"].column(slots["a"]))
    return _clear_top(slots, [sum(values) for values in groups.values()], rng)


def top_rows(database: Database, rng: Random) -> Slots | None:
    """A column of labels, one of numbers, and a number `n` of rows whose values, and the next, are all different."""
    found = [
        {"one": one, **names(t=one.name, l=label, a=a)}
        for one in database.usable
        for label in _labels(one)
        for a in one.roles.numbers
    ]
    slots = _pick(found, rng)
    return slots and _clear_top(slots, present(slots["one"].column(slots["a"])), rng)


def _labels(one: StoredTable) -> tuple[str, ...]:
    """What names a row: its labels, or else its key."""
    key = one.primary_key if len(one.primary_key) == 1 and quotable(one.primary_key[0]) else ()
    return one.roles.labels or key


def _clear_top(slots: Slots, values: Sequence[float], rng: Random) -> Slots | None:
    n = rng.choice((3, 4, 5))
    top = sorted(values, reverse=True)[: n + 1]
    clear = len(top) > n and all(one - other > 1e-9 * abs(one) for one, other in pairwise(top))
    return {**slots, "n": n} if clear else None


def extreme(database: Database, rng: Random) -> Slots | None:
    """As `top_rows`, without a number; the largest and the smallest value stand in one row each."""
    slots = top_rows(database, rng)
    if slots is None:
        return None
    values = present(slots["one"].column(slots["a"]))
    return slots if values.count(max(values)) == 1 and values.count(min(values)) == 1 else None


def above_mean(database: Database, rng: Random) -> Slots | None:
    """A column of numbers of which some are above their mean, another number of them below, and none on it."""
    slots = number(database, rng)
    if slots is None:
        return None
    values = present(slots["one"].column(slots["a"]))
    mean = sum(values) / len(values)
    above = sum(value > mean for value in values)
    clear = min(abs(value - mean) for value in values) > 1e-9 * abs(mean)
    return slots if clear and 2 * above != len(values) else None


def repeated(database: Database, rng: Random) -> Slots | None:
    """A column that holds values more than once, but not one value alone."""
    found = [{"one": one, **names(t=one.name, x=x)} for one in database.usable for x in one.roles.repeated]
    return _pick(found, rng)


def gappy(database: Database, rng: Random) -> Slots | None:
    """A column with missing values."""
    found = [{"one": one, **names(t=one.name, x=x)} for one in database.usable for x in one.roles.gaps]
    return _pick(found, rng)


def dated(database: Database, rng: Random) -> Slots | None:
    """A column of days, with a second table's worth of years in it: at most as many as an answer may have rows."""
    found = [{"one": one, **names(t=one.name, d=d)} for one in database.usable for d in one.roles.dates]
    slots = _pick(found, rng)
    if slots is None:
        return None
    years = {value[:4] for value in present(slots["one"].column(slots["d"]))}
    return slots if 2 <= len(years) <= MAX_ANSWER_ROWS else None


def between(database: Database, rng: Random) -> Slots | None:
    """A column of days and two days with rows before the first, from the one to the other, and after the last."""
    slots = dated(database, rng)
    if slots is None:
        return None
    days = sorted({value[:10] for value in present(slots["one"].column(slots["d"]))})
    if len(days) < 4:
        return None
    first = rng.randrange(1, len(days) - 2)
    last = rng.randrange(first + 1, len(days) - 1)
    return {**slots, "start": days[first], "end": days[last]}


def link(database: Database, rng: Random) -> Slots | None:
    """A foreign key to a table with labels; a few of its rows have partners, and different numbers of them."""
    found = []
    for child, parent, key in database.links:
        sizes = Counter(present(child.column(key.columns[0])))
        if 2 <= len(sizes) <= MAX_ANSWER_ROWS and max(sizes.values()) > 1:
            found += [{**_link(child, parent, key), **names(l=label)} for label in parent.roles.labels]
    return _pick(found, rng)


def link_top(database: Database, rng: Random) -> Slots | None:
    """A foreign key to a table with labels; the `n` rows with the most partners have different numbers of them."""
    found = []
    for child, parent, key in database.links:
        sizes = list(Counter(present(child.column(key.columns[0]))).values())
        for label in parent.roles.labels:
            if slots := _clear_top({**_link(child, parent, key), **names(l=label)}, sizes, rng):
                found.append(slots)
    return _pick(found, rng)


def link_number(database: Database, rng: Random) -> Slots | None:
    """A foreign key, a column of numbers in the child, and a label or group of the parent that some of them have."""
    found = [
        {**_link(child, parent, key), **names(a=a, l=label)}
        for child, parent, key in database.links
        for a in child.roles.numbers
        for label in (*parent.roles.labels, *parent.roles.groups)
    ]
    slots = _pick(found, rng)
    if slots is None:
        return None
    means = joined(slots)
    total = [value for values in means.values() for value in values]
    mean = sum(total) / len(total) if total else 0.0
    other = [
        key
        for key, values in means.items()
        if isinstance(key, int | float) or quotable(key, 40)
        if values and abs(sum(values) / len(values) - mean) > 1e-6 * abs(mean)
    ]
    return {**slots, **value_slots(rng.choice(sorted(other)))} if other else None


def joined(slots: Slots) -> dict[Any, list[Any]]:
    """By the parent's `l`, the child's values of `a` that are not missing."""
    known = dict(zip(slots["parent"].column(slots["r"]), slots["parent"].column(slots["l"]), strict=True))
    found: dict[Any, list[Any]] = defaultdict(list)
    for key, value in zip(slots["child"].column(slots["k"]), slots["child"].column(slots["a"]), strict=True):
        if key is not None and known[key] is not None:
            found[known[key]] += [] if value is None else [value]
    return dict(found)


def alone(database: Database, rng: Random) -> Slots | None:
    """A foreign key; some rows of the parent have no partner, and not as many have one."""
    found = []
    for child, parent, key in database.links:
        used = set(present(child.column(key.columns[0])))
        if 0 < len(used) < parent.rows and 2 * len(used) != parent.rows:
            found.append(_link(child, parent, key))
    return _pick(found, rng)


def chain(database: Database, rng: Random) -> Slots | None:
    """Two foreign keys in a row, from child to parent to a table `q`, and a label there to which some rows lead."""
    found = []
    for child, parent, key in database.links:
        for middle, third, far in database.links:
            if middle is parent and third is not child:
                for label in third.roles.labels:
                    joins = {**_link(child, parent, key), "third": third}
                    found.append({**joins, **names(q=third.name, j=far.columns[0], s=far.targets[0], l=label)})
    slots = _pick(found, rng)
    if slots is None:
        return None
    counts = chained(slots)
    whole = sum(counts.values())
    some = sorted(end for end, count in counts.items() if 0 < count < whole and quotable(end, 40))
    return {**slots, **value_slots(rng.choice(some))} if some else None


def chained(slots: Slots) -> dict[str, int]:
    """By the label of the third table, how many rows of the child lead to it."""
    label = dict(zip(slots["third"].column(slots["s"]), slots["third"].column(slots["l"]), strict=True))
    over = dict(zip(slots["parent"].column(slots["r"]), slots["parent"].column(slots["j"]), strict=True))
    ends = (over[key] for key in slots["child"].column(slots["k"]) if key is not None)
    return dict(Counter(label[end] for end in ends if end is not None))
