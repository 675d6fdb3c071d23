"""A trajectory as a notebook: valid, complete, and the same outputs when a plain kernel runs it."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.grammar import GRAMMARS, all_tags
from groupwise.rollout.notebook import save_notebook, to_notebook
from groupwise.rollout.sandbox import Execution, Limits, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory, encode_spans

ODD = 'it\'s a "täble" {1}.csv'
# Each chunk shows something in which Jupyter differs from the sandbox.
CHUNKS = [
    f"import pandas as pd\ndf = pd.read_csv({ODD!r})\ndf.head()\nprint(df)\ndf.info()",
    "import random, numpy as np\nprint(random.random(), np.random.rand())\ndf",
    "df = df[df.c0 > 3]\nprint(random.random(), np.random.rand(), end='')\nprint(len(df['nothing']))",  # fails
    "print(len(df), random.random(), np.random.rand())",  # of what the failed chunk did, nothing is seen
    "import warnings\nwarnings.warn('never shown')\nwarnings.simplefilter('always')\nwarnings.warn('shown')",
    "import sys, logging\nprint('one')\nprint('two', file=sys.stderr)\nlogging.warning('three')\nprint('four')",
    "x = 5\nprint('left')\nsys.exit()\nx = 6",
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
    "from matplotlib import pyplot as plt\nfig = plt.figure()\nplt.plot([1, 2])\nplt.show()\nprint(__name__, sys.argv)",
    "while True: pass",  # ended
    "import subprocess",  # refused
    "print('the end')",
]
FAILED = [2, 8, 9, 11, 12, 13, 14, 15, 16, 18, 19]


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


def make(
    turns: list[tuple[str, str]], executions: list[Execution], tokenizer: Tokenizer, files: tuple[str, ...] = (), **more
) -> Trajectory:
    task = Task("t1", "How *many*?", files, 'read_csv("t.csv"), 3 rows: "__a__" int', "3", "number", "counting")
    grammar = GRAMMARS["datamind"]
    spans = [("prompt", grammar.prompt(task, tokenizer)), *turns]
    return Trajectory(task, 0, encode_spans(spans, tokenizer), executions=executions, **more)


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
    executions, turns = [], []
    with Sandbox(Limits(wall_s=1)) as sandbox:
        for chunk in CHUNKS:
            executions.append(sandbox.run(chunk, [str(table)], history))
            if executions[-1].ok:
                history.append(chunk)
            turns.append(("model", GRAMMARS["datamind"].render_turn("code", "*think*", chunk)))
            turns.append(("environment", GRAMMARS["datamind"].observation(executions[-1].output)))
    turns.append(("model", GRAMMARS["datamind"].render_turn("answer", "done", "42")))
    assert [number for number, execution in enumerate(executions) if not execution.ok] == FAILED
    return make(turns, executions, tokenizer, (str(table),), status="answered", answer="42")


def test_a_plain_kernel_prints_what_the_sandbox_printed(
    executed: Trajectory, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_notebook(tmp_path / "n.ipynb", executed, tokenizer)
    stored = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    again = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    for cell in again.cells:
        cell.outputs = []
    NotebookClient(again, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pairs = [(a, b) for a, b in zip(stored.cells, again.cells, strict=True) if a.cell_type == "code"]
    for was, now in pairs:
        assert outputs(now) == outputs(was), was.source
    for execution, (was, _) in zip(executed.executions, pairs[1:], strict=True):
        print(outputs(was))
