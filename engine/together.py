"""What fails on one rank fails on all: an action of every rank, with one outcome."""

from collections.abc import Callable
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
