"""A task: one question about some tables, with the answer that is known to be right."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ..engine.errors import UserError
from .sandbox.job import Language

MODES = ("datamind", "agentic", "reflection")
# How an answer is compared, see `rewards.answer`; "free" is free text, for a judge.
ANSWER_TYPES = ("number", "choice", "text", "named", "table", "ordered_table", "free")


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Args:
        id: unique in its data set; it names the task in records and seeds its random stream.
        question: what is asked, in words.
        files: absolute paths; the code sees each under its basename in its working folder.
        description: the tables' metadata as text, shown in front of the question.
        answer: the right answer, as text; a table as CSV with a header.
        answer_type: how an answer is compared, one of `ANSWER_TYPES`.
        task_type: one of the eighteen types of `data.taxonomy`.
        mode: the grammar that the prompt asks for, one of `MODES`.
        table: the name of the table, by which training and evaluation are kept apart.
        language: of the code that the prompt asks for, "python" or "sql".
    """

    id: str
    question: str
    files: tuple[str, ...]
    description: str
    answer: str
    answer_type: str
    task_type: str
    mode: str = "datamind"
    table: str = ""
    language: Language = "python"

    def __post_init__(self) -> None:
        for name, known in (("answer_type", ANSWER_TYPES), ("mode", MODES), ("language", get_args(Language))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"task {self.id!r} has {name} {value!r}; expected one of {', '.join(known)}")

    def to_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """The fields as JSON values; files below `folder`, an absolute path, relative to it."""
        return {**asdict(self), "files": [_relative(file, folder) for file in self.files]}

    @classmethod
    def from_dict(cls, record: dict[str, Any], folder: Path | None = None) -> Task:
        """The inverse of `to_dict`.

        Raises:
            UserError: a field is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        missing = known - record.keys() - {"mode", "table", "language"}
        if unknown := record.keys() - known:
            raise UserError(f"task has the unknown field {min(unknown)!r}; expected {', '.join(sorted(known))}")
        if missing:
            raise UserError(f"task lacks the field {min(missing)!r}; expected {', '.join(sorted(known))}")
        files = (str(folder / file) if folder else file for file in record["files"])
        return cls(**{**record, "files": tuple(files)})


def _relative(file: str, folder: Path | None) -> str:
    return str(Path(file).relative_to(folder)) if folder and Path(file).is_relative_to(folder) else file


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes one JSON object a line; with files in the list's folder or below, the folder can be moved."""
    folder = Path(path).absolute().parent
    lines = [json.dumps(task.to_dict(folder), ensure_ascii=False) + "\n" for task in tasks]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_tasks(path: str | Path) -> Iterator[Task]:
    """Reads what `write_tasks` wrote; a line that is no task raises `UserError` with its number."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Task.from_dict(json.loads(line), Path(path).absolute().parent)
            except (json.JSONDecodeError, TypeError, KeyError, UserError, AttributeError) as error:
                raise UserError(f"{path}, line {number} is not a task: {error}") from error
