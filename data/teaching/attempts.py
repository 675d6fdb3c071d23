"""An attempt at a task: a teacher's script, played to its end, its code executed for real."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...rollout.agent import Executes, Runs
from ...rollout.sandbox import Execution
from ...rollout.task import Task
from .script import Script, Turn

MAX_OBSERVATION_CHARS = 10_000  # of one execution: Datarus-R1, arXiv 2508.13382


@dataclass(frozen=True)
class Attempt:
    """What a teacher did: its turns, and what came of the code of each but the last."""

    turns: tuple[Turn, ...]
    executions: tuple[Execution, ...]

    @property
    def answer(self) -> str:
        """What its last turn says."""
        return self.turns[-1].content


def play(script: Script, task: Task, sandbox: Executes) -> Attempt:
    """Runs a script to its end, its code in a session of its own. Of a long output head and tail are seen and kept.

    Args:
        script: not begun.
        task: whose files the code reads.
        sandbox: runs the code; several threads may play at once.

    Raises:
        Abandoned: the script came to no answer.
    """
    session: Runs | None = None
    executions: list[Execution] = []
    try:
        turns = [next(script)]
        while turns[-1].kind == "code":
            session = session or sandbox.open(task.files, task.language)
            execution = session.submit(turns[-1].content).result()
            executions.append(replace(execution, output=_cut(execution.output)))
            turns.append(script.send(executions[-1]))
    finally:
        script.close()
        if session is not None:
            session.close()
    return Attempt(tuple(turns), tuple(executions))


def _cut(output: str) -> str:
    if len(output) <= MAX_OBSERVATION_CHARS:
        return output
    half = MAX_OBSERVATION_CHARS // 2
    return f"{output[:half]}\n... {len(output) - 2 * half} characters left out ...\n{output[-half:]}"
