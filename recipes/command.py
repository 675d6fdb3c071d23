"""A recipe with flags instead of a configuration: how its arguments are read, and how it ends."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console

from ..engine.errors import UserError
from .run import INTERRUPTED, USER_ERROR


class Arguments(argparse.ArgumentParser):
    """A parser that shows a recipe's docstring as its help.

    Args:
        recipe: name of its module in this package.
        doc: the docstring.

    Raises:
        UserError: from ``parse_args``, in place of ending the process.
    """

    def __init__(self, recipe: str, doc: str | None) -> None:
        super().__init__(
            prog=f"python -m groupwise.recipes.{recipe}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_command(command: Callable[[Sequence[str], Console], object]) -> None:
    """Runs ``command(arguments, console)``; a mistake of the user ends it with one sentence and status 2."""
    try:
        command(sys.argv[1:], Console(highlight=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
