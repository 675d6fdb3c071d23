"""A wall clock that jumps by days and years while a run on two ranks is at work: nothing waits, ends or differs."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupwise.bench.bigram_run import prepare

# What a process asks the C library for, moved by the seconds in the file that JUMPS names.
SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
    char text[32] = {0};
    int file = open(getenv("JUMPS"), O_RDONLY);
    if (file < 0 || read(file, text, 31) < 0) return 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    return now ? (*now = exact.tv_sec) : exact.tv_sec;
}
"""


def launched(folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [*prepare(folder), "grpo.steps=40", "run.checkpoint_every=5", "run.timeout_s=20"]
    return subprocess.Popen(
        [*torchrun, "-m", "groupwise.recipes.grpo", *settings],
        cwd=folder.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def results(folder: Path) -> tuple[str, list[float]]:
    """The hash of the final weights, and the time of each step by the wall clock."""
    weights = (folder / "grpo" / "model" / "model.safetensors").read_bytes()
    times = [json.loads(line)["time"] for line in (folder / "grpo.jsonl").read_text().splitlines()]
    return hashlib.sha256(weights).hexdigest(), times


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    shim, offset = tmp_path / "shim.so", tmp_path / "offset"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", shim, "-"], input=SHIM, text=True, check=True)
    assert launched(tmp_path / "steady").wait(timeout=300) == 0
    offset.write_text("0")
    run = launched(tmp_path / "jumps", LD_PRELOAD=str(shim), JUMPS=str(offset))
    for jump in itertools.cycle((0, 259_200, -259_200, 31_536_000, -34_560_000)):
        if run.poll() is not None:
            break
        offset.write_text(str(jump))
        time.sleep(0.7)
    assert run.returncode == 0
    (wanted, _), (found, times) = results(tmp_path / "steady"), results(tmp_path / "jumps")
    assert found == wanted
    assert max(times) - min(times) > 259_200
