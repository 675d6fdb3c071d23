"""One execution as the server sees it: start it, read what it prints, watch it, and say how it went."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from .cells import DONE, MEMORY, TIMEOUT
from .child import UNCONFINED
from .job import Job
from .paused import ENDED, KEPT
from .process import Context, Process
from .tree import private_bytes

WATCH_S = 0.15
SQL_SPARE_S = 1.0
# Which of them ends an abort depends on whether the process is the first of its namespace.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
DRAIN_READS = 64  # of 64 KiB: the largest pipe without privileges holds 1 MiB


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
        process: what runs it.
        output: descriptor of the pipe with stdout and stderr, not blocking.
        next_look: when `check` has something to do, as `time.monotonic()`.
    """

    def __init__(self, job: Job, context: Context, path: str, paused: Process | None) -> None:
        """Starts it.

        Args:
            path: where a new working folder is to be.
            paused: the session's process, if it is to go on with this chunk.

        Raises:
            OSError: no space, no processes left, a file that is gone: nothing remains then but ``paused``.
        """
        self.job, self.context = job, context
        self.capture = Capture(context.limits.output_bytes)
        self.reason = ""
        self.started = time.monotonic()
        self.output, write_end = os.pipe()
        try:
            self.process = paused or Process(job, context, path, write_end)
            # After a replay, the folder that a failed chunk would need is not there to be copied.
            self._restorable = False
            if self.process.control is not None:
                self._restorable = (paused is not None or not job.history) and self.process.folder.save()
                self._send(write_end, is_new=paused is None)
        except BaseException:
            os.close(self.output)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(self.output, False)
        # A query stops itself in time; this is for what does not look at the clock.
        self._wall_s = context.limits.sql_s + SQL_SPARE_S if job.language == "sql" else context.limits.wall_s
        self.deadline = self.started + self._wall_s
        self.next_look = min(self.deadline, self.started + WATCH_S)

    def _send(self, output: int, is_new: bool) -> None:
        try:
            self.process.send(self.job.code, output)
        except BaseException:
            if is_new:
                self.process.end(set())  # a session is in a PID namespace of its own
                self.process.folder.remove()
            raise

    def read(self) -> bool:
        """Takes a piece of the output; False at the end of the stream."""
        try:
            data = os.read(self.output, 65536)
        except BlockingIOError:
            return True
        self.capture.feed(data)
        return bool(data)

    def check(self, now: float) -> None:
        """Kills the child if its time is over, or its tree has too many processes or too much memory.

        rlimits see single processes, and not everywhere their number.
        """
        limits = self.context.limits
        if now >= self.deadline:
            self.reason = "timeout"
        else:
            tree = self.process.tree()
            used = sum(max(0, private_bytes(pid) - self.context.own_bytes) for pid in tree)
            if len(tree) > limits.processes:
                self.reason = "processes"
            elif used > limits.memory_gib * 2**30:
                self.reason = "memory"
            self.next_look = min(self.deadline, time.monotonic() + WATCH_S)
        if self.reason:
            self.process.kill()
            self.next_look = float("inf")

    def finish(self, running: set[int]) -> tuple[dict[str, Any] | None, Process | None]:
        """Ends what is to end and gives the result, and the process of a session that waits for its next chunk.

        Args:
            running: numbers of the other executions' children, which stay.

        Returns:
            No result if the session's process was lost in a way that only a replay can tell the outcome of.
        """
        answer = b"" if self.reason else self.process.answer()
        kept = answer == KEPT
        if answer.startswith(ENDED):
            status, cpu_s = int(answer.split()[1]), float(answer.split()[2])
            kept = os.waitstatus_to_exitcode(status) != DONE and self._restorable and self.process.folder.restore()
        elif kept:
            status, cpu_s = DONE << 8, 0.0
            self.process.chunks += 1
        if not kept:
            ended = self.process.end(running)
            status, cpu_s = (status, cpu_s) if answer else ended
        wall_s = time.monotonic() - self.started
        # All writers are dead or stopped: what is in the pipe is all there is, at most a pipe's capacity.
        for _ in range(DRAIN_READS):
            before = self.capture.seen
            if not self.read() or self.capture.seen == before:
                break
        os.close(self.output)
        table = self._table(status)
        if not kept:
            self.process.folder.remove()
        lost = self.process.control is not None and not (answer or self.reason)
        return None if lost else self._result(status, cpu_s, wall_s, table), self.process if kept else None

    def _table(self, status: int) -> str | None:
        """The result of a query that ran to its end; our own code runs it, and writes it whole or not at all."""
        if self.job.language != "sql" or self.reason or status != DONE << 8:
            return None
        try:
            with open(
                os.path.join(self.process.folder.path, self.job.result_name), encoding="utf-8", newline=""
            ) as file:
                return file.read()
        except OSError:
            return None

    def _result(self, status: int, cpu_s: float, wall_s: float, table: str | None) -> dict[str, Any]:
        verdict, message = self._verdict(status, cpu_s)
        text = self.capture.text()
        if verdict == "failure":
            return {"id": self.job.id, "failure": text}
        if message:
            text += ("" if not text or text.endswith("\n") else "\n") + message + "\n"
        return {"id": self.job.id, "verdict": verdict, "output": text, "wall_s": wall_s, "table": table}

    def _verdict(self, status: int, cpu_s: float) -> tuple[str, str]:
        """The verdict and the line that is added to the output."""
        limits = self.context.limits
        if self.reason == "timeout":
            return "timeout", f"TimeoutError: stopped after {self._wall_s:g} s"
        if self.reason == "processes":
            return "killed", f"Killed: more than {limits.processes} processes"
        if self.reason == "memory":
            return "memory", f"MemoryError: more than {limits.memory_gib:g} GiB"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= limits.cpu_s - 0.1):
                return "timeout", f"TimeoutError: stopped after {limits.cpu_s:g} s of CPU time"
            if number in CRASHES:
                return "killed", "Killed: the interpreter crashed"
            return "killed", f"Killed: signal {signal.Signals(number).name}"
        code = os.WEXITSTATUS(status)
        if code == 0:
            return "error", "Exited: the code ended its process itself (os._exit)"
        return {DONE: "ok", MEMORY: "memory", TIMEOUT: "timeout", UNCONFINED: "failure"}.get(code, "error"), ""
