"""The process that runs model code: it gives up every right, replays the history, runs the new chunk, and exits.

`run_child` never returns. Its exit status is the verdict: one of those of `cells.py`, or `UNCONFINED` when it could not
give up its rights and so ran nothing. With a control socket it stays, as `paused.py` tells.
"""

from __future__ import annotations

import fcntl
import math
import os
import resource
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from . import kernel, seccomp
from .cells import DONE, FAILED, MEMORY, REPORT, TIMEOUT, Cells
from .job import Job
from .kernel import Features
from .limits import Limits
from .paused import supervise
from .sql import SqlError, SqlLimits, run_sql

UNCONFINED = 98
CONTROL = 4  # descriptor of the control socket
SPARE = 128  # from here on, descriptors are out of the way of those with fixed numbers


@dataclass(frozen=True)
class Place:
    """What the server prepared for a child.

    Args:
        folder: its private working folder, with the task's files in it.
        readable: what Landlock lets it read.
        user: the user id that it takes, None if it keeps the server's.
        output: descriptor that takes stdout and stderr.
        control: descriptor of the socket by which a session's chunks come, None for one execution.
        baseline: bytes of address space that the interpreter already has.
    """

    folder: str
    readable: tuple[str, ...]
    user: int | None
    output: int
    control: int | None
    baseline: int


def run_child(job: Job, limits: Limits, features: Features, place: Place) -> NoReturn:
    """Runs a job in this process."""
    try:
        _confine(job, limits, features, place)
    except BaseException as error:
        os.write(place.output, f"the sandbox could not be set up: {error!r}".encode())
        os._exit(UNCONFINED)
    status = FAILED
    with suppress(BaseException):
        if job.packages:
            sys.path.append(job.packages)
        if place.control is not None:
            supervise(socket.socket(fileno=CONTROL), job.history)
        status = _run_query(job, limits) if job.language == "sql" else _run(job)
    os._exit(status)


def _confine(job: Job, limits: Limits, features: Features, place: Place) -> None:
    """Leaves only what model code may have; the descriptors are REPORT and CONTROL then."""
    os.setsid()
    _place_descriptors(place.output, place.control)
    if features.nested:
        kernel.enter_own(features.per_job, place.folder)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # Where memory ends, this process goes first.
    _limit(job, limits, features, place)
    folder = kernel.WORK if features.work else place.folder
    os.environ.update(HOME=folder, TMPDIR=folder)
    os.environ.pop("MPLCONFIGDIR", None)
    if place.user is not None:
        kernel.become(place.user)
    kernel.drop_privileges(0 if place.user is None else kernel.READ_SEARCH)
    os.chdir(folder)
    if features.landlock:
        kernel.restrict_files(features.landlock, place.readable, folder)
    if features.calls:
        seccomp.restrict_calls(features.calls)


def _limit(job: Job, limits: Limits, features: Features, place: Place) -> None:
    kernel.limit(resource.RLIMIT_CORE, 0)
    kernel.limit(resource.RLIMIT_CPU, math.ceil(limits.sql_s if job.language == "sql" else limits.cpu_s), spare=1)
    kernel.limit(resource.RLIMIT_FSIZE, limits.file_mib * 2**20)
    kernel.limit(resource.RLIMIT_NOFILE, 256)
    kernel.limit(resource.RLIMIT_AS, place.baseline + limits.memory_gib * 2**30)
    if features.counted:
        # A session's two own processes come on top.
        kernel.limit(resource.RLIMIT_NPROC, limits.processes + (1 if place.control is None else 3))


def _place_descriptors(output: int, control: int | None) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    null, output = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, SPARE) for descriptor in (null, output))
    if control is not None:
        control = fcntl.fcntl(control, fcntl.F_DUPFD, SPARE)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.dup2(output, REPORT)
    if control is not None:
        os.dup2(control, CONTROL)
    os.closerange(CONTROL if control is None else CONTROL + 1, kernel.MAX_FILES)


def _run(job: Job) -> int:
    output = fcntl.fcntl(REPORT, fcntl.F_DUPFD, SPARE)
    os.dup2(1, REPORT)  # The history's errors are not shown again.
    cells = Cells()
    cells.replay(job.history)
    return cells.run(job.code, output)


def _run_query(job: Job, limits: Limits) -> int:
    caps = SqlLimits(
        sql_s=limits.sql_s,
        max_bytes=int(min(SqlLimits.max_bytes, limits.file_mib * 2**20)),
        memory_mib=max(1, int(limits.memory_gib * 1024 / 2)),
    )
    names = [os.path.basename(path) for path in job.files]
    try:
        text, status = run_sql(job.code, names, job.result_name, limits=caps), DONE
    except SqlError as error:
        text, status = str(error), {"error": FAILED, "timeout": TIMEOUT, "memory": MEMORY}[error.verdict]
    os.write(REPORT, (text + "\n").encode("utf-8", "replace"))
    return status
