"""The process that runs model code: it gives up every right, replays the history, runs the new chunk, and exits.

`run_child` never returns. Its exit status is the verdict: 0 ok, 1 error, `MEMORY` out of
memory, `UNCONFINED` when it could not give up its rights and so ran nothing.
"""

from __future__ import annotations

import gc
import io
import linecache
import math
import os
import random
import resource
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from . import kernel
from .kernel import Features
from .limits import Job, Limits

MEMORY, UNCONFINED = 97, 98
MAX_FRAMES = 3
MAX_ERROR_CHARS = 400


def run_child(
    job: Job, limits: Limits, features: Features, folder: str, readable: tuple[str, ...], output: int, baseline: int
) -> NoReturn:
    """Runs a job in this process.

    Args:
        folder: its private working folder, with the task's files in it.
        readable: what Landlock lets it read.
        output: the descriptor that takes stdout and stderr.
        baseline: bytes of address space that the interpreter already has.
    """
    try:
        report = _confine(limits, features, folder, readable, output, baseline)
    except BaseException as error:
        os.write(output, f"the sandbox could not be set up: {error!r}".encode())
        os._exit(UNCONFINED)
    try:
        status = _run(job, report)
    except BaseException:
        status = 1
    os._exit(status)


def _confine(
    limits: Limits, features: Features, folder: str, readable: tuple[str, ...], output: int, baseline: int
) -> int:
    """Leaves only what model code may have; returns a copy of the output descriptor, for the error report."""
    os.setsid()
    if features.nested:
        kernel.unshare(features.per_job)
    kernel.limit(resource.RLIMIT_CORE, 0)
    kernel.limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s), spare=1)
    kernel.limit(resource.RLIMIT_FSIZE, limits.file_mib * 2**20)
    kernel.limit(resource.RLIMIT_NOFILE, 256)
    kernel.limit(resource.RLIMIT_AS, baseline + limits.memory_gib * 2**30)
    if features.per_job & kernel.CLONE_NEWUSER:
        kernel.limit(resource.RLIMIT_NPROC, limits.processes + 1)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null, 2)
    report = os.dup2(output, 3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    kernel.drop_privileges()
    if features.landlock:
        kernel.restrict_files(features.landlock, readable, folder)
    return report


def _run(job: Job, report: int) -> int:
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "backslashreplace")
    _print_to(stream)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = [""]
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    gc.enable()
    for number, chunk in enumerate(job.history, 1):
        _execute(chunk, number, main.__dict__, lambda text: None)
    _flush()
    # The history wrote to /dev/null through the same descriptors, so nothing of it can come out late.
    os.dup2(report, 1)
    os.dup2(report, 2)
    _print_to(stream)
    return _execute(job.code, len(job.history) + 1, main.__dict__, lambda text: _write(report, text))


def _print_to(stream: io.TextIOWrapper) -> None:
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        setattr(sys, name, stream)


def _execute(code: str, number: int, namespace: dict[str, object], say: Callable[[str], None]) -> int:
    """Runs one chunk; returns its exit status."""
    name = f"<cell {number}>"
    # The traceback module finds the source of a cell here.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec", dont_inherit=True), namespace)
        status = 0
    except SystemExit as leaving:
        status = 0 if leaving.code in (None, 0) else 1
        if isinstance(leaving.code, str):
            say(leaving.code + "\n")
    except MemoryError:
        _flush()
        say("MemoryError\n")
        return MEMORY
    except BaseException as error:
        _flush()
        say(short_traceback(error))
        return 1
    _flush()
    return status


def short_traceback(error: BaseException) -> str:
    """The error as a notebook shows it, but short: only the cells' frames, the last few, then the error's last lines.

    Example: `cell 1, line 3: print(df["x"])` and on the next line `KeyError: 'x'`.
    """
    lines = []
    try:
        for frame, number in traceback.walk_tb(error.__traceback__):
            code = frame.f_code
            # Only these: to look up a line of a library, its whole source would be read.
            if code.co_filename.startswith("<cell "):
                where = "" if code.co_name == "<module>" else f", in {code.co_name}"
                line = linecache.getline(code.co_filename, number).strip()
                lines.append(f"{code.co_filename[1:-1]}, line {number}{where}: {line}")
        if isinstance(error, SyntaxError) and (error.filename or "").startswith("<cell "):
            source = (error.text or "").strip()
            lines.append(f"{(error.filename or '')[1:-1]}, line {error.lineno}: {source}")
            last = f"{type(error).__name__}: {error.msg}"
        else:
            last = traceback.format_exception_only(type(error), error)[-1].strip()
    except BaseException:  # An exception whose own methods raise.
        last = type(error).__name__
    if len(last) > MAX_ERROR_CHARS:
        last = last[: MAX_ERROR_CHARS // 2] + " ... " + last[-MAX_ERROR_CHARS // 2 :]
    return "\n".join([*lines[-MAX_FRAMES:], last]) + "\n"


def _flush() -> None:
    """What model code did to its streams is its own affair."""
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(BaseException):
            stream.flush()  # type: ignore[union-attr]


def _write(descriptor: int, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    with suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
