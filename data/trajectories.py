"""Expert trajectories: problems worked through by a teacher, each piece of code executed for real.

On disk a trajectory is a JSON line: `task`, `spans` as [writer, text] pairs with writer "model" or "environment" (the
prompt follows from the task), `stratum`, `grammar`, `operation`, the number of the question's `wording`, and
`mistakes`, the indices of the spans in which the teacher is wrong on purpose.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..rewards.answer import answer_correct
from ..rollout.grammar import GRAMMARS
from ..rollout.task import Language, Task
from .tasks import Problem, shares_to_counts
from .teachers import STRATA, Abandoned, Outcome, Script, Turn, scripted

MAX_OBSERVATION_CHARS = 600
WINDOW = 64


class Session(Protocol):
    """What executes the code of one trajectory, chunk after chunk; of those that fail nothing stays."""

    def submit(self, code: str) -> Future[Any]:
        """Start one execution; the result has `.ok` and `.output`."""
        ...

    def close(self) -> None:
        """Let go of what it keeps."""
        ...


class Runner(Protocol):
    """What opens sessions: `rollout.sandbox.Sandbox` is one."""

    def open(self, files: Sequence[str], language: Language) -> Session:
        """A session over some files."""
        ...


@dataclass(frozen=True)
class Expert:
    """An expert trajectory.

    Args:
        spans: (writer, text), without the prompt.
        wording: which of the operation's wordings the question is in, from 0.
        mistakes: indices of spans.
    """

    task: Task
    spans: tuple[tuple[str, str], ...]
    stratum: str
    grammar: str
    operation: str
    wording: int = 0
    mistakes: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "task": self.task.to_dict(),
            "spans": [list(span) for span in self.spans],
            "stratum": self.stratum,
            "grammar": self.grammar,
            "operation": self.operation,
            "wording": self.wording,
            "mistakes": list(self.mistakes),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Expert:
        """The inverse of `to_dict`."""
        return cls(
            task=Task.from_dict(record["task"]),
            spans=tuple((str(writer), str(text)) for writer, text in record["spans"]),
            stratum=record["stratum"],
            grammar=record["grammar"],
            operation=record.get("operation", ""),
            wording=record["wording"],
            mistakes=tuple(record.get("mistakes", ())),
        )


@dataclass
class Report:
    """Counts of what was made: by task type, stratum, grammar and source table, and of what was dropped, by reason."""

    types: Counter[str] = field(default_factory=Counter)
    strata: Counter[str] = field(default_factory=Counter)
    grammars: Counter[str] = field(default_factory=Counter)
    tables: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Number of trajectories kept."""
        return self.strata.total()

    def add(self, expert: Expert) -> None:
        """Count one kept trajectory."""
        self.types[expert.task.task_type] += 1
        self.strata[expert.stratum] += 1
        self.grammars[expert.grammar] += 1
        self.tables[expert.task.table] += 1

    def to_dict(self) -> dict[str, Any]:
        """The counts with sorted keys, for JSON."""
        names = ("types", "strata", "grammars", "tables", "dropped")
        return {"count": self.count, **{name: dict(sorted(getattr(self, name).items())) for name in names}}


def assign_strata(problems: Sequence[Problem], shares: Mapping[str, float], seed: int) -> list[str]:
    """A stratum for each problem, in the given shares of all; problems without code can only succeed.

    Raises:
        UserError: an unknown stratum, or more mistakes asked for than there are problems with code.
    """
    if unknown := set(shares) - set(STRATA):
        raise UserError(f"unknown stratum {min(unknown)!r}; expected some of {', '.join(STRATA)}.")
    counts = shares_to_counts(shares, len(problems))
    faulty = [name for name, count in counts.items() if name != "success" for _ in range(count)]
    with_code = [index for index, problem in enumerate(problems) if problem.question.code]
    if len(faulty) > len(with_code):
        raise UserError(
            f"{len(faulty)} trajectories with mistakes were asked for, but only {len(with_code)} of {len(problems)} "
            "problems use code; raise the share of success or lower that of the reflection mode."
        )
    rng = Random(f"{seed}:strata")
    strata = ["success"] * len(problems)
    for index, name in zip(rng.sample(with_code, len(faulty)), faulty, strict=True):
        strata[index] = name
    return strata


@dataclass
class _Work:
    """One trajectory in the making."""

    problem: Problem
    stratum: str
    script: Script
    turn: Turn
    spans: list[tuple[str, str]] = field(default_factory=list)
    mistakes: list[int] = field(default_factory=list)
    session: Session | None = None  # from its first code on
    future: Future[Any] | None = None

    def write(self, turn: Turn) -> None:
        if turn.mistake:
            self.mistakes.append(len(self.spans))
        grammar = GRAMMARS[self.problem.task.mode]
        self.spans.append(("model", grammar.render_turn(turn.kind, turn.thought, turn.content)))

    def observe(self, outcome: Outcome) -> None:
        if len(outcome.output) > MAX_OBSERVATION_CHARS:
            raise Abandoned("long observation")
        self.spans.append(("environment", GRAMMARS[self.problem.task.mode].observation(outcome.output)))

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


def build_trajectories(
    problems: Sequence[Problem],
    runner: Runner,
    *,
    seed: int,
    strata: Mapping[str, float] = STRATA,
    on_done: Callable[[], None] | None = None,
) -> tuple[list[Expert], Report]:
    """Work through all problems, WINDOW of them at a time, and keep the trajectories that came out as they should.

    Args:
        problems: what to solve, one trajectory each.
        runner: executes the code; several executions are in flight at once.
        seed: the same seed and problems give the same trajectories, in the order of the problems.
        strata: shares of success, corrected, self_corrected and failure.
        on_done: called after each problem, for a progress bar.

    Returns:
        The trajectories and the counts. One whose answer is not the known one (or is, where the stratum is failure),
        whose mistake does not fail or whose observation is too long is dropped and counted.
    """
    waiting = deque(enumerate(zip(problems, assign_strata(problems, strata, seed), strict=True)))
    flying: deque[tuple[int, _Work]] = deque()
    finished: dict[int, Expert] = {}
    report = Report()
    try:
        while waiting or flying:
            while waiting and len(flying) < WINDOW:
                index, (problem, stratum) = waiting.popleft()
                script = scripted(problem, stratum, Random(f"{seed}:{problem.task.id}:teacher"))
                flying.append((index, _Work(problem, stratum, script, next(script))))
                _launch(flying[-1][1], runner)
            index, work = flying[0]
            try:
                expert = _advance(work, runner)
            except Abandoned as reason:
                report.dropped[str(reason)] += 1
            else:
                if expert is None:
                    flying.rotate(-1)
                    continue
                finished[index] = expert
            flying.popleft()
            work.close()
            if on_done:
                on_done()
    finally:
        for _, work in flying:
            work.close()
    experts = [finished[index] for index in sorted(finished)]
    for expert in experts:
        report.add(expert)
    return experts, report


def _launch(work: _Work, runner: Runner) -> None:
    work.write(work.turn)
    work.future = None
    if work.turn.kind == "code":
        if work.session is None:
            work.session = runner.open(work.problem.task.files, work.problem.task.language)
        work.future = work.session.submit(work.turn.content)


def _advance(work: _Work, runner: Runner) -> Expert | None:
    """Take the result of the turn in flight and start the next one; the trajectory once it is complete."""
    if work.future is not None:
        outcome = work.future.result()
        work.observe(outcome)
        work.turn = work.script.send(outcome)
        _launch(work, runner)
        return None
    if answer_correct(work.turn.content, work.problem.task) != (work.stratum != "failure"):
        raise Abandoned("failure with a right answer" if work.stratum == "failure" else "answer is not the known one")
    task, question = work.problem.task, work.problem.question
    return Expert(
        task,
        tuple(work.spans),
        work.stratum,
        task.mode,
        question.operation,
        question.wording,
        tuple(work.mistakes),
    )


def write_experts(path: str | Path, experts: Iterable[Expert]) -> None:
    """Write trajectories as JSON lines: the whole file or, on any failure, nothing."""
    write_atomically(path, (json.dumps(expert.to_dict(), ensure_ascii=False) + "\n" for expert in experts))


def read_experts(path: str | Path) -> Iterator[Expert]:
    """Read what `write_experts` wrote.

    Raises:
        UserError: the file is missing, or a line is not a trajectory.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Expert.from_dict(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{path}, line {number} is not a trajectory: {error}; synthesize again.") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run groupwise.recipes.synthesize first.") from error
