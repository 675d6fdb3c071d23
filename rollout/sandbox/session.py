"""`Session`: chunk after chunk in one namespace and one folder, like a notebook whose failed cells leave no trace."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ...engine.errors import UserError
from .execution import Execution
from .job import Language

Submit = Callable[[str, Sequence[str], Sequence[str], Language, int | None], Future[Execution]]


class Session:
    """Made by `Sandbox.open`; submit one chunk at a time.

    It knows the chunks that succeeded. Each new one meets what they did and nothing of those that failed: by their
    replay from the same start of the folder and the same random state, or in the paused process that they left behind,
    which is replaced by a replay wherever it is lost.

    Attributes:
        history: the chunks that succeeded.
    """

    def __init__(
        self,
        submit: Submit,
        forget: Callable[[int], None],
        files: Sequence[str],
        language: Language,
        number: int | None,
    ) -> None:
        if language not in ("python", "sql"):
            raise UserError(f"the language of a session is {language!r}; expected 'python' or 'sql'")
        self._submit, self._files, self._language, self._number = submit, files, language, number
        self._seen = _fingerprint(files)
        self._busy = False
        self.history: list[str] = []
        # Runs at `close`, at garbage collection and at interpreter exit, once.
        self._finalizer = weakref.finalize(self, forget, number) if number is not None else None

    def run(self, code: str) -> Execution:
        """Runs a chunk and waits for it; see `submit`."""
        return self.submit(code).result()

    def submit(self, code: str) -> Future[Execution]:
        """Runs a chunk.

        Returns:
            A future of the result, as that of `Sandbox.submit`.

        Raises:
            UserError: a file was removed or changed since the session was opened, so chunks would see different data.
            RuntimeError: the chunk before has not ended.
        """
        if self._busy:
            raise RuntimeError("a session runs one chunk at a time; wait for the one before")
        if (changed := _changed(self._files, self._seen)) is not None:
            raise UserError(f"the task's file {changed} was changed or removed while a session used it; start it anew")
        self._busy = True
        try:
            future = self._submit(code, self.history, self._files, self._language, self._number)
        except BaseException:
            self._busy = False
            raise
        future.add_done_callback(lambda done: self._take(code, done))
        return future

    def _take(self, code: str, future: Future[Execution]) -> None:
        self._busy = False
        if not future.cancelled() and future.exception() is None and future.result().ok:
            self.history.append(code)

    def close(self) -> None:
        """Lets go of what the session keeps; more than once does no harm."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _fingerprint(files: Sequence[str]) -> list[tuple[int, int, int]]:
    found = [os.stat(path) for path in files]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _changed(files: Sequence[str], seen: list[tuple[int, int, int]]) -> str | None:
    """The first file that is not as it was."""
    for path, before in zip(files, seen, strict=True):
        try:
            if _fingerprint([path]) != [before]:
                return path
        except OSError:
            return path
    return None
