"""Binding of groups, ranks and years: which of them fill the slots of a question; see `slots`."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import numpy as np

from ..views import View
from .arithmetic import column, correlation, finite, group_means, mean, paired, present, row_of, rows_of
from .slots import NTH, Slots, cut_of, literal


def group(view: View, rng: Random) -> Slots | None:
    """A group column and one of its values."""
    if not view.roles.groups:
        return None
    name = rng.choice(view.roles.groups)
    value = rng.choice(sorted(view.frame[name].dropna().unique().tolist()))
    return {"g": name, "value": value, "v": literal(value)}


def group_number(view: View, rng: Random) -> Slots | None:
    """A group column, one of its values, and another column that is numeric."""
    slots = group(view, rng)
    numbers = slots and [name for name in view.roles.numeric if name != slots["g"]]
    return {**slots, "a": rng.choice(numbers)} if slots and numbers else None


def groups_apart(view: View, rng: Random) -> Slots | None:
    """A group column and a numeric one whose highest and lowest group means are not shared by two groups."""
    slots = group_number(view, rng)
    if slots is None:
        return None
    by_level = view.frame.groupby(slots["g"])[slots["a"]].mean()
    levels, means = by_level.index.tolist(), sorted(by_level.tolist())
    scale = 1e-6 * max(abs(mean) for mean in means)
    clear = bool(np.isfinite(means).all()) and means[1] - means[0] > scale and means[-1] - means[-2] > scale
    return {**slots, "levels": levels} if clear else None


def label(view: View, rng: Random) -> Slots | None:
    """A column that names rows and a numeric one whose largest and smallest values stand in one row each."""
    names = view.roles.labels + view.roles.times
    if not names:
        return None
    name = rng.choice(names)
    numbers = [number for number in view.roles.numeric if number != name]
    if not numbers:
        return None
    column = view.frame[a := rng.choice(numbers)]
    single = all((column == end).sum() == 1 for end in (column.max(), column.min()))
    return {"l": name, "a": a} if single else None


def moment(view: View, rng: Random) -> Slots | None:
    """A column of years, one of them (not the last), and a numeric column that has a value there."""
    if not view.roles.times:
        return None
    name = rng.choice(view.roles.times)
    numbers = [number for number in view.roles.numeric if number != name]
    years = sorted(view.frame[name].tolist())[:-1]
    if not numbers:
        return None
    a, year = rng.choice(numbers), int(rng.choice(years))
    present = view.frame[a][view.frame[name] == year].notna().all()
    return {"t": name, "a": a, "value": year, "v": str(year)} if present else None


def group_threshold(view: View, rng: Random) -> Slots | None:
    """A group column, one of its values, another column that is numeric, and a limit inside the range of that."""
    slots = group_number(view, rng)
    cut = slots and cut_of(view, slots["a"], rng)
    return {**slots, "limit": cut["value"], "w": cut["v"]} if slots and cut else None


def group_pair(view: View, rng: Random) -> Slots | None:
    """A group column, two of its values, and a numeric column whose means over the two differ by a hundredth."""
    slots = group_number(view, rng)
    if slots is None:
        return None
    levels = [level for level in _levels(view, slots["g"]) if level != slots["value"]]
    other = rng.choice(levels)
    first, second = (mean(view.frame, slots["a"], rows_of(view.frame, slots["g"], x)) for x in (slots["value"], other))
    clear = abs(first - second) > 0.01 * max(abs(first), abs(second))  # False where one is NaN
    return {**slots, "other": other, "w": literal(other)} if clear else None


def group_rest(view: View, rng: Random) -> Slots | None:
    """As `group_number`, and the mean over the value's rows differs by a hundredth from that over the others."""
    slots = group_number(view, rng)
    if slots is None:
        return None
    rows = rows_of(view.frame, slots["g"], slots["value"])
    first, second = mean(view.frame, slots["a"], rows), mean(view.frame, slots["a"], ~rows)
    return slots if abs(first - second) > 0.01 * max(abs(first), abs(second)) else None


def group_related(view: View, rng: Random) -> Slots | None:
    """A group column, a value with at least five rows, and two numeric columns that correlate in them."""
    slots = group(view, rng)
    numbers = slots and [name for name in view.roles.numeric if name != slots["g"]]
    if slots is None or not numbers or len(numbers) < 2:
        return None
    a, b = rng.sample(numbers, 2)
    rows = rows_of(view.frame, slots["g"], slots["value"])
    first, second = paired(view.frame[rows], a, b)
    clear = len(first) >= 5 and abs(correlation(first, second)) >= 0.1
    return {**slots, "a": a, "b": b} if clear else None


def _levels(view: View, name: str) -> list[Any]:
    return sorted(view.frame[name].dropna().unique().tolist())


def common(view: View, rng: Random) -> Slots | None:
    """A group column in which one value stands in more rows than any other, and its values."""
    if not view.roles.groups:
        return None
    name = rng.choice(view.roles.groups)
    sizes = sorted(view.frame[name].value_counts())
    return {"g": name, "levels": _levels(view, name)} if sizes[-1] > sizes[-2] else None


def common_number(view: View, rng: Random) -> Slots | None:
    """As `common`, and another column that is numeric and has values in the most common group."""
    slots = common(view, rng)
    numbers = slots and [name for name in view.roles.numeric if name != slots["g"]]
    if not slots or not numbers:
        return None
    most = max(slots["levels"], key=lambda level: int(rows_of(view.frame, slots["g"], level).sum()))
    a = rng.choice(numbers)
    return {**slots, "a": a} if np.isfinite(mean(view.frame, a, rows_of(view.frame, slots["g"], most))) else None


def levels(view: View, rng: Random) -> Slots | None:
    """A group column and its values."""
    if not view.roles.groups:
        return None
    name = rng.choice(view.roles.groups)
    return {"g": name, "levels": _levels(view, name)}


def level_pair(view: View, rng: Random) -> Slots | None:
    """A group column and two of its values that stand in different numbers of rows."""
    slots = group(view, rng)
    if slots is None:
        return None
    other = rng.choice([level for level in _levels(view, slots["g"]) if level != slots["value"]])
    first, second = (int(rows_of(view.frame, slots["g"], level).sum()) for level in (slots["value"], other))
    return {**slots, "other": other, "w": literal(other)} if first != second else None


def group_rank(view: View, rng: Random) -> Slots | None:
    """As `groups_apart`, for three groups or more with means that all differ, and a rank among them."""
    slots = groups_apart(view, rng)
    if slots is None or len(slots["levels"]) < 3:
        return None
    means = sorted(group_means(view.frame, slots["a"], slots["g"], slots["levels"]).values())
    scale = 1e-6 * max(map(abs, means))
    if any(second - first <= scale for first, second in pairwise(means)):
        return None
    n = rng.randint(2, min(5, len(means) - 1))
    return {**slots, "n": n, "nth": NTH[n]}


def label_rank(view: View, rng: Random) -> Slots | None:
    """A column that names rows, a numeric one, and a rank that one row alone has, with the row's name."""
    slots, n = label(view, rng), rng.choice(tuple(NTH))
    if slots is None:
        return None
    values = column(view.frame, slots["a"])
    top = np.sort(present(values))[::-1]
    if len(top) <= n or len(set(top[: n + 1])) <= n:
        return None
    row = int(np.flatnonzero(values == top[n - 1])[0])
    value = list(view.frame[slots["l"]])[row]
    return {**slots, "n": n, "nth": NTH[n], "value": value, "v": literal(value)}


def moments(view: View, rng: Random) -> Slots | None:
    """A column of years, two of them with two years or more between, and a numeric column with a value at both."""
    slots = moment(view, rng)
    if slots is None:
        return None
    later = [year for year in view.frame[str(slots["t"])] if year > slots["value"] + 2]
    if not later:
        return None
    other = int(rng.choice(sorted(later)))
    present_there = view.frame[slots["a"]][view.frame[slots["t"]] == other].notna().all()
    return {**slots, "other": other, "w": str(other)} if present_there else None


def growth(view: View, rng: Random) -> Slots | None:
    """As `moments`, with values above 0 at both years that differ by a hundredth."""
    slots = moments(view, rng)
    if slots is None:
        return None
    values = column(view.frame, slots["a"])
    first, last = (float(values[row_of(view.frame, slots["t"], slots[key])]) for key in ("value", "other"))
    return slots if min(first, last) > 0 and abs(last - first) > 0.01 * first else None


def series(view: View, rng: Random) -> Slots | None:
    """A column of years and a numeric column without missing values."""
    if not view.roles.times:
        return None
    name = rng.choice(view.roles.times)
    numbers = [number for number in view.roles.numeric if number != name and view.frame[number].notna().all()]
    return {"t": name, "a": rng.choice(numbers)} if numbers else None


def group_pair_spread(view: View, rng: Random) -> Slots | None:
    """As `group_pair`, with two values or more in each of the two groups that are not all alike."""
    slots = group_pair(view, rng)
    if slots is None:
        return None
    parts = [finite(view.frame[rows_of(view.frame, slots["g"], slots[key])], slots["a"]) for key in ("value", "other")]
    return slots if all(len(set(part)) >= 2 for part in parts) else None


def strata(view: View, rng: Random) -> Slots | None:
    """A group column, another numeric one, a third, and a limit of that with values on both sides in each group."""
    names = [name for name in view.roles.numeric if view.frame[name].notna().all()]
    if not view.roles.groups:
        return None
    g = rng.choice(view.roles.groups)
    names = [name for name in names if name != g]
    if len(names) < 2 or view.frame[g].isna().any():
        return None
    a, b = rng.sample(names, 2)
    cut = cut_of(view, b, rng)
    if cut is None:
        return None
    above = column(view.frame, b) > cut["value"]
    inside = [above[rows_of(view.frame, g, level)] for level in _levels(view, g)]
    clear = all(part.any() and not part.all() for part in inside)
    return {"a": a, "b": b, "g": g, "levels": _levels(view, g), **cut} if clear else None
