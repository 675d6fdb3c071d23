"""Trajectories on disk: a line of JSON each, written as they end and once more when their rewards are known.

    with Recorder(file, tokenizer) as recorder:
        groups = run_agent(..., progress=recorder.add)
    ...                                      # rewards
    write_records(file, groups, tokenizer)

A line is ``Trajectory.to_record``. What ends a run leaves the lines of all trajectories that had ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from .trajectory import Group, Trajectory

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer


class Recorder:
    """Appends trajectories to a file that it starts anew, each of them on disk before the next one ends.

    Args:
        file: its folder is made if need be.
        tokenizer: that of the policy.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("w", encoding="utf-8")

    def add(self, trajectory: Trajectory) -> None:
        """Writes the line of a trajectory that has ended."""
        self._stream.write(_line(trajectory, self._tokenizer))
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def write_records(file: Path, groups: Iterable[Group], tokenizer: Tokenizer) -> None:
    """Replaces a file by the lines of whole groups in their order: the new file or, whatever happens, the old one."""
    write_atomically(file, (_line(found, tokenizer) for group in groups for found in group.trajectories))


def read_records(file: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file in its order; a last line that was cut off by a kill is left out.

    Raises:
        UserError: the file cannot be read, or a line is no record.
    """
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{file}, line {number} is no trajectory: {error}; remove the line") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a file of RUN/trajectories") from error


def _line(trajectory: Trajectory, tokenizer: Tokenizer) -> str:
    # Half of a surrogate pair, which no encoding has, stays an escape of JSON.
    text = json.dumps(trajectory.to_record(tokenizer), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
