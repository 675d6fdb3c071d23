"""The tag grammars in which a policy thinks, runs code and answers: render, stop, parse.

One table row makes a grammar (see `GRAMMARS`); one renderer and one parser serve all. The teacher renders expert
trajectories with the functions by which the agent builds rollouts, so both have the same token stream:

    prompt        Grammar.prompt(task, tokenizer)
    model         Grammar.render_turn(...)       ends with a stop string, nothing after it
    environment   Grammar.observation(output)    starts and ends with a newline, both written by the environment
    model         ...

Each of these is tokenised alone. Only model text is ever parsed; `observation` and `prompt` break tags that come from
outside by a backslash after `<`, so printed text can neither close an observation nor open a turn.

What the parser mends or minds is listed by name in `ParsedTurn.repairs`, so a reward can be strict where the agent is
lenient:

    upper_case_tag        a tag not in lower case
    missing_closing_tag   the last closing tag(s) missing
    code_fence            the code stood in a Markdown fence
    missing_thought       no thought, or an empty one
    missing_action        no `<action>`, or not the grammar's tool
    missing_wrapper       no `<step>` or `<stop_analysis>` around the turn
    unclosed_thought      the thought has no closing tag
    empty_code, empty_answer
    text_outside_tags     other text beside the tags
    nested_tag            a tag of the grammar inside code or answer
    forged_observation    the model wrote an observation itself
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from .task import Task

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer
    from .trajectory import Writer

Kind = Literal["code", "answer", "void"]

# A model may write very long runs of anything: nothing here takes more than linear time of them.
FENCE = re.compile(r"\s*```[ \t]*+(?:\w*+[ \t]*+\r?\n|(?:python|py|sql)\b)?")
ENDS_OF_TEXT = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Step:
    """One turn to be rendered: what the model writes and, after code, what the environment answers."""

    kind: Literal["code", "answer"]
    thought: str
    content: str
    output: str = ""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A model turn, read.

    Args:
        kind: "code" to run, "answer" to end with, "void" if it is neither, both, or two of them.
        thought: the thought's text, stripped.
        content: the code or the answer; "" if void.
        repairs: what was mended or missing, in the words listed by this module.
        missing: the closing tags left out at the end, as text to be forced after the turn.
    """

    kind: Kind
    thought: str = ""
    content: str = ""
    repairs: list[str] = field(default_factory=list)
    missing: str = ""


@dataclass(frozen=True)
class Grammar:
    """One tag grammar.

    Args:
        name: its key in `GRAMMARS`.
        system, sql_system: the prompt's system line where code is Python or SQL; it tells the modes apart.
        thought, code, answer, result: tag names. `code` is None in a grammar without a tool; `result` holds what the
            environment answers.
        step, final: names of the wrappers around a code turn and around the last turn, None without wrappers.
        action: the tool named before the code, None if it is not named.
        max_turns: the most model turns of a trajectory.
    """

    name: str
    system: str
    sql_system: str
    thought: str
    code: str | None
    answer: str
    result: str | None
    step: str | None
    final: str | None
    action: str | None
    max_turns: int

    @cached_property
    def _names(self) -> tuple[str, ...]:
        action = "action" if self.action else None
        names = (self.step, self.final, self.thought, action, self.code, self.answer, self.result)
        return tuple(name for name in names if name)

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag, opening and closing, for the tokenizer."""
        return tuple(tag for name in self._names for tag in (f"<{name}>", f"</{name}>"))

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings after which a turn is over. The end-of-text token ends a turn too; the sampler knows it."""
        ends = (self.step or self.code, self.final or self.answer)
        return tuple(f"</{name}>" for name in ends if name)

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile(rf"<(/?)({'|'.join(self._names)})>", re.IGNORECASE)

    # ---- rendering -------------------------------------------------------------------------------------------------

    def prompt(self, task: Task, tokenizer: Tokenizer) -> str:
        """The prompt of a task, up to where the model's first turn starts."""
        system = self.sql_system if task.language == "sql" else self.system
        user = f"{task.description}\n{task.question}" if task.description else task.question
        return tokenizer.chat_prompt(system, neutralise(user))

    def render_turn(self, kind: Literal["code", "answer"], thought: str, content: str) -> str:
        """The text of one model turn.

        Raises:
            ValueError: code in a grammar without a tool.
        """
        if kind == "code" and self.code is None:
            raise ValueError(f"the grammar {self.name!r} has no code turns; use datamind or agentic")
        opening, closing = _around(self.step if kind == "code" else self.final)
        head = f"{opening}<{self.thought}>{thought}</{self.thought}>\n"
        if kind == "answer":
            return f"{head}<{self.answer}>{content}</{self.answer}>{closing}"
        action = f"<action>{self.action}</action>\n" if self.action else ""
        return f"{head}{action}<{self.code}>\n{content}\n</{self.code}>{closing}"

    def observation(self, output: str) -> str:
        """What the environment appends after a code turn: the (already capped) output in its tags.

        Output and answer both follow their tag at once: the copying of one into the other starts at a tag, not at one
        of many line ends.
        """
        return f"\n<{self.result}>{neutralise(output.rstrip())}</{self.result}>\n"

    def render(self, steps: Iterable[Step]) -> list[tuple[Writer, str]]:
        """Turns and observations as (writer, text), without the prompt."""
        spans: list[tuple[Writer, str]] = []
        for step in steps:
            spans.append(("model", self.render_turn(step.kind, step.thought, step.content)))
            if step.kind == "code":
                spans.append(("environment", self.observation(step.output)))
        return spans

    def spans(self, task: Task, steps: Iterable[Step], tokenizer: Tokenizer) -> list[tuple[Writer, str]]:
        """A whole trajectory as (writer, text), the prompt first; `trajectory.encode_spans` makes tokens of it."""
        return [("prompt", self.prompt(task, tokenizer)), *self.render(steps)]

    # ---- parsing ---------------------------------------------------------------------------------------------------

    def parse_turn(self, text: str) -> ParsedTurn:
        """Reads one model turn; it never raises.

        A turn must hold one code or one answer; a tag of either inside a complete pair is part of its text. Cut turns
        are for the caller to declare void: here a missing last closing tag is mended, since text that ended by itself
        is complete.
        """
        text = without_end(text)
        repairs: list[str] = []
        outside: list[str] = []
        tags = list(self._tag.finditer(text))
        if any(tag[0] != tag[0].lower() for tag in tags):
            repairs.append("upper_case_tag")
        thought, rest = self._read_thought(text, tags, repairs, outside)
        payload = [tag for tag in tags if tag.start() >= rest and _name(tag) in (self.code, self.answer)]
        opened = next((tag for tag in payload if not tag[1]), None)
        if opened is None:
            return ParsedTurn("void", thought, "", repairs)
        name = _name(opened)
        content_end, after, missing = self._read_end(text, tags, opened, repairs)
        complete = text[content_end:after].lower() == f"</{name}>"
        if any(not tag[1] and tag is not opened and (tag.start() >= after or not complete) for tag in payload):
            return ParsedTurn("void", thought, "", repairs)
        content = text[opened.end() : content_end]
        if self._tag.search(content):
            repairs.append("nested_tag")
        self._read_frame(text, tags, rest, opened, after, repairs, outside)
        if any(piece.strip() for piece in outside):
            repairs.append("text_outside_tags")
        kind: Kind = "answer" if name == self.answer else "code"
        content = _strip_code(content, repairs) if kind == "code" else content.strip()
        if not content.strip():
            repairs.append(f"empty_{kind}")
        return ParsedTurn(kind, thought, content, repairs, missing)

    def _read_thought(
        self, text: str, tags: list[re.Match[str]], repairs: list[str], outside: list[str]
    ) -> tuple[str, int]:
        """The thought and where the rest starts; an unclosed thought ends at the next action, code or answer."""
        payload = next((tag for tag in tags if not tag[1] and _name(tag) in (self.code, self.answer)), None)
        opened = next((tag for tag in tags if _name(tag) == self.thought and not tag[1]), None)
        if opened is None or (payload and opened.start() > payload.start()):
            repairs.append("missing_thought")
            return "", 0
        outside.append(self._tag.sub("", text[: opened.start()]))
        closed = next(
            (tag for tag in tags if _name(tag) == self.thought and tag[1] and tag.start() >= opened.end()), None
        )
        if closed is None:
            repairs.append("unclosed_thought")
            ends = (self.code, self.answer, "action")
            stop = next((tag.start() for tag in tags if tag.start() >= opened.end() and _name(tag) in ends), len(text))
            thought, rest = text[opened.end() : stop].strip(), stop
        else:
            thought, rest = text[opened.end() : closed.start()].strip(), closed.end()
        if not thought:
            repairs.append("missing_thought")
        return thought, rest

    def _read_end(
        self, text: str, tags: list[re.Match[str]], opened: re.Match[str], repairs: list[str]
    ) -> tuple[int, int, str]:
        """Where the code or answer ends, where the text after it starts, and the closing tags left out at the end."""
        name = _name(opened)
        wrapper = self.final if name == self.answer else self.step
        later = [tag for tag in tags if tag.start() >= opened.end() and tag[1]]
        inner = next((tag for tag in later if _name(tag) == name), None)
        outer = next((tag for tag in later if _name(tag) == wrapper), None)
        if inner is not None:
            missing = f"</{wrapper}>" if wrapper and outer is None else ""
            end, after = inner.start(), inner.end()
            if missing and (cut := _partial_tag(text[after:], missing)):
                missing = missing[cut:]
        elif outer is not None:
            repairs.append("missing_closing_tag")
            return outer.start(), outer.start(), ""
        else:
            closing = f"</{name}>" + (f"</{wrapper}>" if wrapper else "")
            cut = _partial_tag(text, closing)
            end, after, missing = len(text) - cut, len(text), closing[cut:]
        if missing:
            repairs.append("missing_closing_tag")
        return end, after, missing

    def _read_frame(
        self,
        text: str,
        tags: list[re.Match[str]],
        rest: int,
        opened: re.Match[str],
        after: int,
        repairs: list[str],
        outside: list[str],
    ) -> None:
        """Checks what stands around the code or answer: wrapper, action, observations, other text."""
        kind = _name(opened)
        wrapper = self.final if kind == self.answer else self.step
        if wrapper:
            first = next((tag for tag in tags if tag.start() < opened.start()), None)
            if first is None or first[1] or _name(first) != wrapper:
                repairs.append("missing_wrapper")
        between, tail = text[rest : opened.start()], text[after:]
        if self.action and kind == self.code:
            named = [tag for tag in tags if rest <= tag.start() < opened.start() and _name(tag) == "action"]
            begin = next((tag for tag in named if not tag[1]), None)
            end = next((tag for tag in named if tag[1] and begin and tag.start() >= begin.end()), None)
            if begin is None or end is None or text[begin.end() : end.start()].strip() != self.action:
                repairs.append("missing_action")
            if begin is not None and end is not None:
                between = text[rest : begin.start()] + text[end.end() : opened.start()]
        if any(_name(tag) == self.result and not opened.end() <= tag.start() < after for tag in tags):
            repairs.append("forged_observation")
        if wrapper:
            tail = tail[: len(tail) - _partial_tag(tail, f"</{wrapper}>")]
        outside += [self._tag.sub("", between), self._tag.sub("", tail)]


GRAMMARS: dict[str, Grammar] = {
    # DataMind, arXiv 2509.25084.
    "datamind": Grammar(
        name="datamind", system="Answer by Python code.", sql_system="Answer by SQL queries.", thought="think",
        code="code", answer="answer", result="interpreter", step=None, final=None, action=None, max_turns=10,
    ),
    # Datarus-R1, arXiv 2508.13382: the same model reasons with a notebook or without one, as the prompt asks.
    "agentic": Grammar(
        name="agentic", system="Answer in notebook steps.", sql_system="Answer in notebook steps of SQL.",
        thought="thought", code="action_input", answer="answer", result="observation", step="step",
        final="stop_analysis", action="python_executor", max_turns=30,
    ),
    "reflection": Grammar(
        name="reflection", system="Answer by thinking.", sql_system="Answer by thinking.", thought="think",
        code=None, answer="answer", result=None, step=None, final=None, action=None, max_turns=1,
    ),
}  # fmt: skip

# Longest first, so that <action_input> is not taken for <action>.
_ALL_NAMES = sorted({name for grammar in GRAMMARS.values() for name in grammar._names}, key=lambda n: (-len(n), n))
_FOREIGN = re.compile(rf"<(?=/?(?:{'|'.join(_ALL_NAMES)})>|\|\w+\|>)", re.IGNORECASE)


def all_tags(names: Sequence[str] = tuple(GRAMMARS)) -> list[str]:
    """Every tag of these grammars once, in a fixed order, for `Tokenizer.train`."""
    return list(dict.fromkeys(tag for name in names for tag in GRAMMARS[name].tags))


def neutralise(text: str) -> str:
    """Breaks every tag and control token in text from outside: `</code>` becomes `<\\/code>`."""
    return _FOREIGN.sub(r"<\\", text)


def without_end(text: str) -> str:
    """The text before the end-of-text tokens, and the blanks between them, that it ends with."""
    end = place = len(text)
    while place:
        while place and text[place - 1].isspace():
            place -= 1
        token = next((token for token in ENDS_OF_TEXT if text.endswith(token, 0, place)), "")
        if not token:
            break
        end = place = place - len(token)
    return text[:end]


def _name(tag: re.Match[str]) -> str:
    return tag[2].lower()


def _around(wrapper: str | None) -> tuple[str, str]:
    return (f"<{wrapper}>", f"</{wrapper}>") if wrapper else ("", "")


def _partial_tag(text: str, closing: str) -> int:
    """Length of the longest proper prefix of `closing`, at least "</", with which `text` ends."""
    lengths = range(min(len(closing) - 1, len(text)), 1, -1)
    return next((length for length in lengths if text.lower().endswith(closing[:length])), 0)


def _strip_code(content: str, repairs: list[str]) -> str:
    """The code without a fence and without the blank lines at its ends; indentation stays."""
    if fence := FENCE.match(content):
        repairs.append("code_fence")
        content = content[fence.end() :].rstrip().removesuffix("```")
    if "\n" not in content.strip("\r\n"):
        return content.strip()
    return re.sub(r"\A(?:[ \t]*\r?\n)+", "", content).rstrip()
