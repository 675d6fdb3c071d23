"""`python -m groupwise.rollout.sandbox`: what this machine enforces on model code, and a trial of it.

Ends with status 1 if something that should have been refused or ended was not.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .client import Sandbox
from .execution import Execution
from .limits import Limits

LIMITS = Limits(wall_s=2.0, cpu_s=2.0, memory_gib=0.125, processes=8, file_mib=1)
LOAD = "import sys, time, importlib\nos, load = sys.modules['os'], importlib.import_module\n"

# What is tried, its code, and the verdicts that are right. {outside} is a file that is not the task's, {port} listens.
TRIALS = (
    ("reads its table", "print(open('t.csv').read())", {"ok"}),
    ("reads a file outside", "open('{outside}').read()", {"error"}),
    ("writes a file outside", "open('{outside}', 'a').write('x')", {"error"}),
    ("changes a mode outside", "os.chmod('{outside}', 0)", {"error"}),
    ("writes over its table", "open('t.csv', 'w')", {"error"}),
    ("lists processes", "os.listdir('/proc')", {"error"}),
    ("starts a program", "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])", {"error"}),
    ("opens a connection", "load('socket').create_connection(('127.0.0.1', {port}), 1)", {"error"}),
    (
        "enters a namespace",
        "c = load('ctypes').CDLL(None)\nif c.unshare(0x10000000): raise OSError('refused')",
        {"error"},
    ),
    ("loops for ever", "while True: pass", {"timeout"}),
    ("takes all memory", "x = [bytearray(2**20) for _ in range(10**6)]", {"memory"}),
    ("forks for ever", "while True:\n    try: os.fork()\n    except OSError: pass", {"killed", "timeout"}),
    ("writes a large file", "open('big', 'wb').write(b'x' * 2**22)", {"error"}),
    ("crashes", "load('ctypes').string_at(0)", {"killed"}),
    ("leaves a process behind", "if os.fork() == 0: time.sleep(60)", {"ok"}),
)


def try_all(sandbox: Sandbox) -> list[tuple[str, Execution, bool]]:
    """Each trial with its execution and whether it went as it should."""
    found = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        table, outside = Path(folder, "t.csv"), Path(folder, "outside")
        for name, code, right in TRIALS:
            table.write_text("a\n1\n")
            outside.write_text("hidden")
            mode = outside.stat().st_mode
            execution = sandbox.run(LOAD + code.format(outside=outside, port=port), [str(table)])
            untouched = outside.stat().st_mode == mode and outside.read_text() == "hidden"
            found.append((name, execution, untouched and execution.verdict in right))
    return found


def main() -> int:
    """Prints the list and the trials; returns the exit status."""
    console = Console()
    with Sandbox(LIMITS) as sandbox:
        console.print("This machine enforces on every execution:")
        for line in sandbox.enforced():
            console.print(f"  {line}", highlight=False)
        results = try_all(sandbox)
        start = time.perf_counter()
        sandbox.run("print(1)")
        elapsed_ms = (time.perf_counter() - start) * 1e3
    shown = Table("model code …", "verdict", "as it should", "last line")
    for name, execution, right in results:
        last = (execution.output.strip().splitlines() or [""])[-1]
        shown.add_row(name, execution.verdict, "[green]yes" if right else "[bold red]NO", last[:60])
    console.print(shown)
    console.print(f"An execution took {elapsed_ms:.0f} ms.")
    return 0 if all(right for *_, right in results) else 1


if __name__ == "__main__":
    sys.exit(main())
