"""What torchrun makes of a rank that dies: the others say who it was, and a restarted run goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_tables import small_tables
from test_recipes import SMALL, run

# Rank 1 dies once; rank 0 computes outside of steps, rank 2 waits in a collective.
PROGRAM = """
import os, signal, time
from groupwise.recipes.run import launch

def recipe(run):
    run.mesh.barrier()
    run.say("met")
    if "die" in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait" in os.environ or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.mesh.rank == 0:
        time.sleep(100)
    run.mesh.barrier()
    run.say("finished")

launch(recipe, claim=False)
"""

# Each rank "samples" until it hears of a stop, wherever the signal came, and then they agree.
SAMPLING = """
import os, time
from pathlib import Path
from groupwise.recipes.run import Stopped, launch

def recipe(run):
    with run.stop_between_steps():
        run.mesh.barrier()
        Path(f"pid{run.mesh.rank}").write_text(str(os.getpid()))
        deadline = time.monotonic() + 60
        while not run.mesh.watch.stop_requested and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.agree_to_stop()
        raise run.stopped()

launch(recipe)
"""


def torchrun(ranks, *command, cwd, **environment):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*start, *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return str(file)


def test_a_rank_that_dies_is_named_and_the_ranks_start_again(program, tmp_path):
    process = torchrun(3, "--max-restarts", "1", program, cwd=tmp_path, die="1")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line for line in printed.splitlines() if "rank" not in line] == ["met", "met", "finished"]
    assert "error: rank 1 died" in errors
    assert "rank 0 had last been in barrier" in errors
    assert "stopped; what is done is saved" not in errors
    assert "Traceback" not in errors


def test_a_run_that_is_asked_to_stop_says_so_and_blames_no_rank(program, tmp_path):
    process = torchrun(2, program, cwd=tmp_path, wait="1")
    while "met" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "stopped; what is done is saved" in errors
    assert "rank 1 " not in errors.split("Traceback")[0]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_one_rank_that_is_asked_to_stop_stops_all(number, status, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(SAMPLING)
    pids = [tmp_path / f"pid{rank}" for rank in range(2)]
    process = torchrun(2, str(file), cwd=tmp_path)
    while not all(pid.exists() and pid.read_text() for pid in pids):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(int(pids[1].read_text()), number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun hides what it was
    assert f"exitcode: {status}" in errors
    assert "stopped; what is done is saved" in errors
    assert "error: " not in errors.split("Traceback")[0]
    resume = tmp_path / "runs" / "train" / "resume"
    assert resume.exists() == (number == signal.SIGTERM)


def pid_of(rank, program):
    """The process of one rank of the launch whose command line has ``program``."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if program.encode() in command and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_rank_dies_resumes_by_itself(rank, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    for table in small_tables():
        table.frame.to_csv(tables / table.file, index=False)
    arguments = [*SMALL, f"tables={tables}", "sft.steps=60", f"run.folder={tmp_path}/runs"]
    run("synthesize", *arguments, cwd=tmp_path)
    process = torchrun(2, "--max-restarts", "1", "-m", "groupwise.recipes.sft", *arguments, cwd=tmp_path)
    records = tmp_path / "runs" / "train" / "sft.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") >= 7):
        assert process.poll() is None, process.communicate()
    os.kill(pid_of(rank, str(tmp_path)), signal.SIGKILL)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert f"error: rank {rank} died" in errors
    assert "resumed after step" in printed
    assert [json.loads(line)["step"] for line in records.read_text().splitlines()] == list(range(60))
    assert (tmp_path / "runs" / "train" / "sft" / "model").is_dir()
