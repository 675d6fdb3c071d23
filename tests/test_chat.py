"""A question to a model in the terminal: its text comes token by token, its code runs, and the notebook is there."""

import itertools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import nbformat
import pytest
import torch
from rich.console import Console

from groupwise.engine.config import ModelConfig
from groupwise.engine.hf import save_hf
from groupwise.engine.model import Model, PackedAttention
from groupwise.engine.tokenizer import Tokenizer
from groupwise.recipes.chat import chat
from groupwise.recipes.command import run_command
from groupwise.rollout.grammar import GRAMMARS, Step, all_tags
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory, encode_spans

FILE = "my t.csv"
DESCRIPTION = f'read_csv("{FILE}"), 3 rows: "name" text, "size" int'
THOUGHT = "日本, étude <b> </c"  # characters of several tokens, and what begins like a tag
COUNT = Step("code", THOUGHT, f"import pandas as pd\nprint(len(pd.read_csv('{FILE}')))", "3")
FAILS = Step("code", "", "1/0", "cell 1, line 1: 1/0\nZeroDivisionError: division by zero")
MANY, LOOP, CUT = "How many rows?", "Which fails?", "Which is cut?"
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# What the model knows by heart, by mode and question.
PLAYS = {
    ("datamind", MANY): GRAMMARS["datamind"].render([COUNT, Step("answer", "so", "3 <i>rows</i>")]),
    ("agentic", MANY): GRAMMARS["agentic"].render([COUNT, Step("answer", "so", "three")]),
    ("reflection", MANY): GRAMMARS["reflection"].render([Step("answer", THOUGHT, "many")]),
    ("datamind", LOOP): GRAMMARS["datamind"].render([FAILS] * 5),
    ("datamind", CUT): [
        ("model", "<think>a</think>\n<code>print(7)<|im_end|>"),
        ("forced", "</code>"),
        ("environment", GRAMMARS["datamind"].observation("7")),
        ("model", GRAMMARS["datamind"].render_turn("answer", "b", "7")),
    ],
}


class Writes:
    """A stream that keeps each piece that is written."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)

    def flush(self) -> None: ...


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / FILE
    path.write_text("name,size\na,1\nb,2\nc,3\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that knows the plays."""
    texts = [DESCRIPTION, FAILS.output, *(grammar.system for grammar in GRAMMARS.values()), "\n<think></think>\n\n"]
    tokenizer = Tokenizer.train(texts * 3, 400, all_tags())
    ids: list[int] = []
    sampled: list[bool] = []
    bounds = [0]
    for (mode, question), play in PLAYS.items():
        task = Task("t", question, (), DESCRIPTION, "", "text", "chat", mode)
        for span in encode_spans([("prompt", GRAMMARS[mode].prompt(task, tokenizer)), *play], tokenizer):
            ids += span.token_ids
            sampled += [span.writer == "model"] * len(span.token_ids)
        bounds.append(len(ids))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    made = Model(config)
    made.init_weights(0)
    positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)])
    attention = PackedAttention(torch.tensor(bounds, dtype=torch.int32), int(positions.max()) + 1)
    targets, mask = torch.tensor([*ids[1:], 0]), torch.tensor([*sampled[1:], False])
    optimizer = torch.optim.Adam(made.parameters(), 6e-3, betas=(0.9, 0.95))
    for _ in range(300):
        logprob = made(torch.tensor(ids), positions, attention, targets=targets)[0][mask]
        if logprob.min() > -0.3:
            break
        optimizer.zero_grad()
        (-logprob.mean()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("model")
    save_hf(made, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def ask(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[str], Trajectory]]:
    """Asks in an empty folder; gives the pieces that were printed, and what happened."""
    monkeypatch.chdir(tmp_path)

    def run(question: str, *arguments: str) -> tuple[list[str], Trajectory]:
        stream = Writes()
        console = Console(file=cast(Any, stream), width=60, color_system="standard", force_terminal=True)
        trajectory = chat(["--model", str(model), "--file", str(table), question, *arguments], console)
        return stream.pieces, trajectory

    return run


@pytest.mark.parametrize(("mode", "question"), PLAYS)
def test_all_text_is_shown_as_it_comes(ask: Callable, mode: str, question: str) -> None:
    pieces, trajectory = ask(question, "--mode", mode)
    play = PLAYS[mode, question]
    answer = trajectory.answer or "no answer: error_limit"
    name = {MANY: "how-many-rows", LOOP: "which-fails", CUT: "which-is-cut"}[question]
    spans = [DESCRIPTION, "\n", *(text for _, text in play)]
    shown = "".join(pieces)
    assert COLOUR.sub("", shown) == "".join([*spans, f"\n\n{answer}\nnotebook: {name}.ipynb\n"])
    # What may be the beginning of a tag or of a character waits for the next token; nothing else does.
    assert sum(map(bool, pieces)) > 0.5 * trajectory.completion_tokens
    if question == CUT:
        # Thought, code and answer of the model, what was forced, what the code printed.
        for part in ("\x1b[3;32ma", "\x1b[1;32m7", "\x1b[7;32m7", "\x1b[2;33m</code>", "\x1b[36m<interpreter>7"):
            assert part in shown, part
    notebook = nbformat.read(f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.groupwise.status == trajectory.status
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]
    assert len(codes) == len(trajectory.executions) == sum(writer == "environment" for writer, _ in play)


def test_only_a_notebook_that_is_named_is_replaced(ask: Callable, tmp_path: Path) -> None:
    kept, replaced = tmp_path / "how-many-rows.ipynb", tmp_path / "mine.ipynb"
    kept.write_text("old")
    replaced.write_text("old")
    ask(MANY, "--mode", "reflection")
    ask(MANY, "--mode", "reflection", "--notebook", "mine.ipynb")
    assert kept.read_text() == "old"
    for path in (replaced, tmp_path / "how-many-rows-2.ipynb"):
        assert nbformat.read(path, as_version=4).metadata.groupwise.answer == "many"


def test_mistakes_end_with_one_sentence(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    twin = tmp_path / FILE
    twin.write_text("a,b\n1,2\n")
    wide = tmp_path / "wide.csv"
    wide.write_text(",".join(f"column {number}" for number in range(200)) + "\n" + ",".join("1" * 200) + "\n")
    good = {"--model": str(model), "--file": str(table)}
    mistakes: list[tuple[dict[str, str], list[str], str]] = [
        ({}, [" "], "the question is empty"),
        ({}, [], "required: question"),
        ({"--model": str(bare)}, ["Why?"], "tokenizer.json does not exist"),
        ({"--model": str(tmp_path / "none")}, ["Why?"], "does not exist"),
        ({"--file": "none.csv"}, ["Why?"], "none.csv does not exist"),
        ({"--file": str(wide)}, ["Why?"], "the model reads no more than 512"),
        ({"--mode": "other"}, ["Why?"], "invalid choice: 'other'"),
        ({"--temperature": "-1"}, ["Why?"], "temperature is -1.0"),
        ({"--notebook": "none/n.ipynb"}, ["Why?"], "the folder none of --notebook does not exist"),
        ({}, ["Why?", "--file", str(twin)], f"two files are named {FILE}"),
    ]
    for options, words, sentence in mistakes:
        flags = [word for option in {**good, **options}.items() for word in option]
        monkeypatch.setattr(sys, "argv", ["chat", *flags, *words])
        with pytest.raises(SystemExit) as ended:
            run_command(chat)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.ipynb"))
