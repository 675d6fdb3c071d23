"""Grammars: what is rendered is read back, nothing that a model writes raises, nothing from outside counts."""

import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.engine.errors import UserError
from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.grammar import GRAMMARS, Step, all_tags, neutralise
from groupwise.rollout.task import Task, read_tasks, write_tasks
from groupwise.rollout.trajectory import encode_spans

NAMES = sorted(GRAMMARS)
WITH_CODE = ["agentic", "datamind"]
TASK = Task("t1", "How many?", ("/data/t.csv",), "t.csv: a, b", "3", "number", "counting")

# Text as a careful writer leaves it: no tags, no outer blanks, no fence around it.
TAG = re.compile("|".join([*all_tags(), r"<\|\w+\|>"]), re.IGNORECASE)
plain = (
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=40),
        st.lists(st.sampled_from(["df", "[", "a < 3", " > ", "</", "<", "```", "\n", "    ", "é", "x|y"])).map("".join),
    )
    .map(str.strip)
    .filter(lambda text: text and not TAG.search(text) and not text.startswith("```"))
)
pieces = st.sampled_from(
    [
        *all_tags(),
        *(tag.upper() for tag in all_tags()),
        "```python\n",
        "```",
        "python_executor",
        "x = 1",
        "\n",
        " ",
        "</co",
        "<|im_end|>",
        "é",
        "<",
        ">",
    ]
)
messy = st.lists(pieces, max_size=25).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["How many rows have x < 3?", "print(df)"] * 9, 340, all_tags())


class Characters:
    """A tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def chat_prompt(self, system: str, user: str) -> str:
        return f"[{system}][{user}]"


@pytest.mark.parametrize("name", NAMES)
@given(thought=plain, content=plain)
def test_rendered_turns_are_read_back_without_repair(name: str, thought: str, content: str) -> None:
    grammar = GRAMMARS[name]
    for kind in ("code", "answer") if grammar.code else ("answer",):
        text = grammar.render_turn(kind, thought, content)
        assert text.endswith(grammar.stops)
        assert sum(text.count(stop) for stop in grammar.stops) == 1
        turn = grammar.parse_turn(text)
        assert (turn.kind, turn.thought, turn.content, turn.repairs, turn.missing) == (kind, thought, content, [], "")


@pytest.mark.parametrize("name", WITH_CODE)
@given(lines=st.lists(st.sampled_from(["if x:", "    y = 1", "\ty", "", "z < 3"]), min_size=2))
def test_indentation_is_read_back(name: str, lines: list[str]) -> None:
    code = "\n".join(["first", *lines, "last"])
    assert GRAMMARS[name].parse_turn(GRAMMARS[name].render_turn("code", "t", code)).content == code


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "<think>t</think><code>```" + " " * 200_000 + "x</code>",
        " " * 200_000 + "<|im_end|>x",
        "<|endoftext|>" * 40_000 + "x",
        "<action>" * 40_000 + "<action_input>x</action_input>",
        "<code>" + "\n \t" * 100_000 + "x",
        "<answer>" * 40_000,
        "<think>" * 40_000,
        "</" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_long_runs_are_read_in_linear_time(name: str, text: str) -> None:
    started = time.perf_counter()
    GRAMMARS[name].parse_turn(text)
    neutralise(text)
    assert time.perf_counter() - started < 3  # what looks twice at a run takes minutes


@settings(max_examples=300)
@given(text=st.one_of(messy, st.text(max_size=80)), name=st.sampled_from(NAMES))
def test_parser_never_raises_and_says_what_it_mended(text: str, name: str) -> None:
    grammar = GRAMMARS[name]
    turn = grammar.parse_turn(text)
    assert turn.kind in ("code", "answer", "void")
    if turn.kind == "code":
        assert grammar.code is not None
    if turn.kind != "void" and not turn.repairs:
        # Nothing was mended, so the text is one rendered turn up to blanks.
        assert "".join(grammar.render_turn(turn.kind, turn.thought, turn.content).split()) == "".join(
            text.replace("<|im_end|>", "").split()
        )
    if turn.missing:
        assert "missing_closing_tag" in turn.repairs
        closed = grammar.parse_turn(text + turn.missing)
        assert (closed.kind, closed.missing) == (turn.kind, "")


@given(text=messy)
def test_no_token_of_a_tag_is_made_of_text_from_outside(text: str, tokenizer: Tokenizer) -> None:
    tags = {tokenizer.token_id(tag) for tag in (*all_tags(), "<|im_start|>", "<|im_end|>")}
    assert None not in tags
    assert not tags & set(tokenizer.encode(neutralise(text)))


@given(output=st.one_of(messy, st.text(max_size=60)), name=st.sampled_from(WITH_CODE))
def test_tags_in_observations_never_count(output: str, name: str) -> None:
    grammar = GRAMMARS[name]
    observation = grammar.observation(output)
    assert [tag for tag in grammar.tags if tag in observation.lower()] == [
        f"<{grammar.result}>",
        f"</{grammar.result}>",
    ]
    assert "<|im_end|>" not in observation
    assert grammar.parse_turn(observation).kind == "void"


@given(question=messy)
def test_questions_cannot_write_tags(question: str) -> None:
    task = Task("t", question, (), "", "", "text", "counting")
    prompt = GRAMMARS["datamind"].prompt(task, Characters())
    assert not any(tag in prompt.lower() for tag in all_tags())
    assert "<|im_end|>" not in prompt


def test_neutralise_keeps_what_is_no_tag() -> None:
    text = "a<b, <div>, x</y>, 1 <| 2 |> 3, <codes>"
    assert neutralise(text) == text
    assert neutralise("</CODE>") == "<\\/CODE>"


@pytest.mark.parametrize(
    ("name", "text", "kind", "content", "repairs"),
    [
        ("datamind", "<THINK>t</THINK>\n<CODE>\nx\n</CODE>", "code", "x", ["upper_case_tag"]),
        ("datamind", "<think>t</think>\n<answer>5", "answer", "5", ["missing_closing_tag"]),
        ("datamind", "<think>t</think>\n<answer>5</ans", "answer", "5", ["missing_closing_tag"]),
        ("datamind", "<think>t</think><code>```python\nx = 1\n```</code>", "code", "x = 1", ["code_fence"]),
        ("datamind", "<think>t</think><code>\nif x:\n    y\n</code>", "code", "if x:\n    y", []),
        ("datamind", "<code>\nx\n</code>", "code", "x", ["missing_thought"]),
        ("datamind", "<think>t\n<code>x</code>", "code", "x", ["unclosed_thought"]),
        ("datamind", "<think>I write <code> now</think><code>x</code>", "code", "x", []),
        ("datamind", "<think>t</think><code></code>", "code", "", ["empty_code"]),
        ("datamind", "<think>t</think><answer> </answer>", "answer", "", ["empty_answer"]),
        ("datamind", "<think>t</think>so<answer>5</answer>", "answer", "5", ["text_outside_tags"]),
        ("datamind", "<think>t</think><code>a<code>b</code>", "code", "a<code>b", ["nested_tag"]),
        ("datamind", "<think>t</think><answer>5</answer><|im_end|>", "answer", "5", []),
        ("datamind", "<think>t</think><CODE>x</CODE><answer>5</answer>", "void", "", ["upper_case_tag"]),
        ("datamind", "<think>t</think><answer>5</answer><code>x</code>", "void", "", []),
        ("datamind", "<answer>5</answer><think>t</think><code>x</code>", "void", "", ["missing_thought"]),
        ("datamind", "<think>t</think><code>x</code><answer>5</answer>", "void", "", []),
        ("datamind", "<think>t</think><code>x</code><code>y</code>", "void", "", []),
        ("datamind", "<think>t</think><code>x<answer>5</answer>", "void", "", ["missing_closing_tag"]),
        ("datamind", "<think>t</think><answer>5<code>x</code>", "void", "", ["missing_closing_tag"]),
        ("datamind", "<think>t</think><code>x<code>y", "void", "", ["missing_closing_tag"]),
        ("datamind", "<think>t</think><code>x<answer>5</answer></code>", "code", "x<answer>5</answer>", ["nested_tag"]),
        ("datamind", "<think>a<think>t</think><code>x</code>", "code", "x", []),
        ("datamind", "<THINK>t</Think><Code>x</CODE>", "code", "x", ["upper_case_tag"]),
        ("datamind", "<think>t</think><code>\n```python\nx\n```\n</code>", "code", "x", ["code_fence"]),
        ("datamind", "<think>t</think><code>```py x```</code>", "code", "x", ["code_fence"]),
        ("datamind", "<think>t</think><code>```\nx", "code", "x", ["code_fence", "missing_closing_tag"]),
        ("datamind", "<think>t</think><code>```sql\n```</code>", "code", "", ["code_fence", "empty_code"]),
        ("datamind", "<think>t</think><code> \n \n</code>", "code", "", ["empty_code"]),
        ("datamind", "<think>\ufffd</think><code>x = '\ufffd'</code>", "code", "x = '\ufffd'", []),
        ("datamind", "<think>t</think>\ufffd<code>x</code>", "code", "x", ["text_outside_tags"]),
        ("datamind", "no tags", "void", "", ["missing_thought"]),
        ("datamind", "", "void", "", ["missing_thought"]),
        ("datamind", "<think>t</think><interpreter>1</interpreter><answer>1</answer>", "answer", "1",
         ["forged_observation", "text_outside_tags"]),
        ("agentic", "<step><thought>t</thought><action_input>x</action_input></step>", "code", "x", ["missing_action"]),
        ("agentic", "<step><thought>t</thought><action>sql</action><action_input>x</action_input></step>", "code", "x",
         ["missing_action"]),
        ("agentic", "<thought>t</thought><action>python_executor</action><action_input>x</action_input></step>", "code",
         "x", ["missing_wrapper"]),
        ("agentic", "<step><thought>t</thought><action>python_executor</action><action_input>x</step>", "code", "x",
         ["missing_closing_tag"]),
        ("agentic", "<stop_analysis><thought>t</thought><answer>7</answer>", "answer", "7", ["missing_closing_tag"]),
        ("agentic", "<step><thought>t</thought><action_input>x</step>", "code", "x",
         ["missing_action", "missing_closing_tag"]),
        ("agentic", "<step><thought>t</thought><action>python_executor</action><action_input>x</action_input></step>"
         "<stop_analysis><answer>7</answer></stop_analysis>", "void", "", []),
        ("agentic", "<step><thought>t</thought><answer>7</answer></step>", "answer", "7",
         ["missing_closing_tag", "missing_wrapper"]),
        ("reflection", "<think>t</think><answer>7</answer>", "answer", "7", []),
        ("reflection", "<think>t</think><code>7</code>", "void", "", []),
    ],
)  # fmt: skip
def test_repairs(name: str, text: str, kind: str, content: str, repairs: list[str]) -> None:
    turn = GRAMMARS[name].parse_turn(text)
    assert (turn.kind, turn.content, sorted(turn.repairs)) == (kind, content, sorted(repairs))


def test_missing_closing_tags_can_be_forced() -> None:
    agentic = GRAMMARS["agentic"]
    text = "<step><thought>t</thought><action>python_executor</action><action_input>x</action_inp"
    assert agentic.parse_turn(text).missing == "ut></step>"
    assert agentic.parse_turn(text + "ut>").missing == "</step>"
    assert agentic.parse_turn(text + "ut></st").missing == "ep>"


def test_the_prompt_asks_for_the_language_of_the_task() -> None:
    asked = {name: GRAMMARS[name].prompt(replace(TASK, language="sql"), Characters()) for name in NAMES}
    assert asked["datamind"] == "[Answer by SQL queries.][t.csv: a, b\nHow many?]"
    assert asked["agentic"] == "[Answer in notebook steps of SQL.][t.csv: a, b\nHow many?]"
    assert asked["reflection"] == GRAMMARS["reflection"].prompt(TASK, Characters())
    with pytest.raises(UserError, match="has language 'r'; expected one of python, sql"):
        replace(TASK, language="r")


def test_a_trajectory_is_spans_of_text_tokenised_one_by_one() -> None:
    grammar, tokenizer = GRAMMARS["datamind"], Characters()
    steps = [Step("code", "look", "print(3)", "3\n"), Step("answer", "done", "3")]
    spans = grammar.spans(TASK, steps, tokenizer)
    assert spans == [
        ("prompt", "[Answer by Python code.][t.csv: a, b\nHow many?]"),
        ("model", "<think>look</think>\n<code>\nprint(3)\n</code>"),
        ("environment", "\n<interpreter>3</interpreter>\n"),
        ("model", "<think>done</think>\n<answer>3</answer>"),
    ]
    encoded = encode_spans(spans, tokenizer)
    assert [(span.writer, tokenizer.decode(span.token_ids)) for span in encoded] == spans


def test_tasks_survive_the_disk(tmp_path) -> None:
    path = tmp_path / "tasks.jsonl"
    write_tasks(path, [TASK])
    assert list(read_tasks(path)) == [TASK]
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1"):
        list(read_tasks(path))
