"""A recipe with flags instead of a configuration: how its arguments are read, and how it ends."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console

from ..engine.errors import UserError
from .run import DRY_RUN, INTERRUPTED, USER_ERROR


class Arguments(argparse.ArgumentParser):
    """A parser that shows a recipe's docstring as its help, and ends the process at ``--dry-run`` with status 0.

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
        self.add_argument(DRY_RUN, action="store_true", help="read the command line and do nothing")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The arguments; ends the process where they ask for a dry run."""
        options = super().parse_args(args)
        if options.dry_run:
            print("dry run: nothing was done")
            self.exit()
        return options

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
