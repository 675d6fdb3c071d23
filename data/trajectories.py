"""Expert trajectories: tasks worked through by a teacher, each piece of code executed for real.

On disk a trajectory is a JSON line: `task` (its files relative to the list's folder, where they lie below it), `spans`
as [writer, text] pairs with writer "model" or "environment" (the prompt follows from the task), `stratum`, `grammar`,
`operation`, the number of the question's `wording`, `mistakes`, the indices of the spans in which the teacher is wrong
on purpose, and `failed`, those of the spans whose code ended with an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..rollout.grammar import GRAMMARS
from ..rollout.task import Language, Task
from .teachers import Outcome, Script, Turn

SHARDS = "experts-*.jsonl"
MAX_OBSERVATION_CHARS = 10_000  # of one execution: Datarus-R1, arXiv 2508.13382


class Session(Protocol):
    """What executes the code of one trajectory, chunk after chunk; of those that fail nothing stays."""

    def submit(self, code: str) -> Future[Any]:
        """Start one execution; the result has `.ok` and `.output`."""
        ...

    def close(self) -> None:
        """Let go of what it keeps."""
        ...


class Runner(Protocol):
    """What opens sessions, from any thread: `rollout.sandbox.Sandbox` is one."""

    def open(self, files: tuple[str, ...], language: Language) -> Session:
        """A session over some files."""
        ...


@dataclass(frozen=True)
class Solution:
    """What a teacher wrote and read, and the answer at its end; see `Expert` for the fields."""

    spans: tuple[tuple[str, str], ...]
    mistakes: tuple[int, ...]
    failed: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class Expert:
    """An expert trajectory.

    Args:
        spans: (writer, text), without the prompt.
        wording: which of the operation's wordings the question is in, from 0.
        mistakes: indices of the spans in which the teacher is wrong on purpose.
        failed: indices of the spans whose code ended with an error.
    """

    task: Task
    spans: tuple[tuple[str, str], ...]
    stratum: str
    grammar: str
    operation: str = ""
    wording: int = 0
    mistakes: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()

    @classmethod
    def of(cls, task: Task, solution: Solution, stratum: str, operation: str = "", wording: int = 0) -> Expert:
        """A solution of a task."""
        return cls(task, solution.spans, stratum, task.mode, operation, wording, solution.mistakes, solution.failed)

    def to_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """The JSON form; `folder` as in `Task.to_dict`."""
        return {
            "task": self.task.to_dict(folder),
            "spans": [list(span) for span in self.spans],
            "stratum": self.stratum,
            "grammar": self.grammar,
            "operation": self.operation,
            "wording": self.wording,
            "mistakes": list(self.mistakes),
            "failed": list(self.failed),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], folder: Path | None = None) -> Expert:
        """The inverse of `to_dict`."""
        return cls(
            task=Task.from_dict(record["task"], folder),
            spans=tuple((str(writer), str(text)) for writer, text in record["spans"]),
            stratum=record["stratum"],
            grammar=record["grammar"],
            operation=record["operation"],
            wording=record["wording"],
            mistakes=tuple(record["mistakes"]),
            failed=tuple(record["failed"]),
        )


@dataclass
class _Writing:
    """A solution in the making."""

    task: Task
    spans: list[tuple[str, str]] = field(default_factory=list)
    mistakes: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def write(self, turn: Turn) -> None:
        if turn.mistake:
            self.mistakes.append(len(self.spans))
        text = GRAMMARS[self.task.mode].render_turn(turn.kind, turn.thought, turn.content)
        self.spans.append(("model", text))

    def observe(self, outcome: Outcome) -> None:
        if not outcome.ok:
            self.failed.append(len(self.spans) - 1)
        self.spans.append(("environment", GRAMMARS[self.task.mode].observation(cut(outcome.output))))


def follow(task: Task, script: Script, runner: Runner) -> Solution:
    """Has a teacher's turns written and its code executed, one after another, till its answer.

    Raises:
        Abandoned: the teacher gave up.
    """
    writing, session = _Writing(task), None
    try:
        turn = next(script)
        while turn.kind == "code":
            writing.write(turn)
            session = session or runner.open(task.files, task.language)
            outcome = session.submit(turn.content).result()
            writing.observe(outcome)
            turn = script.send(outcome)
    finally:
        script.close()
        if session is not None:
            session.close()
    writing.write(turn)
    return Solution(tuple(writing.spans), tuple(writing.mistakes), tuple(writing.failed), turn.content)


def cut(text: str, limit: int = MAX_OBSERVATION_CHARS) -> str:
    """A text of at most about `limit` characters: head and tail stay, a line between says how much is left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def write_experts(path: str | Path, experts: Iterable[Expert]) -> None:
    """Write trajectories as JSON lines: the whole file or, on any failure, nothing."""
    folder = Path(path).absolute().parent
    write_atomically(path, (to_line(expert, folder) for expert in experts))


def to_line(expert: Expert, folder: Path) -> str:
    """The line of a trajectory in a list that lies in `folder`, an absolute path."""
    return json.dumps(expert.to_dict(folder), ensure_ascii=False) + "\n"


def read_experts(path: str | Path) -> Iterator[Expert]:
    """Read what `write_experts` wrote: one list, or all shards of a folder.

    Raises:
        UserError: there is nothing, or a line is not a trajectory.
    """
    path = Path(path).absolute()
    files = sorted(path.glob(SHARDS)) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise UserError(f"{path} holds no trajectories; run groupwise.recipes.synthesize first.")
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Expert.from_dict(json.loads(line), file.parent)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{file}, line {number} is not a trajectory: {error}; synthesize again.") from error
