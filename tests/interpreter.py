"""Run a function of a test file where Triton interprets its kernels.

Triton decides that when it is imported, so one worker process, started on first use, has the setting; the tests' own
process keeps Triton as it is.
"""

import importlib.util
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def interpreted(fn: Callable[..., Any], *args: Any) -> Any:
    """Call ``fn(*args)`` in the worker; ``fn`` is at the top level of a test file. What it raises is raised here."""
    triton = pytest.importorskip("triton")
    versions = [tuple(map(int, version.split(".")[:2])) for version in (triton.__version__, np.__version__)]
    if versions[0] <= (3, 6) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 has no loop bounds known at run time with NumPy 2.4")
    return _worker().submit(_call, inspect.getfile(fn), fn.__name__, args).result(timeout=120)


@cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _call(file: str, name: str, args: tuple[Any, ...]) -> Any:
    # By its path: the name under which pytest imports a test file means nothing to another process.
    module_name = Path(file).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)(*args)
