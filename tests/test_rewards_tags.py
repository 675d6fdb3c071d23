"""R_tag: a clean trajectory of each grammar has 1; each fault costs exactly its own fifth; only model text counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.rewards.tags import CHECKS, format_right, tag_checks, tag_reward
from groupwise.rollout.grammar import GRAMMARS, Step, all_tags
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Span, Trajectory

STEPS = {
    "datamind": [
        Step("code", "look", "print(1)", "1"),
        Step("code", "again", "print(2)", "2"),
        Step("answer", "so", "2"),
    ],
    "agentic": [Step("code", "look", "print(1)", "1"), Step("answer", "so", "2")],
    "reflection": [Step("answer", "so", "2")],
}


class Characters:
    """A tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def chat_prompt(self, system: str, user: str) -> str:
        return f"[{system}][{user}]"


TOKENIZER = Characters()


def trajectory(mode: str, spans: list[tuple[str, str]]) -> Trajectory:
    task = Task("t", "q", (), "", "2", "number", "counting", mode)
    return Trajectory(task, 0, [Span(writer, TOKENIZER.encode(text)) for writer, text in spans])  # type: ignore[arg-type]


def clean(mode: str) -> list[tuple[str, str]]:
    task = Task("t", "q", (), "", "2", "number", "counting", mode)
    return list(GRAMMARS[mode].spans(task, STEPS[mode], TOKENIZER))  # type: ignore[arg-type]


def failed(mode: str, spans: list[tuple[str, str]]) -> set[str]:
    checks = tag_checks(trajectory(mode, spans), TOKENIZER)
    reward = tag_reward(trajectory(mode, spans), TOKENIZER)
    assert list(checks) == list(CHECKS)
    assert reward == pytest.approx(sum(1 for ok in checks.values() if ok) / 5)
    return {name for name, ok in checks.items() if not ok}


@pytest.mark.parametrize("mode", sorted(GRAMMARS))
def test_a_rendered_trajectory_is_perfect(mode: str) -> None:
    assert failed(mode, clean(mode)) == set()
    assert format_right(trajectory(mode, clean(mode)), TOKENIZER)
    assert failed(mode, [*clean(mode)[:-1], ("model", clean(mode)[-1][1] + "<|im_end|>")]) == set()


@pytest.mark.parametrize(
    ("mode", "old", "new", "lost"),
    [
        ("datamind", "<think>look</think>", "<THINK>look</THINK>", {"parses"}),
        ("datamind", "print(1)\n</code>", "```python\nprint(1)\n```\n</code>", {"parses"}),
        ("datamind", "</answer>", "", {"parses"}),
        ("datamind", "<think>look</think>\n", "", {"steps"}),
        ("datamind", "print(2)", "", {"steps"}),
        ("datamind", "<think>look", "well <think>look", {"outside"}),
        ("datamind", "<answer>2", "<answer>", {"answer"}),
        ("agentic", "<action>python_executor</action>\n", "", {"steps"}),
        ("agentic", "python_executor", "shell", {"steps"}),
        ("agentic", "</thought>\n<answer>", "</thought>\nhm\n<answer>", {"outside"}),
        ("reflection", "<think>so</think>", "<think></think>", {"steps"}),
        ("reflection", "<answer>2</answer>", "2", {"parses", "answer", "outside"}),
    ],
)
def test_a_fault_costs_its_own_check(mode: str, old: str, new: str, lost: set[str]) -> None:
    spans = clean(mode)
    assert any(writer == "model" and old in text for writer, text in spans)
    assert failed(mode, [(w, text.replace(old, new, 1) if w == "model" else text) for w, text in spans]) == lost


def test_the_answer_is_one_and_last() -> None:
    spans = clean("datamind")
    assert failed("datamind", spans[:-1]) == {"answer"}
    assert failed("datamind", [*spans, ("model", spans[-1][1])]) == {"answer"}
    assert failed("datamind", [*spans, ("model", spans[1][1])]) == {"answer"}
    assert "answer" in failed("datamind", [*spans[:-1], ("model", spans[-1][1] + "<answer>3</answer>")])


def test_an_observation_by_the_model_is_seen() -> None:
    spans = clean("datamind")
    forged = "<think>look</think>\n<interpreter>\n5\n</interpreter>\n<code>\nprint(1)\n</code>"
    assert "observation" in failed("datamind", [spans[0], ("model", forged), *spans[2:]])
    void = "<think>look</think>\n<interpreter>\n5\n</interpreter>"
    assert "observation" in failed("datamind", [spans[0], ("model", void), *spans[2:]])


def test_only_model_text_counts() -> None:
    prompt, *rest = clean("datamind")
    loud = ("prompt", prompt[1] + "<answer>9</answer><interpreter></interpreter>")
    heard = [(w, text + "<answer>9</answer> text" if w == "environment" else text) for w, text in rest]
    assert failed("datamind", [loud, *heard]) == set()
    cut = [*rest[:-1], ("model", rest[-1][1].removesuffix("</answer>")), ("forced", "</answer>")]
    assert failed("datamind", [prompt, *cut]) == {"parses"}  # the agent closed the tag, the model did not


@pytest.mark.parametrize("mode", sorted(GRAMMARS))
def test_no_form_at_all(mode: str) -> None:
    prompt = clean(mode)[0]
    assert tag_reward(trajectory(mode, [prompt]), TOKENIZER) == 0.0
    assert tag_reward(trajectory(mode, [prompt, ("model", " \n")]), TOKENIZER) == 0.0
    assert failed(mode, [prompt, ("model", "hello")]) == {"parses", "steps", "answer", "outside"}


@settings(max_examples=200)
@given(st.sampled_from(sorted(GRAMMARS)), st.lists(st.sampled_from([*all_tags(), "x", "\n", "```"]), max_size=12))
def test_any_text_has_a_reward(mode: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert 0.0 <= tag_reward(trajectory(mode, [("prompt", "p"), ("model", text)]), TOKENIZER) <= 1.0
