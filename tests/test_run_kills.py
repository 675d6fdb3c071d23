"""A run of GRPO on two ranks that is killed at any moment, again and again, and ends as if it had never been.

`GROUPWISE_KILLS` says how often, 50 by default. A kill waits for a step or a few, and for the phase that is its turn,
which the run's folder and its processes show; the victims are stopped before they are looked at once more and killed.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from groupwise.bench.bigram_run import prepare

KILLS = int(os.environ.get("GROUPWISE_KILLS", "50"))
PHASES = ("rollouts", "tools", "save", "other")
VICTIMS = ("rank 0", "rank 1", "all")
RANKS = 2
LIMIT_S = 300.0  # to wait for anything on a busy machine
SETTINGS = [
    "run.checkpoint_every=1",
    "grpo.max_sampling_rounds=2",
    "grpo.lr=3e-3",
    "grpo.num_minibatches=2",
    "grpo.beta=0.01",
    "grpo.min_lr_ratio=0.1",
]
# What hangs on the clock, on the machine, or on how long the process lives.
VARIABLE = (
    "time",
    "timing_s/",
    "perf/",
    "tools/wait_s",
    "sampling/tokens_per_s",
    "sampling/kv_",
    "sampling/prefix_hit_rate",
    "doctor/",
)


class Launch:
    """The run under torchrun, launched again by the same command where all is killed."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        self.command = [*torchrun, "--max-restarts", "1000", "-m", "groupwise.recipes.grpo", *settings]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.folder.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def ranks(self) -> dict[int, int]:
        """Process by rank."""
        found = {}
        for pid in children(self.process.pid):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {rank: pid for rank in range(RANKS) if f"RANK={rank}".encode() in environment}
        return found

    def steps(self) -> int:
        """The number of the newest step on record, from 1."""
        with suppress(OSError):
            lines = (self.folder / "grpo.jsonl").read_bytes().splitlines(keepends=True)
            return max((json.loads(line)["step"] + 1 for line in lines[-2:] if line.endswith(b"\n")), default=0)
        return 0

    def phases(self) -> set[str]:
        """What the run is doing now."""
        found = {"save"} if (self.folder / "grpo" / "checkpoints" / ".saving").exists() else set()
        for pid in self.ranks().values():
            with suppress(OSError):
                links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
                if any("/trajectories/" in link for link in links):
                    found.add("rollouts")
                # A rank has the guard of its sandbox, which has the server, which has a child for each execution.
                if any(children(server) for guard in children(pid) for server in children(guard)):
                    found.add("tools")
        return found or {"other"}

    def wait(self, until, what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not until():
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no {what}: {self.log.read_text()[-3000:]}"
            time.sleep(0.001)

    def kill(self, victim: str, phase: str) -> set[str]:
        """Waits for a phase and kills there; returns what was under way when the victims stood still."""
        while True:
            self.wait(lambda: phase in self.phases() and len(self.ranks()) == RANKS, phase)
            ranks = self.ranks()
            pids = list(ranks.values()) if victim == "all" else [ranks[int(victim[-1])]]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            if phase in (found := self.phases()):
                break
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        if victim == "all":
            self.process.kill()  # else it would start the ranks again
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if victim == "all":
            self.process.wait()
            self.start()
        return found

    def end(self) -> None:
        assert self.process.wait(timeout=3600) == 0, self.log.read_text()[-3000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.ranks().values()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def children(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def results(folder: Path) -> tuple[str, list[dict[str, object]], dict[str, str]]:
    """The hash of the final weights, the records without what hangs on time, and the trajectories' hashes."""
    weights = hashlib.sha256((folder / "grpo" / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = (folder / "grpo.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if not k.startswith(VARIABLE)} for line in lines]
    trajectories = {}
    for file in sorted((folder / "trajectories" / "grpo").glob("*.jsonl")):
        kept = [json.loads(line) for line in file.read_text().splitlines()]
        for record in kept:
            for execution in record["executions"]:
                del execution["wall_s"]
        trajectories[file.name] = json.dumps(kept).replace(str(folder), "")
    return weights, records, trajectories


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_never_killed(tmp_path: Path) -> None:
    settings = [*SETTINGS, f"grpo.steps={3 * KILLS + 4}"]
    with Launch(tmp_path / "never", [*prepare(tmp_path / "never"), *settings]) as never:
        never.end()
    with Launch(tmp_path / "killed", [*prepare(tmp_path / "killed"), *settings]) as killed:
        kill_often(killed)
        killed.end()
    for mine, wanted in zip(results(killed.folder), results(never.folder), strict=True):
        assert mine == wanted


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tools", "save"])
def test_a_run_that_a_scheduler_stops_ends_as_if_never_stopped(phase: str, tmp_path: Path) -> None:
    settings = [*SETTINGS, "grpo.steps=8"]
    with Launch(tmp_path / "never", [*prepare(tmp_path / "never"), *settings]) as never:
        never.end()
    with Launch(tmp_path / "stopped", [*prepare(tmp_path / "stopped"), *settings]) as stopped:
        stopped.wait(lambda: stopped.steps() >= 2 and phase in stopped.phases(), phase)
        stopped.process.send_signal(signal.SIGTERM)
        assert stopped.process.wait(timeout=LIMIT_S) == 1  # torchrun hides what it was
        assert "stopped; what is done is saved" in stopped.log.read_text()
        resume = stopped.folder / "resume"
        assert resume.exists()
        stopped.start()
        stopped.end()
        assert not resume.exists()
    assert results(stopped.folder) == results(never.folder)


def kill_often(killed: Launch) -> None:
    rng, counts, recoveries = random.Random(KILLS), Counter(), []
    for number in range(KILLS):
        goal = killed.steps() + rng.randint(0, 1)
        killed.wait(lambda goal=goal: killed.steps() >= max(goal, 1), f"step {goal}")
        time.sleep(rng.uniform(0.0, 0.3))
        phase, victim = PHASES[number % len(PHASES)], VICTIMS[number // len(PHASES) % len(VICTIMS)]
        found = killed.kill(victim, phase)
        counts.update([*found, victim])
        done, since = killed.steps(), time.monotonic()
        killed.wait(lambda done=done: killed.steps() > done, "step after the kill")
        recoveries.append(time.monotonic() - since)
        print(f"kill {number + 1} in step {done + 1}, {victim}, {sorted(found)}: {recoveries[-1]:.1f} s", flush=True)
    print(f"{KILLS} kills: {dict(counts)}")
    print(f"from a kill to the next step: median {statistics.median(recoveries):.1f} s, most {max(recoveries):.1f} s")
    if len(PHASES) * len(VICTIMS) <= KILLS:
        assert set(counts) == {*PHASES, *VICTIMS}
