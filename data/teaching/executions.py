"""Executions kept on disk, so that a run that was stopped goes on with what its code printed the first time.

What code prints may hold addresses, times, or a time limit that a busy machine reached: run again it could print
something else, and a model teacher that reads something else must be asked, and paid, again.
"""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path

from ...rewards.kept import Kept
from ...rollout.agent import Executes, Runs
from ...rollout.sandbox import Execution
from ...rollout.task import Language


class KeptSandbox:
    """A sandbox whose sessions run no code that ran before on the same files after the same chunks.

    Args:
        sandbox: runs what is new.
        file: what came of it; made if absent, with its folder.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, sandbox: Executes, file: Path) -> None:
        self._sandbox = sandbox
        self._kept = Kept[Execution](file, "the executions", "execution", asdict, _to_execution)
        self._lock = threading.Lock()

    def open(self, files: Sequence[str], language: Language) -> "KeptSession":
        """A session over some files, see `Sandbox.open`."""
        return KeptSession(self, files, language)

    def get(self, key: str) -> Execution | None:
        """What came of a chunk, None if it is new."""
        return self._kept.get(key)

    def keep(self, key: str, execution: Execution) -> Execution:
        """Keeps what came of a chunk; where another thread ran the same one meanwhile, what came first counts."""
        with self._lock:
            first = self._kept.get(key)
            if first is None:
                self._kept.add({key: execution})
            return first or execution

    def begin(self, files: Sequence[str], language: Language, history: Sequence[str]) -> Runs:
        """A session of the sandbox in which some chunks have run."""
        session = self._sandbox.open(files, language)
        for chunk in history:
            session.submit(chunk).result()
        return session


class KeptSession:
    """Made by `KeptSandbox.open`; it opens a session of the sandbox with the first chunk that is new."""

    def __init__(self, sandbox: KeptSandbox, files: Sequence[str], language: Language) -> None:
        self._sandbox, self._files, self._language = sandbox, files, language
        self._start = [[Path(path).name, sha256(Path(path).read_bytes()).hexdigest()] for path in files]
        self._history: list[str] = []  # the chunks that succeeded
        self._session: Runs | None = None

    def submit(self, code: str) -> Future[Execution]:
        """Runs a chunk, see `Session.submit`."""
        asked = json.dumps([self._language, self._start, self._history, code])
        key = sha256(asked.encode()).hexdigest()
        execution = self._sandbox.get(key)
        if execution is None:
            if self._session is None:
                self._session = self._sandbox.begin(self._files, self._language, self._history)
            execution = self._sandbox.keep(key, self._session.submit(code).result())
        if execution.ok:
            self._history.append(code)
        future: Future[Execution] = Future()
        future.set_result(execution)
        return future

    def close(self) -> None:
        """Lets go of what the session keeps."""
        if self._session is not None:
            self._session.close()


def _to_execution(value: object) -> Execution | None:
    names = {field.name for field in fields(Execution)}
    return Execution(**value) if isinstance(value, dict) and value.keys() == names else None
