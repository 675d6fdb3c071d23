"""An environment that is one function, in the place of a `Sandbox`: a game, a service, a lab's own executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .sandbox import Execution
from .task import Language

Function = Callable[[str, tuple[str, ...], tuple[str, ...]], str]


class Environment:
    """Has a function called for what a model writes as code.

        run_agent(sampler, Environment(lambda text, history, files: str(eval(text))), tasks, ...)

    Nothing is isolated: what runs is the function, in a thread of this process.

    Args:
        function: (text, earlier texts of the trajectory that succeeded, the task's files) -> what the model reads. An
            exception is a failed execution, and the model reads its type and message.
        workers: calls at once.
    """

    def __init__(self, function: Function, workers: int = 8) -> None:
        self._function = function
        self._pool = ThreadPoolExecutor(workers, "environment")

    def open(self, files: Sequence[str], language: Language) -> EnvironmentSession:
        """The session of one trajectory, see `Sandbox.open`."""
        return EnvironmentSession(self._function, self._pool, tuple(files))

    def close(self) -> None:
        """Ends its threads, after the calls under way."""
        self._pool.shutdown()

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EnvironmentSession:
    """Remembers the texts that succeeded."""

    def __init__(self, function: Function, pool: ThreadPoolExecutor, files: tuple[str, ...]) -> None:
        self._function, self._pool, self._files = function, pool, files
        self._history: tuple[str, ...] = ()

    def submit(self, code: str) -> Future[Execution]:
        """Starts a call."""
        return self._pool.submit(self._call, code)

    def _call(self, code: str) -> Execution:
        begin = time.monotonic()
        try:
            output = self._function(code, self._history, self._files)
        except Exception as error:
            return Execution(False, f"{type(error).__name__}: {error}", "error", time.monotonic() - begin)
        self._history = (*self._history, code)
        return Execution(True, output, "ok", time.monotonic() - begin)

    def close(self) -> None:
        """There is nothing to let go of."""
