"""The sandbox: latency beside a fresh interpreter, executions a second, and sessions by replay beside paused forks.

    python -m groupwise.bench.sandbox

A chunk reads a table of 200 rows, groups it and prints. Times are told as shares of what a rollout can bear: 30 ms in
the median, 150 ms for the slowest of a hundred, and a fortieth of a second for each when they come in a row.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from groupwise.bench import common
from groupwise.rollout.sandbox import Sandbox, Session
from groupwise.rollout.sandbox.tree import descendants, private_bytes

CHUNK = "import pandas as pd\nd = pd.read_csv('t.csv')\nprint(d.groupby('b')['a'].mean().round(2))"
MEDIAN_S, P99_S, RATE = 0.030, 0.150, 40.0  # goals, on two cores
EXECUTIONS, FRESH, BURST = 300, 7, 200
CHUNKS, SESSIONS = 10, 8


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def latency(sandbox: Sandbox, table: str) -> common.Row:
    """One execution at a time, beside `python -c` of the same chunk in the table's folder."""
    command = [sys.executable, "-c", CHUNK]
    expected = subprocess.run(command, cwd=Path(table).parent, capture_output=True, text=True, check=True).stdout
    if (got := sandbox.run(CHUNK, [table]).output) != expected:
        sys.exit(f"sandbox: the chunk printed {got!r}; expected {expected!r}")
    ours, fresh = [], []
    for turn in range(EXECUTIONS):
        ours.append(seconds(lambda: sandbox.run(CHUNK, [table])))
        if turn % (EXECUTIONS // FRESH) == 0:
            fresh.append(seconds(lambda: subprocess.run(command, cwd=Path(table).parent, capture_output=True)))
    median, p99 = statistics.median(ours), statistics.quantiles(ours, n=100)[98]
    return {
        "case": "one at a time",
        "median_of_goal": median / MEDIAN_S,
        "p99_of_goal": p99 / P99_S,
        "fresh_interpreter_over_ours": statistics.median(fresh) / median,
    }


def throughput(table: str, workers: int) -> common.Row:
    """Executions a second when many wait."""
    with Sandbox(workers=workers) as sandbox:
        sandbox.run(CHUNK, [table])

        def burst() -> None:
            for future in [sandbox.submit(CHUNK, [table]) for _ in range(BURST)]:
                assert future.result().ok

        return {"case": f"{workers} workers", "rate_of_goal": BURST / seconds(burst) / RATE}


def sessions(table: str) -> common.Row:
    """Sessions of several chunks: replay over paused forks in time, and what a paused one holds."""
    chunks = [CHUNK, *(f"d['c{n}'] = d['a'] * {n}\nprint(d['c{n}'].describe())" for n in range(1, CHUNKS))]
    whole: dict[str, list[float]] = {"replay": [], "forked": []}
    last: dict[str, list[float]] = {"replay": [], "forked": []}
    seen: dict[str, list[str]] = {}
    with Sandbox(workers=1) as replaying, Sandbox(workers=1, execution="forked") as forking:
        for _ in range(SESSIONS):
            for name, sandbox in (("replay", replaying), ("forked", forking)):
                with sandbox.open([table]) as session:
                    times, seen[name] = run_all(session, chunks)
                whole[name].append(sum(times))
                last[name].append(times[-1])
        if seen["replay"] != seen["forked"]:
            sys.exit("sandbox: a replay and a paused fork printed different things")
        held = held_mib(forking, table, chunks)
    ratio = {
        name: statistics.median(times["replay"]) / statistics.median(times["forked"])
        for name, times in (("whole", whole), ("last", last))
    }
    return {
        "case": f"sessions of {CHUNKS} chunks",
        "replay_over_forked": ratio["whole"],
        "replay_over_forked_last_chunk": ratio["last"],
        "held_mib": held,
    }


def run_all(session: Session, chunks: list[str]) -> tuple[list[float], list[str]]:
    times, outputs = [], []
    for chunk in chunks:
        start = time.perf_counter()
        outputs.append(session.run(chunk).output)
        times.append(time.perf_counter() - start)
    return times, outputs


def held_mib(sandbox: Sandbox, table: str, chunks: list[str]) -> float:
    """Memory of a paused session that no other process shares, in MiB."""
    server = set(descendants(sandbox.server_pid))
    with sandbox.open([table]) as session:
        run_all(session, chunks)
        paused = set(descendants(sandbox.server_pid)) - server
        return sum(_unshared(pid) for pid in paused) / 2**20


def _unshared(pid: int) -> int:
    """Bytes of a process alone; all that no file backs where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return private_bytes(pid)
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def measure(args: argparse.Namespace) -> list[common.Row]:
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/t.csv"
        Path(table).write_text("a,b\n" + "".join(f"{n * 7 % 31},x{n % 4}\n" for n in range(200)))
        with Sandbox(workers=1) as sandbox:
            rows = [latency(sandbox, table)]
        return [*rows, *(throughput(table, workers) for workers in (1, 2, 8)), sessions(table)]


def main() -> None:
    args = common.parser(__doc__).parse_args()
    common.report("sandbox", measure(args), args)


if __name__ == "__main__":
    main()
