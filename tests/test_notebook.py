"""A trajectory as a notebook: valid, complete, and the same outputs when a plain kernel runs it."""

import copy
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.grammar import GRAMMARS, Step, all_tags
from groupwise.rollout.notebook import record_to_notebook, save_notebook, to_notebook
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Status, Trajectory, Writer, encode_spans

DATAMIND = GRAMMARS["datamind"]
ODD = 'it\'s a "täble" {1}.csv'
# Each chunk shows something in which Jupyter differs from the sandbox.
CHUNKS = [
    f"import pandas as pd\ndf = pd.read_csv({ODD!r})\ndf.head()\nprint(df)\ndf.info(memory_usage='deep')",
    "import random, numpy as np\nprint(random.random(), np.random.rand())\ndf",
    "df = df[df.c0 > 3]\nprint(random.random(), np.random.rand(), end='')\nprint(len(df['nothing']))",  # fails
    "print(len(df), random.random(), np.random.rand())",  # of what the failed chunk did, nothing is seen
    "import warnings\nwarnings.warn('never shown')\nwarnings.simplefilter('always')\nwarnings.warn('shown')",
    "import sys, logging\nprint('one')\nprint('two', file=sys.stderr)\nlogging.warning('three')\nprint('four')",
    "x = 5\ndf.to_csv('new.csv')\nprint('left')\nsys.exit()\nx = 6",
    "exit(0)",
    "raise SystemExit('with a message')",  # fails
    "print(1)\nexit(3)",  # fails
    "from __future__ import annotations\ndef f(n: Unknown): return 1 / n\ntry:\n    f(0)\n"
    "except ZeroDivisionError:\n    import traceback; traceback.print_exc()",
    "print('before')\nf(0)",  # fails
    "def broken(:",  # fails
    "!ls",  # fails: it is no Python
    "raise ValueError('two\\nlines: of message')",  # fails
    "print(os.name)",  # fails: nobody imported it
    "import json\njson.loads('{')",  # fails, and the error's name has a module
    "import os\nos.abort()",  # killed
    "import subprocess",  # refused
    "from matplotlib import pyplot as plt\nfig = plt.figure()\nplt.plot([1, 2])\nplt.show()\nprint(__name__, sys.argv)",
]
FAILED = [2, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / ODD
    columns = [f"c{number}" for number in range(25)]
    rows = [",".join(str(row * number) for number in range(24)) + f",name {row}" for row in range(9)]
    path.write_text("\n".join([",".join(columns), *rows]))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text"], 400, all_tags())


def trajectory_of(
    spans: list[tuple[Writer, str]],
    executions: list[Execution],
    tokenizer: Tokenizer,
    *,
    files: tuple[str, ...] = (),
    status: Status = "void",
    answer: str | None = None,
) -> Trajectory:
    task = Task("t1", "How *many*?", files, 'read_csv("t.csv"), 3 rows: "__a__" int', "3", "number", "counting")
    spans = [("prompt", DATAMIND.prompt(task, tokenizer)), *spans]
    made = Trajectory(task, 0, encode_spans(spans, tokenizer), status, answer=answer, executions=executions)
    made.rewards, made.reward, made.advantage = {"answer": 1.0, "tags": 0.8}, 1.6, -0.5
    return made


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook as a kernel in a folder runs it."""
    again = copy.deepcopy(notebook)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(again, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    return again


def outputs(cell: nbformat.NotebookNode) -> list[tuple[str, ...]]:
    """Printed text joined, errors by name and message; anything else as it is."""
    shown: list[tuple[str, ...]] = []
    for output in cell.outputs:
        if output.output_type == "error":
            shown.append(("error", output.ename, output.evalue))
        elif output.output_type == "stream" and shown and shown[-1][0] == output.name:
            shown[-1] = (output.name, shown[-1][1] + output.text)
        else:
            shown.append((output.name, output.text) if output.output_type == "stream" else (str(output),))
    return shown


@pytest.fixture(scope="module")
def executed(table: Path, tokenizer: Tokenizer) -> Trajectory:
    """A trajectory whose code really ran."""
    history: list[str] = []
    executions: list[Execution] = []
    spans: list[tuple[Writer, str]] = []
    with Sandbox() as sandbox:
        for chunk in CHUNKS:
            execution = sandbox.run(chunk, [str(table)], history)
            history += [chunk] * execution.ok
            executions.append(execution)
            spans += DATAMIND.render([Step("code", "*think*", chunk, execution.output)])
    spans += DATAMIND.render([Step("answer", "done", "42")])
    assert [number for number, execution in enumerate(executions) if not execution.ok] == FAILED
    return trajectory_of(spans, executions, tokenizer, files=(str(table),), status="answered", answer="42")


def test_a_plain_kernel_prints_what_the_sandbox_printed(
    executed: Trajectory, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_notebook(tmp_path / "n.ipynb", executed, tokenizer)
    stored = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    nbformat.validate(stored)
    again = execute(stored, tmp_path)
    codes = [(was, now) for was, now in zip(stored.cells, again.cells, strict=True) if was.cell_type == "code"]
    for was, now in codes:
        assert outputs(now) == outputs(was), was.source
        assert now.execution_count == was.execution_count
    # And what is stored is what the sandbox said.
    for execution, (was, _) in zip(executed.executions, codes[1:], strict=True):
        texts = [output.text if output.output_type == "stream" else "" for output in was.outputs]
        assert execution.output.startswith("".join(texts))
        last = was.outputs[-1] if was.outputs else None
        assert (last is not None and last.output_type == "error") == (not execution.ok)
        if last and not execution.ok and last.ename != "SystemExit":
            assert "\n".join(last.traceback) + "\n" == execution.output.removeprefix("".join(texts))
            assert last.traceback[-1].endswith(last.evalue.splitlines()[-1])
    assert outputs(codes[3][0])[-1] == ("error", "KeyError", "'nothing'")
    assert list(tmp_path.iterdir()) == [tmp_path / "n.ipynb"]


def test_cells_say_what_was_written_by_whom(tokenizer: Tokenizer) -> None:
    fenced = "<think>why</think>aside\n<code>```python\nprint(1)\n```"
    spans: list[tuple[Writer, str]] = [
        ("model", fenced),
        ("forced", "</code>"),
        ("environment", "\n<interpreter>1</interpreter>\n"),
        ("model", "<think></think><answer>**7**</answer>"),
    ]
    made = trajectory_of(spans, [Execution(True, "1\n", "ok", 0.25)], tokenizer, status="answered", answer="**7**")
    notebook = to_notebook(made, tokenizer)
    assert notebook == to_notebook(made, tokenizer)
    _, question, description, thought, code, answer = notebook.cells
    assert [cell.cell_type for cell in (question, description, thought, answer)] == ["markdown"] * 4
    assert question.source == made.task.question
    assert description.source.strip() == made.task.description
    assert thought.source == "why"
    assert code.source == "print(1)"
    assert answer.source.endswith("\n\n**7**")
    about = code.metadata.groupwise
    repairs = DATAMIND.parse_turn(fenced).repairs
    assert {"code_fence", "missing_closing_tag", "text_outside_tags"} == set(repairs)
    assert about == {
        "writer": "model",
        "turn": 0,
        "repairs": repairs,
        "text": fenced,
        "forced": "</code>",
        "environment": "\n<interpreter>1</interpreter>\n",
        "verdict": "ok",
        "wall_s": 0.25,
    }
    earned = {"rewards": {"answer": 1.0, "tags": 0.8}, "reward": 1.6, "advantage": -0.5}
    assert answer.metadata.groupwise.items() >= {"writer": "model", "turn": 1, **earned}.items()
    assert notebook.metadata.groupwise == {
        "task": made.task.to_dict(),
        "sample": 0,
        "status": "answered",
        "answer": "**7**",
        **earned,
    }


@pytest.mark.parametrize(
    ("output", "verdict", "shown"),
    [
        (
            "12\ncell 2, line 3, in <lambda>: f: x\ncell 1, line 1: y\na.b.C: d: e\nf\n",
            "error",
            ("12\n", "C", "d: e\nf"),
        ),
        ("glued cell 1, line 1: y\nC\n", "error", ("glued ", "C", "")),
        ("cell 1, line 1: y\na note\n", "error", ("", "Error", "a note")),
        ("12\n", "error", ("12\n", "SystemExit", "")),
        ("12MemoryError\n", "memory", ("12", "MemoryError", "")),
        (
            "a\nTimeoutError: x\nKilled: signal SIGKILL\n",
            "killed",
            ("a\nTimeoutError: x\n", "Killed", "signal SIGKILL"),
        ),
        ("12\n", "unheard_of", ("12\n", "unheard_of", "")),
    ],
)
def test_reports_of_the_sandbox_become_errors(
    output: str, verdict: str, shown: tuple[str, str, str], tokenizer: Tokenizer
) -> None:
    spans = DATAMIND.render([Step("code", "", "print(12)", output)])
    notebook = to_notebook(trajectory_of(spans, [Execution(False, output, verdict, 0.1)], tokenizer), tokenizer)
    cell = next(cell for cell in notebook.cells if cell.source.endswith("print(12)"))
    printed = "".join(part.text for part in cell.outputs[:-1])
    assert (printed, cell.outputs[-1].ename, cell.outputs[-1].evalue) == shown
    assert cell.source.startswith("%%forked\n" if verdict == "error" else "%%stopped ")


@pytest.mark.parametrize(
    ("text", "status", "kept"),
    [
        ("no tags", "void", "no tags"),
        ("<think>t</think>\n<code>print(1)</code>", "turn_limit", "print(1)"),
        ("<think>t</think>\n<answer>4", "token_limit", "<think>t</think>\n<answer>4"),
    ],
)
def test_what_was_not_run_is_raw(text: str, status: Status, kept: str, tokenizer: Tokenizer) -> None:
    notebook = to_notebook(trajectory_of([("model", text)], [], tokenizer, status=status), tokenizer)
    assert [cell.source for cell in notebook.cells if cell.cell_type == "raw"] == [kept]
    assert notebook.cells[-1].source == f"*No answer: {status}*"
    assert sum(cell.cell_type == "code" for cell in notebook.cells) == 1


def test_queries_run_by_a_magic_and_files_beside_the_notebook_serve(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = tuple(str(tmp_path / "gone" / name) for name in ("one.sqlite", "my two.db"))
    for number, file in enumerate(files):
        with closing(sqlite3.connect(tmp_path / Path(file).name)) as connection:
            connection.executescript(f"CREATE TABLE t (a); INSERT INTO t VALUES ({number + 4});")
    queries = ["DROP TABLE t", 'SELECT x.a, y.a AS b FROM one.t x, "my two".t y', "SELECT a FROM t"]
    executions = [
        Execution(False, "not allowed: {c}\n", "error", 0.1),
        Execution(True, "a  b\n4  5\n", "ok", 0.1),
        Execution(False, "TimeoutError: stopped after 60 s\n", "timeout", 60.0),
    ]
    spans = DATAMIND.render([Step("code", "", query, "") for query in queries])
    record = trajectory_of(spans, executions, tokenizer, files=files).to_record(tokenizer)
    record["task"]["language"] = "sql"
    again = execute(record_to_notebook(record), tmp_path)
    codes = [cell for cell in again.cells if cell.cell_type == "code"][1:]
    assert [(cell.source.split("\n")[0], outputs(cell)) for cell in codes] == [
        ("%%stopped SqlError: not allowed: {c}", [("error", "SqlError", "not allowed: {c}")]),
        ("%%sql", [("stdout", " a  b\n 4  5\n")]),
        ("%%stopped TimeoutError: stopped after 60 s", [("error", "TimeoutError", "stopped after 60 s")]),
    ]
    assert sorted(os.listdir(tmp_path)) == ["my two.db", "one.sqlite"]


def test_queries_read_tables(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    file = tmp_path / "my table.csv"
    file.write_text("name,size\nx,1\ny,4\n")
    query = 'SELECT sum(size) AS total FROM "my table"'
    spans = DATAMIND.render([Step("code", "", query, "5")])
    made = trajectory_of(spans, [Execution(True, "total\n    5\n", "ok", 0.1)], tokenizer, files=(str(file),))
    record = made.to_record(tokenizer)
    record["task"]["language"] = "sql"
    again = execute(record_to_notebook(record), tmp_path)
    assert outputs([cell for cell in again.cells if cell.cell_type == "code"][1]) == [("stdout", " total\n     5\n")]
