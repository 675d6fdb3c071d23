"""Two results of ``recipes.evaluate`` side by side, and whether what differs is more than chance.

    python -m groupwise.recipes.evaluate --compare RUN_A/evaluate/NAME.json RUN_B/evaluate/NAME.json

Task by task: a difference's interval is of a paired bootstrap over tasks, its p-value of a permutation test that flips
the signs of the tasks' differences. A file of its own because it needs neither ranks nor a configuration. The last line
of output is JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.outcomes import Outcome, compare
from ..engine.errors import UserError
from .command import Arguments
from .scoreboard import shown


def compare_results(argv: Sequence[str], console: Console) -> None:
    """Prints the comparison of the two results that a command line names.

    Raises:
        UserError: a file is missing or is no result, or the two have no task in common.
    """
    parser = Arguments("evaluate", __doc__)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), required=True,
                        help="two results, files RUN/evaluate/NAME.json")  # fmt: skip
    files = parser.parse_args(argv).compare
    results = [read_result(file) for file in files]
    one, other = ([Outcome.from_dict(outcome) for outcome in result["outcomes"]] for result in results)
    found = compare(one, other)
    table = Table(title=f"{found['num_tasks']} tasks\nA: {files[0]}\nB: {files[1]}", title_justify="left")
    table.add_column("")
    for column in ("A", "B", "B - A", "95 % interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["rows"].items():
        low, high = row["interval"]
        values = (shown(row["one"]), shown(row["other"]), f"{row['difference']:+.4g}", f"{low:+.4g} to {high:+.4g}")
        table.add_row(name.replace("_", " "), *values, f"{row['p_value']:.4f}")
    console.print(table)
    for count, file in zip((found["only_one"], found["only_other"]), files, strict=True):
        if count:
            console.print(f"{count} tasks are in {file} alone and left out", soft_wrap=True)
    console.print(json.dumps(found), soft_wrap=True, markup=False)


def read_result(file: Path) -> dict[str, Any]:
    """What ``evaluate`` wrote.

    Raises:
        UserError: the file is missing or is no result.
    """
    try:
        result = json.loads(file.read_text())
        result["outcomes"][0]["task"]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a file RUN/evaluate/NAME.json") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is no result of an evaluation; give a file RUN/evaluate/NAME.json") from error
    return dict(result)
