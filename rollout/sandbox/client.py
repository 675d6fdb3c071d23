"""`Sandbox`: runs model-written Python and SQL apart from this process, in milliseconds, and leaves nothing behind.

    with Sandbox(Limits(wall_s=5)) as sandbox:
        print(sandbox.run("import pandas as pd; print(pd.read_csv('t.csv').shape)", files=["/data/t.csv"]).output)
        with sandbox.open(["/data/t.csv"]) as session:  # chunk after chunk, like a notebook
            session.run("x = 1")
            print(session.run("print(x)").output)

A warm server process (`server.py`) forks a child for each execution. Where the kernel grants it, the child
has no network, no view of other processes, no capability, reads only the interpreter and its own files, writes
only in its private folder, and starts no program (`kernel.py`, `seccomp.py`, `cgroup.py`; `Sandbox.enforced()` lists
what holds here, and `python -m groupwise.rollout.sandbox` tries it).

Not protected against: holes in the kernel; reading the time or the machine's load; learning by `stat` which paths
exist; use of the processors up to the limits; a disk that many small files fill until the execution ends; and, without
namespaces, changes of mode or owner of files that belong to the user, and signals to the user's other processes where
Landlock is older than version 6.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...engine.errors import UserError
from . import cgroup
from .calls import refusal
from .execution import Execution
from .install import Installer
from .job import Job, Language
from .limits import Limits
from .session import Session

HERE = str(Path(__file__).parent)
# The server's files are loaded as a package of their own: importing this one would need its dependencies there.
BOOT = (
    "import importlib.util as u, sys; folder = sys.argv.pop(1); "
    "spec = u.spec_from_file_location('_sandbox', folder + '/__init__.py', submodule_search_locations=[folder]); "
    "sys.modules['_sandbox'] = u.module_from_spec(spec); from _sandbox.server import main; main()"
)
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # The same code prints sets in the same order every time.
    "PYTHONDONTWRITEBYTECODE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
START_S = 120.0
CLOSE_S = 5.0
ATTEMPTS = 2


@dataclass
class _Pending:
    request: bytes
    future: Future[Execution]
    attempts: int = 1


class _Link:
    """The connection to one server process after another. `Sandbox` is its handle, so that it can be collected."""

    def __init__(self, limits: Limits, workers: int) -> None:
        self.limits, self.workers = limits, workers
        # A sandbox may be collected in any thread at any line, also in one that holds this.
        self.lock = threading.RLock()
        self.pending: dict[int, _Pending] = {}
        self.closed = False
        self.restarts = 0
        self.groups: list[str] = []
        self.base = tempfile.mkdtemp(prefix=cgroup.PREFIX)
        try:
            self.hello = self._start()
        except BaseException:
            shutil.rmtree(self.base, ignore_errors=True)
            raise
        self.reader = threading.Thread(target=self._read_replies, name="sandbox", daemon=True)
        self.reader.start()

    def _start(self) -> dict[str, Any]:
        """Starts a server and waits until it is warm."""
        self.channel, theirs = socket.socketpair()
        settings = {
            "channel": theirs.fileno(), "base": self.base, "workers": self.workers, "limits": asdict(self.limits)
        }  # fmt: skip
        with theirs, tempfile.TemporaryFile() as errors:
            # -P and -s: neither the current folder nor the user's packages; -I would also ignore the hash seed.
            command = [sys.executable, "-P", "-s", "-c", BOOT, HERE, json.dumps(settings)]
            environment = {**ENVIRONMENT, "HOME": self.base, "MPLCONFIGDIR": _fonts()}
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.base, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self.channel.settimeout(START_S)
            try:
                frame = _receive(self.channel)
            except (OSError, EOFError) as error:
                late = isinstance(error, TimeoutError)
                self._end_process(0.0 if late else CLOSE_S)
                errors.seek(0)
                lines = errors.read().decode("utf-8", "replace").strip().splitlines()
                ended = f"no answer within {START_S:g} s" if late else f"it ended with status {self.process.returncode}"
                reason = lines[-1] if lines else ended
                raise UserError(f"the sandbox server did not start: {reason}") from error
            self.channel.settimeout(None)
        hello = dict(json.loads(frame))
        self.groups = hello["groups"]
        return hello

    def send(self, job: Job, future: Future[Execution]) -> None:
        """Sends a job, whose result comes as the future's."""
        pending = _Pending(_frame(asdict(job)), future)
        with self.lock:
            if self.closed:
                raise RuntimeError("the sandbox is closed")
            self.pending[job.id] = pending
            # If the server died, the reader starts another one and sends again.
            with suppress(OSError):
                self.channel.sendall(pending.request)

    def forget(self, session: int) -> None:
        """Lets the server end a session's paused process; a server that died has none."""
        with self.lock, suppress(OSError):
            if not self.closed:
                self.channel.sendall(_frame({"close": session}))

    def _read_replies(self) -> None:
        while True:
            try:
                result = json.loads(_receive(self.channel))
            except (OSError, EOFError, ValueError):
                if not self._restart():
                    return
                continue
            self._deliver(result)

    def _deliver(self, result: dict[str, Any]) -> None:
        with self.lock:
            pending = self.pending.pop(result["id"], None)
        if pending is None:
            return
        if "failure" in result:
            _settle(pending.future, error=RuntimeError(result["failure"]))
            return
        verdict, retried = result["verdict"], pending.attempts > 1
        execution = Execution(
            verdict == "ok", result["output"], verdict, result["wall_s"], result.get("table"), retried
        )
        _settle(pending.future, execution)

    def _restart(self) -> bool:
        """After the server died: another one gets what was under way once more; False when closed or impossible."""
        lost: list[_Pending] = []
        with self.lock:
            if self.closed:
                return False
            self._end_process(0.0)
            try:
                cgroup.remove(self.groups)
                _empty(self.base)
                self._start()
                self.restarts += 1
            except (UserError, OSError) as error:
                self.closed = True
                failure = RuntimeError(f"the sandbox server died and cannot be restarted: {error}")
                for pending in self.pending.values():
                    _settle(pending.future, error=failure)
                self.pending.clear()
                return False
            warnings.warn(
                "the sandbox server was ended from outside and started anew; executions under way "
                f"({len(self.pending)}) are tried once more",
                RuntimeWarning,
                stacklevel=1,
            )
            for number, pending in list(self.pending.items()):
                pending.attempts += 1
                if pending.attempts > ATTEMPTS:
                    lost.append(self.pending.pop(number))
                    continue
                try:
                    self.channel.sendall(pending.request)
                except OSError:
                    break  # It died again; the reader sees that next.
        for pending in lost:
            message = "Killed: the sandbox server was ended twice\n"
            _settle(pending.future, Execution(False, message, "killed", 0.0, retried=True))
        return True

    def close(self) -> None:
        with self.lock:
            if self.closed and self.process.returncode is not None and not os.path.lexists(self.base):
                return
            self.closed = True
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self._end_process(CLOSE_S)
        if self.reader is not threading.current_thread():
            self.reader.join(CLOSE_S)
        for pending in self.pending.values():
            _settle(pending.future, error=RuntimeError("the sandbox was closed before this execution ended"))
        self.pending.clear()
        cgroup.remove(self.groups, CLOSE_S)
        _empty(self.base)
        shutil.rmtree(self.base, ignore_errors=True)

    def _end_process(self, patience_s: float) -> None:
        if patience_s:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        if self.process.poll() is None:
            # What was started is the guard of the server: asked to, it ends the server and waits for it.
            self.process.terminate()
            try:
                self.process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.channel.close()


class Sandbox:
    """Runs code in isolated processes.

    Args:
        limits: what one execution may use.
        workers: executions at once.
        execution: how a session keeps its state: "replay" runs the chunks before again, "forked" keeps a paused process
            for each session, which takes memory instead of time and needs PID namespaces; without them it replays.
        installer: what installs packages that code imports, before it runs; None: nothing is installed.

    Raises:
        UserError: the server cannot start, or the machine isolates nothing and `limits.isolation` is "auto".
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int = 2,
        *,
        execution: Literal["replay", "forked"] = "replay",
        installer: Installer | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise UserError(f"the sandbox needs Linux, this is {sys.platform}")
        if workers < 1:
            raise UserError(f"workers is {workers}; expected at least 1")
        if execution not in ("replay", "forked"):
            raise UserError(f"execution is {execution!r}; expected 'replay' or 'forked'")
        self.limits = limits or Limits()
        self._link = _Link(self.limits, workers)
        # Runs at garbage collection and at interpreter exit, once.
        self._finalizer = weakref.finalize(self, self._link.close)
        self._numbers = itertools.count()
        if self.limits.isolation == "auto" and not self._link.hello["isolates"]:
            self.close()
            raise UserError(
                "this machine grants neither namespaces nor Landlock, so model code cannot be isolated; "
                "set isolation = 'none' to run it nevertheless"
            )
        self._forks = execution == "forked" and self._link.hello["nested"]
        self._installer = installer

    def open(self, files: Sequence[str] = (), language: Language = "python") -> Session:
        """A session of chunks over some files; see `Session`.

        Args:
            files: paths that the code sees under their basenames in its working folder, read-only.
            language: "python", or "sql" for queries of .sqlite and .csv files.

        Raises:
            UserError: a file is missing, two have the same name, or the language is another.
        """
        number = next(self._numbers) if self._forks and language == "python" else None
        return Session(self._submit, self._link.forget, task_files(files), language, number)

    def run(
        self, code: str, files: Sequence[str] = (), history: Sequence[str] = (), language: Language = "python"
    ) -> Execution:
        """Runs one chunk and waits for it; see `submit`."""
        return self.submit(code, files, history, language).result()

    def submit(
        self, code: str, files: Sequence[str] = (), history: Sequence[str] = (), language: Language = "python"
    ) -> Future[Execution]:
        """Runs one chunk.

        Args:
            code: the new chunk; only its output is returned.
            files: paths that the code sees under their basenames in its working folder, read-only.
            history: earlier chunks, run again before it in the same namespace with their output discarded.
            language: "python" or "sql".

        Returns:
            A future of the result. It raises RuntimeError where the sandbox itself failed (no space left, closed).

        Raises:
            UserError: a file is missing, or two have the same name.
        """
        return self._submit(code, history, task_files(files), language, None)

    def _submit(
        self, code: str, history: Sequence[str], files: Sequence[str], language: Language, session: int | None
    ) -> Future[Execution]:
        future: Future[Execution] = Future()
        if language == "python" and (reason := refusal(code)):
            future.set_result(Execution(False, reason + "\n", "refused", 0.0))
            return future
        packages = self._installer.folder if self._installer is not None else ""
        job = Job(next(self._numbers), code, list(history), list(files), language, session, packages)
        if self._installer is None or language != "python":
            self._link.send(job, future)
        else:
            threading.Thread(target=self._install_and_send, args=(self._installer, job, future), daemon=True).start()
        return future

    def _install_and_send(self, installer: Installer, job: Job, future: Future[Execution]) -> None:
        """Sends a job when the packages that it imports are there; what could not be installed ends its output."""
        try:
            problem = installer.ensure(job.code).problem
            sent: Future[Execution] = Future()
            self._link.send(job, sent)
            execution = sent.result()
        except Exception as error:
            _settle(future, error=error)
            return
        if problem and not execution.ok:
            execution = replace(execution, output=f"{execution.output}{problem}\n")
        _settle(future, execution)

    def enforced(self) -> tuple[str, ...]:
        """What the kernel of this machine enforces on each execution, one entry each."""
        return tuple(self._link.hello["enforced"])

    @property
    def restarts(self) -> int:
        """How often the server died and was started again."""
        return self._link.restarts

    @property
    def server_pid(self) -> int:
        """Process id of the server."""
        return self._link.process.pid

    def close(self) -> None:
        """Ends the server and all that runs; futures under way raise RuntimeError. More than once does no harm."""
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _fonts() -> str:
    """Where matplotlib keeps its list of the user's fonts, which takes seconds to make."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "matplotlib")


def task_files(files: Sequence[str]) -> list[str]:
    """Absolute paths of a task's files.

    Raises:
        UserError: one is missing, or two have the same name.
    """
    paths = [os.path.abspath(path) for path in files]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"the task's file {path} does not exist")
    if len({os.path.basename(path) for path in paths}) < len(paths):
        raise UserError(f"two of the task's files have the same name: {', '.join(paths)}")
    return paths


def _frame(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">I", len(data)) + data


def _receive(channel: socket.socket) -> bytes:
    """One frame; EOFError when the other side is gone."""
    size = struct.unpack(">I", _receive_exactly(channel, 4))[0]
    return _receive_exactly(channel, size)


def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = channel.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _settle(future: Future[Execution], result: Execution | None = None, error: Exception | None = None) -> None:
    """Completes a future unless its owner cancelled it."""
    if future.set_running_or_notify_cancel():
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)


def _empty(folder: str) -> None:
    """Removes what executions that were ended in the middle left behind."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
