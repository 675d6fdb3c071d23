"""The interpreter that model code meets: chunks run in one namespace, and errors look as in a notebook."""

from __future__ import annotations

import gc
import io
import linecache
import random
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from os import dup2, write  # by name, as model code may change the module

DONE, FAILED, MEMORY, TIMEOUT = 96, 1, 97, 95  # Exit statuses; 0 would be that of code which ends its process itself.
REPORT = 3  # descriptor by which the error report leaves, whatever model code does to the streams
MAX_FRAMES = 3
MAX_ERROR_CHARS = 400


class Cells:
    """A namespace like that of a notebook, in this process, whose streams and modules it takes over."""

    def __init__(self) -> None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
        self._main = types.ModuleType("__main__")
        sys.modules["__main__"] = self._main
        sys.argv = [""]
        random.seed(0)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(0)
        gc.enable()
        self._count = 0
        self._print_anew()

    def replay(self, history: list[str]) -> None:
        """Runs chunks again; what they print goes where the descriptors lead, to nothing."""
        for chunk in history:
            self._execute(chunk, lambda text: None)
        _flush()

    def run(self, code: str, output: int) -> int:
        """Runs one chunk.

        Args:
            output: descriptor of a pipe for what it prints.

        Returns:
            DONE, FAILED or MEMORY; the report of an error is printed.
        """
        # Earlier chunks wrote through descriptors that lead to nothing, so nothing of theirs can come out late.
        for descriptor in (1, 2, REPORT):
            dup2(output, descriptor)
        self._print_anew()
        return self._execute(code, _report)

    def _print_anew(self) -> None:
        raw = io.FileIO(1, "w", closefd=False)
        stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            setattr(sys, name, stream)

    def _execute(self, code: str, say: Callable[[str], None]) -> int:
        self._count += 1
        name = f"<cell {self._count}>"
        # The traceback module finds the source of a cell here.
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        status = DONE
        try:
            exec(compile(code, name, "exec", dont_inherit=True), self._main.__dict__)
        except SystemExit as leaving:
            status = DONE if leaving.code in (None, 0) else FAILED
            if isinstance(leaving.code, str):
                _flush()
                say(leaving.code + "\n")
        except MemoryError:
            _flush()
            say("MemoryError\n")
            status = MEMORY
        except BaseException as error:
            _flush()
            say(short_traceback(error))
            status = FAILED
        _flush()
        if status != DONE:
            self._count -= 1  # A failed chunk is not kept, so the next one has its number.
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


def _report(text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    with suppress(OSError):
        while data:
            data = data[write(REPORT, data) :]
