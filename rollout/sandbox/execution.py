"""What comes back from one execution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """The result of one execution.

    Args:
        ok: whether the code ended without an error, by its exit status.
        output: stdout and stderr, capped, with a short traceback or the reason at the end if it failed.
        verdict: "ok", "error", "timeout", "memory", "killed" (crashed or ended from outside), "refused".
        wall_s: seconds, replayed history included, waiting for a worker not.
        table: the result of a query as CSV, up to the limits; None for Python and for a query that failed.
        retried: the server died meanwhile, and this is the result of the second try.
    """

    ok: bool
    output: str
    verdict: str
    wall_s: float
    table: str | None = None
    retried: bool = False
