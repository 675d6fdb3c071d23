"""The scripted teacher of SQL: one query answers, and the answer names the file with its result."""

from __future__ import annotations

import re
from random import Random

from ..tasks import Problem
from .mistakes import Mistake, misspell
from .script import Abandoned, Outcome, Script, Turn

LOOK = 0.3  # share of the trajectories that look at a table first
TABLE = re.compile(r'\b(?:FROM|JOIN)\s+("[^"]+"|`[^`]+`|\w+)', re.IGNORECASE)
QUOTES = '"`'
WRITTEN = re.compile(r"written to ([\w-]+\.csv)$")
# What other languages call a function; neither SQLite nor DuckDB has these.
FUNCTIONS = {"AVG": "AVERAGE", "SUM": "ADD", "MAX": "MAXIMUM", "MIN": "MINIMUM", "COUNT": "NUMBER"}
ANSWERS = ("{}", "{}", "The result is in {}.", "See {}.")


def demonstrate_sql(problem: Problem, stratum: str, rng: Random) -> Script:
    """The turns of one trajectory in SQL; see `teachers.scripted`."""
    question = problem.question
    query, thought = question.code, question.thought
    if rng.random() < LOOK and (table := TABLE.search(query)):
        outcome = yield Turn("code", "I look at the table first.", f"SELECT * FROM {table[1]} LIMIT 3")
        if not outcome.ok:
            raise Abandoned("right code failed")
    if stratum == "failure":
        yield from _fail(problem, rng)
        return
    if stratum == "corrected":
        mistake = rng.choice(_some(problem, rng))
        outcome = yield Turn("code", thought, mistake.code, mistake=True)
        if outcome.ok:
            raise Abandoned("mistake did not fail")
        thought = mistake.lesson
    elif stratum == "self_corrected":
        what, wrong = question.slip
        outcome = yield Turn("code", thought, wrong, mistake=True)
        if not outcome.ok:
            raise Abandoned("slip failed")
        thought = rng.choice((f"That is the {what}. {thought}", f"Wait: this gives the {what}. {thought}"))
    outcome = yield Turn("code", thought, query)
    if not outcome.ok:
        raise Abandoned("right code failed")
    yield Turn("answer", "The file holds the answer.", rng.choice(ANSWERS).format(_file(outcome)))


def _fail(problem: Problem, rng: Random) -> Script:
    """Errors, and no answer; or another query's result, unnoticed."""
    thought = problem.question.thought
    if rng.random() < 0.5:
        outcome = yield Turn("code", thought, problem.question.slip[1], mistake=True)
        if not outcome.ok:
            raise Abandoned("slip failed")
        yield Turn("answer", "The file holds the answer.", _file(outcome), mistake=True)
        return
    pool = _some(problem, rng)
    for mistake in rng.sample(pool, min(2, len(pool))):
        outcome = yield Turn("code", thought, mistake.code, mistake=True)
        if outcome.ok:
            raise Abandoned("mistake did not fail")
        thought = mistake.lesson
    yield Turn("answer", "I cannot find out.", "unknown", mistake=True)


def _file(outcome: Outcome) -> str:
    found = WRITTEN.search(outcome.output.rstrip())
    if not found:
        raise Abandoned("no file in the output of a query")
    return found[1]


def _some(problem: Problem, rng: Random) -> list[Mistake]:
    found = sql_mistakes(problem.question.code, problem.question.columns, problem.task.description, rng)
    if not found:
        raise Abandoned("no mistake fits")
    return found


def sql_mistakes(query: str, columns: tuple[str, ...], description: str, rng: Random) -> list[Mistake]:
    """Wrong versions of a query that fail, one of each kind that it allows.

    Args:
        query: one SELECT that works.
        columns: names that it uses, tables perhaps among them.
        description: the database's metadata; no wrong name stands there.
        rng: the source of chance.
    """
    found = []
    tables = list(dict.fromkeys(TABLE.findall(query)))
    # A name in double quotes that SQLite does not know is a text to it, and no error, unless a table stands before it.
    named = {table.strip(QUOTES) for table in tables}
    names = [name for name in columns if name.strip(QUOTES) not in named and re.search(_use(name), query)]
    if names:
        name = rng.choice(names)
        if wrong := _unknown(name, description, rng):
            code = re.sub(_use(name), lambda _: wrong, query)
            found.append(Mistake("wrong column", code, f'There is no column "{wrong}". The name is "{name}".'))
    if tables:
        table = rng.choice(tables)
        name = table.strip(QUOTES)
        if wrong := _unknown(name, description, rng):
            code = re.sub(rf'(?<![\w"`]){re.escape(table)}(?![\w"`])', lambda _: table.replace(name, wrong), query)
            found.append(Mistake("wrong table", code, f'There is no table "{wrong}". The name is "{name}".'))
    called = [name for name in FUNCTIONS if re.search(rf"\b{name}\(", query, re.IGNORECASE)]
    if called:
        name = rng.choice(called)
        code = re.sub(rf"\b{name}\(", f"{FUNCTIONS[name]}(", query, flags=re.IGNORECASE)
        found.append(Mistake("wrong function", code, f"SQL has no {FUNCTIONS[name]}. Use {name}."))
    bare = re.sub(r"'[^']*'", lambda text: "'" * len(text[0]), query)  # brackets inside of values are none
    if call := re.search(r"\b\w+\([^()']*(?=\))", bare):
        code = query[: call.end()] + query[call.end() + 1 :]
        found.append(Mistake("missing bracket", code, "A closing bracket is missing."))
    if re.search(r"\bFROM\b", query):
        found.append(Mistake("wrong keyword", re.sub(r"\bFROM\b", "FORM", query, count=1), "I wrote FORM for FROM."))
    return found


def _use(name: str) -> str:
    """A pattern for uses of a column by its bare name or in quotes behind a table's name."""
    bare = rf'(?<![\w"\'.]){re.escape(name)}(?![\w"\'(.])'
    return rf'(?:(?<=\w\."){re.escape(name)}(?=")|(?<=\w\.){re.escape(name)}(?![\w"\'(.])|{bare})'


def _unknown(name: str, description: str, rng: Random) -> str:
    """`name` misspelt to one that the description does not have, in any letter case; "" where none comes up."""
    for _ in range(20):
        wrong = misspell(name, rng)
        if wrong.lower() != name.lower() and wrong.lower() not in description.lower():
            return wrong
    return ""
