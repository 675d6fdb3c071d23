"""The numbers that a round of a composed question may be about; see `composition`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import coefficients, correlation, deviation, median


@dataclass(frozen=True)
class Measure:
    """A number about a column `b`, or about two, over the rows `r`.

    Args:
        noun: what it is in words.
        forms: equivalent expressions of it.
        gold: it, from the values of `b`, or of `b` and `c`, without NaN.
        slip: what a plausible wrong expression computes, and that expression.
        shape: how it is printed, see `questions.Operation`.
    """

    noun: str
    forms: tuple[str, ...]
    gold: Callable[..., float]
    slip: tuple[str, str]
    shape: str = "number"


COLUMN_MEASURES = {
    "mean": Measure('the mean of "{b}"', ('{r}["{b}"].mean()', 'np.mean({r}["{b}"])'), lambda v: float(np.mean(v)),
                     ("median", '{r}["{b}"].median()')),
    "median": Measure('the median of "{b}"', ('{r}["{b}"].median()', '{r}["{b}"].quantile(0.5)'), median,
                       ("mean", '{r}["{b}"].mean()')),
    "low": Measure('the 25th percentile of "{b}"', ('{r}["{b}"].quantile(0.25)',),
                    lambda v: float(np.percentile(v, 25)), ("75th percentile", '{r}["{b}"].quantile(0.75)')),
    "high": Measure('the 75th percentile of "{b}"', ('{r}["{b}"].quantile(0.75)',),
                     lambda v: float(np.percentile(v, 75)), ("25th percentile", '{r}["{b}"].quantile(0.25)')),
    "total": Measure('the sum of "{b}"', ('{r}["{b}"].sum()', 'np.sum({r}["{b}"])'), lambda v: float(np.sum(v)),
                      ("mean", '{r}["{b}"].mean()')),
    "deviation": Measure('the standard deviation of "{b}"', ('{r}["{b}"].std()', '{r}["{b}"].var() ** 0.5'), deviation,
                          ("variance", '{r}["{b}"].var()')),
    "largest": Measure('the largest "{b}"', ('{r}["{b}"].max()',), lambda v: float(np.max(v)),
                        ("smallest", '{r}["{b}"].min()')),
    "smallest": Measure('the smallest "{b}"', ('{r}["{b}"].min()',), lambda v: float(np.min(v)),
                         ("largest", '{r}["{b}"].max()')),
    "range": Measure('the range (largest minus smallest) of "{b}"', ('{r}["{b}"].max() - {r}["{b}"].min()',),
                      lambda v: float(np.ptp(v)), ("largest", '{r}["{b}"].max()')),
    "high values": Measure(
        'the number of values of "{b}" more than one standard deviation above their mean',
        ('({r}["{b}"] > {r}["{b}"].mean() + {r}["{b}"].std()).sum()',),
        lambda v: float(np.sum(v > np.mean(v) + deviation(v))),
        ("number above the mean", '({r}["{b}"] > {r}["{b}"].mean()).sum()'), "count",
    ),
}  # fmt: skip
PAIR_MEASURES = {
    "correlation": Measure('the correlation between "{b}" and "{c}"', ('{r}["{b}"].corr({r}["{c}"])',), correlation,
                            ("covariance", '{r}["{b}"].cov({r}["{c}"])')),
    "slope": Measure('the slope of a linear regression of "{c}" on "{b}"',
                      ('{r}["{c}"].cov({r}["{b}"]) / {r}["{b}"].var()', 'np.polyfit({r}["{b}"], {r}["{c}"], 1)[0]'),
                      lambda b, c: float(coefficients(c, b)[0]), ("correlation", '{r}["{b}"].corr({r}["{c}"])')),
    "product": Measure('the mean of a new column "{b}" times "{c}"', ('({r}["{b}"] * {r}["{c}"]).mean()',),
                        lambda b, c: float(np.mean(b * c)), ("sum", '({r}["{b}"] * {r}["{c}"]).sum()')),
}  # fmt: skip
