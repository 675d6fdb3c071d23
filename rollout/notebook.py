"""A trajectory as a Jupyter notebook (.ipynb, format 4) that runs again and prints the same.

    save_notebook("answer.ipynb", trajectory, tokenizer)

The first cell makes a plain kernel behave as the sandbox did (`jupyter.py`): seeds, files, exits, warnings, and nothing
shown but what is printed. Code follows in cells of three kinds:

    succeeded          as the model wrote it
    failed             behind `%%forked`: it runs in a copy of the kernel and leaves nothing, as in the sandbox
    refused or ended   behind `%%stopped` and the reason: it does not run, since it would hang or do harm; so do all
                       queries that failed

The last two are tagged "raises-exception", so that a run goes on behind them. Not repeated are the order of sets
(PYTHONHASHSEED is 0 in the sandbox), paths and limits, what code printed before it was ended, files that a failed cell
wrote and, without `os.fork`, what it prints.

A query that succeeded is behind `%%sql`, which the first cell defines; its result is stored as the sandbox printed it,
and is printed by pandas when it runs again.

What was written and not run (a void turn, a turn that was cut, code of the last turn) is a raw cell. Metadata under the
key "groupwise" say of a cell who wrote it, in which turn, what the parser mended, how its execution went and what the
model read of it; of the last cell and of the notebook the reward with its parts and the advantage; of the notebook the
task and how it ended.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbformat import NotebookNode, v4

from ..engine.errors import UserError
from .grammar import GRAMMARS
from .jupyter import add_failures, add_sql, imitate_sandbox
from .trajectory import Trajectory, turn_starts

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer

# How the sandbox reports an error, behind what was printed: frames and the error, or one line on why it did not go on.
FRAMES = re.compile(r"(?:cell \d+, line \d+(?:, in [^\n:]+)?: [^\n]*\n)+")
ENDED = re.compile(r"(?:TimeoutError|MemoryError|Killed|Refused)(?:: [^\n]*)?\n\Z")


def to_notebook(trajectory: Trajectory, tokenizer: Tokenizer) -> NotebookNode:
    """The notebook of a trajectory; it is valid by `nbformat`, and the same for the same trajectory."""
    return record_to_notebook(trajectory.to_record(tokenizer))


def save_notebook(path: str | Path, trajectory: Trajectory, tokenizer: Tokenizer) -> None:
    """Writes the notebook of a trajectory; see `write_notebook`."""
    write_notebook(path, to_notebook(trajectory, tokenizer))


def record_to_notebook(record: Mapping[str, Any]) -> NotebookNode:
    """The notebook of what `Trajectory.to_record` gives."""
    task = record["task"]
    cells = [
        _cell("code", _setup(task), {"writer": "environment"}, jupyter={"source_hidden": True}),
        _cell("markdown", task["question"], {"writer": "prompt"}),
    ]
    if task["description"]:
        # Indented, since names of columns would be taken for Markdown.
        description = "\n".join(f"    {line}" for line in task["description"].splitlines())
        cells.append(_cell("markdown", description, {"writer": "prompt"}))
    cells += _turn_cells(record)
    if record["status"] != "answered":
        cells.append(_cell("markdown", f"*No answer: {record['status']}*", {"writer": "environment"}))
    earned = {key: record[key] for key in ("rewards", "reward", "advantage")}
    cells[-1].metadata["groupwise"] |= earned
    executed = 0
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            executed += 1
            cell.execution_count = executed
    about = {key: record[key] for key in ("task", "sample", "status", "answer")} | earned
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "groupwise": about})
    nbformat.validate(notebook)
    return notebook


def write_notebook(path: str | Path, notebook: NotebookNode) -> None:
    """Writes a notebook; an existing file is replaced.

    Raises:
        UserError: it cannot be written there.
    """
    # Half of a surrogate pair, which no encoding has, becomes an escape of JSON.
    data = nbformat.writes(notebook).encode("utf-8", "backslashreplace")
    try:
        Path(path).write_bytes(data + b"\n")
    except OSError as error:
        raise UserError(f"the notebook {path} cannot be written ({error.strerror}); choose another place") from error


def _setup(task: Mapping[str, Any]) -> str:
    """Source of the first cell: functions and their calls; none of their names stays."""
    files = f"({task['files']!r})"
    calls: dict[Callable[..., None], str] = {imitate_sandbox: files, add_failures: "()"}
    if _is_sql(task):
        calls[add_sql] = files
    lines = [f"{function.__name__}{arguments}\ndel {function.__name__}" for function, arguments in calls.items()]
    return "\n\n".join([*map(inspect.getsource, calls), "\n".join(lines)])


def _is_sql(task: Mapping[str, Any]) -> bool:
    return task.get("language", "python") == "sql"


def _turn_cells(record: Mapping[str, Any]) -> list[NotebookNode]:
    grammar = GRAMMARS[record["task"]["mode"]]
    executions, spans = iter(record["executions"]), record["spans"]
    cells: list[NotebookNode] = []
    turns = turn_starts([span["writer"] for span in spans])
    for number, index in enumerate(turns):
        text = spans[index]["text"]
        turn = grammar.parse_turn(text)
        about: dict[str, Any] = {"writer": spans[index]["writer"], "turn": number}
        if turn.repairs:
            about |= {"repairs": turn.repairs, "text": text}
        # What others wrote behind the turn: the closing tag that was forced, the observation.
        others = spans[index + 1 : turns[number + 1] if number + 1 < len(turns) else None]
        if turn.kind == "void" or (turn.kind == "answer" and record["status"] != "answered"):
            cells.append(_cell("raw", text, about))
            continue
        if turn.thought:
            cells.append(_cell("markdown", turn.thought, about))
        if turn.kind == "answer":
            cells.append(_cell("markdown", f"**Answer**\n\n{turn.content}", about))
        elif execution := next(executions, None):
            about |= {span["writer"]: span["text"] for span in others}
            cells.append(_code_cell(turn.content, execution, about, is_sql=_is_sql(record["task"])))
        else:
            cells.append(_cell("raw", turn.content, about))
    return cells


def _code_cell(code: str, execution: Mapping[str, Any], about: dict[str, Any], *, is_sql: bool) -> NotebookNode:
    """A chunk with what it printed and, if it failed, its error."""
    verdict, printed, report = execution["verdict"], execution["output"], ""
    magic = "%%sql\n" if is_sql else ""
    if not execution["ok"]:
        if is_sql and verdict == "error":
            printed, report = "", f"SqlError: {' '.join(printed.split())}"
        else:
            printed, report = _split(printed, verdict)
        # No kernel has the sandbox's limits: a query may have been refused, or stopped.
        magic = "%%forked\n" if verdict == "error" and not is_sql else f"%%stopped {report}\n"
    cell = _cell("code", f"{magic}{code}", {**about, "verdict": verdict, "wall_s": execution["wall_s"]})
    if printed:
        cell.outputs.append(v4.new_output("stream", name="stdout", text=printed))
    if not execution["ok"]:
        frames = FRAMES.match(report)
        last = report[frames.end() if frames else 0 :]
        name, _, message = last.partition(": ")
        if not re.fullmatch(r"[\w.]+", name):
            name, message = "Error", last
        name = name.rpartition(".")[2]  # Jupyter names a class without its module
        cell.outputs.append(v4.new_output("error", ename=name, evalue=message, traceback=report.splitlines()))
        cell.metadata["tags"] = ["raises-exception"]
    return cell


def _split(output: str, verdict: str) -> tuple[str, str]:
    """What a failed chunk printed, and the sandbox's report; one that left by `sys.exit(1)` has none."""
    matches = list((FRAMES if verdict == "error" else ENDED).finditer(output))
    if not matches:
        return output, "SystemExit" if verdict == "error" else verdict
    return output[: matches[-1].start()], output[matches[-1].start() :].rstrip("\n")


def _cell(kind: str, source: str, about: dict[str, Any], **metadata: Any) -> NotebookNode:
    new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell, "raw": v4.new_raw_cell}[kind]
    return new(source, metadata={**metadata, "groupwise": about})
