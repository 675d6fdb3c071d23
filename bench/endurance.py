"""A run of days in small: thousands of steps of GRPO, each with rollouts whose code is executed, watched from outside.

    python -m groupwise.bench.endurance [--steps 20000] [--folder FOLDER] [--out FILE]

The run is that of ``bench/bigram_run.py`` on one rank, saves a checkpoint every 500 steps, and keeps the trajectories
of the newest 100. This process reads the run's memory from /proc, and its folder, about once a second.

A row for each process (the rank, the guard of its sandbox, the server that executes; what an execution forks comes and
goes): ``memory_mib`` and ``memory_mib_last``, the medians of its pages that are no file's (Pss_Anon) over the second
and over the last tenth of the steps, as the first tenth warms up, ``growth_percent``, and the same from the sixth tenth
to the last, ``later_growth_percent``, for what is met seldom warms up longer. ``step``: wall seconds of the median step
and the rank's CPU seconds, the last tenth over the second (``wall_ratio``, ``cpu_ratio``: other work on the machine
shows in the former). ``disk``: what the folder holds at the end by part; ``bytes_per_step`` of the logs, and of the
parts that the settings bound ``growth_percent`` from the second tenth to the last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from groupwise.bench import common
from groupwise.bench.bigram_run import prepare
from groupwise.engine.metrics import read_records

EVERY_S = 1.0
BOUNDED = ("grpo/checkpoints", "trajectories")  # folders of the run whose size the settings bound
SETTINGS = (
    "grpo.prompts_per_step=1",
    "grpo.lr=1e-6",  # so small that the rollouts stay what they are
    "rollout.max_turns=2",
    "run.checkpoint_every=500",
    "run.kept_steps=100",
    "sandbox.workers=2",
)


@dataclass
class Sample:
    """What was seen at one moment: MiB and CPU seconds by process, bytes by part of the folder."""

    step: int
    memory: dict[str, float]
    cpu_s: float
    sizes: dict[str, int]


def main() -> None:
    own = common.parser(__doc__)
    own.add_argument("--steps", type=int, default=20_000)
    own.add_argument("--folder", type=Path, default=None, help="where the run shall stay; default: nowhere")
    args = own.parse_args()
    if args.steps < 5000:
        own.error(f"--steps is {args.steps}, expected 5000 or more: the first checkpoint, of step 500, is compared")
    with TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary) / "run").absolute()
        samples = watch(folder, args.steps)
        common.report("endurance", rows(folder, samples, args), args)


def watch(folder: Path, steps: int) -> list[Sample]:
    """Does the run, and returns what was seen of it."""
    command = [sys.executable, "-m", "groupwise.recipes.grpo", *prepare(folder), *SETTINGS, f"grpo.steps={steps}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    samples = []
    try:
        records = None
        step = 0
        while process.poll() is None:
            time.sleep(EVERY_S)
            if records is None and (folder / "grpo.jsonl").exists():
                records = (folder / "grpo.jsonl").open("rb")
            if records is not None:
                step += sum(line.endswith(b"\n") for line in records)
            with suppress(OSError, IndexError, ValueError):  # it ends at this moment
                samples.append(look(folder, process.pid, step))
    finally:
        process.kill()
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    return samples


def look(folder: Path, rank: int, step: int) -> Sample:
    """Memory and CPU time of the processes that last, and the sizes of the folder's parts."""
    found = {"rank": rank, "guard": children(rank)[0]}
    found["server"] = children(found["guard"])[0]
    memory = {name: pss_mib(pid) for name, pid in found.items()}
    fields = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    parts = [part for part in (*folder.iterdir(), *(folder / "grpo").iterdir()) if part.name != "grpo"]
    return Sample(step, memory, cpu_s, {str(part.relative_to(folder)): size(part) for part in parts})


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def pss_mib(pid: int) -> float:
    """Memory of a process that no file holds; of pages that it shares, its share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} tells no Pss_Anon")


def size(path: Path) -> int:
    """Bytes of a file or of all files below a folder, as they are counted on the disk."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):
            total += file.stat().st_blocks * 512
    return total


def rows(folder: Path, samples: list[Sample], args: argparse.Namespace) -> list[common.Row]:
    """What the bench reports."""
    tenth = args.steps // 10
    second, sixth, last = ([each for each in samples if n * tenth <= each.step < (n + 1) * tenth] for n in (1, 5, 9))
    found: list[common.Row] = []
    for name in second[0].memory:
        before, later, after = (median(each.memory[name] for each in part) for part in (second, sixth, last))
        row = {"what": name, "memory_mib": before, "memory_mib_last": after}
        growth = {"growth_percent": 100 * (after / before - 1), "later_growth_percent": 100 * (after / later - 1)}
        found.append(row | growth)
    times = [record["time"] for record in read_records(folder / "grpo.jsonl")]
    walls = [after - before for before, after in pairwise(times)]
    wall_s, wall_s_last = median(walls[tenth : 2 * tenth]), median(walls[-tenth:])
    cpu_s, cpu_s_last = ((part[-1].cpu_s - part[0].cpu_s) / (part[-1].step - part[0].step) for part in (second, last))
    found.append(
        {"what": "step", "steps": len(times), "wall_ratio": wall_s_last / wall_s, "cpu_ratio": cpu_s_last / cpu_s}
    )
    for name in sorted(samples[-1].sizes):
        before, after = (median(each.sizes.get(name, 0) for each in part) for part in (second, last))
        row = {"what": f"disk: {name}", "kib": after / 1024}
        if name in BOUNDED:
            found.append({**row, "growth_percent": 100 * (after / before - 1)})
        elif after > before:
            steps = median(each.step for each in last) - median(each.step for each in second)
            found.append({**row, "bytes_per_step": (after - before) / steps})
    return found


if __name__ == "__main__":
    main()
