"""Computations on the values of a table that answers are made of: numpy and plain Python, nothing of what they check.

Legend: N rows of a frame, V values present in a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]


def column(frame: pd.DataFrame, name: str) -> Numbers:
    """A numeric column as float64 [N], NaN where a value is missing."""
    return frame[name].to_numpy(dtype=float)


def present(values: Numbers) -> Numbers:
    """The values that are not NaN."""
    return values[~np.isnan(values)]


def finite(frame: pd.DataFrame, name: str) -> list[float]:
    """The V values of a numeric column as floats, missing ones left out."""
    return present(column(frame, name)).tolist()


def paired(frame: pd.DataFrame, a: str, b: str) -> tuple[Numbers, Numbers]:
    """The values of two columns in the rows where both are present, as two float64 arrays of one length."""
    first, second = column(frame, a), column(frame, b)
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


def rows_of(frame: pd.DataFrame, name: str, value: object) -> Mask:
    """Which rows [N] hold `value` in a column."""
    return np.array([item == value for item in frame[name].tolist()], dtype=bool)


def row_of(frame: pd.DataFrame, name: str, value: float) -> int:
    """The number of the first row that holds `value` in a numeric column."""
    return int(np.flatnonzero(column(frame, name) == value)[0])


def mean(frame: pd.DataFrame, name: str, rows: Mask | None = None) -> float:
    """The mean of a column over some rows [N], or all; NaN where there is no value."""
    values = present(column(frame, name) if rows is None else column(frame, name)[rows])
    return float(np.mean(values)) if len(values) else math.nan


def median(values: Sequence[float] | Numbers) -> float:
    """The middle of some values without NaN; NaN where there are none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def deviation(values: Sequence[float] | Numbers) -> float:
    """The standard deviation of some values without NaN, over V - 1; NaN where there are fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def number_above_mean(values: Sequence[float] | Numbers) -> int:
    """How many values lie above their mean."""
    return int((np.asarray(values) > np.mean(values)).sum())


def correlation(first: Numbers, second: Numbers) -> float:
    """Pearson's correlation of two arrays without NaN; NaN where one does not vary."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def ranks(values: Sequence[float] | Numbers) -> Numbers:
    """The rank of each value from 1, the mean of the ranks for equal ones."""
    array = np.asarray(values)
    below = (array[:, None] > array).sum(axis=1)
    equal = (array[:, None] == array).sum(axis=1)
    return below + (equal + 1) / 2


def skewness(values: Sequence[float] | Numbers) -> float:
    """The skewness of some values, adjusted for their number: G1 of Joanes and Gill, 1998."""
    array, count = np.asarray(values), len(values)
    centred = array - array.mean()
    raw = np.mean(centred**3) / np.mean(centred**2) ** 1.5
    return float(raw * math.sqrt(count * (count - 1)) / (count - 2))


def coefficients(target: Numbers, *causes: Numbers) -> Numbers:
    """The slopes of the least-squares regression, with an intercept, of `target` on `causes`."""
    design = np.column_stack([np.ones(len(target)), *causes])
    return np.asarray(np.linalg.lstsq(design, target, rcond=None)[0][1:], dtype=np.float64)


def residual(target: Numbers, cause: Numbers) -> Numbers:
    """What a regression with an intercept on `cause` leaves of `target`."""
    slope = coefficients(target, cause)[0]
    return target - target.mean() - slope * (cause - cause.mean())


def group_means(frame: pd.DataFrame, a: str, g: str, levels: Sequence[object]) -> dict[object, float]:
    """The mean of a numeric column for each of some values of a group column."""
    return {level: mean(frame, a, rows_of(frame, g, level)) for level in levels}


def best_group(frame: pd.DataFrame, a: str, g: str, levels: Sequence[object], sign: int) -> str:
    """The value of a group column with the highest mean of another (`sign` 1) or the lowest (-1)."""
    means = group_means(frame, a, g, levels)
    return str(max(means, key=lambda level: sign * means[level]))


def in_order(frame: pd.DataFrame, t: str, a: str) -> Numbers:
    """A numeric column [N] in the order of another one."""
    return column(frame, a)[np.argsort(column(frame, t))]
