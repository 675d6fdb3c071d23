"""Mistakes that fail: wrong versions of a program, each with what its error teaches."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from random import Random

# What people take for the name of a method.
METHODS = {
    "mean": "average", "sum": "total", "max": "maximum", "min": "minimum", "median": "middle", "std": "deviation",
    "isna": "missing", "nunique": "distinct", "quantile": "percentile", "nlargest": "largest", "corr": "correlation",
    "cov": "covariance", "idxmax": "argtop", "idxmin": "argbottom", "iloc": "row", "loc": "row", "groupby": "group",
}  # fmt: skip
NUMERIC_ONLY = "mean|std|var|median|quantile|sem|skew|kurt"


@dataclass(frozen=True)
class Mistake:
    """A wrong program and the thought that follows its error."""

    kind: str
    code: str
    lesson: str


def misspell(name: str, rng: Random) -> str:
    """`name` with one typing error: a letter left out, doubled, or in the other case."""
    letters = [index for index, mark in enumerate(name) if mark.isalpha()] or [0]
    at = rng.choice(letters)
    draw = rng.random()
    if draw < 0.4 and len(name) > 2:
        return name[:at] + name[at + 1 :]
    if draw < 0.7 or name[at].swapcase() == name[at]:
        return name[: at + 1] + name[at:]
    return name[:at] + name[at].swapcase() + name[at + 1 :]


def python_mistakes(
    code: str, frame: str, columns: tuple[str, ...], known: Collection[str], texts: Collection[str], rng: Random
) -> list[Mistake]:
    """Wrong versions of `code`, one of each kind that it allows.

    Args:
        code: a program that works.
        frame: what the table is called there.
        columns: names of columns that the code may use.
        known: names of all columns.
        texts: names of the columns that hold text.
        rng: the source of chance.
    """
    drafts = (
        _no_import(code, rng),
        _wrong_file(code, rng),
        _wrong_reader(code, rng),
        _wrong_column(code, columns, known, rng),
        _wrong_method(code, rng),
        _no_bracket(code),
        _open_string(code, frame),
        _number_as_text(code),
        _text_as_number(code, columns, texts, rng),
        _past_the_end(code, frame, columns),
        _wrong_name(code, frame, rng),
        _and(code),
        _bare_list(code, frame),
    )
    return [draft for draft in drafts if draft and draft.code != code]


def _no_import(code: str, rng: Random) -> Mistake | None:
    found = re.findall(r"^import (\w+) as (\w+)\n", code, re.MULTILINE)
    used = [(name, short) for name, short in found if f"{short}." in code]
    if not used:
        return None
    name, short = rng.choice(used)
    lesson = rng.choice(
        (f"{name} is not imported.", f"I forgot to import {name}.", f"{short} is unknown without import.")
    )
    return Mistake("missing import", code.replace(f"import {name} as {short}\n", "", 1), lesson)


def _wrong_file(code: str, rng: Random) -> Mistake | None:
    found = re.search(r'"([^"\n]+)\.csv"', code)
    if not found:
        return None
    stem = rng.choice((found[1] + "s", found[1] + "_data", "data/" + found[1]))
    lesson = rng.choice(
        (f'There is no such file. It is "{found[1]}.csv".', f'The file is called "{found[1]}.csv", not as I wrote.')
    )
    return Mistake("wrong file", code.replace(found[0], f'"{stem}.csv"', 1), lesson)


def _wrong_reader(code: str, rng: Random) -> Mistake | None:
    wrong = rng.choice(("read_cvs", "readcsv", "load_csv"))
    return Mistake("wrong reader", code.replace("read_csv", wrong, 1), f"pandas has no {wrong}. It is read_csv.")


def _wrong_column(code: str, columns: tuple[str, ...], known: Collection[str], rng: Random) -> Mistake | None:
    lines = code.split("\n")
    for name in rng.sample(columns, len(columns)):
        wrong = misspell(name, rng)
        # Only where it names a column: in brackets or as an argument.
        place = re.compile(r'(?<=[\[(])"' + re.escape(name) + '"(?=[\\]),])')
        if wrong in known or not any(place.search(line) for line in lines if not line.startswith("#")):
            continue
        changed = [line if line.startswith("#") else place.sub(f'"{wrong}"', line) for line in lines]
        lesson = rng.choice(
            (
                f'There is no "{wrong}". The name is "{name}".',
                f'I misspelt the column: it is "{name}".',
                f'No column is called "{wrong}"; the description says "{name}".',
            )
        )
        return Mistake("wrong column", "\n".join(changed), lesson)
    return None


def _wrong_method(code: str, rng: Random) -> Mistake | None:
    used = [method for method in METHODS if re.search(rf'[\])"]\.{method}\b', code)]
    if not used:
        return None
    method = rng.choice(used)
    wrong = re.sub(rf'(?<=[\])"])\.{method}\b', f".{METHODS[method]}", code, count=1)
    lesson = rng.choice(
        (f"There is no {METHODS[method]}. Use {method}.", f"It is called {method}, not {METHODS[method]}.")
    )
    return Mistake("wrong method", wrong, lesson)


def _no_bracket(code: str) -> Mistake | None:
    return Mistake("missing bracket", code[:-1], "A closing bracket is missing.") if code.endswith(")") else None


def _open_string(code: str, frame: str) -> Mistake | None:
    place = code.rfind(f'{frame}["')
    end = code.find('"', place + len(frame) + 2)
    if place < 0 or end < 0:
        return None
    return Mistake("open string", code[:end] + code[end + 1 :], "A quote is missing behind the column's name.")


def _number_as_text(code: str) -> Mistake | None:
    wrong = re.sub(r'("\] [<>]=?) (-?\d+\.?\d*)(?=[\])])', r'\1 "\2"', code, count=1)
    return Mistake("number as text", wrong, "The limit must be a number, not a text.")


def _text_as_number(code: str, columns: tuple[str, ...], texts: Collection[str], rng: Random) -> Mistake | None:
    for name in columns:
        place = f'"{name}"].'
        if texts and name not in texts and re.search(re.escape(place) + f"(?:{NUMERIC_ONLY})\\(", code):
            text = rng.choice(sorted(texts))
            wrong = re.sub(re.escape(place) + f"(?={NUMERIC_ONLY})", f'"{text}"].', code)
            lesson = f'"{text}" holds text, so it has no such number. The column that I need is "{name}".'
            return Mistake("text as number", wrong, lesson)
    return None


def _past_the_end(code: str, frame: str, columns: tuple[str, ...]) -> Mistake | None:
    head, _, last = code.rpartition("\n")
    if not columns:
        return None
    line = f'print({frame}["{columns[0]}"].iloc[len({frame})])'
    wrong = f"{head}\n{line}\n{last}" if head else f"{line}\n{last}"
    return Mistake("past the end", wrong, f"The last row has index len({frame}) - 1. I do not need it here.")


def _wrong_name(code: str, frame: str, rng: Random) -> Mistake | None:
    head, _, last = code.rpartition("\n")
    place = re.search(rf"\b{frame}(?=[\[.])", last)
    if not place:
        return None
    other = rng.choice([name for name in ("df", "data", "frame") if name != frame])
    wrong = last[: place.start()] + other + last[place.end() :]
    return Mistake("wrong name", f"{head}\n{wrong}" if head else wrong, f"The table is called {frame}, not {other}.")


def _and(code: str) -> Mistake | None:
    found = re.search(r"\) ([&|]) \(", code)
    if not found:
        return None
    word = {"&": "and", "|": "or"}[found[1]]
    wrong = code[: found.start()] + f") {word} (" + code[found.end() :]
    return Mistake("and", wrong, f"Whole columns are combined by {found[1]}, not by {word}.")


def _bare_list(code: str, frame: str) -> Mistake | None:
    wrong = re.sub(rf'\b{frame}\[\[("[^"]+", "[^"\]]+")\]\]', rf"{frame}[\1]", code, count=1)
    return Mistake("bare list", wrong, "Several columns need a list in the brackets.")
