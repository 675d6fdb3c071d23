"""Demonstrations: the scripted teacher in full detail, which writes varied programs and reacts to what they print.

One code turn a step, sometimes a look at the table before, and mistakes at any step: errors of many kinds, and programs
that run and compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from random import Random

import numpy as np

from ...rewards.answer import answer_correct
from ..asking.questions import DECIMALS, Step
from ..tables import kind
from ..tasks import Problem
from ..taxonomy import TASK_TYPES
from .mistakes import Mistake, python_mistakes
from .programs import Chunk, Writer
from .script import Abandoned, Outcome, Script, Turn

LOOK = 0.3  # share of the trajectories that look at the table first
UNNOTICED = 0.5  # share of the failures that end with a wrong result instead of errors
OPENINGS = (
    "{T}", "{T}", "{T}", "What I need: {t}", "The question asks for this: {t}", "Plan: {t}",
    "The task comes down to this: {t}",
)  # fmt: skip
NEXT = (
    "{name} is {value}. Next: {t}", "That gives {value}. Now: {t}", "{value}. {T}", "So {name} = {value}. Then: {t}",
)  # fmt: skip
LOOKS = (
    "I look at the table first.", "First a look at the data.", "Let me see what the columns hold.",
    "Before computing anything I check the data.",
)  # fmt: skip
LOOKED = ("The columns are as expected. {T}", "The table is clear. {T}", "Now the computation: {t}", "{T}")
NOTICED = (
    "That is the {what}, which is not what was asked for. {T}",
    "Wait: this is the {what}. Needed: {t}",
    "{value} does not look right: the line computes the {what}. Again: {t}",
    "Checking the line: it gives the {what}. {T}",
)
READ = (
    "The output is the answer.", "That answers the question.", "The result is {value}.", "So the answer is {value}.",
    "The code printed {value}, the answer.",
)  # fmt: skip
GIVE_UP = ("I cannot find out.", "This does not work; I stop here.", "I have no way to get the number.", "I give up.")
UNKNOWN = ("unknown", "I could not find the answer.", "not available")
NUMBERS = ("{}", "{}", "{}", "The answer is {}.", "It is {}.", "The result is {}.")
VERDICTS = {"yes": ("yes", "yes", "Yes", "Yes, that is true."), "no": ("no", "no", "No", "No, that is not so.")}


def demonstrate(problem: Problem, stratum: str, rng: Random) -> Script:
    """The turns of one trajectory about a table; see `teachers.scripted`."""
    if problem.question.steps:
        return _Demonstration(problem, stratum, rng).turns()
    return _from_description(problem, stratum, rng)


def _from_description(problem: Problem, stratum: str, rng: Random) -> Script:
    question = problem.question
    if stratum == "failure":
        yield Turn("answer", rng.choice(GIVE_UP), rng.choice(UNKNOWN), mistake=True)
        return
    pattern = rng.choice((*OPENINGS, "The description says it. {T}", "No code is needed. {T}"))
    yield Turn("answer", phrased(pattern, question.thought), question.answer)


def phrased(pattern: str, sentence: str, **words: str) -> str:
    """`pattern` with a sentence in it: `{T}` as it is, `{t}` with a small first letter."""
    small = sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence
    parts = {"T": sentence, "t": small, **words}
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], pattern)


class _Demonstration:
    """One trajectory in the making."""

    def __init__(self, problem: Problem, stratum: str, rng: Random) -> None:
        self.problem, self.stratum, self.rng = problem, stratum, rng
        self.steps = problem.question.steps
        self.writer = Writer(problem.view.file, self.steps, rng)
        self.at = rng.randrange(len(self.steps))  # the step with the mistake
        self.header = self.writer.header()  # "" once the table is read

    def turns(self) -> Script:
        thought = phrased(self.rng.choice(OPENINGS), self.steps[0].thought) + self._fact()
        if self.rng.random() < LOOK:
            thought = yield from self._look()
        unnoticed = self.stratum == "failure" and self.rng.random() < UNNOTICED
        wrong, value = False, ""
        for index, step in enumerate(self.steps):
            chunk = self._chunk(step)
            if index == self.at:
                if unnoticed:
                    chunk, wrong = self._slip(step)[0], True
                elif self.stratum == "failure":
                    yield from self._fail(step, chunk, thought)
                    return
                elif self.stratum == "corrected":
                    thought = yield from self._err(step, chunk, thought)
                elif self.stratum == "self_corrected":
                    thought = yield from self._notice(step, thought)
                    chunk = self._chunk(step)
            outcome = yield Turn("code", thought, chunk.code, mistake=wrong)
            if not outcome.ok and wrong:
                yield self._give_up()
                return
            if not outcome.ok:
                raise Abandoned("right code failed")
            self.header, value = "", chunk.value(outcome.output)
            if index + 1 < len(self.steps):
                after = self.steps[index + 1].thought
                thought = phrased(self.rng.choice(NEXT), after, name=step.name, value=_plain(value))
        answer = self._answer(value)
        if wrong and answer_correct(answer, self.problem.task):
            yield from self._fail(self.steps[-1], self._chunk(self.steps[-1]), "Let me check this in another way.")
            return
        yield Turn("answer", phrased(self.rng.choice(READ), "", value=_plain(value)), answer, mistake=wrong)

    # ---- turns -----------------------------------------------------------------------------------------------------

    def _look(self) -> Generator[Turn, Outcome, str]:
        code = f"{self.header}\n{self.writer.look(self.problem.question.columns)}"
        outcome = yield Turn("code", self.rng.choice(LOOKS), code)
        if not outcome.ok:
            raise Abandoned("right code failed")
        self.header = ""
        return phrased(self.rng.choice(LOOKED), self.steps[0].thought)

    def _err(self, step: Step, chunk: Chunk, thought: str) -> Generator[Turn, Outcome, str]:
        """One error or two; the thought that corrects the last."""
        for mistake in self._mistakes(step, chunk, 2 if self.rng.random() < 0.15 else 1):
            outcome = yield Turn("code", thought, mistake.code, mistake=True)
            if outcome.ok:
                raise Abandoned("mistake did not fail")
            thought = mistake.lesson
        return thought

    def _notice(self, step: Step, thought: str) -> Generator[Turn, Outcome, str]:
        """A program that runs and computes something else; the thought that notices."""
        chunk, what = self._slip(step)
        outcome = yield Turn("code", thought, chunk.code, mistake=True)
        if not outcome.ok:
            raise Abandoned("slip failed")
        self.header, value = "", chunk.value(outcome.output)
        if _same(value, step):
            raise Abandoned("slip gives the right result")
        return phrased(self.rng.choice(NOTICED), step.thought, what=what, value=_plain(value))

    def _fail(self, step: Step, chunk: Chunk, thought: str) -> Script:
        for mistake in self._mistakes(step, chunk, self.rng.choice((1, 2, 2, 3))):
            outcome = yield Turn("code", thought, mistake.code, mistake=True)
            if outcome.ok:
                raise Abandoned("mistake did not fail")
            thought = mistake.lesson
        yield self._give_up()

    def _give_up(self) -> Turn:
        return Turn("answer", self.rng.choice(GIVE_UP), self.rng.choice(UNKNOWN), mistake=True)

    # ---- what stands in them ---------------------------------------------------------------------------------------

    def _chunk(self, step: Step, form: str = "") -> Chunk:
        return self.writer.chunk(step, form=form, header=self.header, keep=len(self.steps) > 1)

    def _slip(self, step: Step) -> tuple[Chunk, str]:
        """A program that computes something else, and what that is."""
        slips = list(step.slips)
        others = [name for name in self.problem.sheet.roles.numeric if name not in step.columns]
        place = re.compile(r'"([^"\n]+)"\]\.(?=(?:mean|median|sum|max|min|std|count|var)\(\))')
        form = step.forms[0]
        if others and len(set(place.findall(form))) == 1 and "] - " not in form:
            other, name = self.rng.choice(others), place.findall(form)[0]
            code = place.sub(lambda _: f'"{other}"].', form)
            slips.append((f'number for "{other}", while "{name}" was meant', code))
        what, code = self.rng.choice(slips)
        return self._chunk(step, form=code), what

    def _mistakes(self, step: Step, chunk: Chunk, count: int) -> list[Mistake]:
        frame = self.problem.sheet.frame
        kinds = {str(name): kind(frame[name]) for name in frame}
        texts = [name for name in kinds if kinds[name] == "text"]
        found = python_mistakes(chunk.code, self.writer.frame, step.columns, kinds, texts, self.rng)
        if not found:
            raise Abandoned("no mistake fits")
        return self.rng.sample(found, min(count, len(found)))

    def _fact(self) -> str:
        """A sentence about the columns or a piece of the type's advice, now and then."""
        draw, frame, columns = self.rng.random(), self.problem.sheet.frame, self.steps[0].columns
        if draw < 0.15:
            return " " + self.rng.choice(TASK_TYPES[self.problem.question.task_type].workflow)
        if draw < 0.4 and columns:
            name = self.rng.choice(columns)
            gaps = int(frame[name].isna().sum())
            values = f", {gaps} of its {len(frame)} values missing" if gaps else ", without missing values"
            return f' "{name}" is of type {kind(frame[name])}{values}.'
        if draw < 0.5:
            return f" The table has {len(frame)} rows and {len(frame.columns)} columns."
        return ""

    def _answer(self, value: str) -> str:
        step = self.steps[-1]
        if step.shape in ("number", "count"):
            return self.rng.choice(NUMBERS).format(_plain(value))
        if step.shape == "check":
            word = "yes" if value in ("True", "yes") else "no"
            return self.rng.choice(VERDICTS[word])
        return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    """A printed number as an answer writes it: at most DECIMALS places, no exponent; other text as it is."""
    number = _number(text)
    if number is None or not np.isfinite(number):
        return text
    return np.format_float_positional(round(number, DECIMALS), trim="-")


def _same(value: str, step: Step) -> bool:
    """Whether a printed value is the step's result."""
    if step.shape == "check":
        return (value in ("True", "yes")) == (step.answer == "yes")
    first, second = _number(value), _number(step.answer)
    if first is None or second is None:
        return value == step.answer
    return abs(first - second) <= 0.5 * 10**-DECIMALS
