"""Is the answer right: numbers, choices, named values and tables, each compared in its own way.

A form that lists several candidates is wrong: two numbers where one was asked for, or one name with two values.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from ..rollout.sandbox import Execution
from ..rollout.task import Task
from ..rollout.trajectory import Trajectory
from .choice_match import OPTION, same_choice
from .table_match import is_table, same_result, same_table
from .value_match import normalise, parse_number, parse_numbers, same_number, same_value

RELATIVE = 0.03  # DataMind, arXiv 2509.25084: numbers agree within 3 % of the right one
NAMED = re.compile(r"@(\w+)\s*\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")  # the value may be a list in brackets of its own
TABLES = ("table", "ordered_table")
FILE = re.compile(r"(?<![\w-])[\w-]++\.csv\b")


def answer_correct(prediction: str | None, task: Task) -> bool:
    """Whether a trajectory's answer is the task's; an empty one and NaN never are.

    Several named values, ``@name[value]``, must all be there and right. With ``answer_type`` "number" a number within
    3 % of the right one counts, in plain, percent, currency or thousands form, also as the only number of a sentence;
    "choice" takes the option's letter or its text, see ``same_choice``; "table" and "ordered_table" compare rows as
    wholes, see ``same_table``. Any other type is compared exactly after normalisation: numbers by value, yes and no by
    their synonyms, dates by the day, and names without regard to case, quotes, spaces, hyphens and underscores.

    Args:
        prediction: the answer's text, None where there is none.
        task: ``answer`` is the right one.
    """
    if prediction is None or not prediction.strip() or normalise(prediction) == "nan":
        return False
    if task.answer_type in TABLES:
        return same_table(prediction, task.answer, ordered=task.answer_type == "ordered_table")
    if gold := named_values(task.answer):
        given = named_values(prediction)
        return all(
            (said := given.get(name)) is not None
            and normalise(said) != "nan"
            and same_value(said, str(value), tolerance=RELATIVE)
            for name, value in gold.items()
        )
    if task.answer_type == "number" and len(parse_numbers(task.answer)) == 1:
        return same_number(prediction, task.answer, tolerance=RELATIVE)
    if task.answer_type == "choice":
        return same_choice(prediction, task.answer)
    return same_value(prediction, task.answer, tolerance=0.0)


def trajectory_correct(trajectory: Trajectory) -> bool:
    """Whether the answer with which a trajectory ended is right, see ``is_right``."""
    return is_right(trajectory.answer, trajectory.executions, trajectory.task)


def is_right(answer: str | None, executions: Sequence[Execution], task: Task) -> bool:
    """Whether an answer is right, see ``answer_correct``, where code ran before it.

    Where a table was asked for, the answer may instead name the CSV file to which one of the queries wrote the result.
    An answer that is a table itself stands alone.
    """
    if answer_correct(answer, task):
        return True
    result = named_result(answer, executions, task)
    return result is not None and same_result(result, task.answer, ordered=task.answer_type == "ordered_table")


def named_result(answer: str | None, executions: Sequence[Execution], task: Task) -> str | None:
    """The CSV of the query's result that an answer stands for, None where it stands for itself."""
    if task.answer_type not in TABLES or not answer or not answer.strip() or is_table(answer, task.answer):
        return None
    return result_named(answer, executions)


def result_named(answer: str, executions: Sequence[Execution]) -> str | None:
    """The CSV of the latest query's result that went to the one file which an answer names; None without one."""
    files = set(FILE.findall(answer))
    if len(files) != 1:
        return None
    for execution in reversed(executions):
        # The last line of a query's output says how many rows went to which file.
        written = FILE.findall(execution.output.rstrip().rpartition("\n")[2])
        if execution.ok and execution.table is not None and files <= set(written):
            return execution.table
    return None


def needs_judge(prediction: str | None, task: Task) -> bool:
    """Whether only a judge can tell: the right answer is free text, and the prediction is another one."""
    return (
        task.answer_type == "free" and bool(prediction and prediction.strip()) and not answer_correct(prediction, task)
    )


def named_values(text: str) -> dict[str, str | None]:
    """The pairs of DABench's ``@name[value]`` by lower-case name; a list has no brackets, a name given twice None."""
    pairs: dict[str, str | None] = {}
    for name, value in NAMED.findall(text):
        pairs[name.lower()] = None if name.lower() in pairs else value.strip().strip("[]").strip()
    return pairs


def has_form(prediction: str, task: Task) -> bool:
    """Whether an answer, right or wrong, is of the form that was asked for: one number, one option, all names, a table.

    Any text has the form of a text.
    """
    if not prediction.strip():
        return False
    if task.answer_type in TABLES:
        return is_table(prediction, task.answer) or len(set(FILE.findall(prediction))) == 1
    if gold := named_values(task.answer):
        given = named_values(prediction)
        return all(given.get(name) for name in gold)
    if task.answer_type == "choice" and OPTION.fullmatch(task.answer):
        return any(same_choice(prediction, letter) for letter in ascii_uppercase)
    if task.answer_type == "number" or parse_number(task.answer) is not None:
        return len(parse_numbers(prediction)) == 1
    return True
