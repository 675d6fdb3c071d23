"""Executions kept on disk, so that a run that was stopped goes on with what its code printed the first time.

What code prints may hold addresses, times, or a time limit that a busy machine reached: run again it could print
something else, and a model teacher that reads something else must be asked, and paid, again.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path

from ..rewards.kept import Kept
from ..rollout.agent import Executes, Runs
from ..rollout.sandbox import Execution
from ..rollout.task import Language


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

    def open(self, files: Sequence[str], language: Language) -> "KeptSession":
        """A session over some files, see `Sandbox.open`."""
        return KeptSession(self._sandbox, self._kept, files, language)


class KeptSession:
    """Made by `KeptSandbox.open`; it opens a session of the sandbox with the first chunk that is new."""

    def __init__(self, sandbox: Executes, kept: Kept[Execution], files: Sequence[str], language: Language) -> None:
        self._sandbox, self._kept, self._files, self._language = sandbox, kept, files, language
        self._start = [[Path(path).name, sha256(Path(path).read_bytes()).hexdigest()] for path in files]
        self._history: list[str] = []  # the chunks that succeeded
        self._session: Runs | None = None

    def submit(self, code: str) -> Future[Execution]:
        """Runs a chunk, see `Session.submit`."""
        asked = json.dumps([self._language, self._start, self._history, code])
        key = sha256(asked.encode()).hexdigest()
        future: Future[Execution] = Future()
        execution = self._kept.get(key)
        if execution is None:
            if self._session is None:
                self._session = self._sandbox.open(self._files, self._language)
                for chunk in self._history:
                    self._session.submit(chunk).result()
            execution = self._session.submit(code).result()
            self._kept.add({key: execution})
        if execution.ok:
            self._history.append(code)
        future.set_result(execution)
        return future

    def close(self) -> None:
        """Lets go of what the session keeps."""
        if self._session is not None:
            self._session.close()


def _to_execution(value: object) -> Execution | None:
    names = {field.name for field in fields(Execution)}
    return Execution(**value) if isinstance(value, dict) and value.keys() == names else None
