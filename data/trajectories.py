"""Expert trajectories, and their lists on disk.

On disk a trajectory is a JSON line: `task` (its files relative to the list's folder, where they lie below it), `spans`
as [writer, text] pairs with writer "model" or "environment" (the prompt follows from the task), `stratum`, `grammar`,
`operation`, the number of the question's `wording`, `mistakes`, the indices of the spans in which the teacher is wrong
on purpose, and `failed`, those of the spans whose code ended with an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..rollout.grammar import GRAMMARS
from ..rollout.task import Task
from .teaching.attempts import Attempt

SHARDS = "experts-*.jsonl"


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
    def of(cls, task: Task, attempt: Attempt, stratum: str, operation: str = "", wording: int = 0) -> Expert:
        """An attempt as a trajectory in its task's grammar."""
        grammar = GRAMMARS[task.mode]
        spans: list[tuple[str, str]] = []
        mistakes, failed = [], []
        for turn, execution in zip(attempt.turns, (*attempt.executions, None), strict=True):
            if turn.mistake:
                mistakes.append(len(spans))
            if execution is not None and not execution.ok:
                failed.append(len(spans))
            spans.append(("model", grammar.render_turn(turn.kind, turn.thought, turn.content)))
            if execution is not None:
                spans.append(("environment", grammar.observation(execution.output)))
        return cls(task, tuple(spans), stratum, task.mode, operation, wording, tuple(mistakes), tuple(failed))

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
