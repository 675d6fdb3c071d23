"""Teachers show how a problem is solved, turn by turn; what their code prints is never made up.

A teacher is a generator function: it yields turns and is sent the Execution of each code turn. `scripted` knows the
right program. In a share of its trajectories it makes a real mistake first, because a policy that never saw an error
cannot recover from one.
"""

from __future__ import annotations

import re
from random import Random

from .tasks import Problem
from .taxonomy import Detail
from .teaching.demonstrations import demonstrate
from .teaching.mistakes import METHODS, misspell
from .teaching.script import Abandoned, Script, Turn
from .teaching.sql_scripts import demonstrate_sql

# Shares of the strata in Datarus-R1, arXiv 2508.13382.
STRATA = {"success": 0.40, "corrected": 0.35, "self_corrected": 0.15, "failure": 0.10}
READ_RESULT = "The output is the answer."


def program(problem: Problem, line: str | None = None) -> str:
    """A whole program: import, read the table, and the line that prints (the right one if none is given)."""
    return f'import pandas as pd\ndf = pd.read_csv("{problem.view.file}")\n{line or problem.question.code}'


def scripted(problem: Problem, stratum: str, rng: Random, detail: Detail = "short") -> Script:
    """The turns of one trajectory.

    Args:
        problem: the problem, with its program.
        stratum: "success"; "corrected": an error, then the right code; "self_corrected": code that runs but answers
            something else, then the right code; "failure": errors and a wrong answer.
        rng: the source of chance for the mistakes and, in full detail, for the words and the style.
        detail: "short": one form of each program in few words; "full": many, see `demonstrations`. SQL has one form.

    Raises:
        Abandoned: a mistake did not fail, or right code did.
    """
    if problem.task.language == "sql":
        return demonstrate_sql(problem, stratum, rng)
    return (demonstrate if detail == "full" else _short)(problem, stratum, rng)


def _short(problem: Problem, stratum: str, rng: Random) -> Script:
    question = problem.question
    if not question.code:
        failed = stratum == "failure"
        yield Turn("answer", question.thought, "unknown" if failed else question.answer, mistake=failed)
        return
    if stratum == "failure":
        yield from _fail(problem, rng)
        return
    thought, code = question.thought, program(problem)
    if stratum == "corrected":
        wrong, lesson = rng.choice(mistakes(problem, rng))
        outcome = yield Turn("code", thought, wrong, mistake=True)
        if outcome.ok:
            raise Abandoned("mistake did not fail")
        thought = lesson
    elif stratum == "self_corrected":
        what, line = question.slip
        outcome = yield Turn("code", thought, program(problem, line), mistake=True)
        if not outcome.ok:
            raise Abandoned("slip failed")
        thought, code = f"That is the {what}. {question.thought}", question.code
    outcome = yield Turn("code", thought, code)
    if not outcome.ok:
        raise Abandoned("right code failed")
    yield Turn("answer", READ_RESULT, outcome.output.strip().rpartition("\n")[2].strip())


def _fail(problem: Problem, rng: Random) -> Script:
    pool = mistakes(problem, rng)
    thought = problem.question.thought
    for wrong, lesson in rng.sample(pool, min(2, len(pool))):
        outcome = yield Turn("code", thought, wrong, mistake=True)
        if outcome.ok:
            raise Abandoned("mistake did not fail")
        thought = lesson
    yield Turn("answer", "I cannot find out.", "unknown", mistake=True)


def mistakes(problem: Problem, rng: Random) -> list[tuple[str, str]]:
    """Wrong programs that must fail, each with the thought that follows the error."""
    question, right = problem.question, program(problem)
    found = [(right.partition("\n")[2], "pandas is not imported.")]
    name = rng.choice(question.columns)
    wrong = misspell(name, rng)
    if wrong not in problem.sheet.frame.columns:
        line = question.code.replace(f'"{name}"', f'"{wrong}"')
        found.append((program(problem, line), f'There is no "{wrong}". The name is "{name}".'))
    used = [method for method in METHODS if re.search(rf"\.{method}\b", question.code)]
    if used:
        method = rng.choice(used)
        line = re.sub(rf"\.{method}\b", f".{METHODS[method]}", question.code, count=1)
        found.append((program(problem, line), f"There is no {METHODS[method]}. Use {method}."))
    return found
