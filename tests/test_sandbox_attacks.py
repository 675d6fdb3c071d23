"""Attacks and accidents: each ends in time with the right verdict, leaves nothing, and the next execution works.

Attacks reach modules by `sys.modules`, past the first look of `calls.py`, so that what is tested is the kernel's work.
"""

import re
import socket
import time
from pathlib import Path

import pytest
from sandboxes import LIMITS, attack

from groupwise.rollout.sandbox import Sandbox, client

OWN_VARIABLES = ("HOME", "TMPDIR", "LC_CTYPE", "PWD")


ATTACKS = {
    "endless loop": ("while True: pass", {"timeout"}, "stopped after"),
    "endless sleep": ("time.sleep(100)", {"timeout"}, "stopped after 3 s"),
    "memory bomb": ("x = [bytearray(2**20) for _ in range(10**6)]", {"memory"}, "MemoryError"),
    "one huge allocation": ("import numpy as np\nnp.zeros(10**10)", {"memory", "error"}, "Memory"),
    "memory of many processes": (
        "for _ in range(5):\n    if os.fork() == 0:\n        x = b'x' * (60 * 2**20); time.sleep(60)\ntime.sleep(60)",
        {"memory", "timeout"},
        "",
    ),
    "fork bomb": ("while True:\n    try: os.fork()\n    except OSError: pass", {"killed", "timeout"}, ""),
    "thread bomb": (
        "import threading\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        {"error", "memory", "timeout"},
        "",
    ),
    "descriptor exhaustion": ("x = [open('/dev/null') for _ in range(10**5)]", {"error"}, "Too many open files"),
    "huge output": ("print('start' + 'x' * 10**7 + 'end')", {"ok"}, "bytes left out"),
    "endless output": ("while True: print('y' * 1000)", {"timeout"}, "bytes left out"),
    "output of bytes": ("os.write(1, bytes(range(256)))", {"ok"}, "abc"),
    "double fork": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nprint('gone')",
        {"ok"},
        "gone",
    ),
    "child that ignores signals": (
        "import importlib\ns = importlib.import_module('sig' + 'nal')\n"
        "if os.fork() == 0:\n    for n in (1, 2, 3, 15): s.signal(n, s.SIG_IGN)\n    time.sleep(60)\nprint('left')",
        {"ok"},
        "left",
    ),
    "os._exit with success": ("os._exit(0)", {"ok"}, ""),
    "os._exit with failure": ("os._exit(5)", {"error"}, ""),
    "crash in C": ("import importlib\nimportlib.import_module('ctypes').string_at(0)", {"killed"}, "SIG"),
    "abort": ("os.abort()", {"killed"}, "SIG"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", {"error"}, "RecursionError"),
    "deeper recursion": (
        "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        # Which comes first depends on the machine's speed; the interpreter itself may give up with a SystemError.
        {"memory", "killed", "timeout", "error"},
        "",
    ),
    "closed stdout": ("sys.stdout.close()\nprint('x')", {"error"}, "ValueError"),
    "closed descriptors": ("os.closerange(0, 100)\n1 / 0", {"error"}, ""),
    "stdin": ("print(repr(sys.stdin.read()))", {"ok"}, "''"),
    "write over the table": ("open('t.csv', 'w').write('x')", {"error"}, "PermissionError"),
    "file too large": ("open('big', 'wb').write(b'x' * 2**22)", {"error"}, "File too large"),
    "folder without rights": (
        "os.makedirs('a/b'); open('a/b/f', 'w').close(); os.chmod('a', 0); os.chmod('.', 0)",
        {"ok"},
        "",
    ),
    "shadowing module": (
        "open('random.py', 'w').write('1 / 0')\nimport random, string\nprint(random.random() < 1)",
        {"ok"},
        "True",
    ),
    "excepthook and streams": (
        "sys.excepthook = 5; sys.stderr = None; sys.stdout = 3\n1 / 0",
        {"error"},
        "ZeroDivisionError",
    ),
    "changed builtins": (
        "import builtins\nbuiltins.print = None; builtins.len = None; import pandas; pandas.read_csv = 0",
        {"ok"},
        "",
    ),
    "raised limits": (
        "import importlib\nr = importlib.import_module('reso' + 'urce')\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
        {"error"},
        "ValueError",
    ),
}

# What only namespaces or Landlock can refuse. {outside} is a folder of the test with a file "secret" in it.
CONFINED = {
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read outside": "open('{outside}/secret').read()",
    "list outside": "os.listdir('{outside}')",
    "write outside": "open('{outside}/new', 'w')",
    "append outside": "open('{outside}/secret', 'a')",
    "remove outside": "os.remove('{outside}/secret')",
    "rename outside": "os.rename('{outside}/secret', '{outside}/moved')",
    "link to outside": "os.symlink('{outside}/secret', 'link'); open('link').read()",
    "hard link to outside": "os.link('{outside}/secret', 'link'); open('link').read()",
    "climb": "open('../../../../../../../../{outside}/secret').read()",
    "other folders": "os.listdir('..')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "environment of others": "open('/proc/1/environ').read()",
    "start a program": "os.execv('/bin/sh', ['sh', '-c', 'echo started'])",
    "kill the server": "os.kill({server}, 9)",
}
NETWORK = {
    "TCP": "s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {port}))",
    "UDP": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('8.8.8.8', 53))",
    "abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect('\\0groupwise-test')",
    "names": "socket.gethostbyname('example.com')",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(sandbox: Sandbox, table: str, name: str) -> None:
    code, verdicts, text = ATTACKS[name]
    started = time.monotonic()
    result = attack(sandbox, code, (table,))
    assert result.verdict in verdicts, result
    assert text in result.output
    if name == "deeper recursion" and result.verdict == "error":
        assert "SystemError" in result.output or "RecursionError" in result.output
    assert len(result.output) < LIMITS.output_bytes + 200
    assert time.monotonic() - started < LIMITS.wall_s + 3
    assert Path(table).read_text().startswith("a,b\n0,x0")


@pytest.mark.parametrize("name", CONFINED)
def test_nothing_outside_is_touched(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    if not any(line.startswith("Landlock") for line in sandbox.enforced()):
        pytest.skip("needs Landlock")
    (tmp_path / "secret").write_text("hidden")
    code = CONFINED[name].format(outside=tmp_path, server=sandbox.server_pid)
    result = attack(sandbox, code)
    assert result.verdict == "error", result
    assert "hidden" not in result.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("secret", "hidden")]


def test_modes_outside_cannot_be_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    if "read-only mounts" not in sandbox.enforced():
        pytest.skip("needs mount namespaces")
    path = tmp_path / "secret"
    path.write_text("hidden")
    before = path.stat()
    for code in (f"os.chmod('{path}', 0)", f"os.utime('{path}', (1, 1))", f"os.truncate('{path}', 0)"):
        assert attack(sandbox, code).verdict == "error"
    assert path.stat() == before


@pytest.mark.parametrize("name", NETWORK)
def test_there_is_no_network(sandbox: Sandbox, name: str) -> None:
    if "network namespace" not in sandbox.enforced():
        pytest.skip("needs network namespaces")
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind("\0groupwise-test")
        unix.listen()
        lines = "import importlib\nsocket = importlib.import_module('socket')\n"
        result = attack(sandbox, lines + NETWORK[name].format(port=tcp.getsockname()[1]))
    assert result.verdict == "error", result
    assert "error" in result.output.lower()


def test_privileges_are_gone(sandbox: Sandbox) -> None:
    result = attack(sandbox, "print(sorted(os.environ))\nprint(os.getpid())\nos.setuid(12345)")
    assert set(re.findall(r"'(\w+)'", result.output.splitlines()[0])) <= {*client.ENVIRONMENT, *OWN_VARIABLES}
    assert "PermissionError" in result.output or "OSError" in result.output
    if "pid namespace" in sandbox.enforced():
        assert "\n1\n" in result.output
