"""More to ask about how columns go together; see `operations` for how to read a row."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from . import group_slots as bind_group
from . import slots as bind
from .arithmetic import (
    Numbers,
    coefficients,
    column,
    correlation,
    deviation,
    finite,
    group_means,
    mean,
    median,
    paired,
    present,
    ranks,
    residual,
    rows_of,
)
from .questions import Operation
from .slots import Slots


def _slope(frame: pd.DataFrame, slots: Slots) -> float:
    """Of the regression of `b` on `a`."""
    return float(coefficients(column(frame, slots["b"]), column(frame, slots["a"]))[0])


def _adjusted(frame: pd.DataFrame, slots: Slots) -> tuple[Numbers, Numbers]:
    """What the confounder `c` leaves of `a` and of `b`: by Frisch, Waugh and Lovell the rest is about these alone."""
    confounder = column(frame, slots["c"])
    return residual(column(frame, slots["a"]), confounder), residual(column(frame, slots["b"]), confounder)


def _stratified(frame: pd.DataFrame, slots: Slots) -> float:
    values, treated = column(frame, slots["a"]), column(frame, slots["b"]) > slots["value"]
    effects = []
    for level in slots["levels"]:
        rows = rows_of(frame, slots["g"], level)
        effects.append(rows.mean() * (np.mean(values[rows & treated]) - np.mean(values[rows & ~treated])))
    return math.fsum(effects)


RELATION_OPERATIONS: tuple[Operation, ...] = (
    # ---- correlation
    Operation(
        "rank_correlation", "correlation", "number", bind.related_ranks,
        (
            "What is Spearman's rank correlation of \"{a}\" and \"{b}\"?",
            'How strongly do the ranks of "{a}" and "{b}" correlate?',
        ),
        'Correlation of the ranks of "{a}" and "{b}".', 'df["{a}"].rank().corr(df["{b}"].rank())',
        lambda f, s: correlation(ranks(column(f, s["a"])), ranks(column(f, s["b"]))),
        ("correlation of the values", 'df["{a}"].corr(df["{b}"])'),
        ('ranks = df[["{a}", "{b}"]].rank()\nranks["{a}"].corr(ranks["{b}"])',),
    ),
    Operation(
        "covariance", "correlation", "number", bind.related,
        ('What is the sample covariance of "{a}" and "{b}"?', 'Give the covariance between "{a}" and "{b}".'),
        'Covariance of "{a}" and "{b}".', 'df["{a}"].cov(df["{b}"])',
        lambda f, s: float(np.cov(*paired(f, s["a"], s["b"]))[0, 1]),
        ("correlation", 'df["{a}"].corr(df["{b}"])'),
        (
            'pair = df[["{a}", "{b}"]].dropna()\nnp.cov(pair["{a}"], pair["{b}"])[0, 1]',
            'df[["{a}", "{b}"]].cov().iloc[0, 1]',
        ),
    ),
    Operation(
        "closest_partner", "correlation", "choice", bind.partner,
        (
            'Which of {list} correlates most strongly with "{a}", either way?',
            'With which of the columns {list} does "{a}" have the largest absolute correlation?',
        ),
        'Largest absolute correlation with "{a}".', 'df[[{list}]].corrwith(df["{a}"]).abs().idxmax()',
        lambda f, s: str(max(s["others"], key=lambda other: abs(correlation(*paired(f, s["a"], other))))),
        ("weakest", 'df[[{list}]].corrwith(df["{a}"]).abs().idxmin()'),
        ('strength = {{name: abs(df["{a}"].corr(df[name])) for name in [{list}]}}\nmax(strength, key=strength.get)',),
    ),
    Operation(
        "group_correlation", "correlation", "number", bind_group.group_related,
        (
            'What is the correlation between "{a}" and "{b}" in the rows where "{g}" is {v}?',
            'For "{g}" {v} only: how strongly do "{a}" and "{b}" correlate?',
        ),
        'Correlation of "{a}" and "{b}" where "{g}" == {v}.',
        'part = df[df["{g}"] == {v}]\npart["{a}"].corr(part["{b}"])',
        lambda f, s: correlation(*paired(f[rows_of(f, s["g"], s["value"])], s["a"], s["b"])),
        ("correlation over all rows", 'df["{a}"].corr(df["{b}"])'),
        ('df[df["{g}"] == {v}][["{a}", "{b}"]].corr().iloc[0, 1]',),
    ),
    # ---- impact
    Operation(
        "prediction", "impact", "number", bind.related_point,
        (
            'Fit a straight line of "{b}" on "{a}". What "{b}" does it predict at "{a}" {v}?',
            'By linear regression on "{a}", which "{b}" is expected where "{a}" is {v}?',
        ),
        'Regression line of "{b}" on "{a}" at {v}.',
        'slope, intercept = np.polyfit(df["{a}"], df["{b}"], 1)\nslope * {v} + intercept',
        lambda f, s: mean(f, s["b"]) + _slope(f, s) * (s["value"] - mean(f, s["a"])),
        ("mean", 'df["{b}"].mean()'),
        (
            'slope = df["{a}"].cov(df["{b}"]) / df["{a}"].var()\n'
            'intercept = df["{b}"].mean() - slope * df["{a}"].mean()\n'
            "intercept + slope * {v}",
        ),
    ),
    Operation(
        "explained", "impact", "number", bind.related_complete,
        (
            'What share of the variance of "{b}" does a linear regression on "{a}" explain (R squared)?',
            'Give the R squared of the regression of "{b}" on "{a}".',
        ),
        'R squared of "{b}" on "{a}".', 'df["{a}"].corr(df["{b}"]) ** 2',
        lambda f, s: 1 - float(np.var(residual(column(f, s["b"]), column(f, s["a"]))) / np.var(column(f, s["b"]))),
        ("correlation", 'df["{a}"].corr(df["{b}"])'),
        ('r = np.corrcoef(df["{a}"], df["{b}"])[0, 1]\nr**2',),
    ),
    Operation(
        "standard_slope", "impact", "number", bind.related_complete,
        (
            'By how much does "{b}" change on average when "{a}" grows by one standard deviation (linear regression)?',
            'What change of "{b}" goes with one standard deviation more of "{a}", by a regression line?',
        ),
        'Slope of "{b}" on "{a}" times the deviation of "{a}".', 'df["{b}"].cov(df["{a}"]) / df["{a}"].std()',
        lambda f, s: _slope(f, s) * deviation(column(f, s["a"])),
        ("slope for a change of 1", 'df["{b}"].cov(df["{a}"]) / df["{a}"].var()'),
        ('slope = np.polyfit(df["{a}"], df["{b}"], 1)[0]\nslope * df["{a}"].std()',),
    ),
    Operation(
        "group_lift", "impact", "number", bind_group.group_rest,
        (
            'How much does the mean of "{a}" where "{g}" is {v} exceed the mean of "{a}" over all rows?',
            'What does "{g}" {v} do to "{a}": its mean there minus the mean of the whole table?',
        ),
        'Mean of "{a}" where "{g}" == {v}, minus the mean of all.',
        'df[df["{g}"] == {v}]["{a}"].mean() - df["{a}"].mean()',
        lambda f, s: mean(f, s["a"], rows_of(f, s["g"], s["value"])) - mean(f, s["a"]),
        ("mean of the group alone", 'df[df["{g}"] == {v}]["{a}"].mean()'),
        ('means = df.groupby("{g}")["{a}"].mean()\nmeans[{v}] - df["{a}"].mean()',),
    ),
    # ---- causal
    Operation(
        "difference_in_means", "causal", "number", bind_group.group_rest,
        (
            'Treat the rows with "{g}" {v} as treated and all others as controls, assigned at random. What is '
            'the average effect on "{a}"?',
            'Estimate the effect of "{g}" being {v} on "{a}" as the difference in means between those rows and '
            "all others.",
        ),
        'Mean of "{a}" where "{g}" == {v}, minus the mean of the others.',
        'treated = df["{g}"] == {v}\ndf[treated]["{a}"].mean() - df[~treated]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], rows_of(f, s["g"], s["value"])) - mean(f, s["a"], ~rows_of(f, s["g"], s["value"])),
        ("difference from the mean of all rows", 'df[df["{g}"] == {v}]["{a}"].mean() - df["{a}"].mean()'),
        (
            'df[df["{g}"] == {v}]["{a}"].mean() - df[df["{g}"] != {v}]["{a}"].mean()',
            'by = df.groupby(df["{g}"] == {v})["{a}"].mean()\nby[True] - by[False]',
        ),
    ),
    Operation(
        "adjusted_slope", "causal", "number", bind.three,
        (
            'What is the effect of "{a}" on "{b}" when the confounder "{c}" is controlled for? Give the '
            "coefficient of a linear regression on both.",
            'Regress "{b}" on "{a}" and "{c}". What is the coefficient of "{a}"?',
        ),
        'Coefficient of "{a}" in the regression of "{b}" on "{a}" and "{c}".',
        'design = np.column_stack([np.ones(len(df)), df["{a}"], df["{c}"]])\n'
        'np.linalg.lstsq(design, df["{b}"], rcond=None)[0][1]',
        lambda f, s: float(coefficients(*reversed(_adjusted(f, s)))[0]),
        ("slope without control", 'np.polyfit(df["{a}"], df["{b}"], 1)[0]'),
        (
            'cov = df[["{a}", "{c}"]].cov()\nwith_b = df[["{a}", "{c}"]].apply(lambda column: column.cov(df["{b}"]))\n'
            "np.linalg.solve(cov, with_b)[0]",
        ),
    ),
    Operation(
        "partial_correlation", "causal", "number", bind.three,
        (
            'How strongly do "{a}" and "{b}" correlate once "{c}" is held fixed? Give the partial correlation.',
            'Is the link of "{a}" and "{b}" due to "{c}"? Give their partial correlation given "{c}".',
        ),
        'Partial correlation of "{a}" and "{b}" given "{c}".',
        'r = df[["{a}", "{b}", "{c}"]].corr().to_numpy()\n'
        "(r[0, 1] - r[0, 2] * r[1, 2]) / ((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)) ** 0.5",
        lambda f,
        s: correlation(residual(column(f, s["a"]), column(f, s["c"])), residual(column(f, s["b"]), column(f, s["c"]))),
        ("plain correlation", 'df["{a}"].corr(df["{b}"])'),
        (
            'rest_a = df["{a}"] - np.polyval(np.polyfit(df["{c}"], df["{a}"], 1), df["{c}"])\n'
            'rest_b = df["{b}"] - np.polyval(np.polyfit(df["{c}"], df["{b}"], 1), df["{c}"])\nrest_a.corr(rest_b)',
        ),
    ),
    Operation(
        "stratified_effect", "causal", "number", bind_group.strata,
        (
            'Take rows with "{b}" above {v} as treated. Adjust for "{g}": what is the effect on "{a}", the '
            'differences in means within each "{g}", averaged by the size of the groups?',
            'What is the effect of "{b}" being above {v} on the mean of "{a}", stratified by "{g}" and weighted '
            "by the number of rows in each?",
        ),
        'Difference in means of "{a}" within each "{g}", weighted by size.',
        'effect = 0\nfor _, part in df.groupby("{g}"):\n    treated = part["{b}"] > {v}\n'
        '    difference = part[treated]["{a}"].mean() - part[~treated]["{a}"].mean()\n'
        "    effect += difference * len(part) / len(df)\neffect",
        _stratified,
        ("difference without adjustment", 'df[df["{b}"] > {v}]["{a}"].mean() - df[df["{b}"] <= {v}]["{a}"].mean()'),
    ),
    Operation(
        "confounded", "causal", "check", bind.three_signed,
        (
            'Does the sign of the effect of "{a}" on "{b}" stay the same when "{c}" is added to the linear regression?',
            'Is the slope of "{b}" on "{a}" of the same sign with and without control for "{c}"?',
        ),
        'Compare the slope of "{b}" on "{a}" without and with "{c}".',
        'plain = np.polyfit(df["{a}"], df["{b}"], 1)[0]\n'
        'design = np.column_stack([np.ones(len(df)), df["{a}"], df["{c}"]])\n'
        'np.linalg.lstsq(design, df["{b}"], rcond=None)[0][1] * plain > 0',
        lambda f, s: correlation(column(f, s["a"]), column(f, s["b"])) * correlation(*_adjusted(f, s)) > 0,
        (
            "opposite",
            'plain = np.polyfit(df["{a}"], df["{b}"], 1)[0]\n'
            'design = np.column_stack([np.ones(len(df)), df["{a}"], df["{c}"]])\n'
            'np.linalg.lstsq(design, df["{b}"], rcond=None)[0][1] * plain < 0',
        ),
    ),
    # ---- arithmetic
    Operation(
        "median_gap", "arithmetic", "number", bind.spreads_apart,
        (
            'What is the median of "{a}" minus the median of "{b}"?',
            'By how much does the median "{a}" exceed the median "{b}"?',
        ),
        'Median of "{a}" minus median of "{b}".', 'df["{a}"].median() - df["{b}"].median()',
        lambda f, s: median(finite(f, s["a"])) - median(finite(f, s["b"])),
        ("difference of the means", 'df["{a}"].mean() - df["{b}"].mean()'),
        ('medians = df[["{a}", "{b}"]].median()\nmedians["{a}"] - medians["{b}"]',),
    ),
    Operation(
        "percent_gap", "arithmetic", "number", bind.two_apart,
        (
            'By how many percent is the mean of "{a}" larger than the mean of "{b}"? (negative if smaller)',
            'Express the mean of "{a}" minus that of "{b}" as a percentage of the mean of "{b}".',
        ),
        'Mean of "{a}" relative to mean of "{b}", in percent.', '100 * (df["{a}"].mean() / df["{b}"].mean() - 1)',
        lambda f, s: 100 * (mean(f, s["a"]) - mean(f, s["b"])) / (mean(f, s["b"]) or math.nan),
        ("ratio", 'df["{a}"].mean() / df["{b}"].mean()'),
        ('first, second = df["{a}"].mean(), df["{b}"].mean()\n(first - second) / second * 100',),
    ),
    Operation(
        "extremes_ratio", "arithmetic", "number", bind.positive,
        (
            'How many times as large as the smallest is the largest "{a}"?',
            'What is the maximum of "{a}" divided by its minimum?',
        ),
        'Maximum by minimum of "{a}".', 'df["{a}"].max() / df["{a}"].min()',
        lambda f, s: max(finite(f, s["a"])) / min(finite(f, s["a"])),
        ("difference", 'df["{a}"].max() - df["{a}"].min()'),
        ('low, high = df["{a}"].min(), df["{a}"].max()\nhigh / low',),
    ),
    Operation(
        "group_gap", "arithmetic", "number", bind_group.group_pair,
        (
            'What is the mean of "{a}" for "{g}" {v} minus that for "{g}" {w}?',
            'How much higher is the average "{a}" where "{g}" is {v} than where it is {w}?',
        ),
        'Difference of the means of "{a}" between "{g}" {v} and {w}.',
        'df[df["{g}"] == {v}]["{a}"].mean() - df[df["{g}"] == {w}]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], rows_of(f, s["g"], s["value"])) - mean(f, s["a"], rows_of(f, s["g"], s["other"])),
        ("difference the wrong way round", 'df[df["{g}"] == {w}]["{a}"].mean() - df[df["{g}"] == {v}]["{a}"].mean()'),
        ('means = df.groupby("{g}")["{a}"].mean()\nmeans[{v}] - means[{w}]',),
    ),
    Operation(
        "weighted_mean", "arithmetic", "number", bind.two_positive,
        ('What is the mean of "{a}" weighted by "{b}"?', 'Weigh each row by "{b}". What is the average "{a}"?'),
        'Mean of "{a}" weighted by "{b}".', '(df["{a}"] * df["{b}"]).sum() / df["{b}"].sum()',
        lambda f, s: math.fsum(column(f, s["a"]) * column(f, s["b"])) / math.fsum(column(f, s["b"])),
        ("plain mean", 'df["{a}"].mean()'),
        ('np.average(df["{a}"], weights=df["{b}"])',),
    ),
    # ---- multi-hop numerical
    Operation(
        "median_above", "multi-hop numerical", "number", bind.two_threshold,
        (
            'What is the median of "{a}" in rows with "{b}" above {v}?',
            'Among the rows where "{b}" exceeds {v}, what is the middle "{a}"?',
        ),
        'Median of "{a}" where "{b}" > {v}.', 'df[df["{b}"] > {v}]["{a}"].median()',
        lambda f, s: median(present(column(f, s["a"])[column(f, s["b"]) > s["value"]])),
        ("median of all rows", 'df["{a}"].median()'),
        ('df.loc[df["{b}"] > {v}, "{a}"].median()',),
    ),
    Operation(
        "mean_of_top", "multi-hop numerical", "number", bind.two_top,
        (
            'What is the mean of "{a}" over the {n} rows with the largest "{b}"?',
            'Take the {n} rows with the highest "{b}". What is their average "{a}"?',
        ),
        'Mean of "{a}" in the {n} rows with the largest "{b}".', 'df.nlargest({n}, "{b}")["{a}"].mean()',
        lambda f, s: mean(f, s["a"], column(f, s["b"]) >= s["limit"]),
        ("mean of the largest values themselves", 'df["{a}"].nlargest({n}).mean()'),
        (
            'df.sort_values("{b}", ascending=False).head({n})["{a}"].mean()',
            'top = df.nlargest({n}, "{b}")\ntop["{a}"].mean()',
        ),
    ),
    Operation(
        "mean_above_mean", "multi-hop numerical", "number", bind.two_apart_from_mean,
        (
            'What is the mean of "{a}" in the rows where "{b}" is above its own mean?',
            'Where "{b}" exceeds its average, what is the average "{a}"?',
        ),
        'Mean of "{a}" where "{b}" is above its mean.', 'df[df["{b}"] > df["{b}"].mean()]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], column(f, s["b"]) > mean(f, s["b"])),
        ("mean where it is below", 'df[df["{b}"] < df["{b}"].mean()]["{a}"].mean()'),
        ('limit = df["{b}"].mean()\ndf.loc[df["{b}"] > limit, "{a}"].mean()',),
    ),
    Operation(
        "mean_of_common", "multi-hop numerical", "number", bind_group.common_number,
        (
            'What is the mean of "{a}" in the most common "{g}"?',
            'Find the "{g}" with the most rows. What is its average "{a}"?',
        ),
        'Most common "{g}", then its mean "{a}".', 'df[df["{g}"] == df["{g}"].mode()[0]]["{a}"].mean()',
        lambda f,
        s: mean(f, s["a"], rows_of(f, s["g"], max(s["levels"], key=lambda level: rows_of(f, s["g"], level).sum()))),
        ("mean of all rows", 'df["{a}"].mean()'),
        ('common = df["{g}"].value_counts().idxmax()\ndf[df["{g}"] == common]["{a}"].mean()',),
    ),
    Operation(
        "spread_of_groups", "multi-hop numerical", "number", bind_group.groups_apart,
        (
            'By how much do the highest and the lowest mean "{a}" of any "{g}" differ?',
            'Average "{a}" for each "{g}". What is the range of these means?',
        ),
        'Range of the means of "{a}" by "{g}".', 'means = df.groupby("{g}")["{a}"].mean()\nmeans.max() - means.min()',
        lambda f, s: float(np.ptp(list(group_means(f, s["a"], s["g"], s["levels"]).values()))),
        ("range of the values", 'df["{a}"].max() - df["{a}"].min()'),
        ('np.ptp(df.groupby("{g}")["{a}"].mean().to_numpy())',),
    ),
)  # fmt: skip
