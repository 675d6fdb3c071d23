"""More to ask about groups, ranks and years; see `operations` for how to read a row."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from . import group_slots as bind
from . import slots as bind_column
from .arithmetic import (
    coefficients,
    column,
    deviation,
    finite,
    group_means,
    in_order,
    mean,
    median,
    number_above_mean,
    paired,
    row_of,
    rows_of,
)
from .questions import Operation
from .slots import Slots


def _order(values: np.ndarray) -> list[int]:
    """The rows with a value, the largest value first."""
    return sorted(np.flatnonzero(~np.isnan(values)).tolist(), key=lambda row: -values[row])


def _by_mean(means: dict[object, float]) -> list[object]:
    return sorted(means, key=lambda level: -means[level])


def _at(frame: pd.DataFrame, slots: Slots, key: str) -> float:
    return float(column(frame, slots["a"])[row_of(frame, slots["t"], slots[key])])


def _welch(first: list[float], second: list[float]) -> float:
    spread = deviation(first) ** 2 / len(first) + deviation(second) ** 2 / len(second)
    return (math.fsum(first) / len(first) - math.fsum(second) / len(second)) / math.sqrt(spread)


def _shares(frame: pd.DataFrame, slots: Slots) -> list[float]:
    sizes = [int(rows_of(frame, slots["g"], level).sum()) for level in slots["levels"]]
    return [size / sum(sizes) for size in sizes]


GROUP_OPERATIONS: tuple[Operation, ...] = (
    # ---- aggregation
    Operation(
        "group_total", "aggregation", "number", bind.group_number,
        ('What is the sum of "{a}" in rows where "{g}" is {v}?', 'What is the total "{a}" of "{g}" {v}?'),
        'Sum of "{a}" where "{g}" == {v}.', 'df[df["{g}"] == {v}]["{a}"].sum()',
        lambda f, s: math.fsum(finite(f[rows_of(f, s["g"], s["value"])], s["a"])),
        ("sum of all rows", 'df["{a}"].sum()'),
        ('df.groupby("{g}")["{a}"].sum()[{v}]', 'df.loc[df["{g}"] == {v}, "{a}"].sum()'),
    ),
    # ---- counting
    Operation(
        "count_between", "counting", "count", bind_column.interval,
        (
            'How many rows have "{a}" from {v} to {w}, both included?',
            'Count the rows where "{a}" is at least {v} and at most {w}.',
        ),
        'Count rows with {v} <= "{a}" <= {w}.', 'df["{a}"].between({v}, {w}).sum()',
        lambda f, s: sum(s["value"] <= x <= s["high"] for x in finite(f, s["a"])),
        ("number of rows above the lower limit", '(df["{a}"] >= {v}).sum()'),
        ('((df["{a}"] >= {v}) & (df["{a}"] <= {w})).sum()', 'len(df[(df["{a}"] >= {v}) & (df["{a}"] <= {w})])'),
    ),
    Operation(
        "count_both", "counting", "count", bind.group_threshold,
        (
            'How many rows have "{g}" equal to {v} and "{a}" above {w}?',
            'Among the rows where "{g}" is {v}, how many have "{a}" greater than {w}?',
        ),
        'Count rows with "{g}" == {v} and "{a}" > {w}.', '((df["{g}"] == {v}) & (df["{a}"] > {w})).sum()',
        lambda f, s: sum(x > s["limit"] for x in finite(f[rows_of(f, s["g"], s["value"])], s["a"])),
        ("number of rows that meet either", '((df["{g}"] == {v}) | (df["{a}"] > {w})).sum()'),
        ('part = df[df["{g}"] == {v}]\n(part["{a}"] > {w}).sum()', 'len(df[(df["{g}"] == {v}) & (df["{a}"] > {w})])'),
    ),
    Operation(
        "count_above_mean", "counting", "count", bind_column.apart_from_mean,
        ('How many rows have "{a}" above its mean?', 'In how many rows does "{a}" exceed the average of the column?'),
        'Count "{a}" above its mean.', '(df["{a}"] > df["{a}"].mean()).sum()',
        lambda f, s: number_above_mean(finite(f, s["a"])),
        ("number of rows below", '(df["{a}"] < df["{a}"].mean()).sum()'),
        ('middle = df["{a}"].mean()\nlen(df[df["{a}"] > middle])',),
    ),
    Operation(
        "count_common", "counting", "count", bind.levels,
        ('How many rows does the most common "{g}" have?', 'How often does the most frequent value of "{g}" occur?'),
        'Size of the largest group of "{g}".', 'df["{g}"].value_counts().max()',
        lambda f, s: max(int(rows_of(f, s["g"], level).sum()) for level in s["levels"]),
        ("size of the smallest group", 'df["{g}"].value_counts().min()'),
        ('df["{g}"].value_counts().iloc[0]', 'df.groupby("{g}").size().max()'),
    ),
    Operation(
        "count_either", "counting", "count", bind.group_threshold,
        (
            'How many rows have "{g}" equal to {v} or "{a}" above {w} (or both)?',
            'Count the rows where "{g}" is {v}, "{a}" exceeds {w}, or both hold.',
        ),
        'Count rows with "{g}" == {v} or "{a}" > {w}.', '((df["{g}"] == {v}) | (df["{a}"] > {w})).sum()',
        lambda f, s: int((rows_of(f, s["g"], s["value"]) | (column(f, s["a"]) > s["limit"])).sum()),
        ("number of rows that meet both", '((df["{g}"] == {v}) & (df["{a}"] > {w})).sum()'),
        ('len(df[(df["{g}"] == {v}) | (df["{a}"] > {w})])',),
    ),
    # ---- descriptive
    Operation(
        "most_common", "descriptive", "choice", bind.common,
        ('What is the most common "{g}"?', 'Which "{g}" stands in more rows than any other?'),
        'Mode of "{g}".', 'df["{g}"].mode()[0]',
        lambda f, s: str(max(s["levels"], key=lambda level: int(rows_of(f, s["g"], level).sum()))),
        ("least common one", 'df["{g}"].value_counts().idxmin()'),
        ('df["{g}"].value_counts().idxmax()', 'df["{g}"].value_counts().index[0]'),
    ),
    # ---- distribution
    Operation(
        "share_group", "distribution", "number", bind.group,
        ('What percentage of rows have "{g}" equal to {v}?', 'How many percent of the table does "{g}" {v} make up?'),
        'Percentage of rows with "{g}" == {v}.', '(df["{g}"] == {v}).mean() * 100',
        lambda f, s: 100.0 * int(rows_of(f, s["g"], s["value"]).sum()) / len(f),
        ("number of rows", '(df["{g}"] == {v}).sum()'),
        ('100 * len(df[df["{g}"] == {v}]) / len(df)', 'part = df[df["{g}"] == {v}]\nlen(part) / len(df) * 100'),
    ),
    # ---- comparison
    Operation(
        "larger_spread", "comparison", "choice", bind_column.spreads_apart,
        (
            'Which varies more, "{a}" or "{b}" (standard deviation)?',
            'Which has the larger standard deviation, "{a}" or "{b}"?',
        ),
        'Compare the standard deviations of "{a}" and "{b}".', 'df[["{a}", "{b}"]].std().idxmax()',
        lambda f, s: max((s["a"], s["b"]), key=lambda name: deviation(finite(f, name))),
        ("one that varies less", 'df[["{a}", "{b}"]].std().idxmin()'),
        ('"{a}" if df["{a}"].std() > df["{b}"].std() else "{b}"',),
    ),
    Operation(
        "larger_median", "comparison", "choice", bind_column.spreads_apart,
        (
            'Which has the larger median, "{a}" or "{b}"?',
            'Whose middle value is higher, that of "{a}" or that of "{b}"?',
        ),
        'Compare the medians of "{a}" and "{b}".', 'df[["{a}", "{b}"]].median().idxmax()',
        lambda f, s: max((s["a"], s["b"]), key=lambda name: median(finite(f, name))),
        ("smaller", 'df[["{a}", "{b}"]].median().idxmin()'),
        ('"{a}" if df["{a}"].median() > df["{b}"].median() else "{b}"',),
    ),
    Operation(
        "larger_rows", "comparison", "count", bind_column.two,
        ('In how many rows is "{a}" larger than "{b}"?', 'How often does "{a}" exceed "{b}"?'),
        'Count rows with "{a}" > "{b}".', '(df["{a}"] > df["{b}"]).sum()',
        lambda f, s: int(np.greater(*paired(f, s["a"], s["b"])).sum()),
        ("number of rows where it is smaller", '(df["{a}"] < df["{b}"]).sum()'),
        ('len(df[df["{a}"] > df["{b}"]])', 'df["{a}"].gt(df["{b}"]).sum()'),
    ),
    Operation(
        "more_frequent", "comparison", "choice", bind.level_pair,
        ('Which is more frequent in "{g}", {v} or {w}?', 'Does "{g}" {v} or {w} stand in more rows?'),
        'Compare the numbers of rows with "{g}" {v} and {w}.',
        'df[df["{g}"].isin([{v}, {w}])]["{g}"].value_counts().idxmax()',
        lambda f, s: str(max((s["value"], s["other"]), key=lambda level: int(rows_of(f, s["g"], level).sum()))),
        ("less frequent one", 'df[df["{g}"].isin([{v}, {w}])]["{g}"].value_counts().idxmin()'),
        ('counts = df["{g}"].value_counts()\ncounts[[{v}, {w}]].idxmax()',),
    ),
    # ---- fact checking
    Operation(
        "any_row", "fact checking", "check", bind.group_threshold,
        (
            'Is there a row with "{g}" equal to {v} and "{a}" above {w}?',
            'Does any row where "{g}" is {v} have "{a}" greater than {w}?',
        ),
        'Any row with "{g}" == {v} and "{a}" > {w}?', '((df["{g}"] == {v}) & (df["{a}"] > {w})).any()',
        lambda f, s: any(x > s["limit"] for x in finite(f[rows_of(f, s["g"], s["value"])], s["a"])),
        ("opposite", 'not ((df["{g}"] == {v}) & (df["{a}"] > {w})).any()'),
        ('len(df[(df["{g}"] == {v}) & (df["{a}"] > {w})]) > 0',),
    ),
    Operation(
        "mean_over_median", "fact checking", "check", bind_column.skewed,
        ('Is the mean of "{a}" larger than its median?', 'Is it true that the average "{a}" lies above the median?'),
        'Mean of "{a}" > median of "{a}"?', 'df["{a}"].mean() > df["{a}"].median()',
        lambda f, s: mean(f, s["a"]) > median(finite(f, s["a"])),
        ("wrong way round", 'df["{a}"].mean() < df["{a}"].median()'),
        ('mean, median = df["{a}"].mean(), df["{a}"].median()\nmean > median',),
    ),
    Operation(
        "group_higher", "fact checking", "check", bind.group_pair,
        (
            'Is the mean of "{a}" higher for "{g}" {v} than for "{g}" {w}?',
            'Do rows with "{g}" {v} have a larger average "{a}" than those with {w}?',
        ),
        'Mean of "{a}" for "{g}" {v} above that for {w}?',
        'df[df["{g}"] == {v}]["{a}"].mean() > df[df["{g}"] == {w}]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], rows_of(f, s["g"], s["value"])) > mean(f, s["a"], rows_of(f, s["g"], s["other"])),
        ("wrong way round", 'df[df["{g}"] == {v}]["{a}"].mean() < df[df["{g}"] == {w}]["{a}"].mean()'),
        ('means = df.groupby("{g}")["{a}"].mean()\nmeans[{v}] > means[{w}]',),
    ),
    Operation(
        "majority", "fact checking", "check", bind_column.threshold,
        (
            'Do more than half of the rows have "{a}" above {v}?',
            'Is "{a}" greater than {v} in the majority of all rows?',
        ),
        'More than half of the rows with "{a}" > {v}?', '(df["{a}"] > {v}).mean() > 0.5',
        lambda f, s: 2 * sum(x > s["value"] for x in finite(f, s["a"])) > len(f),
        ("opposite", '(df["{a}"] > {v}).mean() <= 0.5'),
        ('above = (df["{a}"] > {v}).sum()\nabove > len(df) / 2',),
    ),
    # ---- ranking
    Operation(
        "nth_smallest", "ranking", "number", bind_column.bottom_rank,
        ('What is the {nth} smallest "{a}"?', 'Which value of "{a}" ranks {nth} from the bottom?'),
        'Value {n} of the smallest "{a}".', 'df["{a}"].nsmallest({n}).iloc[-1]',
        lambda f, s: sorted(finite(f, s["a"]))[s["n"] - 1],
        ("smallest", 'df["{a}"].min()'),
        (
            'df["{a}"].sort_values().iloc[{n} - 1]',
            'ordered = df["{a}"].dropna().sort_values().to_list()\nordered[{n} - 1]',
        ),
    ),
    Operation(
        "nth_label", "ranking", "choice", bind.label_rank,
        (
            'Which "{l}" has the {nth} highest "{a}"?',
            'Order the rows by "{a}", largest first. Which "{l}" comes {nth}?',
        ),
        'Find "{l}" of the {nth} largest "{a}".', 'df.nlargest({n}, "{a}")["{l}"].iloc[-1]',
        lambda f, s: str(list(f[s["l"]])[_order(column(f, s["a"]))[s["n"] - 1]]),
        ("highest", 'df.nlargest({n}, "{a}")["{l}"].iloc[0]'),
        (
            'df.sort_values("{a}", ascending=False)["{l}"].iloc[{n} - 1]',
            'ordered = df.sort_values("{a}", ascending=False)\nordered.iloc[{n} - 1]["{l}"]',
        ),
    ),
    Operation(
        "rank_of", "ranking", "count", bind.label_rank,
        (
            'Which place does "{l}" {v} take by "{a}", the largest being first?',
            'Order the rows by "{a}", largest first. At which rank is "{l}" {v}?',
        ),
        'Rank of "{l}" {v} by "{a}".', '(df["{a}"] > df[df["{l}"] == {v}]["{a}"].iloc[0]).sum() + 1',
        lambda f, s: _order(column(f, s["a"])).index(list(f[s["l"]]).index(s["value"])) + 1,
        ("rank from the bottom", '(df["{a}"] < df[df["{l}"] == {v}]["{a}"].iloc[0]).sum() + 1'),
        ('place = df["{a}"].rank(ascending=False)\nint(place[df["{l}"] == {v}].iloc[0])',),
    ),
    Operation(
        "nth_group", "ranking", "choice", bind.group_rank,
        (
            'Which "{g}" has the {nth} highest mean "{a}"?',
            'Order each "{g}" by its average "{a}", largest first. Which comes {nth}?',
        ),
        'Means of "{a}" by "{g}", the {nth} from the top.',
        'df.groupby("{g}")["{a}"].mean().sort_values(ascending=False).index[{n} - 1]',
        lambda f, s: str(_by_mean(group_means(f, s["a"], s["g"], s["levels"]))[s["n"] - 1]),
        ("highest", 'df.groupby("{g}")["{a}"].mean().idxmax()'),
        ('means = df.groupby("{g}")["{a}"].mean()\nmeans.nlargest({n}).index[-1]',),
    ),
    # ---- statistical
    Operation(
        "t_statistic", "statistical", "number", bind.group_pair_spread,
        (
            "What is Welch's t statistic for \"{a}\" between \"{g}\" {v} and \"{g}\" {w}?",
            'Test whether "{a}" differs between "{g}" {v} and {w}: what is t, without assuming equal variances?',
        ),
        "Welch's t of \"{a}\" between \"{g}\" {v} and {w}.",
        'first = df[df["{g}"] == {v}]["{a}"].dropna()\nsecond = df[df["{g}"] == {w}]["{a}"].dropna()\n'
        "(first.mean() - second.mean()) / (first.var() / len(first) + second.var() / len(second)) ** 0.5",
        lambda f, s: _welch(
            finite(f[rows_of(f, s["g"], s["value"])], s["a"]), finite(f[rows_of(f, s["g"], s["other"])], s["a"])
        ),
        ("difference of the means", 'df[df["{g}"] == {v}]["{a}"].mean() - df[df["{g}"] == {w}]["{a}"].mean()'),
        (
            'stats = df.groupby("{g}")["{a}"].agg(["mean", "var", "count"])\n'
            'one, two = stats.loc[{v}], stats.loc[{w}]\n'
            '(one["mean"] - two["mean"]) / np.sqrt(one["var"] / one["count"] + two["var"] / two["count"])',
        ),
    ),
    Operation(
        "group_deviation", "statistical", "number", bind.group_number,
        (
            'What is the standard deviation of "{a}" in rows where "{g}" is {v}?',
            'How much does "{a}" vary (standard deviation) for "{g}" {v}?',
        ),
        'Standard deviation of "{a}" where "{g}" == {v}.', 'df[df["{g}"] == {v}]["{a}"].std()',
        lambda f, s: deviation(finite(f[rows_of(f, s["g"], s["value"])], s["a"])),
        ("standard deviation of all rows", 'df["{a}"].std()'),
        ('df.groupby("{g}")["{a}"].std()[{v}]', 'part = df.loc[df["{g}"] == {v}, "{a}"]\npart.std()'),
    ),
    # ---- time-based calculation
    Operation(
        "change", "time-based calculation", "number", bind.moments,
        ('By how much did "{a}" change from "{t}" {v} to {w}?', 'What is "{a}" in "{t}" {w} minus "{a}" in {v}?'),
        'Difference of "{a}" between "{t}" {v} and {w}.',
        'df[df["{t}"] == {w}]["{a}"].iloc[0] - df[df["{t}"] == {v}]["{a}"].iloc[0]',
        lambda f, s: float(np.diff([column(f, s["a"])[row_of(f, s["t"], s[key])] for key in ("value", "other")])[0]),
        ("difference the wrong way round", 'df[df["{t}"] == {v}]["{a}"].iloc[0] - df[df["{t}"] == {w}]["{a}"].iloc[0]'),
        (
            'by_time = df.set_index("{t}")["{a}"]\nby_time[{w}] - by_time[{v}]',
            'start = df.loc[df["{t}"] == {v}, "{a}"].item()\nend = df.loc[df["{t}"] == {w}, "{a}"].item()\nend - start',
        ),
    ),
    Operation(
        "growth", "time-based calculation", "number", bind.growth,
        (
            'By how many percent did "{a}" grow from "{t}" {v} to {w}?',
            'What is the percentage change of "{a}" between "{t}" {v} and {w}?',
        ),
        'Change of "{a}" from "{t}" {v} to {w} in percent.',
        'by_time = df.set_index("{t}")["{a}"]\n100 * (by_time[{w}] / by_time[{v}] - 1)',
        lambda f, s: 100 * (_at(f, s, "other") - _at(f, s, "value")) / _at(f, s, "value"),
        ("change as a number", 'df[df["{t}"] == {w}]["{a}"].iloc[0] - df[df["{t}"] == {v}]["{a}"].iloc[0]'),
        (
            'start = df[df["{t}"] == {v}]["{a}"].iloc[0]\nend = df[df["{t}"] == {w}]["{a}"].iloc[0]\n'
            "(end - start) / start * 100",
        ),
    ),
    Operation(
        "mean_during", "time-based calculation", "number", bind.moments,
        (
            'What was the mean of "{a}" from "{t}" {v} to {w}, both included?',
            'Average "{a}" over the rows with "{t}" at least {v} and at most {w}.',
        ),
        'Mean of "{a}" where {v} <= "{t}" <= {w}.', 'df[df["{t}"].between({v}, {w})]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], (column(f, s["t"]) >= s["value"]) & (column(f, s["t"]) <= s["other"])),
        ("mean of all rows", 'df["{a}"].mean()'),
        (
            'period = df[(df["{t}"] >= {v}) & (df["{t}"] <= {w})]\nperiod["{a}"].mean()',
            'df.set_index("{t}").sort_index().loc[{v}:{w}, "{a}"].mean()',
        ),
    ),
    Operation(
        "largest_step", "time-based calculation", "number", bind.series,
        (
            'Order the rows by "{t}". What is the largest rise of "{a}" from one row to the next?',
            'What is the biggest increase of "{a}" between consecutive rows in order of "{t}"?',
        ),
        'Largest step of "{a}" in order of "{t}".', 'df.sort_values("{t}")["{a}"].diff().max()',
        lambda f, s: float(np.max(np.diff(in_order(f, s["t"], s["a"])))),
        ("whole change", 'df.sort_values("{t}")["{a}"].iloc[-1] - df.sort_values("{t}")["{a}"].iloc[0]'),
        (
            'ordered = df.sort_values("{t}")\nsteps = ordered["{a}"] - ordered["{a}"].shift(1)\nsteps.max()',
            'np.diff(df.sort_values("{t}")["{a}"]).max()',
        ),
    ),
    Operation(
        "moving_average", "time-based calculation", "number", bind.series,
        (
            'What is the highest moving average of "{a}" over 3 rows in order of "{t}"?',
            'Smooth "{a}" by a mean over 3 consecutive rows, ordered by "{t}". What is the maximum?',
        ),
        'Maximum of the rolling mean of "{a}" over 3 rows by "{t}".',
        'df.sort_values("{t}")["{a}"].rolling(3).mean().max()',
        lambda f, s: float(np.max(np.convolve(in_order(f, s["t"], s["a"]), np.ones(3) / 3, "valid"))),
        ("maximum without smoothing", 'df["{a}"].max()'),
        (
            'ordered = df.sort_values("{t}")["{a}"].to_numpy()\n'
            "np.max((ordered[:-2] + ordered[1:-1] + ordered[2:]) / 3)",
        ),
    ),
    # ---- impact
    Operation(
        "trend", "impact", "number", bind.series,
        (
            'By how much does "{a}" change per unit of "{t}", by linear regression?',
            'What is the slope of the trend line of "{a}" over "{t}"?',
        ),
        'Slope of "{a}" on "{t}".', 'np.polyfit(df["{t}"], df["{a}"], 1)[0]',
        lambda f, s: float(coefficients(column(f, s["a"]), column(f, s["t"]))[0]),
        ("correlation", 'df["{a}"].corr(df["{t}"])'),
        ('df["{a}"].cov(df["{t}"]) / df["{t}"].var()',),
    ),
    # ---- domain specific
    Operation(
        "yearly_growth", "domain specific", "number", bind.growth,
        (
            'What is the compound annual growth rate of "{a}" from "{t}" {v} to {w}, in percent?',
            'An investor asks for the CAGR of "{a}" between "{t}" {v} and {w} (percent a year). What is it?',
        ),
        'Compound growth of "{a}" per year from {v} to {w}, in percent.',
        'by_time = df.set_index("{t}")["{a}"]\n100 * ((by_time[{w}] / by_time[{v}]) ** (1 / ({w} - {v})) - 1)',
        lambda f, s: 100 * math.expm1(math.log(_at(f, s, "other") / _at(f, s, "value")) / (s["other"] - s["value"])),
        (
            "growth over the whole time",
            '100 * (df[df["{t}"] == {w}]["{a}"].iloc[0] / df[df["{t}"] == {v}]["{a}"].iloc[0] - 1)',
        ),
        (
            'start = df[df["{t}"] == {v}]["{a}"].iloc[0]\nend = df[df["{t}"] == {w}]["{a}"].iloc[0]\n'
            "years = {w} - {v}\n((end / start) ** (1 / years) - 1) * 100",
        ),
    ),
    Operation(
        "entropy", "domain specific", "number", bind.levels,
        (
            'How diverse is "{g}"? Give the Shannon entropy of its values in bits.',
            'As an ecologist would for species, give the Shannon entropy (base 2) of "{g}".',
        ),
        'Shannon entropy of "{g}" in bits.', 'p = df["{g}"].value_counts(normalize=True)\n-(p * np.log2(p)).sum()',
        lambda f, s: -sum(p * math.log2(p) for p in _shares(f, s)),
        ("entropy in nats", 'p = df["{g}"].value_counts(normalize=True)\n-(p * np.log(p)).sum()'),
        ('counts = df["{g}"].value_counts()\np = counts / counts.sum()\nsum(-x * np.log2(x) for x in p)',),
    ),
    Operation(
        "simpson", "domain specific", "number", bind.levels,
        (
            "What is Simpson's diversity of \"{g}\": 1 minus the sum of the squared shares of its values?",
            'Give the Gini-Simpson index of "{g}".',
        ),
        'One minus the squared shares of "{g}".', '1 - (df["{g}"].value_counts(normalize=True) ** 2).sum()',
        lambda f, s: 1 - math.fsum(p * p for p in _shares(f, s)),
        ("largest share", 'df["{g}"].value_counts(normalize=True).max()'),
        ('p = df["{g}"].value_counts(normalize=True)\n1 - (p**2).sum()',),
    ),
)  # fmt: skip
