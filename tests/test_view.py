"""Trajectories in the terminal: who wrote what, in which part, and what it earned; saved ones by the recipe `show`."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from groupwise.engine.tokenizer import Tokenizer
from groupwise.recipes.command import run_command
from groupwise.recipes.show import show
from groupwise.rollout.grammar import GRAMMARS, Step, all_tags
from groupwise.rollout.sandbox import Execution
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory, encode_spans
from groupwise.rollout.view import Painter, trajectory_panel

TASK = Task("t1", "How many [rows]?", (), 'read_csv("t.csv")', "7", "number", "counting")


@pytest.fixture(scope="module")
def records() -> list[dict[str, object]]:
    """Three saved trajectories, as the lines of a file."""
    tokenizer = Tokenizer.train(["some text"], 400, all_tags())
    found = []
    for answer in ("7", "8", "9"):
        steps = [Step("code", "why [x]", "print(8)  # \u2028.", "8"), Step("answer", "so", answer)]
        spans = encode_spans(GRAMMARS["datamind"].spans(TASK, steps, tokenizer), tokenizer)
        executions = [Execution(True, "8\n", "ok", 0.1)]
        made = Trajectory(TASK, 0, spans, "answered", answer=answer, executions=executions)
        made.rewards, made.reward, made.advantage = {"answer": 0.0, "tags": 0.75}, 0.675, -0.5
        found.append(made.to_record(tokenizer))
    return found


def shown(*things: object) -> str:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*things)
    return console.export_text()


def test_a_panel_shows_who_wrote_what_how_it_ended_and_what_it_earned(records: list[dict[str, object]]) -> None:
    text = shown(trajectory_panel(records[1]))
    parts = ("How many [rows]?", "<think>why [x]</think>", "print(8)", "<interpreter>8</interpreter>")
    end = "answered '8', known '7' (answered)", "reward 0.675 (answer 0, tags 0.75), advantage -0.5"
    for part in (*parts, *end):
        assert part in text
    assert "right" not in text
    assert "wrong: answered '8'" in shown(trajectory_panel({**records[1], "correct": False}))
    assert "reward" not in shown(trajectory_panel({**records[1], "rewards": {}}))


def styles(painted: Text) -> list[tuple[str, str]]:
    """(text, style) of each stretch of one style."""
    found: list[tuple[str, str]] = []
    for index, character in enumerate(painted.plain):
        style = " ".join(str(span.style) for span in painted.spans if span.start <= index < span.end)
        if found and found[-1][1] == style:
            found[-1] = (found[-1][0] + character, style)
        else:
            found.append((character, style))
    return found


@pytest.mark.parametrize("mode", GRAMMARS)
def test_writers_have_colours_and_parts_have_styles(mode: str) -> None:
    grammar, painter = GRAMMARS[mode], Painter(mode)
    kinds = ["code", "answer"] if grammar.code else ["answer"]
    for kind in kinds:
        turn = grammar.render_turn(kind, "T", "C")  # type: ignore[arg-type]
        found = styles(painter.paint("model", turn))
        assert ("T", "italic green") in found
        assert any(text.strip() == "C" and style == {"code": "bold green", "answer": "reverse green"}[kind]
                   for text, style in found)  # fmt: skip
        assert all(("green" in style) and ("dim" in style) == ("<" in text) for text, style in found)
    assert styles(painter.paint("forced", grammar.stops[0])) == [(grammar.stops[0], "dim yellow")]
    assert painter.paint("environment", "<code>").style == "cyan"
    assert painter.paint("prompt", "<code>").style == "dim"


@given(data=st.data())
def test_text_in_pieces_looks_like_the_whole(data: st.DataObject) -> None:
    words = st.sampled_from([*GRAMMARS["agentic"].tags, "</", "<", "st", "a", "</STEP>", "\n", "é"])
    text = "".join(data.draw(st.lists(words, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole, painter = Painter("agentic").paint("model", text), Painter("agentic")
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    painted = [painter.paint("model", piece, more=index < len(cuts)) for index, piece in enumerate(pieces)]
    assert styles(Text().join(painted)) == styles(whole)
    assert whole.plain == text


def test_text_does_not_control_the_terminal() -> None:
    for writer in ("model", "environment"):
        painted = Painter("datamind").paint(writer, "a\x1b[2J\rb\x9b31m\tc\n")  # type: ignore[arg-type]
        assert painted.plain == "a␛[2J␍b\ufffd31m\tc\n"


def save(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def test_show_finds_a_record_and_makes_its_notebook(records: list[dict[str, object]], tmp_path: Path) -> None:
    path = save(tmp_path / "some.jsonl", *records)
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    show([str(path)], console)
    everything = console.export_text()
    assert all(f"answered '{answer}'" in everything for answer in "789")
    show([str(path), "--index", "2"], console)
    assert "answered '9'" in (text := console.export_text())
    assert "answered '7'" not in text
    show([str(path), "--index", "1", "--notebook", str(tmp_path / "n.ipynb")], console)
    notebook = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.groupwise.answer == "8"
    assert any(cell.source == "print(8)  # \u2028." for cell in notebook.cells)


def test_mistakes_end_with_one_sentence(
    records: list[dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = str(save(tmp_path / "good.jsonl", *records))
    words = {key: value for key, value in records[0].items() if key != "executions"}
    out = str(tmp_path / "n.ipynb")
    (tmp_path / "text.jsonl").write_text("no json\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\n")
    mistakes = [
        ([str(tmp_path / "none.jsonl")], "cannot be read"),
        ([str(tmp_path / "binary.jsonl")], "line 1 is no trajectory"),
        ([str(tmp_path / "text.jsonl")], "line 1 is no trajectory"),
        ([str(save(tmp_path / "list.jsonl", records[0], [1]))], "line 2 is no trajectory"),
        ([str(save(tmp_path / "other.jsonl", records[0], {"task": {}}))], "lacks 'advantage'"),
        ([good, "--index", "3"], "holds the records 0 to 2"),
        ([good, "--index", "-1"], "holds the records 0 to 2"),
        ([good, "--notebook", out], "name it by --index"),
        ([good, "--index", "0", "--notebook", str(tmp_path / "none" / "n.ipynb")], "cannot be written"),
        ([str(save(tmp_path / "words.jsonl", words)), "--notebook", out], "lacks 'executions'"),
    ]
    for arguments, sentence in mistakes:
        monkeypatch.setattr(sys, "argv", ["show", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(show)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence in error
        assert error.count("\n") == 1
    assert not Path(out).exists()
