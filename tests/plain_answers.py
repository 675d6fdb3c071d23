"""A second computation of answers: it reads the text of a question and loops over the rows of the file.

Neither pandas nor numpy, nothing of `data` but the wordings, which say what a text asks.
"""

import csv
import io
import math
import re
import statistics
from collections import Counter

NAMES = dict.fromkeys("abcglt", r'[^"]+')
PATTERNS = {"v": r'"[^"]*"|-?[\d.]+', "w": r'"[^"]*"|-?[\d.]+', "nth": r"\w+", "list": r".+"}
ORDER = {"2nd": 2, "3rd": 3, "4th": 4, "5th": 5}


def read_rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def read_slots(operation, text):
    """The slots that a text fills in one of the wordings, as texts; None where it fits none of them."""
    for wording in operation.wordings:
        pieces, seen = re.split(r"\{(\w+)\}", wording), set()
        pattern = ""
        for index, piece in enumerate(pieces):
            if index % 2 == 0:
                pattern += re.escape(piece)
            elif piece in seen:
                pattern += f"(?P={piece})"
            else:
                seen.add(piece)
                pattern += f"(?P<{piece}>{NAMES.get(piece) or PATTERNS.get(piece, '[0-9]+')})"
        if found := re.fullmatch(pattern, text):
            return found.groupdict()
    return None


def number(text):
    return float(text) if text not in ("", None) else None


def values(rows, name):
    return [number(row[name]) for row in rows if row[name] != ""]


def pairs(rows, a, b):
    return [(number(row[a]), number(row[b])) for row in rows if row[a] != "" and row[b] != ""]


def same(cell, value):
    """Whether a cell is the value that a question names, a text in quotes or a number."""
    if value.startswith('"'):
        return cell == value.strip('"')
    return cell != "" and cell.replace("-", "", 1).replace(".", "", 1).isdigit() and float(cell) == float(value)


def where(rows, name, value):
    return [row for row in rows if same(row[name], value)]


def above(rows, name, limit):
    return [row for row in rows if row[name] != "" and float(row[name]) > float(limit)]


def between(rows, name, low, high):
    return [row for row in rows if row[name] != "" and float(low) <= float(row[name]) <= float(high)]


def quantile(items, share):
    items = sorted(items)
    place = share * (len(items) - 1)
    low = int(place)
    high = min(low + 1, len(items) - 1)
    return items[low] + (items[high] - items[low]) * (place - low)


def covariance(points):
    x, y = statistics.fmean(p[0] for p in points), statistics.fmean(p[1] for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / (len(points) - 1)


def pearson(points):
    spread = covariance([(p[0], p[0]) for p in points]) * covariance([(p[1], p[1]) for p in points])
    return covariance(points) / math.sqrt(spread)


def slope(points):
    """Of the second on the first."""
    return covariance(points) / covariance([(p[0], p[0]) for p in points])


def by_group(rows, g, a):
    groups = {}
    for row in rows:
        if row[g] != "" and row[a] != "":
            groups.setdefault(row[g], []).append(float(row[a]))
    return {level: statistics.fmean(items) for level, items in groups.items()}


def partial(rows, s):
    a, b, c = ([float(row[s[key]]) for row in rows] for key in "abc")
    ab, ac, bc = (pearson(list(zip(x, y, strict=True))) for x, y in ((a, b), (a, c), (b, c)))
    return (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))


def adjusted(rows, s):
    """Cramer's rule on the normal equations of two regressors."""
    a, b, c = ([float(row[s[key]]) for row in rows] for key in "abc")
    aa, cc, ac, ab, cb = (covariance(list(zip(x, y, strict=True))) for x, y in ((a, a), (c, c), (a, c), (a, b), (c, b)))
    return (ab * cc - cb * ac) / (aa * cc - ac**2)


def at(rows, s, key):
    return float(where(rows, s["t"], s[key])[0][s["a"]])


def mean(rows, name):
    return statistics.fmean(values(rows, name))


def verdict(truth):
    return "yes" if truth else "no"


def top(rows, a):
    return sorted((row for row in rows if row[a] != ""), key=lambda row: -float(row[a]))


PLAIN = {
    "mean": lambda r, s: mean(r, s["a"]),
    "total": lambda r, s: math.fsum(values(r, s["a"])),
    "total_above": lambda r, s: math.fsum(values(above(r, s["b"], s["v"]), s["a"])),
    "group_total": lambda r, s: math.fsum(values(where(r, s["g"], s["v"]), s["a"])),
    "largest": lambda r, s: max(values(r, s["a"])),
    "smallest": lambda r, s: min(values(r, s["a"])),
    "in_row": lambda r, s: number(r[ORDER[s["nth"]] - 1][s["a"]]),
    "most_common": lambda r, s: Counter(row[s["g"]] for row in r if row[s["g"]]).most_common(1)[0][0],
    "median": lambda r, s: statistics.median(values(r, s["a"])),
    "deviation": lambda r, s: statistics.stdev(values(r, s["a"])),
    "variance": lambda r, s: statistics.variance(values(r, s["a"])),
    "count_above": lambda r, s: len(above(r, s["a"], s["v"])),
    "count_between": lambda r, s: len(between(r, s["a"], s["v"], s["w"])),
    "count_both": lambda r, s: len(above(where(r, s["g"], s["v"]), s["a"], s["w"])),
    "missing": lambda r, s: sum(row[s["a"]] == "" for row in r),
    "complete_rows": lambda r, s: sum(all(row.values()) for row in r),
    "clipped_mean": lambda r, s: statistics.fmean(min(x, float(s["v"])) for x in values(r, s["a"])),
    "percentile": lambda r, s: quantile(values(r, s["a"]), int(s["p"]) / 100),
    "quartile_range": lambda r, s: quantile(values(r, s["a"]), 0.75) - quantile(values(r, s["a"]), 0.25),
    "share_above": lambda r, s: 100 * len(above(r, s["a"], s["v"])) / len(r),
    "nth_largest": lambda r, s: sorted(values(r, s["a"]))[-ORDER[s["nth"]]],
    "nth_label": lambda r, s: top(r, s["a"])[ORDER[s["nth"]] - 1][s["l"]],
    "rank_of": lambda r, s: [same(row[s["l"]], s["v"]) for row in top(r, s["a"])].index(True) + 1,
    "larger_mean": lambda r, s: max((s["a"], s["b"]), key=lambda name: mean(r, name)),
    "top_group": lambda r, s: max((m := by_group(r, s["g"], s["a"])), key=m.get),
    "bottom_group": lambda r, s: min((m := by_group(r, s["g"], s["a"])), key=m.get),
    "mean_exceeds": lambda r, s: verdict(mean(r, s["a"]) > float(s["v"])),
    "any_row": lambda r, s: verdict(above(where(r, s["g"], s["v"]), s["a"], s["w"])),
    "majority": lambda r, s: verdict(2 * len(above(r, s["a"], s["v"])) > len(r)),
    "correlation": lambda r, s: pearson(pairs(r, s["a"], s["b"])),
    "covariance": lambda r, s: covariance(pairs(r, s["a"], s["b"])),
    "group_correlation": lambda r, s: pearson(pairs(where(r, s["g"], s["v"]), s["a"], s["b"])),
    "outliers": lambda r, s: sum(
        x > mean(r, s["a"]) + int(s["k"]) * statistics.stdev(values(r, s["a"])) for x in values(r, s["a"])
    ),
    "low_outliers": lambda r, s: sum(
        x < mean(r, s["a"]) - int(s["k"]) * statistics.stdev(values(r, s["a"])) for x in values(r, s["a"])
    ),
    "farthest": lambda r, s: max(values(r, s["a"]), key=lambda x: abs(x - mean(r, s["a"]))),
    "slope": lambda r, s: slope(pairs(r, s["a"], s["b"])),
    "trend": lambda r, s: slope(pairs(r, s["t"], s["a"])),
    "group_lift": lambda r, s: mean(where(r, s["g"], s["v"]), s["a"]) - mean(r, s["a"]),
    "difference_in_means": lambda r, s: (
        mean(where(r, s["g"], s["v"]), s["a"]) - mean([row for row in r if not same(row[s["g"]], s["v"])], s["a"])
    ),
    "adjusted_slope": adjusted,
    "partial_correlation": partial,
    "mean_above": lambda r, s: mean(above(r, s["b"], s["v"]), s["a"]),
    "mean_group": lambda r, s: mean(where(r, s["g"], s["v"]), s["a"]),
    "mean_of_top": lambda r, s: mean(top(r, s["b"])[: int(s["n"])], s["a"]),
    "mean_gap": lambda r, s: mean(r, s["a"]) - mean(r, s["b"]),
    "weighted_mean": lambda r, s: (
        sum(a * b for a, b in pairs(r, s["a"], s["b"])) / sum(b for _, b in pairs(r, s["a"], s["b"]))
    ),
    "mean_product": lambda r, s: statistics.fmean(a * b for a, b in pairs(r, s["a"], s["b"])),
    "ratio_median": lambda r, s: statistics.median(a / b for a, b in pairs(r, s["a"], s["b"])),
    "in_year": lambda r, s: at(r, s, "v"),
    "mean_since": lambda r, s: mean(above(r, s["t"], s["v"]), s["a"]),
    "change": lambda r, s: at(r, s, "w") - at(r, s, "v"),
    "growth": lambda r, s: 100 * (at(r, s, "w") / at(r, s, "v") - 1),
    "variation": lambda r, s: 100 * statistics.stdev(values(r, s["a"])) / mean(r, s["a"]),
    "geometric_mean": lambda r, s: statistics.geometric_mean(values(r, s["a"])),
    "gini": lambda r, s: (
        sum(abs(x - y) for x in values(r, s["a"]) for y in values(r, s["a"]))
        / (2 * len(values(r, s["a"])) * sum(values(r, s["a"])))
    ),
    "yearly_growth": lambda r, s: 100 * ((at(r, s, "w") / at(r, s, "v")) ** (1 / (int(s["w"]) - int(s["v"]))) - 1),
}


# ---- composed questions ----------------------------------------------------------------------------------------------

ONE = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "25th percentile": lambda items: quantile(items, 0.25),
    "75th percentile": lambda items: quantile(items, 0.75),
    "sum": math.fsum,
    "standard deviation": statistics.stdev,
    "largest": max,
    "smallest": min,
    "range (largest minus smallest)": lambda items: max(items) - min(items),
    "number of values": lambda items: sum(x > statistics.fmean(items) + statistics.stdev(items) for x in items),
}


def composed(text, rows):
    """The answer of a question in "Let x be ..." or in "Step 1: find ..." form."""
    results, chosen = {}, rows
    if text.startswith("Let "):
        parts = [part.removeprefix("Let ") for part in re.split(r"\. (?=[A-Z])", text)]
        parts = [part.partition(" be ")[::2] for part in parts[:-1]] + [("", parts[-1])]
    else:
        parts = re.split(r"(?:^|\. )Step \d+: ", text)[1:]
        parts = [(f"the result of step {index}", part.removeprefix("find ")) for index, part in enumerate(parts, 1)]
    for name, noun in parts:
        noun = re.sub(r"^(?:What is |Give |Find |How many )(?!out)", "", noun).rstrip(".?")
        result, chosen = _round(noun, rows, chosen, results)
        results[name] = result
    return results[parts[-1][0]]


def _round(noun, rows, chosen, results):
    if found := re.fullmatch(r"(?:Is it true that|Find out whether) (.+) is larger than (.+?)(?:: yes or no)?", noun):
        return verdict(results[found[1]] > results[found[2]]), chosen
    for sign, compute in (("minus", lambda x, y: x - y), ("divided by", lambda x, y: x / y)):
        one, between, other = noun.partition(f" {sign} ")
        if between and one in results:
            return compute(results[one], results[other]), chosen
    noun, test, rest = _condition(noun)
    if test:
        within = chosen if rest == " among those chosen before" else rows
        chosen = [row for row in within if _meets(row, *test, results)]
    else:
        chosen = rows
    return _number(noun, chosen, rows), chosen


def _condition(noun):
    """The noun without its selection, and the selection as column, word and what it is compared with."""
    found = re.fullmatch(
        r'(.*?)rows with "([^"]+)" (above|below|after|before|equal to) (.+?)( among those chosen before)?( are there)?',
        noun,
    )
    return (found[1], found.group(2, 3, 4), found[5] or "") if found else (noun, None, "")


def _meets(row, name, word, ref, results):
    if word == "equal to":
        return row[name] == results[ref]
    if row[name] == "":
        return False
    value, limit = float(row[name]), float(results[ref])
    return value > limit if word in ("above", "after") else value < limit


def _number(noun, chosen, rows):
    if noun in ("", "the number of "):
        return len(chosen)
    if noun == "the percentage of all rows that are ":
        return 100 * len(chosen) / len(rows)
    noun = re.sub(r" (?:over|among) the $", "", noun)
    if found := re.fullmatch(r'the "([^"]+)" with the (highest|lowest) mean of "([^"]+)"', noun):
        means = by_group(chosen, found[1], found[3])
        return (max if found[2] == "highest" else min)(means, key=means.get)
    if found := re.fullmatch(r'the "([^"]+)" of the row with the (largest|smallest) "([^"]+)"', noun):
        end = max if found[2] == "largest" else min
        return end((row for row in chosen if row[found[3]] != ""), key=lambda row: float(row[found[3]]))[found[1]]
    if found := re.fullmatch(r'the correlation between "([^"]+)" and "([^"]+)"', noun):
        return pearson(pairs(chosen, found[1], found[2]))
    if found := re.fullmatch(r'the slope of a linear regression of "([^"]+)" on "([^"]+)"', noun):
        return slope(pairs(chosen, found[2], found[1]))
    if found := re.fullmatch(r'the mean of a new column "([^"]+)" times "([^"]+)"', noun):
        return statistics.fmean(a * b for a, b in pairs(chosen, found[1], found[2]))
    found = re.fullmatch(r'the (.+?)(?: of)? "([^"]+)"(?: more than one standard deviation above their mean)?', noun)
    return ONE[found[1]](values(chosen, found[2]))
