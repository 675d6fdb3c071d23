"""A folder of tables to expert trajectories: speed, memory, shares, and how alike the questions are.

    python -m groupwise.bench.synthesis [--tables FOLDER] [--count 5000] [--out FILE]

One run of ``recipes.synthesize`` with full detail and the scripted teacher, in a process of its own, whose memory is
looked at every second: ``memory_growth`` is its mean over the last quarter of the time by that over the second, when
all tables have been read. ``shares_off`` is the largest distance of a stratum's share from 40/35/15/10, in points.
``near_duplicates``: the share of trajectories whose question has the columns and values of an earlier one over the same
table, and 0.8 of its words and pairs of words (Jaccard).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from groupwise.bench import common
from groupwise.data.filters import alike, content, shingles, words
from groupwise.data.trajectories import read_experts

STRATA = {"success": 0.40, "corrected": 0.35, "self_corrected": 0.15, "failure": 0.10}
NEAR = 0.8
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    own = common.parser(__doc__)
    own.add_argument("--tables", type=Path, default=None, help="folder of tables; default: those bundled")
    own.add_argument("--count", type=int, default=5000, help="trajectories")
    args = own.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.folder": folder,
            "run.name": "bench",
            "data.tables": args.tables.absolute() if args.tables else "",
            "data.detail": "full",
            "data.num_trajectories": args.count,
            "data.strata": "40/35/15/10",
            "data.modes": "70/25/5",
        }
        command = [sys.executable, "-m", "groupwise.recipes.synthesize"]
        seconds, memory = measured([*command, *(f"{key}={value}" for key, value in settings.items())])
        data = Path(folder) / "bench" / "data"
        report = json.loads((data / "report.json").read_text())
        shares = report["strata_shares"]
        row = {
            "trajectories": report["count"],
            "tables": len(report["training_tables"]),
            "seconds": round(seconds, 1),
            "per_second": round(report["count"] / seconds, 1),
            "memory_growth": round(fmean(memory[3]) / fmean(memory[1]), 3),
            "peak_mib": round(max(map(max, memory)) / 2**20),
            "shares_off": round(100 * max(abs(shares.get(name, 0) - share) for name, share in STRATA.items()), 2),
            "types": len(report["types"]),
            "near_duplicates": round(near_duplicates(data), 4),
            **{f"dropped: {reason}": count for reason, count in report["dropped"].items()},
        }
    common.report("synthesis", [row], args)


def measured(command: list[str]) -> tuple[float, list[list[int]]]:
    """Seconds of a command, and what memory it held in the four quarters of that time, in bytes."""
    begin, seen = time.monotonic(), []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            seen.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE)
        except (OSError, IndexError):  # it ended meanwhile
            break
        time.sleep(1)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    seen = seen or [0]
    quarter = max(len(seen) // 4, 1)
    return time.monotonic() - begin, [seen[number * quarter :][:quarter] or seen[-1:] for number in range(4)]


def near_duplicates(folder: Path) -> float:
    """See above."""
    before: dict[tuple[str, frozenset[str]], list[frozenset[tuple[str, ...]]]] = defaultdict(list)
    count = found = 0
    for expert in read_experts(folder):
        question = words(expert.task.question)
        mine, others = shingles(question), before[expert.task.table, content(question)]
        found += any(alike(mine, other) >= NEAR for other in others)
        others.append(mine)
        count += 1
    return found / count


if __name__ == "__main__":
    main()
