"""What fails on one rank fails on all: an action of every rank, with one outcome."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import UserError
from .mesh import Mesh

Value = TypeVar("Value")


def together(mesh: Mesh, action: Callable[[], Value]) -> list[Value]:
    """Run ``action`` on each rank, and return what it gave on each; a collective.

    Raises:
        UserError: on every rank, the one of the first rank whose action raised any.
    """
    try:
        outcome: tuple[str, Value | None] = "", action()
    except UserError as error:
        outcome = str(error), None
    outcomes = mesh.all_gather_object(outcome)
    failed = [sentence for sentence, _ in outcomes if sentence]
    if failed:
        raise UserError(failed[0])
    return [value for _, value in outcomes]


def check_shared(folder: Path, mesh: Mesh) -> None:
    """Refuse a folder that is another one on another host, as on a disk of its own; a collective.

    Args:
        folder: rank 0 can write there.
        mesh: the ranks.

    Raises:
        UserError: some rank does not see in it what rank 0 writes.
    """
    mark = folder / mesh.broadcast_object(f".seen-by-all-{uuid.uuid4().hex}")  # a name that no network disk knows yet
    if mesh.rank == 0:
        mark.touch()
    mesh.barrier()
    blind = [rank for rank, seen in enumerate(mesh.all_gather_object(mark.exists())) if not seen]
    if mesh.rank == 0:
        mark.unlink()
    if blind:
        raise UserError(
            f"{folder} of {mesh.watch.names([0])} is not the folder that {mesh.watch.names(blind)} would write to; "
            "put it on a disk that all hosts share."
        )
