"""What the tests of the sandbox share: tight limits, and a check that an execution left nothing behind."""

import os
import textwrap

from groupwise.rollout.sandbox import Execution, Limits, Sandbox
from groupwise.rollout.sandbox.job import Language
from groupwise.rollout.sandbox.tree import descendants

LIMITS = Limits(wall_s=1.5, cpu_s=2, memory_gib=0.125, processes=8, file_mib=1, output_bytes=4096)
PRELUDE = "import sys, time, importlib\nos, load = sys.modules['os'], importlib.import_module\n"


def left_behind(sandbox: Sandbox) -> list[str]:
    """Processes under the server's guard beside the server itself, and files in the working folders."""
    tree = descendants(sandbox.server_pid)
    nested = "pid namespace" in sandbox.enforced()
    return [f"process {pid}" for pid in tree[2 if nested else 1 :]] + os.listdir(sandbox._link.base)


def attack(sandbox: Sandbox, code: str, files: tuple[str, ...] = (), language: Language = "python") -> Execution:
    """Runs it, then checks that all is gone and that the next execution works."""
    code = PRELUDE + textwrap.dedent(code) if language == "python" else code
    result = sandbox.run(code, files, language=language)
    assert left_behind(sandbox) == []
    assert sandbox.run("print(1 + 1)").output == "2\n"
    assert sandbox.restarts == 0
    assert result.ok == (result.verdict == "ok")
    return result
