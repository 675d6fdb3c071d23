"""Small random tables, an in-process stand-in for the sandbox, what a teacher makes with them: for tests of `data`."""

import contextlib
import io
import os
import threading
from concurrent.futures import Future

import numpy as np
import pandas as pd

from groupwise.data.production import assign_strata, made, scripted_works
from groupwise.data.tables import Table
from groupwise.data.teachers import STRATA
from groupwise.rollout.sandbox import Execution

FOLDER = threading.RLock()  # the working folder and the standard output are one for all threads


def small_tables(count: int = 6) -> list[Table]:
    tables = []
    for number in range(count):
        rng = np.random.default_rng(number)
        rows = 40 + number
        frame = pd.DataFrame(
            {
                f"year{number}": np.arange(1950, 1950 + rows),
                f"height {number} (cm)": rng.normal(170, 9, rows).round(2),
                f"count{number}": rng.integers(0, 30, rows),
                f"share{number}": np.where(rng.random(rows) < 0.1, np.nan, rng.random(rows).round(4)),
                f"kind{number}": rng.choice(["red", "green", "dark blue"], rows),
                f"grade{number}": rng.integers(1, 5, rows),
                f"person{number}": [f"p {n}" for n in range(rows)],
            }
        )
        tables.append(Table(f"table{number}", frame))
    return tables


def rough_tables(count: int = 6) -> list[Table]:
    """Tables with negative numbers, ties, gaps, large and small numbers, years out of order, and a correlation."""
    tables = []
    for number in range(count):
        rng = np.random.default_rng(100 + number)
        rows = 50 + number
        below = rng.normal(0, 5, rows).round(2)
        frame = pd.DataFrame(
            {
                f"time{number}": rng.permutation(np.arange(1900, 1900 + rows)),
                f"below {number}": below,
                f"ties{number}": rng.integers(-3, 4, rows),
                f"gaps{number}": np.where(rng.random(rows) < 0.2, np.nan, rng.normal(10, 3, rows).round(1)),
                f"big{number}": (rng.random(rows) * 1e5).round(),
                f"small{number}": (rng.random(rows) + 0.1).round(3),
                f"near{number}": (below * 2 + rng.normal(0, 3, rows)).round(3),
                f"kind{number}": rng.choice(["a b", "c", "D-d"], rows),
                f"code{number}": rng.integers(1, 4, rows),
                f"name{number}": [f"n{n}" for n in range(rows)],
            }
        )
        tables.append(Table(f"rough{number}", frame))
    return tables


def ran(ok: bool, output: str) -> Execution:
    return Execution(ok, output, "ok" if ok else "error", 0.0)


class InProcess:
    """Runs code by exec, later chunks after earlier ones, each file under its base name."""

    def __init__(self) -> None:
        self.programs: list[str] = []

    def open(self, files, language):
        return InProcessSession(self, files)

    def submit(self, code, files=(), history=()):
        future: Future[Execution] = Future()
        future.set_result(self.run(code, files, history))
        return future

    def run(self, code, files=(), history=()):
        with FOLDER:
            return self._run(code, files, history)

    def _run(self, code, files, history):
        self.programs.append(code)
        space: dict[str, object] = {}
        output = io.StringIO()
        here = os.getcwd()
        os.chdir(os.path.dirname(files[0]) if files else here)
        try:
            for chunk in history:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(chunk, space)
            with contextlib.redirect_stdout(output):
                exec(code, space)
        except Exception as error:
            return ran(False, f"{output.getvalue()}{type(error).__name__}: {error}")
        finally:
            os.chdir(here)
        return ran(True, output.getvalue())


class InProcessSession:
    """Remembers the chunks that succeeded."""

    def __init__(self, runner, files):
        self.runner, self.files, self.history, self.closed = runner, files, (), False

    def submit(self, code):
        assert not self.closed
        future = self.runner.submit(code, self.files, self.history)
        future.add_done_callback(lambda done: self.take(code, done.result()))
        return future

    def take(self, code, ran):
        if ran.ok:
            self.history = (*self.history, code)

    def close(self):
        self.closed = True


def taught(problems, runner, seed, strata=STRATA, threads=2):
    """What the scripted teacher makes of problems, and the reasons of those that it made nothing of."""
    works = scripted_works(problems, assign_strata(problems, strata, seed), runner, seed)
    found = list(made(works, threads))
    return [expert for each in found for expert in each.experts], [each.reason for each in found if each.reason]
