"""One execution as the server sees it: fork the child, read what it prints, watch it, end its tree, say how it went.

With a PID namespace of its own, the child is its first process: when it dies, the kernel ends everything it started.
Without one, the server adopts orphans and kills them (`end_orphans`).
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from dataclasses import dataclass
from typing import Any

from . import kernel
from .child import MEMORY, UNCONFINED, run_child
from .kernel import Features
from .limits import Job, Limits

COPY_BYTES = 4 * 2**20  # Larger files are linked instead of copied where the kernel keeps them read-only.
WATCH_S = 0.15
DRAIN_READS = 64  # of 64 KiB: the largest pipe without privileges holds 1 MiB
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Context:
    """What every execution of a server shares."""

    limits: Limits
    features: Features
    readable: tuple[str, ...]
    baseline: int  # bytes of address space of the warm interpreter


class Capture:
    """Keeps the first and the last half of `cap` bytes of a stream of any length."""

    def __init__(self, cap: int) -> None:
        self.half, self.head, self.tail, self.seen = max(1, cap // 2), bytearray(), bytearray(), 0

    def feed(self, data: bytes) -> None:
        """Takes the next bytes."""
        self.seen += len(data)
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 4 * self.half:
            del self.tail[: -self.half]

    def text(self) -> str:
        """Head and tail, with a line between that counts what was left out."""
        tail = bytes(self.tail[-self.half :])
        lost = self.seen - len(self.head) - len(tail)
        if not lost:
            return (bytes(self.head) + tail).decode("utf-8", "replace")
        between = f"\n... {lost} bytes left out ...\n"
        return bytes(self.head).decode("utf-8", "replace") + between + tail.decode("utf-8", "replace")


class Run:
    """One execution under way.

    Attributes:
        output: descriptor of the pipe with the child's stdout and stderr, not blocking.
        handle: descriptor that becomes readable when the child ends.
        next_look: when `check` has something to do, as `time.monotonic()`.
    """

    def __init__(self, job: Job, context: Context, folder: str) -> None:
        """Makes the folder and starts the child.

        Raises:
            OSError: no space, no processes left, a file that is gone: nothing remains then.
        """
        self.job, self.context, self.folder = job, context, folder
        self.capture = Capture(context.limits.output_bytes)
        self.reason = ""
        try:
            os.mkdir(folder, 0o700)
            linked = _place_files(job.files, folder, bool(context.features.landlock))
            self.output, write_end = os.pipe()
            self.started = time.monotonic()
            try:
                self.pid = self._fork(write_end, linked)
            finally:
                os.close(write_end)
        except BaseException:
            remove_folder(folder)
            raise
        self.handle = os.pidfd_open(self.pid)
        os.set_blocking(self.output, False)
        self.deadline = self.started + context.limits.wall_s
        self.next_look = min(self.deadline, self.started + WATCH_S)

    def _fork(self, output: int, linked: list[str]) -> int:
        context = self.context
        server = os.getpid()
        pid = kernel.fork_nested() if context.features.nested else os.fork()
        if pid == 0:
            if not context.features.nested:
                kernel.die_with_parent(server)
            readable = (*context.readable, *linked)
            run_child(self.job, context.limits, context.features, self.folder, readable, output, context.baseline)
        return pid

    def read(self) -> bool:
        """Takes a piece of the output; False at the end of the stream."""
        try:
            data = os.read(self.output, 65536)
        except BlockingIOError:
            return True
        self.capture.feed(data)
        return bool(data)

    def check(self, now: float, own_pages: int) -> None:
        """Kills the child if its time is over, or its tree has too many processes or too much memory.

        rlimits see single processes, and root is exempt from the one on their number.
        """
        limits = self.context.limits
        if now >= self.deadline:
            self.reason = "timeout"
        else:
            tree = descendants(_outer_pid(self.handle))
            pages = sum(max(0, private_pages(pid) - own_pages) for pid in tree)
            if len(tree) > limits.processes:
                self.reason = "processes"
            elif pages * PAGE > limits.memory_gib * 2**30:
                self.reason = "memory"
            self.next_look = min(self.deadline, time.monotonic() + WATCH_S)
        if self.reason:
            self.kill()
            self.next_look = float("inf")

    def kill(self) -> None:
        """Ends the child, and with it or right after it all that it started."""
        try:
            if not self.context.features.nested:
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def finish(self, running: set[int]) -> dict[str, Any]:
        """Reaps the child, ends what it left behind, and gives the result.

        Args:
            running: process ids of the other executions, which stay.
        """
        self.kill()
        status, usage = os.wait4(self.pid, 0)[1:]
        wall_s = time.monotonic() - self.started
        if not self.context.features.nested:
            end_orphans(running)
        # All writers are dead: what is in the pipe is all there is, at most a pipe's capacity.
        for _ in range(DRAIN_READS):
            before = self.capture.seen
            if not self.read() or self.capture.seen == before:
                break
        os.close(self.output)
        os.close(self.handle)
        remove_folder(self.folder)
        verdict, message = self._verdict(status, usage.ru_utime + usage.ru_stime)
        text = self.capture.text()
        if verdict == "failure":
            return {"id": self.job.id, "failure": text}
        if message:
            text += ("" if not text or text.endswith("\n") else "\n") + message + "\n"
        return {"id": self.job.id, "verdict": verdict, "output": text, "wall_s": wall_s}

    def _verdict(self, status: int, cpu_s: float) -> tuple[str, str]:
        """The verdict and the line that is added to the output."""
        limits = self.context.limits
        if self.reason == "timeout":
            return "timeout", f"TimeoutError: stopped after {limits.wall_s:g} s"
        if self.reason == "processes":
            return "killed", f"Killed: more than {limits.processes} processes"
        if self.reason == "memory":
            return "memory", f"MemoryError: more than {limits.memory_gib:g} GiB"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= limits.cpu_s - 0.1):
                return "timeout", f"TimeoutError: stopped after {limits.cpu_s:g} s of CPU time"
            return "killed", f"Killed: signal {signal.Signals(number).name}"
        code = os.WEXITSTATUS(status)
        return {0: "ok", MEMORY: "memory", UNCONFINED: "failure"}.get(code, "error"), ""


def _place_files(files: list[str], folder: str, protected: bool) -> list[str]:
    """Puts the task's files into the folder, read-only; returns those linked, which must be readable at their place."""
    linked = []
    for path in files:
        target = os.path.join(folder, os.path.basename(path))
        if protected and os.path.getsize(path) > COPY_BYTES:
            linked.append(os.path.realpath(path))
            os.symlink(linked[-1], target)
        else:
            shutil.copyfile(path, target)
            os.chmod(target, 0o444)
    return linked


def remove_folder(folder: str) -> None:
    """Removes a working folder, whatever its modes are."""

    def retry(function: Any, path: str, error: Any) -> None:
        try:
            os.chmod(os.path.dirname(path), stat.S_IRWXU)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, stat.S_IRWXU)
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except OSError:
            pass

    shutil.rmtree(folder, onerror=retry)


# ---- processes, by the numbers that /proc shows ----------------------------------------------------------------------


def end_orphans(running: set[int]) -> None:
    """Kills and reaps every child of this process but those named, and what they leave, until none is left."""
    while True:
        orphans = [pid for pid in descendants(os.getpid(), depth=1)[1:] if pid not in running]
        if not orphans:
            return
        for pid in orphans:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def descendants(root: int, depth: int = 1 << 30) -> list[int]:
    """Process ids of `root` and the tree under it."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(name))
    found = [root]
    level = [root]
    while level and depth:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
        depth -= 1
    return found


def private_pages(pid: int | str) -> int:
    """Resident pages of a process that no file backs; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
        return int(fields[1]) - int(fields[2])
    except (OSError, IndexError):
        return 0


def _outer_pid(handle: int) -> int:
    """The number of a process in /proc, which may be mounted for another PID namespace than ours; -1 if it is gone."""
    with open(f"/proc/self/fdinfo/{handle}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)
