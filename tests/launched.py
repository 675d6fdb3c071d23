"""Run a recipe as a command in a process that has the package imported already: for tests of many commands."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from distributed import PRELOAD


def launched(recipe: str, arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """What ``python -m groupwise.recipes.RECIPE ARGUMENTS`` in the folder ``cwd`` ends with, on one rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    module = f"groupwise.recipes.{recipe}"
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_main, args=(module, tuple(arguments), str(cwd), folder))
        process.start()
        process.join(280)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{module} {arguments} did not end in time")
        printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([module, *arguments], process.exitcode or 0, *printed)


def _main(module: str, arguments: tuple[str, ...], cwd: str, folder: str) -> None:
    for number, name in enumerate(("stdout", "stderr"), 1):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # else runpy warns that it is imported and run
    runpy.run_module(module, run_name="__main__", alter_sys=True)
