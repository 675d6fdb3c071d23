"""What the server is asked to run, as `client.py` sends it in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["python", "sql"]


@dataclass(frozen=True)
class Job:
    """One execution.

    Args:
        id: number of the execution, by which its result is known.
        code: the new chunk.
        history: the chunks before it that succeeded.
        files: absolute paths of the task's files.
        language: of the code.
        session: number of the session whose paused process is to go on; None for an execution that is on its own.
        packages: folder of installed packages, "" without.
    """

    id: int
    code: str
    history: list[str]
    files: list[str]
    language: Language = "python"
    session: int | None = None
    packages: str = ""

    @property
    def result_name(self) -> str:
        """The file in the working folder that takes a query's result."""
        return f"result_{len(self.history) + 1}.csv"
