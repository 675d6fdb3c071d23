"""Binding: which columns and values of a view fill the slots of a question, so that its answer is clear.

Each function returns the slots of one question, or None if the view lacks the columns or every choice would be
ambiguous. Slot names: `a`, `b`, `c` numeric columns, `g` a group column, `l` a label column, `t` a column of years;
`value` is a value as Python has it, `v` the same as question and code write it, `w` a second one.
"""

from __future__ import annotations

from itertools import combinations
from random import Random
from typing import Any

import numpy as np

from ..tables import kind
from ..views import View
from .arithmetic import (
    column,
    correlation,
    deviation,
    finite,
    median,
    paired,
    present,
    ranks,
    residual,
)

Slots = dict[str, Any]
NTH = {2: "2nd", 3: "3rd", 4: "4th", 5: "5th"}


def literal(value: Any) -> str:
    """A cell's value as question and code write it: text in double quotes, numbers short and without exponent."""
    if isinstance(value, str):
        return f'"{value}"'
    return np.format_float_positional(float(value), trim="-")


def shorten(value: float) -> float:
    """`value` to three significant digits, a whole number if it is 100 or more."""
    if value == 0 or not np.isfinite(value):
        return 0.0
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return float(round(value, min(digits, 0) if abs(value) >= 100 else digits))


def nothing(view: View, rng: Random) -> Slots | None:
    """No column at all: a question about the table."""
    return {"rows": len(view.frame)}


def one(view: View, rng: Random) -> Slots | None:
    """A numeric column."""
    return {"a": rng.choice(view.roles.numeric)}


def any_column(view: View, rng: Random) -> Slots | None:
    """A column of any type."""
    return {"a": rng.choice(list(view.frame.columns))}


def gappy(view: View, rng: Random) -> Slots | None:
    """A numeric column, mostly one with missing values."""
    gaps = [name for name in view.roles.numeric if view.frame[name].isna().any()]
    if gaps:
        return {"a": rng.choice(gaps)}
    return one(view, rng) if rng.random() < 0.1 else None


def typed_column(view: View, rng: Random) -> Slots | None:
    """A column and the word for its type."""
    name = rng.choice(list(view.frame.columns))
    return {"a": name, "type": kind(view.frame[name])}


def two(view: View, rng: Random) -> Slots | None:
    """Two numeric columns."""
    if len(view.roles.numeric) < 2:
        return None
    a, b = rng.sample(view.roles.numeric, 2)
    return {"a": a, "b": b}


def two_apart(view: View, rng: Random) -> Slots | None:
    """Two numeric columns whose means differ by at least a hundredth of the larger one."""
    slots = two(view, rng)
    if slots is None:
        return None
    first, second = (float(np.mean(finite(view.frame, slots[key]))) for key in "ab")
    return slots if abs(first - second) > 0.01 * max(abs(first), abs(second)) else None


def two_peak(view: View, rng: Random) -> Slots | None:
    """Two numeric columns; the largest value of `b` stands in one row only and `a` is present there."""
    slots = two(view, rng)
    if slots is None:
        return None
    a, b = view.frame[slots["a"]], view.frame[slots["b"]]
    top = b == b.max()
    return slots if top.sum() == 1 and a[top].notna().all() else None


def related(view: View, rng: Random) -> Slots | None:
    """Two numeric columns with a correlation of at least 0.1 either way."""
    slots = two(view, rng)
    if slots is None:
        return None
    first, second = paired(view.frame, slots["a"], slots["b"])
    if len(first) < 5 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return slots if abs(np.corrcoef(first, second)[0, 1]) >= 0.1 else None


def related_complete(view: View, rng: Random) -> Slots | None:
    """As `related`, without missing values, so that covariance and variance are over the same rows."""
    slots = related(view, rng)
    if slots is None or view.frame[[slots["a"], slots["b"]]].isna().any().any():
        return None
    return slots


def cut_of(view: View, name: str, rng: Random) -> Slots | None:
    """A short number that has at least two values of the column on each side."""
    values = sorted(finite(view.frame, name))
    value = shorten(values[int(len(values) * rng.uniform(0.15, 0.85))])
    below, above = sum(item < value for item in values), sum(item > value for item in values)
    return {"value": value, "v": literal(value)} if min(below, above) >= 2 else None


def threshold(view: View, rng: Random) -> Slots | None:
    """A numeric column and a value inside its range."""
    name = rng.choice(view.roles.numeric)
    cut = cut_of(view, name, rng)
    return cut and {"a": name, **cut}


def two_threshold(view: View, rng: Random) -> Slots | None:
    """Two numeric columns and a value inside the range of `b`."""
    slots = two(view, rng)
    cut = slots and cut_of(view, slots["b"], rng)
    return {**slots, **cut} if slots and cut else None


def near_mean(view: View, rng: Random) -> Slots | None:
    """A numeric column and a value clearly above or clearly below its mean, as often the one as the other."""
    name = rng.choice(view.roles.numeric)
    values = finite(view.frame, name)
    mean, spread = float(np.mean(values)), float(np.std(values))
    value = shorten(mean + rng.choice((-1, 1)) * rng.uniform(0.2, 1.2) * spread)
    return {"a": name, "value": value, "v": literal(value)} if abs(value - mean) > 0.1 * spread else None


def percentile(view: View, rng: Random) -> Slots | None:
    """A numeric column and a percentage."""
    return {"a": rng.choice(view.roles.numeric), "p": rng.choice((10, 25, 75, 90))}


def rank(view: View, rng: Random) -> Slots | None:
    """A numeric column and a rank whose value does not hang on how ties are counted."""
    name, n = rng.choice(view.roles.numeric), rng.choice(tuple(NTH))
    top = sorted(finite(view.frame, name), reverse=True)[:n]
    return {"a": name, "n": n, "nth": NTH[n]} if len(set(top)) == n else None


def outlier(view: View, rng: Random) -> Slots | None:
    """A numeric column, a number of standard deviations, and the limit they give: some values above, none on it."""
    name, k = rng.choice(view.roles.numeric), rng.choice((1, 2, 3))
    values = np.array(finite(view.frame, name))
    spread = float(np.std(values, ddof=1))
    limit = float(np.mean(values)) + k * spread
    clear = np.abs(values - limit).min() > 1e-6 * spread and values.max() > limit
    return {"a": name, "k": k, "limit": limit} if clear else None


def interval(view: View, rng: Random) -> Slots | None:
    """A numeric column and two values inside its range, `value` below `high`, with at least two rows between them."""
    name = rng.choice(view.roles.numeric)
    cuts = [cut_of(view, name, rng), cut_of(view, name, rng)]
    if not cuts[0] or not cuts[1] or cuts[0]["value"] == cuts[1]["value"]:
        return None
    low, high = sorted(cut["value"] for cut in cuts if cut)
    inside = sum(low <= item <= high for item in finite(view.frame, name))
    if inside < 2:
        return None
    return {"a": name, "value": low, "v": literal(low), "high": high, "w": literal(high)}


def three(view: View, rng: Random) -> Slots | None:
    """Three numeric columns without missing values, no two of which correlate by more than 0.95."""
    whole = [name for name in view.roles.numeric if view.frame[name].notna().all()]
    if len(whole) < 3:
        return None
    a, b, c = rng.sample(whole, 3)
    values = [column(view.frame, name) for name in (a, b, c)]
    clear = all(abs(correlation(one, other)) < 0.95 for one, other in combinations(values, 2))
    return {"a": a, "b": b, "c": c} if clear else None


def positive(view: View, rng: Random) -> Slots | None:
    """A numeric column whose values are all above 0."""
    names = [name for name in view.roles.numeric if min(finite(view.frame, name)) > 0]
    return {"a": rng.choice(names)} if names else None


def two_positive(view: View, rng: Random) -> Slots | None:
    """Two numeric columns without missing values, the values of `b` all above 0."""
    slots = two(view, rng)
    if slots is None or view.frame[[slots["a"], slots["b"]]].isna().any().any():
        return None
    return slots if column(view.frame, slots["b"]).min() > 0 else None


def two_gappy(view: View, rng: Random) -> Slots | None:
    """Two numeric columns, the first with missing values, the second with values in at least two of those rows."""
    slots = two(view, rng)
    if slots is None:
        return None
    gaps = view.frame[slots["a"]].isna()
    return slots if gaps.any() and view.frame[slots["b"]][gaps].notna().sum() >= 2 else None


def gap_column(view: View, rng: Random) -> Slots | None:
    """A numeric column with missing values."""
    gaps = [name for name in view.roles.numeric if view.frame[name].isna().any()]
    return {"a": rng.choice(gaps)} if gaps else None


def gaps_somewhere(view: View, rng: Random) -> Slots | None:
    """A table with missing values."""
    return {} if view.frame.isna().any().any() else None


def place(view: View, rng: Random) -> Slots | None:
    """A numeric column and the number of a row, from 1 and from 0, that has a value there."""
    name, n = rng.choice(view.roles.numeric), rng.choice(tuple(NTH))
    return {"a": name, "n": n, "nth": NTH[n], "i": n - 1} if view.frame[name].notna()[n - 1] else None


def farthest(view: View, rng: Random) -> Slots | None:
    """A numeric column in which one value lies farther from the mean than any other."""
    name = rng.choice(view.roles.numeric)
    values = np.array(finite(view.frame, name))
    distances = np.sort(np.abs(values - values.mean()))
    return {"a": name} if distances[-1] - distances[-2] > 1e-6 * distances[-1] else None


def apart_from_mean(view: View, rng: Random) -> Slots | None:
    """A numeric column with no value at its mean."""
    name = rng.choice(view.roles.numeric)
    values = np.array(finite(view.frame, name))
    return {"a": name} if np.abs(values - values.mean()).min() > 1e-9 * np.ptp(values) else None


def two_apart_from_mean(view: View, rng: Random) -> Slots | None:
    """Two numeric columns; no value of `b` is at its mean, and `a` has values in the rows above it."""
    slots = two(view, rng)
    if slots is None:
        return None
    a, b = column(view.frame, slots["a"]), column(view.frame, slots["b"])
    middle = np.nanmean(b)
    clear = np.nanmin(np.abs(b - middle)) > 1e-9 * (np.nanmax(b) - np.nanmin(b)) and len(present(a[b > middle])) >= 2
    return slots if clear else None


def skewed(view: View, rng: Random) -> Slots | None:
    """A numeric column whose mean and median differ by a fiftieth of its standard deviation."""
    name = rng.choice(view.roles.numeric)
    values = finite(view.frame, name)
    return {"a": name} if abs(np.mean(values) - median(values)) > 0.02 * deviation(values) else None


def spreads_apart(view: View, rng: Random) -> Slots | None:
    """Two numeric columns whose standard deviations and whose medians differ by a hundredth."""
    slots = two(view, rng)
    if slots is None:
        return None
    first, second = (finite(view.frame, slots[key]) for key in "ab")
    pairs = ((deviation(first), deviation(second)), (median(first), median(second)))
    return slots if all(abs(x - y) > 0.01 * max(abs(x), abs(y)) for x, y in pairs) else None


def partner(view: View, rng: Random) -> Slots | None:
    """A numeric column, the other numeric ones, and among them one that correlates with it the most, either way."""
    numeric = view.roles.numeric
    if len(numeric) < 3:
        return None
    name = rng.choice(numeric)
    others = [other for other in numeric if other != name]
    found = sorted(abs(correlation(*paired(view.frame, name, other))) for other in others)
    clear = bool(np.isfinite(found).all()) and found[-1] - found[-2] > 0.01
    return {"a": name, "others": others, "list": ", ".join(f'"{other}"' for other in others)} if clear else None


def two_top(view: View, rng: Random) -> Slots | None:
    """Two numeric columns and a number of rows, the largest by `b`; which rows those are does not hang on ties."""
    slots, n = two(view, rng), rng.choice((3, 5, 10))
    if slots is None:
        return None
    b = np.sort(np.array(finite(view.frame, slots["b"])))[::-1]
    if len(b) <= n or b[n - 1] == b[n]:
        return None
    a, all_b = column(view.frame, slots["a"]), column(view.frame, slots["b"])
    return {**slots, "n": n, "limit": float(b[n - 1])} if len(present(a[all_b >= b[n - 1]])) >= 2 else None


def bottom_rank(view: View, rng: Random) -> Slots | None:
    """A numeric column and a rank from the bottom whose value does not hang on how ties are counted."""
    name, n = rng.choice(view.roles.numeric), rng.choice(tuple(NTH))
    bottom = sorted(finite(view.frame, name))[:n]
    return {"a": name, "n": n, "nth": NTH[n]} if len(set(bottom)) == n else None


def low_outlier(view: View, rng: Random) -> Slots | None:
    """As `outlier`, below the mean."""
    name, k = rng.choice(view.roles.numeric), rng.choice((1, 2))
    values = np.array(finite(view.frame, name))
    spread = deviation(values)
    limit = float(np.mean(values)) - k * spread
    clear = np.abs(values - limit).min() > 1e-6 * spread and values.min() < limit
    return {"a": name, "k": k, "limit": limit} if clear else None


def fenced(view: View, rng: Random) -> Slots | None:
    """A numeric column with values outside the fences of a box plot, none on them."""
    name = rng.choice(view.roles.numeric)
    values = np.array(finite(view.frame, name))
    low, high = np.percentile(values, (25, 75))
    fences = np.array([low - 1.5 * (high - low), high + 1.5 * (high - low)])
    clear = np.abs(values[:, None] - fences).min() > 1e-9 * np.ptp(values)
    return {"a": name} if clear and (values.min() < fences[0] or values.max() > fences[1]) else None


def pareto(view: View, rng: Random) -> Slots | None:
    """A numeric column whose values are all above 0, and a number of rows."""
    slots = positive(view, rng)
    return {**slots, "n": rng.choice((3, 5, 10))} if slots else None


def related_ranks(view: View, rng: Random) -> Slots | None:
    """As `related_complete`, and the ranks correlate as strongly."""
    slots = related_complete(view, rng)
    if slots is None:
        return None
    first, second = (ranks(column(view.frame, slots[key])) for key in "ab")
    return slots if abs(correlation(first, second)) >= 0.1 else None


def related_point(view: View, rng: Random) -> Slots | None:
    """As `related_complete`, and a value inside the range of `a`."""
    slots = related_complete(view, rng)
    cut = slots and cut_of(view, slots["a"], rng)
    return {**slots, **cut} if slots and cut else None


def three_signed(view: View, rng: Random) -> Slots | None:
    """As `three`, with correlations of `a` and `b`, both plain and given `c`, that are clearly not 0."""
    slots = three(view, rng)
    if slots is None:
        return None
    a, b, c = (column(view.frame, slots[key]) for key in "abc")
    found = correlation(a, b), correlation(residual(a, c), residual(b, c))
    return slots if min(map(abs, found)) > 0.02 else None


def column_place(view: View, rng: Random) -> Slots | None:
    """The place of a column that is neither the first nor the last one."""
    n = rng.choice(tuple(NTH))
    return {"n": n, "nth": NTH[n]} if n < len(view.frame.columns) else None


def column_or_not(view: View, rng: Random) -> Slots | None:
    """The name of a column, or as often a name like it that no column has."""
    name = rng.choice(list(view.frame.columns))
    other = name + rng.choice(("s", "2", "_x"))
    return {"a": name if rng.random() < 0.5 or other in view.frame.columns else other}
