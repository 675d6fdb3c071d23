"""The processes of an execution, or of a session that lasts, as the server holds them.

With a PID namespace of its own, the child is its first process: when it dies, the kernel ends everything it started.
Without one, the server adopts orphans and kills them.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass

from . import kernel, sql
from .child import Place, run_child
from .folder import Folder
from .job import Job
from .kernel import Features
from .limits import Limits
from .paused import MESSAGE_BYTES
from .tree import descendants, end_orphans, outer_pid


@dataclass(frozen=True)
class Context:
    """What every execution of a server shares.

    Args:
        readable: what an interpreter may read.
        baseline: bytes of address space of the warm interpreter.
        own_bytes: bytes of memory that no file backs, of the same.
    """

    limits: Limits
    features: Features
    readable: tuple[str, ...]
    baseline: int
    own_bytes: int


class Process:
    """A child that runs one job, or with `control` the chunks of a session, and all that these start.

    Attributes:
        handle: descriptor that becomes readable when the child ends.
        control: socket to a session's first process, None for one job.
        folder: its working folder.
        chunks: how many chunks of the session it has run.
    """

    def __init__(self, job: Job, context: Context, path: str, output: int) -> None:
        """Makes the folder and starts the child.

        Args:
            path: where the folder is to be.
            output: descriptor that takes what the child prints.

        Raises:
            OSError: no space, no processes left, a file that is gone: nothing remains then.
        """
        self._context = context
        self.chunks = len(job.history)
        self.control: socket.socket | None = None
        theirs: socket.socket | None = None
        if job.session is not None:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            user = kernel.new_user() if context.features.own_users else None
            self.folder = Folder(path, job.files, bool(context.features.landlock), user)
            try:
                self._pid = self._fork(job, output, theirs, user)
            except BaseException:
                self.folder.remove()
                raise
        except BaseException:
            if self.control is not None:
                self.control.close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        self.handle = os.pidfd_open(self._pid)

    def _fork(self, job: Job, output: int, theirs: socket.socket | None, user: int | None) -> int:
        context, features = self._context, self._context.features
        server = os.getpid()
        pid = kernel.fork_nested() if features.nested else os.fork()
        if pid == 0:
            if not features.nested:
                kernel.die_with_parent(server)
            packages = (job.packages,) if job.packages else ()
            engines = sql.DUCKDB_READS if job.language == "sql" else ()
            readable = (*context.readable, *self.folder.linked, *packages, *engines)
            control = None if theirs is None else theirs.fileno()
            place = Place(self.folder.path, readable, user, output, control, context.baseline)
            run_child(job, context.limits, features, place)
        return pid

    @property
    def pid(self) -> int:
        """The child's number in the server's PID namespace."""
        return self._pid

    def tree(self) -> list[int]:
        """Numbers in /proc of what runs model code; a session's two own processes come first in its tree."""
        return descendants(outer_pid(self.handle))[0 if self.control is None else 2 :]

    def send(self, code: str, output: int) -> None:
        """Gives a session its next chunk; one that is gone takes none, which its handle tells."""
        assert self.control is not None
        descriptor = os.memfd_create("chunk")
        with os.fdopen(descriptor, "wb") as file:
            file.write(code.encode("utf-8", "surrogatepass"))
            file.flush()
            file.seek(0)
            with suppress(OSError):
                socket.send_fds(self.control, [b"run"], [descriptor, output])

    def answer(self) -> bytes:
        """What a session said of its chunk; b"" if it is gone or has said nothing."""
        if self.control is None:
            return b""
        try:
            return self.control.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    def kill(self) -> None:
        """Ends the child, and with it or right after it all that it started."""
        with suppress(ProcessLookupError):
            if not self._context.features.nested:
                os.killpg(self._pid, signal.SIGKILL)
            os.kill(self._pid, signal.SIGKILL)

    def end(self, running: set[int]) -> tuple[int, float]:
        """Kills and reaps it, ends what it left behind, closes what it held; its folder remains.

        Args:
            running: numbers of other executions' children, which stay.

        Returns:
            The child's status as `os.wait4` has it, and its CPU seconds.
        """
        self.kill()
        status, usage = os.wait4(self._pid, 0)[1:]
        if not self._context.features.nested:
            end_orphans(running)
        os.close(self.handle)
        if self.control is not None:
            self.control.close()
        return status, usage.ru_utime + usage.ru_stime
