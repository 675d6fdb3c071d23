"""Saved trajectories in the terminal, or one of them as a notebook.

    python -m groupwise.recipes.show RUN/trajectories/FILE.jsonl [--index N] [--notebook OUT.ipynb]

The file holds what ``Trajectory.to_record`` gives, one record a line. A mistake of the user ends it with one sentence
and status 2.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..engine.errors import UserError
from ..rollout.notebook import record_to_notebook, write_notebook
from ..rollout.record import read_records
from ..rollout.view import trajectory_panel
from .command import Arguments, run_command

VIEWED = frozenset({"task", "status", "answer", "reward", "rewards", "advantage", "spans"})


def show(argv: Sequence[str], console: Console) -> None:
    """Prints the records that a command line names, or saves one as a notebook.

    Raises:
        UserError: the file is missing or holds something else, the index is out of range, or a record lacks what a
            notebook needs.
    """
    parser = Arguments("show", __doc__)
    parser.add_argument("file", type=Path, help="a record a line")
    parser.add_argument("--index", type=int, help="only this record, from 0")
    parser.add_argument("--notebook", type=Path, help="where the record is saved, instead of being shown")
    options = parser.parse_args(argv)
    records = list(read_records(options.file))
    if options.index is not None:
        if not 0 <= options.index < len(records):
            raise UserError(f"--index is {options.index}, and {options.file} holds the records 0 to {len(records) - 1}")
        records = [records[options.index]]
    if options.notebook is None:
        for record in records:
            check_record(record, VIEWED, options.file)
            console.print(trajectory_panel(record))
        return
    if len(records) != 1:
        raise UserError(f"{options.file} holds {len(records)} records and a notebook is of one; name it by --index")
    check_record(records[0], VIEWED | {"sample", "executions"}, options.file)
    write_notebook(options.notebook, record_to_notebook(records[0]))


def check_record(record: dict[str, Any], needed: frozenset[str], path: Path) -> None:
    """Raises UserError where a record of a file lacks a key."""
    if missing := needed - record.keys():
        raise UserError(f"a record in {path} lacks {min(missing)!r}; expected what Trajectory.to_record gives")


if __name__ == "__main__":
    run_command(show)
