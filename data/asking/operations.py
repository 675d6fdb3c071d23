"""The basic set of what can be asked of a table: one row is one thing, its wordings, its program, its answer.

What is asked in short form is these alone; `column_operations`, `relation_operations` and `group_operations` have more.
"""

from __future__ import annotations

import math

import numpy as np

from . import group_slots as bind_group
from . import slots as bind
from .arithmetic import best_group, column, finite, mean, paired, row_of, rows_of
from .questions import Operation

OPERATIONS: tuple[Operation, ...] = (
    # ---- aggregation
    Operation(
        "mean", "aggregation", "number", bind.one,
        ('What is the mean of "{a}"?', 'What is the average "{a}"?', 'Give the average value of "{a}".'),
        'Mean of "{a}".', 'df["{a}"].mean()',
        lambda f, s: float(np.mean(finite(f, s["a"]))),
        ("sum", 'df["{a}"].sum()'),
    ),
    Operation(
        "total", "aggregation", "number", bind.one,
        ('What is the total of "{a}"?', 'What is the sum of "{a}"?', 'Add up all values of "{a}".'),
        'Sum of "{a}".', 'df["{a}"].sum()',
        lambda f, s: math.fsum(finite(f, s["a"])),
        ("mean", 'df["{a}"].mean()'),
    ),
    # ---- descriptive
    Operation(
        "largest", "descriptive", "number", bind.one,
        ('What is the largest "{a}"?', 'What is the maximum of "{a}"?', 'Give the highest value of "{a}".'),
        'Maximum of "{a}".', 'df["{a}"].max()',
        lambda f, s: max(finite(f, s["a"])),
        ("minimum", 'df["{a}"].min()'),
    ),
    Operation(
        "smallest", "descriptive", "number", bind.one,
        ('What is the smallest "{a}"?', 'What is the minimum of "{a}"?', 'Give the lowest value of "{a}".'),
        'Minimum of "{a}".', 'df["{a}"].min()',
        lambda f, s: min(finite(f, s["a"])),
        ("maximum", 'df["{a}"].max()'),
    ),
    Operation(
        "range", "descriptive", "number", bind.one,
        ('What is the range of "{a}"?', 'How far apart are the largest and the smallest "{a}"?'),
        'Maximum minus minimum of "{a}".', 'df["{a}"].max() - df["{a}"].min()',
        lambda f, s: max(finite(f, s["a"])) - min(finite(f, s["a"])),
        ("maximum", 'df["{a}"].max()'),
    ),
    # ---- statistical
    Operation(
        "median", "statistical", "number", bind.one,
        ('What is the median of "{a}"?', 'Give the median value of "{a}".', 'What is the middle value of "{a}"?'),
        'Median of "{a}".', 'df["{a}"].median()',
        lambda f, s: float(np.percentile(finite(f, s["a"]), 50)),
        ("mean", 'df["{a}"].mean()'),
    ),
    Operation(
        "deviation", "statistical", "number", bind.one,
        ('What is the standard deviation of "{a}"?', 'Give the standard deviation of "{a}".'),
        'Standard deviation of "{a}".', 'df["{a}"].std()',
        lambda f, s: float(np.std(finite(f, s["a"]), ddof=1)),
        ("variance", 'df["{a}"].var()'),
    ),
    # ---- counting
    Operation(
        "count_above", "counting", "count", bind.threshold,
        ('How many rows have "{a}" above {v}?', 'In how many rows is "{a}" greater than {v}?'),
        'Count rows with "{a}" > {v}.', '(df["{a}"] > {v}).sum()',
        lambda f, s: sum(value > s["value"] for value in finite(f, s["a"])),
        ("number of rows below", '(df["{a}"] < {v}).sum()'),
    ),
    Operation(
        "count_below", "counting", "count", bind.threshold,
        ('How many rows have "{a}" below {v}?', 'In how many rows is "{a}" less than {v}?'),
        'Count rows with "{a}" < {v}.', '(df["{a}"] < {v}).sum()',
        lambda f, s: sum(value < s["value"] for value in finite(f, s["a"])),
        ("number of rows above", '(df["{a}"] > {v}).sum()'),
    ),
    Operation(
        "count_group", "counting", "count", bind_group.group,
        ('How many rows have "{g}" equal to {v}?', 'In how many rows is "{g}" {v}?'),
        'Count rows with "{g}" == {v}.', '(df["{g}"] == {v}).sum()',
        lambda f, s: int(rows_of(f, s["g"], s["value"]).sum()),
        ("number of other rows", '(df["{g}"] != {v}).sum()'),
    ),
    # ---- data preprocessing
    Operation(
        "missing", "data preprocessing", "count", bind.gappy,
        ('How many values of "{a}" are missing?', 'How many rows have no "{a}"?'),
        'Count missing "{a}".', 'df["{a}"].isna().sum()',
        lambda f, s: sum(value != value for value in f[s["a"]]),
        ("number of values present", 'df["{a}"].count()'),
    ),
    Operation(
        "distinct", "data preprocessing", "count", bind.any_column,
        ('How many different values does "{a}" have?', 'Count the unique values of "{a}".'),
        'Count different "{a}".', 'df["{a}"].nunique()',
        lambda f, s: len({value for value in f[s["a"]] if value == value}),
        ("number of values", 'df["{a}"].count()'),
    ),
    # ---- distribution
    Operation(
        "percentile", "distribution", "number", bind.percentile,
        ('What is the {p}th percentile of "{a}"?', 'Below which "{a}" do {p} percent of the values lie?'),
        'Quantile 0.{p} of "{a}".', 'df["{a}"].quantile(0.{p})',
        lambda f, s: float(np.percentile(finite(f, s["a"]), s["p"])),
        ("median", 'df["{a}"].median()'),
    ),
    Operation(
        "share_above", "distribution", "number", bind.threshold,
        ('What percentage of rows have "{a}" above {v}?', 'In what percent of rows is "{a}" greater than {v}?'),
        'Percentage of rows with "{a}" > {v}.', '(df["{a}"] > {v}).mean() * 100',
        lambda f, s: 100.0 * int((column(f, s["a"]) > s["value"]).sum()) / len(f),
        ("number of rows", '(df["{a}"] > {v}).sum()'),
    ),
    # ---- ranking
    Operation(
        "nth_largest", "ranking", "number", bind.rank,
        ('What is the {nth} largest "{a}"?', 'Which value of "{a}" ranks {nth} from the top?'),
        'Value {n} of the largest "{a}".', 'df["{a}"].nlargest({n}).iloc[-1]',
        lambda f, s: sorted(finite(f, s["a"]), reverse=True)[s["n"] - 1],
        ("largest", 'df["{a}"].max()'),
    ),
    Operation(
        "top_label", "ranking", "choice", bind_group.label,
        ('Which "{l}" has the highest "{a}"?', 'For which "{l}" is "{a}" largest?'),
        'Find "{l}" at the maximum of "{a}".', 'df.loc[df["{a}"].idxmax(), "{l}"]',
        lambda f, s: str(f[s["l"]].to_numpy()[int(np.nanargmax(column(f, s["a"])))]),
        ("lowest", 'df.loc[df["{a}"].idxmin(), "{l}"]'),
    ),
    Operation(
        "bottom_label", "ranking", "choice", bind_group.label,
        ('Which "{l}" has the lowest "{a}"?', 'For which "{l}" is "{a}" smallest?'),
        'Find "{l}" at the minimum of "{a}".', 'df.loc[df["{a}"].idxmin(), "{l}"]',
        lambda f, s: str(f[s["l"]].to_numpy()[int(np.nanargmin(column(f, s["a"])))]),
        ("highest", 'df.loc[df["{a}"].idxmax(), "{l}"]'),
    ),
    # ---- comparison
    Operation(
        "larger_mean", "comparison", "choice", bind.two_apart,
        ('Which has the larger mean, "{a}" or "{b}"?', 'Which is higher on average, "{a}" or "{b}"?'),
        'Compare the means of "{a}" and "{b}".', 'df[["{a}", "{b}"]].mean().idxmax()',
        lambda f, s: str(max((s["a"], s["b"]), key=lambda name: mean(f, name))),
        ("smaller", 'df[["{a}", "{b}"]].mean().idxmin()'),
    ),
    Operation(
        "top_group", "comparison", "choice", bind_group.groups_apart,
        ('Which "{g}" has the highest mean "{a}"?', 'For which "{g}" is the average "{a}" largest?'),
        'Group by "{g}", highest mean of "{a}".', 'df.groupby("{g}")["{a}"].mean().idxmax()',
        lambda f, s: best_group(f, s["a"], s["g"], s["levels"], 1),
        ("lowest", 'df.groupby("{g}")["{a}"].mean().idxmin()'),
    ),
    Operation(
        "bottom_group", "comparison", "choice", bind_group.groups_apart,
        ('Which "{g}" has the lowest mean "{a}"?', 'For which "{g}" is the average "{a}" smallest?'),
        'Group by "{g}", lowest mean of "{a}".', 'df.groupby("{g}")["{a}"].mean().idxmin()',
        lambda f, s: best_group(f, s["a"], s["g"], s["levels"], -1),
        ("highest", 'df.groupby("{g}")["{a}"].mean().idxmax()'),
    ),
    # ---- fact checking
    Operation(
        "mean_exceeds", "fact checking", "check", bind.near_mean,
        ('Is the mean of "{a}" above {v}?', 'Is it true that the average "{a}" is above {v}?'),
        'Compare the mean of "{a}" with {v}.', 'df["{a}"].mean() > {v}',
        lambda f, s: mean(f, s["a"]) > s["value"],
        ("wrong way round", 'df["{a}"].mean() < {v}'),
    ),
    Operation(
        "mean_order", "fact checking", "check", bind.two_apart,
        ('Is the mean of "{a}" larger than the mean of "{b}"?', 'Is "{a}" on average larger than "{b}"?'),
        'Mean of "{a}" > mean of "{b}"?', 'df["{a}"].mean() > df["{b}"].mean()',
        lambda f, s: mean(f, s["a"]) > mean(f, s["b"]),
        ("wrong way round", 'df["{a}"].mean() < df["{b}"].mean()'),
    ),
    # ---- correlation
    Operation(
        "correlation", "correlation", "number", bind.related,
        ('What is the correlation between "{a}" and "{b}"?', 'How strongly do "{a}" and "{b}" correlate?'),
        'Correlation of "{a}" and "{b}".', 'df["{a}"].corr(df["{b}"])',
        lambda f, s: float(np.corrcoef(*paired(f, s["a"], s["b"]))[0, 1]),
        ("covariance", 'df["{a}"].cov(df["{b}"])'),
    ),
    Operation(
        "correlation_sign", "correlation", "check", bind.related,
        ('Are "{a}" and "{b}" positively correlated?', 'Does "{a}" tend to rise with "{b}"?'),
        'Correlation of "{a}" and "{b}" > 0?', 'df["{a}"].corr(df["{b}"]) > 0',
        lambda f, s: bool(np.corrcoef(*paired(f, s["a"], s["b"]))[0, 1] > 0),
        ("wrong way round", 'df["{a}"].corr(df["{b}"]) < 0'),
    ),
    # ---- anomaly detection
    Operation(
        "outliers", "anomaly detection", "count", bind.outlier,
        (
            'How many values of "{a}" lie more than {k} standard deviations above the mean?',
            'Count the outliers of "{a}": values over the mean plus {k} standard deviations.',
        ),
        'Count "{a}" > mean + {k} std.', '(df["{a}"] > df["{a}"].mean() + {k} * df["{a}"].std()).sum()',
        lambda f, s: sum(value > s["limit"] for value in finite(f, s["a"])),
        ("number of values above the mean", '(df["{a}"] > df["{a}"].mean()).sum()'),
    ),
    # ---- impact
    Operation(
        "slope", "impact", "number", bind.related_complete,
        (
            'By how much does "{b}" change when "{a}" grows by 1, by linear regression?',
            'What is the slope of the regression of "{b}" on "{a}"?',
        ),
        'Slope of "{b}" on "{a}".', 'df["{b}"].cov(df["{a}"]) / df["{a}"].var()',
        lambda f, s: float(np.polyfit(*paired(f, s["a"], s["b"]), 1)[0]),
        ("correlation", 'df["{a}"].corr(df["{b}"])'),
    ),
    # ---- multi-hop numerical
    Operation(
        "mean_above", "multi-hop numerical", "number", bind.two_threshold,
        (
            'What is the mean of "{a}" in rows with "{b}" above {v}?',
            'What is the average "{a}" where "{b}" is greater than {v}?',
        ),
        'Mean of "{a}" where "{b}" > {v}.', 'df[df["{b}"] > {v}]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], column(f, s["b"]) > s["value"]),
        ("mean of all rows", 'df["{a}"].mean()'),
    ),
    Operation(
        "mean_group", "multi-hop numerical", "number", bind_group.group_number,
        ('What is the mean of "{a}" in rows where "{g}" is {v}?', 'What is the average "{a}" for "{g}" {v}?'),
        'Mean of "{a}" where "{g}" == {v}.', 'df[df["{g}"] == {v}]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], rows_of(f, s["g"], s["value"])),
        ("mean of all rows", 'df["{a}"].mean()'),
    ),
    Operation(
        "at_largest", "multi-hop numerical", "number", bind.two_peak,
        ('What is "{a}" in the row with the largest "{b}"?', 'What is "{a}" where "{b}" is highest?'),
        'Find "{a}" at the maximum of "{b}".', 'df.loc[df["{b}"].idxmax(), "{a}"]',
        lambda f, s: float(column(f, s["a"])[int(np.nanargmax(column(f, s["b"])))]),
        ("largest", 'df["{a}"].max()'),
    ),
    # ---- arithmetic
    Operation(
        "mean_gap", "arithmetic", "number", bind.two_apart,
        (
            'What is the mean of "{a}" minus the mean of "{b}"?',
            'How much larger is the average "{a}" than the average "{b}"?',
        ),
        'Mean of "{a}" minus mean of "{b}".', 'df["{a}"].mean() - df["{b}"].mean()',
        lambda f, s: mean(f, s["a"]) - mean(f, s["b"]),
        ("sum of the means", 'df["{a}"].mean() + df["{b}"].mean()'),
    ),
    Operation(
        "sum_ratio", "arithmetic", "number", bind.two_apart,
        (
            'What is the sum of "{a}" divided by the sum of "{b}"?',
            'What is the ratio of the total "{a}" to the total "{b}"?',
        ),
        'Sum of "{a}" by sum of "{b}".', 'df["{a}"].sum() / df["{b}"].sum()',
        lambda f, s: math.fsum(finite(f, s["a"])) / (math.fsum(finite(f, s["b"])) or math.nan),
        ("wrong way round", 'df["{b}"].sum() / df["{a}"].sum()'),
    ),
    # ---- feature engineering
    Operation(
        "mean_product", "feature engineering", "number", bind.two,
        (
            'Make a new column "{a}" times "{b}". What is its mean?',
            'What is the mean of the product of "{a}" and "{b}"?',
        ),
        'Mean of "{a}" * "{b}".', '(df["{a}"] * df["{b}"]).mean()',
        lambda f, s: float(np.mean(np.multiply(*paired(f, s["a"], s["b"])))),
        ("sum of the product", '(df["{a}"] * df["{b}"]).sum()'),
    ),
    Operation(
        "largest_sum", "feature engineering", "number", bind.two,
        (
            'Make a new column "{a}" plus "{b}". What is its maximum?',
            'Add "{a}" and "{b}" in each row. What is the largest result?',
        ),
        'Maximum of "{a}" + "{b}".', '(df["{a}"] + df["{b}"]).max()',
        lambda f, s: float(np.max(np.add(*paired(f, s["a"], s["b"])))),
        ("minimum of the sum", '(df["{a}"] + df["{b}"]).min()'),
    ),
    # ---- time-based calculation
    Operation(
        "in_year", "time-based calculation", "number", bind_group.moment,
        ('What was "{a}" in "{t}" {v}?', 'Give "{a}" for "{t}" {v}.'),
        'Find "{a}" where "{t}" == {v}.', 'df[df["{t}"] == {v}]["{a}"].iloc[0]',
        lambda f, s: float(column(f, s["a"])[row_of(f, s["t"], s["value"])]),
        ("first value", 'df["{a}"].iloc[0]'),
    ),
    Operation(
        "mean_since", "time-based calculation", "number", bind_group.moment,
        ('What was the mean of "{a}" after "{t}" {v}?', 'Give the average "{a}" after "{t}" {v}.'),
        'Mean of "{a}" where "{t}" > {v}.', 'df[df["{t}"] > {v}]["{a}"].mean()',
        lambda f, s: mean(f, s["a"], column(f, s["t"]) > s["value"]),
        ("mean of all rows", 'df["{a}"].mean()'),
    ),
)  # fmt: skip

# Answered from the description alone.
REFLECTIONS: tuple[Operation, ...] = (
    Operation(
        "row_count", "counting", "count", bind.nothing,
        ("How many rows does the table have?", "How many rows are there?"),
        "The table has {rows} rows.", "", lambda f, s: len(f),
    ),
    Operation(
        "column_count", "counting", "count", bind.nothing,
        ("How many columns does the table have?", "How many columns are there?"),
        "Count the columns.", "", lambda f, s: len(f.columns),
    ),
    Operation(
        "column_type", "descriptive", "choice", bind.typed_column,
        ('What is the type of "{a}"?', 'Which type does "{a}" have?'),
        'Look at "{a}".', "", lambda f, s: str(s["type"]),
    ),
    Operation(
        "first_column", "descriptive", "choice", bind.nothing,
        ("What is the first column?", "Name the first column."),
        "Look at the first name.", "", lambda f, s: str(f.columns[0]),
    ),
    Operation(
        "last_column", "descriptive", "choice", bind.nothing,
        ("What is the last column?", "Name the last column."),
        "Look at the last name.", "", lambda f, s: str(f.columns[-1]),
    ),
)  # fmt: skip
