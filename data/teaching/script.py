"""A script: how a teacher speaks with whatever executes its code.

A teacher is a generator. It yields turns and is sent the outcome of each code turn; what its code prints is never made
up. A trajectory is made by driving one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol


class Outcome(Protocol):
    """The part of a sandbox's Execution that teachers read."""

    @property
    def ok(self) -> bool:
        """Whether the code ended without an error."""
        ...

    @property
    def output(self) -> str:
        """What the code printed, its error message included."""
        ...


@dataclass(frozen=True)
class Turn:
    """One turn of a teacher; `mistake` marks one that is wrong on purpose, which a student need not imitate."""

    kind: Literal["code", "answer"]
    thought: str
    content: str
    mistake: bool = False


class Abandoned(Exception):
    """The execution did not go as the script needs; the trajectory is dropped for the reason given as the message."""


Script = Generator[Turn, Outcome, None]
