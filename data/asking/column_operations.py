"""More to ask about one column, or about the rows that another one selects; see `operations` for how to read a row."""

from __future__ import annotations

import math

import numpy as np

from . import slots as bind
from .arithmetic import Numbers, column, deviation, finite, median, number_above_mean, paired, present, skewness
from .questions import Operation


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, (25, 75))
    return float(low), float(high)


def _beyond_fences(values: list[float]) -> int:
    low, high = _quartiles(values)
    reach = 1.5 * (high - low)
    return sum(value < low - reach or value > high + reach for value in values)


def _farthest(values: list[float]) -> float:
    middle = math.fsum(values) / len(values)
    return max(values, key=lambda value: abs(value - middle))


def _filled(values: Numbers, filling: float) -> Numbers:
    return np.where(np.isnan(values), filling, values)


def _gini(values: list[float]) -> float:
    """Half the mean absolute difference of all pairs, by the mean."""
    array = np.asarray(values)
    return float(np.abs(array[:, None] - array).mean() / (2 * array.mean()))


COLUMN_OPERATIONS: tuple[Operation, ...] = (
    # ---- aggregation
    Operation(
        "total_above", "aggregation", "number", bind.two_threshold,
        ('What is the total of "{a}" over the rows with "{b}" above {v}?', 'Add up "{a}" wherever "{b}" exceeds {v}.'),
        'Sum of "{a}" where "{b}" > {v}.', 'df[df["{b}"] > {v}]["{a}"].sum()',
        lambda f, s: math.fsum(present(column(f, s["a"])[column(f, s["b"]) > s["value"]])),
        ("sum of all rows", 'df["{a}"].sum()'),
        ('df.loc[df["{b}"] > {v}, "{a}"].sum()', 'chosen = df[df["{b}"] > {v}]\nchosen["{a}"].sum()'),
    ),
    Operation(
        "total_first", "aggregation", "number", bind.place,
        ('What is the sum of "{a}" over the first {n} rows?', 'Add up "{a}" in the first {n} rows of the table.'),
        'Sum of the first {n} values of "{a}".', 'df["{a}"].head({n}).sum()',
        lambda f, s: math.fsum(present(column(f, s["a"])[: s["n"]])),
        ("sum of all rows", 'df["{a}"].sum()'),
        ('df["{a}"].iloc[:{n}].sum()', 'first = df.head({n})\nfirst["{a}"].sum()'),
    ),
    Operation(
        "mean_absolute", "aggregation", "number", bind.one,
        ('What is the mean of the absolute values of "{a}"?', 'Average "{a}" without regard to sign.'),
        'Mean of the absolute "{a}".', 'df["{a}"].abs().mean()',
        lambda f, s: math.fsum(map(abs, finite(f, s["a"]))) / len(finite(f, s["a"])),
        ("largest absolute value", 'df["{a}"].abs().max()'),
        ('size = df["{a}"].abs()\nsize.sum() / size.count()',),
    ),
    # ---- descriptive
    Operation(
        "midrange", "descriptive", "number", bind.one,
        ('What value lies halfway between the smallest and the largest "{a}"?', 'Give the midrange of "{a}".'),
        'Halfway between minimum and maximum of "{a}".', '(df["{a}"].min() + df["{a}"].max()) / 2',
        lambda f, s: min(finite(f, s["a"])) + (max(finite(f, s["a"])) - min(finite(f, s["a"]))) / 2,
        ("median", 'df["{a}"].median()'),
        ('low = df["{a}"].min()\nhigh = df["{a}"].max()\n(low + high) / 2', 'df["{a}"].agg(["min", "max"]).mean()'),
    ),
    Operation(
        "in_row", "descriptive", "number", bind.place,
        ('What is "{a}" in the {nth} row?', 'Which value of "{a}" stands in the {nth} row of the table?'),
        'Value of "{a}" in row {n}; the first row has index 0.', 'df["{a}"].iloc[{i}]',
        lambda f, s: float(column(f, s["a"])[s["n"] - 1]),
        ("row after it: the first row has index 0", 'df["{a}"].iloc[{n}]'),
        ('df["{a}"].to_list()[{i}]', 'df.iloc[{i}]["{a}"]'),
    ),
    Operation(
        "largest_above", "descriptive", "number", bind.two_threshold,
        (
            'What is the largest "{a}" among the rows with "{b}" above {v}?',
            'Where "{b}" exceeds {v}, how high does "{a}" get?',
        ),
        'Maximum of "{a}" where "{b}" > {v}.', 'df[df["{b}"] > {v}]["{a}"].max()',
        lambda f, s: float(max(present(column(f, s["a"])[column(f, s["b"]) > s["value"]]), default=math.nan)),
        ("smallest such value", 'df[df["{b}"] > {v}]["{a}"].min()'),
        ('df.loc[df["{b}"] > {v}, "{a}"].max()', 'mask = df["{b}"] > {v}\ndf["{a}"][mask].max()'),
    ),
    # ---- statistical
    Operation(
        "variance", "statistical", "number", bind.one,
        ('What is the sample variance of "{a}"?', 'Give the variance of "{a}", over n - 1.'),
        'Variance of "{a}".', 'df["{a}"].var()',
        lambda f, s: deviation(finite(f, s["a"])) ** 2,
        ("standard deviation", 'df["{a}"].std()'),
        ('df["{a}"].std() ** 2', 'np.var(df["{a}"].dropna(), ddof=1)'),
    ),
    Operation(
        "standard_error", "statistical", "number", bind.one,
        ('What is the standard error of the mean of "{a}"?', 'How large is the standard error of the average "{a}"?'),
        'Standard error of the mean of "{a}".', 'df["{a}"].sem()',
        lambda f, s: deviation(finite(f, s["a"])) / math.sqrt(len(finite(f, s["a"]))),
        ("standard deviation", 'df["{a}"].std()'),
        (
            'values = df["{a}"].dropna()\nvalues.std() / len(values) ** 0.5',
            'df["{a}"].std() / np.sqrt(df["{a}"].count())',
        ),
    ),
    Operation(
        "mean_deviation", "statistical", "number", bind.one,
        (
            'How far from their mean are the values of "{a}" on average?',
            'What is the mean absolute deviation of "{a}" from its mean?',
        ),
        'Mean distance of "{a}" from its mean.', '(df["{a}"] - df["{a}"].mean()).abs().mean()',
        lambda f, s: float(np.mean(np.abs(np.subtract(finite(f, s["a"]), np.mean(finite(f, s["a"])))))),
        ("standard deviation", 'df["{a}"].std()'),
        ('middle = df["{a}"].mean()\n(df["{a}"] - middle).abs().mean()',),
    ),
    Operation(
        "trimmed_mean", "statistical", "number", bind.one,
        (
            'What is the mean of "{a}" without its smallest and its largest value?',
            'Leave out one smallest and one largest value of "{a}". What is the mean of the rest?',
        ),
        'Mean of "{a}" without both ends.', 'df["{a}"].dropna().sort_values().iloc[1:-1].mean()',
        lambda f, s: float(np.mean(sorted(finite(f, s["a"]))[1:-1])),
        ("mean of all values", 'df["{a}"].mean()'),
        ('values = df["{a}"].dropna()\n(values.sum() - values.min() - values.max()) / (len(values) - 2)',),
    ),
    # ---- distribution
    Operation(
        "quartile_range", "distribution", "number", bind.one,
        ('What is the interquartile range of "{a}"?', 'How far apart are the 75th and the 25th percentile of "{a}"?'),
        'Third minus first quartile of "{a}".', 'df["{a}"].quantile(0.75) - df["{a}"].quantile(0.25)',
        lambda f, s: _quartiles(finite(f, s["a"]))[1] - _quartiles(finite(f, s["a"]))[0],
        ("whole range", 'df["{a}"].max() - df["{a}"].min()'),
        (
            'low, high = df["{a}"].quantile([0.25, 0.75])\nhigh - low',
            'np.subtract(*np.percentile(df["{a}"].dropna(), [75, 25]))',
        ),
    ),
    Operation(
        "skewness", "distribution", "number", bind.one,
        ('How skewed is "{a}"? Give its skewness.', 'What is the (adjusted) skewness of "{a}"?'),
        'Skewness of "{a}".', 'df["{a}"].skew()',
        lambda f, s: skewness(finite(f, s["a"])),
        ("kurtosis", 'df["{a}"].kurt()'),
    ),
    Operation(
        "share_between", "distribution", "number", bind.interval,
        (
            'What percentage of rows have "{a}" from {v} to {w}, both included?',
            'In what percent of all rows is "{a}" at least {v} and at most {w}?',
        ),
        'Percentage of rows with {v} <= "{a}" <= {w}.', 'df["{a}"].between({v}, {w}).mean() * 100',
        lambda f, s: 100.0 * sum(s["value"] <= x <= s["high"] for x in finite(f, s["a"])) / len(f),
        ("number of such rows", 'df["{a}"].between({v}, {w}).sum()'),
        ('inside = (df["{a}"] >= {v}) & (df["{a}"] <= {w})\n100 * inside.sum() / len(df)',),
    ),
    Operation(
        "share_over_mean", "distribution", "number", bind.apart_from_mean,
        (
            'What percentage of the values of "{a}" lie above their mean?',
            'Of the values of "{a}", how many percent exceed the average?',
        ),
        'Percentage of values of "{a}" above the mean.',
        '100 * (df["{a}"] > df["{a}"].mean()).sum() / df["{a}"].count()',
        lambda f, s: 100.0 * number_above_mean(finite(f, s["a"])) / len(finite(f, s["a"])),
        ("number of such values", '(df["{a}"] > df["{a}"].mean()).sum()'),
        ('values = df["{a}"].dropna()\n(values > values.mean()).mean() * 100',),
    ),
    # ---- anomaly detection
    Operation(
        "low_outliers", "anomaly detection", "count", bind.low_outlier,
        (
            'How many values of "{a}" lie more than {k} standard deviations below the mean?',
            'Count the values of "{a}" under the mean minus {k} standard deviations.',
        ),
        'Count "{a}" < mean - {k} std.', '(df["{a}"] < df["{a}"].mean() - {k} * df["{a}"].std()).sum()',
        lambda f, s: sum(value < s["limit"] for value in finite(f, s["a"])),
        ("number of values below the mean", '(df["{a}"] < df["{a}"].mean()).sum()'),
        ('limit = df["{a}"].mean() - {k} * df["{a}"].std()\nlen(df[df["{a}"] < limit])',),
    ),
    Operation(
        "beyond_fences", "anomaly detection", "count", bind.fenced,
        (
            'How many values of "{a}" lie more than 1.5 interquartile ranges below the first or above the third '
            "quartile?",
            'By the 1.5 IQR rule, how many outliers does "{a}" have?',
        ),
        'Count the values of "{a}" outside the fences of a box plot.',
        'q1, q3 = df["{a}"].quantile([0.25, 0.75])\n'
        '((df["{a}"] < q1 - 1.5 * (q3 - q1)) | (df["{a}"] > q3 + 1.5 * (q3 - q1))).sum()',
        lambda f, s: _beyond_fences(finite(f, s["a"])),
        (
            "number of values outside the quartiles",
            '((df["{a}"] < df["{a}"].quantile(0.25)) | (df["{a}"] > df["{a}"].quantile(0.75))).sum()',
        ),
        (
            'q1 = df["{a}"].quantile(0.25)\nq3 = df["{a}"].quantile(0.75)\niqr = q3 - q1\n'
            'len(df[(df["{a}"] < q1 - 1.5 * iqr) | (df["{a}"] > q3 + 1.5 * iqr)])',
        ),
    ),
    Operation(
        "largest_z", "anomaly detection", "number", bind.one,
        (
            'How many standard deviations above the mean is the largest "{a}"?',
            'What is the z-score of the maximum of "{a}"?',
        ),
        'z-score of the maximum of "{a}".', '(df["{a}"].max() - df["{a}"].mean()) / df["{a}"].std()',
        lambda f, s: (max(finite(f, s["a"])) - float(np.mean(finite(f, s["a"])))) / deviation(finite(f, s["a"])),
        ("distance of the maximum from the mean", 'df["{a}"].max() - df["{a}"].mean()'),
        ('z = (df["{a}"] - df["{a}"].mean()) / df["{a}"].std()\nz.max()',),
    ),
    Operation(
        "farthest", "anomaly detection", "number", bind.farthest,
        (
            'Which value of "{a}" is farthest from the mean?',
            'What is the most unusual "{a}", the one farthest from the average?',
        ),
        'Value of "{a}" farthest from its mean.', 'df.loc[(df["{a}"] - df["{a}"].mean()).abs().idxmax(), "{a}"]',
        lambda f, s: _farthest(finite(f, s["a"])),
        ("largest distance itself", '(df["{a}"] - df["{a}"].mean()).abs().max()'),
        ('distance = (df["{a}"] - df["{a}"].mean()).abs()\ndf["{a}"][distance.idxmax()]',),
    ),
    # ---- data preprocessing
    Operation(
        "missing_share", "data preprocessing", "number", bind.gap_column,
        ('What percentage of "{a}" is missing?', 'In how many percent of the rows is there no "{a}"?'),
        'Percentage of missing "{a}".', 'df["{a}"].isna().mean() * 100',
        lambda f, s: 100.0 * int(np.isnan(column(f, s["a"])).sum()) / len(f),
        ("number of missing values", 'df["{a}"].isna().sum()'),
        ('100 * df["{a}"].isnull().sum() / len(df)', '100 * (1 - df["{a}"].count() / len(df))'),
    ),
    Operation(
        "complete_rows", "data preprocessing", "count", bind.gaps_somewhere,
        ("How many rows have no missing value at all?", "Drop every row with a gap. How many rows are left?"),
        "Count the rows without missing values.", "len(df.dropna())",
        lambda f,
        s: sum(all(x == x and x is not None for x in row) for row in zip(*(f[c].tolist() for c in f), strict=True)),
        ("number of rows with a gap", "df.isna().any(axis=1).sum()"),
        ("df.notna().all(axis=1).sum()", "df.dropna().shape[0]"),
    ),
    Operation(
        "columns_with_gaps", "data preprocessing", "count", bind.gaps_somewhere,
        ("How many columns have missing values?", "In how many columns is at least one value missing?"),
        "Count the columns with missing values.", "df.isna().any().sum()",
        lambda f, s: sum(any(x != x or x is None for x in f[c].tolist()) for c in f),
        ("number of missing values", "df.isna().sum().sum()"),
        ("gaps = df.isna().sum()\n(gaps > 0).sum()",),
    ),
    Operation(
        "filled_mean", "data preprocessing", "number", bind.gap_column,
        (
            'Fill the gaps of "{a}" with its median. What is its mean then?',
            'What is the mean of "{a}" after missing values are replaced by the median?',
        ),
        'Fill "{a}" with its median, then the mean.', 'df["{a}"].fillna(df["{a}"].median()).mean()',
        lambda f, s: float(np.mean(_filled(column(f, s["a"]), median(finite(f, s["a"]))))),
        ("mean after filling with 0", 'df["{a}"].fillna(0).mean()'),
        ('filled = df["{a}"].fillna(df["{a}"].median())\nfilled.mean()',),
    ),
    Operation(
        "where_missing", "data preprocessing", "number", bind.two_gappy,
        ('What is the mean of "{b}" in the rows where "{a}" is missing?', 'Average "{b}" over the rows without "{a}".'),
        'Mean of "{b}" where "{a}" is missing.', 'df[df["{a}"].isna()]["{b}"].mean()',
        lambda f, s: float(np.mean(present(column(f, s["b"])[np.isnan(column(f, s["a"]))]))),
        ("mean where it is present", 'df[df["{a}"].notna()]["{b}"].mean()'),
        ('df.loc[df["{a}"].isnull(), "{b}"].mean()', 'gaps = df["{a}"].isna()\ndf["{b}"][gaps].mean()'),
    ),
    Operation(
        "clipped_mean", "data preprocessing", "number", bind.threshold,
        (
            'Cap "{a}" at {v}: larger values become {v}. What is the mean then?',
            'What is the mean of "{a}" after values above {v} are set to {v}?',
        ),
        'Mean of "{a}" capped at {v}.', 'df["{a}"].clip(upper={v}).mean()',
        lambda f, s: float(np.mean([min(x, s["value"]) for x in finite(f, s["a"])])),
        ("mean of the values up to the cap", 'df[df["{a}"] <= {v}]["{a}"].mean()'),
        ('capped = df["{a}"].clip(upper={v})\ncapped.mean()', 'np.minimum(df["{a}"], {v}).mean()'),
    ),
    Operation(
        "scaled_mean", "data preprocessing", "number", bind.one,
        (
            'Scale "{a}" to the range from 0 to 1. What is its mean then?',
            'What is the mean of "{a}" after min-max scaling?',
        ),
        'Mean of "{a}" scaled to 0 to 1.',
        '((df["{a}"] - df["{a}"].min()) / (df["{a}"].max() - df["{a}"].min())).mean()',
        lambda f, s: (float(np.mean(finite(f, s["a"]))) - min(finite(f, s["a"]))) / float(np.ptp(finite(f, s["a"]))),
        ("mean by the maximum", '(df["{a}"] / df["{a}"].max()).mean()'),
        ('low, high = df["{a}"].min(), df["{a}"].max()\nscaled = (df["{a}"] - low) / (high - low)\nscaled.mean()',),
    ),
    # ---- domain specific
    Operation(
        "variation", "domain specific", "number", bind.positive,
        (
            'What is the coefficient of variation of "{a}", in percent?',
            'Quality control wants the relative spread of "{a}": standard deviation by mean, in percent. What is it?',
        ),
        'Standard deviation of "{a}" in percent of its mean.', '100 * df["{a}"].std() / df["{a}"].mean()',
        lambda f, s: 100 * deviation(finite(f, s["a"])) / float(np.mean(finite(f, s["a"]))),
        ("standard deviation", 'df["{a}"].std()'),
        ('mean, std = df["{a}"].mean(), df["{a}"].std()\nstd / mean * 100',),
    ),
    Operation(
        "gini", "domain specific", "number", bind.positive,
        (
            'How unequally is "{a}" spread over the rows? Give the Gini coefficient.',
            'What is the Gini coefficient of "{a}" (mean absolute difference of all pairs by twice the mean)?',
        ),
        'Gini coefficient of "{a}".',
        'x = df["{a}"].dropna().to_numpy()\nnp.abs(x[:, None] - x).mean() / (2 * x.mean())',
        lambda f, s: _gini(finite(f, s["a"])),
        ("coefficient of variation", 'df["{a}"].std() / df["{a}"].mean()'),
        (
            'x = np.sort(df["{a}"].dropna())\nn = len(x)\n'
            '(2 * np.arange(1, n + 1) - n - 1).dot(x) / (n * x.sum())',
        ),
    ),
    Operation(
        "concentration", "domain specific", "number", bind.positive,
        (
            'Take each row as a firm with sales "{a}". What is the Herfindahl index, the sum of the squared shares?',
            'How concentrated is "{a}"? Give the Herfindahl index of the shares of the rows.',
        ),
        'Sum of the squared shares of "{a}".', '((df["{a}"] / df["{a}"].sum()) ** 2).sum()',
        lambda f, s: math.fsum(x * x for x in finite(f, s["a"])) / math.fsum(finite(f, s["a"])) ** 2,
        ("largest share", '(df["{a}"] / df["{a}"].sum()).max()'),
        ('shares = df["{a}"] / df["{a}"].sum()\n(shares**2).sum()',),
    ),
    Operation(
        "geometric_mean", "domain specific", "number", bind.positive,
        (
            'What is the geometric mean of "{a}"?',
            'Growth factors are averaged geometrically. What is the geometric mean of "{a}"?',
        ),
        'Geometric mean of "{a}".', 'np.exp(np.log(df["{a}"]).mean())',
        lambda f, s: math.exp(math.fsum(map(math.log, finite(f, s["a"]))) / len(finite(f, s["a"]))),
        ("arithmetic mean", 'df["{a}"].mean()'),
        ('logs = np.log(df["{a}"].dropna())\nnp.exp(logs.mean())',),
    ),
    Operation(
        "root_mean_square", "domain specific", "number", bind.one,
        ('What is the root mean square of "{a}"?', 'As an engineer would for a signal, give the RMS of "{a}".'),
        'Root of the mean square of "{a}".', '(df["{a}"] ** 2).mean() ** 0.5',
        lambda f, s: math.sqrt(math.fsum(x * x for x in finite(f, s["a"])) / len(finite(f, s["a"]))),
        ("mean square, without the root", '(df["{a}"] ** 2).mean()'),
        ('np.sqrt(np.mean(df["{a}"] ** 2))',),
    ),
    Operation(
        "top_tenth", "domain specific", "number", bind.pareto,
        (
            'What percentage of the total "{a}" do the {n} largest rows make up?',
            'Pareto analysis: how many percent of all "{a}" fall on the top {n} rows?',
        ),
        'Share of the {n} largest in the sum of "{a}".', '100 * df["{a}"].nlargest({n}).sum() / df["{a}"].sum()',
        lambda f, s: 100 * math.fsum(sorted(finite(f, s["a"]))[-s["n"] :]) / math.fsum(finite(f, s["a"])),
        ("sum of the largest", 'df["{a}"].nlargest({n}).sum()'),
        ('top = df["{a}"].sort_values(ascending=False).head({n})\ntop.sum() / df["{a}"].sum() * 100',),
    ),
    # ---- feature engineering
    Operation(
        "binned", "feature engineering", "count", bind.apart_from_mean,
        (
            'Make a flag that is 1 where "{a}" is above its mean and 0 elsewhere. What is the sum of the flag?',
            'A new column says whether "{a}" exceeds its average. In how many rows is it true?',
        ),
        'Flag the rows with "{a}" above its mean and add up.', '(df["{a}"] > df["{a}"].mean()).sum()',
        lambda f, s: number_above_mean(finite(f, s["a"])),
        ("number of rows at or below", '(df["{a}"] <= df["{a}"].mean()).sum()'),
        ('df["flag"] = (df["{a}"] > df["{a}"].mean()).astype(int)\ndf["flag"].sum()',),
    ),
    Operation(
        "log_mean", "feature engineering", "number", bind.positive,
        (
            'Add a column with the natural logarithm of "{a}". What is its mean?',
            'What is the mean of the natural log of "{a}"?',
        ),
        'Mean of the logarithm of "{a}".', 'np.log(df["{a}"]).mean()',
        lambda f, s: math.fsum(map(math.log, finite(f, s["a"]))) / len(finite(f, s["a"])),
        ("logarithm of the mean", 'np.log(df["{a}"].mean())'),
        ('df["log"] = np.log(df["{a}"])\ndf["log"].mean()',),
    ),
    Operation(
        "ratio_median", "feature engineering", "number", bind.two_positive,
        (
            'Make a new column "{a}" divided by "{b}". What is its median?',
            'What is the median of the ratio of "{a}" to "{b}", row by row?',
        ),
        'Median of "{a}" / "{b}".', '(df["{a}"] / df["{b}"]).median()',
        lambda f, s: median(np.divide(*paired(f, s["a"], s["b"]))),
        ("mean of the ratio", '(df["{a}"] / df["{b}"]).mean()'),
        ('df["ratio"] = df["{a}"] / df["{b}"]\ndf["ratio"].median()', 'df["{a}"].div(df["{b}"]).median()'),
    ),
    Operation(
        "difference_spread", "feature engineering", "number", bind.two,
        (
            'Make a new column "{a}" minus "{b}". What is its standard deviation?',
            'How much does the row-wise difference "{a}" minus "{b}" vary (standard deviation)?',
        ),
        'Standard deviation of "{a}" - "{b}".', '(df["{a}"] - df["{b}"]).std()',
        lambda f, s: deviation(np.subtract(*paired(f, s["a"], s["b"]))),
        ("mean of the difference", '(df["{a}"] - df["{b}"]).mean()'),
        ('difference = df["{a}"] - df["{b}"]\ndifference.std()', 'df["{a}"].sub(df["{b}"]).std()'),
    ),
)  # fmt: skip
