"""Questions in several rounds: the answer of each is the input of the next (DataMind's recursive composition).

A round is a number, a group or a year about some rows: all of them at first, later those that the answer before selects
("above x", "equal to x", "after x"). Chains that become degenerate are not asked: too few rows, a value that is
undefined or at the edge of its own condition, a group or year that shares its place with another. The type of a
composed question is that of its last round, so that composing does not change how often a type comes up.

In the templates here `{x0}`, `{x1}`, ... stand for the answers of the rounds; no column's name has a brace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import numpy as np

from ..views import View
from .arithmetic import Mask, Numbers, column, correlation, deviation, present
from .composed_measures import COLUMN_MEASURES, PAIR_MEASURES
from .questions import Question, Step, printed, spoken

MIN_ROWS = 4  # in a selection
MARGIN = 0.01  # between numbers that are compared, as a share of the larger
NAMES = (("x", "y", "z", "u", "w"), ("p", "q", "r", "s", "t"), ("first", "second", "third", "fourth", "fifth"))
LETTERS = 2  # of these, those that may stand in a question
COMPARED = ("difference", "ratio", "check")  # rounds about two answers before
Value = float | int | str | bool


_THRESHOLDS = ("mean", "median", "low", "high")
# How the last round of each type may go; names of measures, or of a kind of round.
_ENDS: dict[str, tuple[str, ...]] = {
    "aggregation": ("mean", "total"),
    "anomaly detection": ("high values",),
    "arithmetic": ("difference", "ratio"),
    "comparison": ("group",),
    "correlation": ("correlation",),
    "counting": ("count",),
    "descriptive": ("largest", "smallest", "range"),
    "distribution": ("share", "low", "high"),
    "fact checking": ("check",),
    "feature engineering": ("product",),
    "impact": ("slope",),
    "multi-hop numerical": ("at peak",),
    "ranking": ("label",),
    "statistical": ("median", "deviation"),
    "time-based calculation": ("since",),
}


@dataclass(frozen=True)
class _Rows:
    """A selection: its rows, what it is called in words and in code, the line that makes it, and a wrong one or ""."""

    mask: Mask
    words: str
    name: str
    line: str
    wrong: str


@dataclass(frozen=True)
class _Round:
    """One round; `test` is the column that its answer is compared with by the next one, and `kind` how."""

    noun: str
    value: Value
    shape: str
    forms: tuple[str, ...]
    slips: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: _Rows | None = None
    kind: str = ""
    test: str = ""


class _Dead(Exception):
    """The chain cannot go on with what was drawn."""


class _Chain:
    """A chain in the making; its methods draw a round each and raise _Dead where the view does not allow it."""

    def __init__(self, view: View, rng: Random) -> None:
        self.view, self.rng = view, rng
        self.rounds: list[_Round] = []

    def pick(self, names: tuple[str, ...], but: tuple[str, ...] = ()) -> str:
        names = tuple(name for name in names if name not in but)
        if not names:
            raise _Dead
        return self.rng.choice(names)

    def select(self) -> _Rows | None:
        """The rows that the last answer selects, of all rows or of those it was about; None before any answer."""
        if not self.rounds:
            return None
        index, last, frame = len(self.rounds) - 1, self.rounds[-1], self.view.frame
        word = self.rng.choice(("above", "below"))
        sign, wrong = (">", "<") if word == "above" else ("<", ">")
        if last.kind == "group":
            word, sign, wrong = "equal to", "==", "!="
            mask = np.array([item == last.value for item in frame[last.test].tolist()], dtype=bool)
        else:
            values = column(frame, last.test)
            mask = values > float(last.value) if word == "above" else values < float(last.value)
            word = {"year": {"above": "after", "below": "before"}[word]}.get(last.kind, word)
        words, base, name = f'rows with "{last.test}" {word} {{x{index}}}', "df", f"rows_{len(self.rounds) + 1}"
        within = np.ones(len(frame), dtype=bool)
        if last.rows is not None and self.rng.random() < 0.35:
            within, base, words = last.rows.mask, last.rows.name, f"{words} among those chosen before"
        mask = mask & within
        if not MIN_ROWS <= mask.sum() < within.sum():
            raise _Dead
        line = f'{name} = {base}[{base}["{last.test}"] {{sign}} {{{{x{index}}}}}]'
        others = int((within & ~mask).sum())
        return _Rows(mask, words, name, line.format(sign=sign), line.format(sign=wrong) if others > MIN_ROWS else "")

    def add(
        self, noun: str, value: Value, shape: str, forms: tuple[str, ...], slips: tuple[tuple[str, str], ...],
        columns: tuple[str, ...], rows: _Rows | None, kind: str = "", test: str = "",
    ) -> None:  # fmt: skip
        """Add a round whose programs and slips are about the rows `{r}`."""
        name = rows.name if rows else "df"
        before = f"{rows.line}\n" if rows else ""
        forms = tuple(f"{before}{form.replace('{r}', name)}" for form in forms)
        wrong = [(what, f"{before}{slip.replace('{r}', name)}") for what, slip in slips]
        # Where the opposite rows are few, what is computed of them may be undefined.
        if rows and rows.wrong and not re.search("idx|polyfit|groupby|sort", forms[0]):
            wrong.append(("result for the opposite rows", forms[0].replace(rows.line, rows.wrong, 1)))
        self.rounds.append(_Round(noun, value, shape, forms, tuple(wrong), columns, rows, kind, test))

    def measure(self, name: str, rows: _Rows | None, b: str = "") -> None:
        """A number about one or two numeric columns."""
        frame, two = self.view.frame, name in PAIR_MEASURES
        measure = (PAIR_MEASURES if two else COLUMN_MEASURES)[name]
        numeric = self.view.roles.numeric
        b = b or self.pick(numeric)
        c = self.pick(numeric, (b,)) if two else ""
        mask = rows.mask if rows else np.ones(len(frame), dtype=bool)
        first = column(frame, b)[mask]
        if two:
            second = column(frame, c)[mask]
            both = ~(np.isnan(first) | np.isnan(second))
            # numpy and pandas leave out missing values in different ways.
            if both.sum() < MIN_ROWS + 1 or (name == "slope" and not both.all()):
                raise _Dead
            strength = correlation(first[both], second[both])
            value = measure.gold(first[both], second[both])
            if name != "product" and not 0.1 <= abs(strength) <= 1:
                raise _Dead
        else:
            first = present(first)
            if len(first) < MIN_ROWS:
                raise _Dead
            value = measure.gold(first)
            if name == "high values" and not self.clear_edge(first, float(np.mean(first)) + deviation(first)):
                raise _Dead
        clear = name in _THRESHOLDS and self.clear_edge(column(frame, b), value, exact=name == "median")
        words = {"b": b, "c": c, "r": "{r}"}
        self.add(
            measure.noun.format(**words) + (f" over the {rows.words}" if rows else ""), value, measure.shape,
            tuple(form.format(**words) for form in measure.forms),
            ((measure.slip[0], measure.slip[1].format(**words)),),
            (b, c) if two else (b,), rows, "number" if clear else "", b,
        )  # fmt: skip

    def clear_edge(self, values: Numbers, edge: float, exact: bool = False) -> bool:
        """Whether no value lies so near the edge that rounding decides; `exact` allows a value on it."""
        distance = np.abs(present(values) - edge)
        return bool(np.all((distance > 1e-9 * max(1.0, abs(edge))) | (exact & (distance == 0))))

    def group(self, rows: _Rows | None) -> None:
        """The group with the highest or the lowest mean."""
        frame = self.view.frame
        g = self.pick(self.view.roles.groups)
        a = self.pick(self.view.roles.numeric, (g,))
        sign, end, method = self.rng.choice(((1, "highest", "idxmax"), (-1, "lowest", "idxmin")))
        mask = rows.mask if rows else np.ones(len(frame), dtype=bool)
        members: dict[str | int, list[float]] = {}
        for level, value, inside in zip(frame[g].tolist(), column(frame, a).tolist(), mask.tolist(), strict=True):
            if inside and value == value and level == level and level is not None:
                members.setdefault(level, []).append(value)
        means = {level: float(np.mean(values)) for level, values in members.items()}
        order = sorted(means, key=lambda level: -sign * means[level])
        if len(order) < 2 or abs(means[order[0]] - means[order[1]]) <= 1e-6 * max(map(abs, means.values())):
            raise _Dead
        noun = f'the "{g}" with the {end} mean of "{a}"' + (f" over the {rows.words}" if rows else "")
        other = {"idxmax": "idxmin", "idxmin": "idxmax"}[method]
        self.add(
            noun, order[0], "choice",
            (f'{{r}}.groupby("{g}")["{a}"].mean().{method}()',
             f'{{r}}.groupby("{g}")["{a}"].mean().sort_values(ascending={sign < 0}).index[0]'),
            ((f'"{g}" at the other end', f'{{r}}.groupby("{g}")["{a}"].mean().{other}()'),),
            (a, g), rows, "group", g,
        )  # fmt: skip

    def peak(self, rows: _Rows | None, target: str, kind: str) -> None:
        """What a column holds in the row where a numeric one is largest or smallest."""
        frame = self.view.frame
        a = self.pick(self.view.roles.numeric, (target,))
        end, method, other = self.rng.choice((("largest", "idxmax", "idxmin"), ("smallest", "idxmin", "idxmax")))
        mask = rows.mask if rows else np.ones(len(frame), dtype=bool)
        values = np.where(mask, column(frame, a), np.nan)
        if np.isnan(values).all():
            raise _Dead
        best = np.nanmax(values) if end == "largest" else np.nanmin(values)
        found = np.flatnonzero(values == best)
        value = frame[target].tolist()[int(found[0])]
        if len(found) > 1 or value != value:
            raise _Dead
        noun = f'the "{target}" of the row with the {end} "{a}"' + (f" among the {rows.words}" if rows else "")
        self.add(
            noun, value, {"year": "count", "label": "choice"}.get(kind, "number"),
            (f'{{r}}.loc[{{r}}["{a}"].{method}(), "{target}"]',
             f'{{r}}.sort_values("{a}", ascending={end == "smallest"})["{target}"].iloc[0]'),
            ((f'"{target}" at the other end', f'{{r}}.loc[{{r}}["{a}"].{other}(), "{target}"]'),),
            (a, target), rows, kind, target,
        )  # fmt: skip

    def pivot(self, kind: str = "") -> None:
        """A round whose answer can select rows."""
        rows = self.select()
        roles = self.view.roles
        kinds = ["number"] * 3 + ["group"] * 2 * bool(roles.groups) + ["year"] * bool(roles.times)
        kind = kind or self.rng.choice(kinds)
        if kind == "number":
            self.measure(self.rng.choice(_THRESHOLDS), rows)
        elif kind == "group":
            self.group(rows)
        else:
            self.peak(rows, self.pick(roles.times), "year")
        if not self.rounds[-1].kind:
            raise _Dead

    def count(self, rows: _Rows | None, share: bool) -> None:
        """How many rows the last answer selects, or what percentage of all that is."""
        if rows is None:
            raise _Dead
        number, total = int(rows.mask.sum()), len(self.view.frame)
        if share:
            noun, forms = f"the percentage of all rows that are {rows.words}", ("100 * len({r}) / len(df)",)
            self.add(noun, 100 * number / total, "number", forms, (("number of rows", "len({r})"),), (), rows)
        else:
            slip = (("number of the other rows", "len(df) - len({r})"),)
            self.add(f"the number of {rows.words}", number, "count", ("len({r})", "{r}.shape[0]"), slip, (), rows)

    def compare(self, end: str) -> None:
        """The difference or the ratio of the last two numbers of one kind, or whether the last is larger."""
        last = len(self.rounds) - 1
        first = max(
            (index for index, one in enumerate(self.rounds[:-1]) if one.shape == "number" and one.kind != "year"),
            key=lambda index: (self.rounds[index].test == self.rounds[last].test, index), default=None,
        )  # fmt: skip
        if first is None or self.rounds[last].shape != "number":
            raise _Dead
        x, y = float(self.rounds[first].value), float(self.rounds[last].value)
        if abs(y - x) <= MARGIN * max(abs(x), abs(y)) or (end == "ratio" and x == 0):
            raise _Dead
        one, two = f"{{x{first}}}", f"{{x{last}}}"
        value: Value
        if end == "check":
            noun, form, slip, value = f"whether {two} is larger than {one}", f"{two} > {one}", f"{two} < {one}", y > x
        elif end == "difference":
            noun, form, slip, value = f"{two} minus {one}", f"{two} - {one}", f"{one} - {two}", y - x
        else:
            noun, form, slip, value = f"{two} divided by {one}", f"{two} / {one}", f"{one} / {two}", y / x
        shape = "check" if end == "check" else "number"
        self.add(noun, value, shape, (form,), (("result the wrong way round", slip),), (), None)

    def finish(self, end: str) -> None:
        """The last round."""
        if end in COMPARED:
            self.compare(end)
            return
        rows = self.select()
        if end in ("count", "share"):
            self.count(rows, share=end == "share")
        elif end == "group":
            self.group(rows)
        elif end == "label":
            self.peak(rows, self.pick(self.view.roles.labels), "label")
        elif end == "at peak":
            self.peak(rows, self.pick(self.view.roles.numeric), "")
        elif end == "since":
            self.measure(self.rng.choice(("mean", "median", "total", "largest")), rows)
        else:
            self.measure(end, rows)


@dataclass(frozen=True)
class Composition:
    """Questions in several rounds, the last of which is of `task_type`.

    Args:
        task_type: the type of the last round and of the question.
        rounds: the numbers of rounds that may be drawn.
    """

    task_type: str
    rounds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among operations and compositions."""
        return f"{self.task_type} in {' or '.join(map(str, self.rounds))} rounds"

    def ask(self, view: View, rng: Random) -> Question | None:
        """A question about `view`, or None if what was drawn is degenerate."""
        end, rounds = rng.choice(_ENDS[self.task_type]), rng.choice(self.rounds)
        chain = _Chain(view, rng)
        try:
            pivots = rounds - (2 if end in COMPARED else 1)
            for index in range(pivots):
                chain.pivot("year" if end == "since" and index == pivots - 1 else "")
            if end in COMPARED:
                # Two numbers of one column are worth comparing.
                known = [one.test for one in chain.rounds if one.kind == "number"]
                chain.measure("mean", chain.select(), rng.choice(known) if known else "")
            chain.finish(end)
        except _Dead:
            return None
        return _question(self, chain, rng)


def _question(composition: Composition, chain: _Chain, rng: Random) -> Question | None:
    rounds = chain.rounds
    answers = [spoken(one.value, one.shape) for one in rounds]
    if any(answer is None for answer in answers):
        return None
    texts = _wordings(rounds, rng)
    wording = rng.choice(sorted(texts))
    names, text = texts[wording]
    refs = {f"x{index}": name for index, name in enumerate(names)}
    steps = tuple(
        Step(
            thought=_upper(one.noun.format(**refs)) + ".",
            name=name,
            forms=tuple(form.format(**refs) for form in one.forms),
            shape=one.shape,
            answer=str(answer),
            slips=tuple((what, slip.format(**refs)) for what, slip in one.slips),
            columns=one.columns or rounds[index - 1].columns,
        )
        for index, (one, name, answer) in enumerate(zip(rounds, names, answers, strict=True))
    )
    last, before = steps[-1], "".join(f"{assigned(step)}\n" for step in steps[:-1])
    what, wrong = last.slips[0]
    return Question(
        operation=composition.name,
        task_type=composition.task_type,
        wording=wording,
        text=text,
        answer=last.answer,
        answer_type="number" if last.shape in ("number", "count") else "choice",
        thought=steps[0].thought,
        code=before + printed(last.forms[0], last.shape),
        slip=(what, before + printed(wrong, last.shape)),
        columns=tuple(dict.fromkeys(name for step in steps for name in step.columns)),
        steps=steps,
        asked="; ".join(one.noun for one in rounds),
    )


def assigned(step: Step) -> str:
    """The first program of a step, its result assigned to the step's name."""
    before, newline, expression = step.forms[0].rpartition("\n")
    return f"{before}{newline}{step.name} = {expression}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _wordings(rounds: list[_Round], rng: Random) -> dict[int, tuple[tuple[str, ...], str]]:
    """The question in each wording that suits it, by number, with the names of the answers that it uses."""
    count, last = len(rounds), len(rounds) - 1
    nouns = [one.noun for one in rounds]
    used = [{int(index) for index in re.findall(r"\{x(\d)\}", noun)} for noun in nouns]
    straight = all(indices <= {index - 1} for index, indices in enumerate(used))

    def fill(noun: str, refs: list[str]) -> str:
        return noun.format(**{f"x{index}": ref for index, ref in enumerate(refs)})

    letters = rng.choice(NAMES[:LETTERS])[:count]
    lets = " ".join(f"Let {letters[index]} be {fill(nouns[index], list(letters))}." for index in range(last))
    found = {0: (letters, f"{lets} {_ask(fill(nouns[last], list(letters)), rng)}")}
    names = rng.choice(NAMES)[:count]
    results = [f"the result of step {index + 1}" for index in range(count)]
    steps = " ".join(f"Step {index + 1}: find {fill(nouns[index], results)}." for index in range(last))
    found[1] = names, f"{steps} Step {count}: {_ask(fill(nouns[last], results), rng)}"
    if straight:
        that = ["that value"] * count
        finds = " ".join(f"{'Then' if index else 'First'} find {fill(nouns[index], that)}." for index in range(last))
        found[2] = names, f"{finds} {_ask(fill(nouns[last], that), rng)}"
    if straight and count <= 3 and not any("chosen before" in noun for noun in nouns):
        refs: list[str] = []
        for noun in nouns:
            refs.append(fill(noun, refs or [""]))
        found[3] = names, _ask(refs[last], rng)
    return found


def _ask(noun: str, rng: Random) -> str:
    if noun.startswith("whether "):
        return rng.choice((f"Is it true that {noun.removeprefix('whether ')}?", f"Find out {noun}: yes or no?"))
    if noun.startswith("the number of rows with "):
        return rng.choice((f"How many {noun.removeprefix('the number of ')} are there?", f"What is {noun}?"))
    return rng.choice((f"What is {noun}?", f"Give {noun}.", f"Find {noun}."))


COMPOSITIONS: tuple[Composition, ...] = tuple(
    Composition(name, rounds)
    for name in _ENDS
    for rounds in (((3,), (4, 5)) if name in ("arithmetic", "fact checking") else ((2, 3), (4, 5)))
)
