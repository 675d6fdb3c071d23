"""Binding: which columns and values of a view fill the slots of a question, so that its answer is clear.

Each function returns the slots of one question, or None if the view lacks the columns or every choice would be
ambiguous. Slot names: `a`, `b` numeric columns, `g` a group column, `l` a label column, `t` a column of years; `value`
is a value as Python has it, `v` the same as question and code write it.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pandas as pd

from .tables import kind
from .views import View

Slots = dict[str, Any]
NTH = {2: "2nd", 3: "3rd", 4: "4th", 5: "5th"}


def finite(frame: pd.DataFrame, name: str) -> list[float]:
    """The values of a numeric column as floats, missing ones left out."""
    return [float(value) for value in frame[name] if value == value]


def paired(frame: pd.DataFrame, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of two columns in the rows where both are present, as two float64 arrays of one length."""
    first, second = frame[a].to_numpy(dtype=float), frame[b].to_numpy(dtype=float)
    present = ~(np.isnan(first) | np.isnan(second))
    return first[present], second[present]


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


def _cut(view: View, name: str, rng: Random) -> Slots | None:
    """A short number that has at least two values of the column on each side."""
    values = sorted(finite(view.frame, name))
    value = shorten(values[int(len(values) * rng.uniform(0.15, 0.85))])
    below, above = sum(item < value for item in values), sum(item > value for item in values)
    return {"value": value, "v": literal(value)} if min(below, above) >= 2 else None


def threshold(view: View, rng: Random) -> Slots | None:
    """A numeric column and a value inside its range."""
    name = rng.choice(view.roles.numeric)
    cut = _cut(view, name, rng)
    return cut and {"a": name, **cut}


def two_threshold(view: View, rng: Random) -> Slots | None:
    """Two numeric columns and a value inside the range of `b`."""
    slots = two(view, rng)
    cut = slots and _cut(view, slots["b"], rng)
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
