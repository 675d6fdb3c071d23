"""The sandbox: right results, the right verdict for every attack and accident, and nothing left behind.

Attacks reach modules by `sys.modules`, past the first look of `calls.py`, so that what is tested is the kernel's work.
"""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from groupwise.engine.errors import UserError
from groupwise.rollout.sandbox import Execution, Limits, Sandbox, calls, client
from groupwise.rollout.sandbox.run import Capture, descendants

LIMITS = Limits(wall_s=3, cpu_s=2, memory_gib=0.25, processes=8, file_mib=1, output_bytes=4096)
MEAN = "import pandas as pd\ndf = pd.read_csv('t.csv')\nprint(df['a'].mean())"
PRELUDE = "import sys, time\nos = sys.modules['os']\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as shared:
        yield shared


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},x{i % 3}\n" for i in range(40)))
    return str(path)


def left_behind(sandbox: Sandbox) -> list[str]:
    """Processes under the server's guard beside the server itself, and files in the working folders."""
    tree = descendants(sandbox.server_pid)
    nested = "pid namespace" in sandbox.enforced()
    return [f"process {pid}" for pid in tree[2 if nested else 1 :]] + os.listdir(sandbox._link.base)


def attack(sandbox: Sandbox, code: str, files: tuple[str, ...] = ()) -> Execution:
    """Runs it, then checks that all is gone and that the next execution works."""
    result = sandbox.run(PRELUDE + textwrap.dedent(code), files)
    assert left_behind(sandbox) == []
    assert sandbox.run("print(1 + 1)").output == "2\n"
    assert sandbox.restarts == 0
    assert result.ok == (result.verdict == "ok")
    return result


# ---- results -------------------------------------------------------------------------------------------------------


def test_a_chunk_reads_its_table(sandbox: Sandbox, table: str) -> None:
    result = sandbox.run(MEAN, [table])
    assert (result.ok, result.output, result.verdict) == (True, "19.5\n", "ok")
    assert 0 < result.wall_s < LIMITS.wall_s
    assert left_behind(sandbox) == []


def test_history_is_replayed_without_its_output(sandbox: Sandbox, table: str) -> None:
    history = [
        "import random, sys\nimport numpy as np\nprint('hidden'); print('hidden', file=sys.stderr)\nx = random.random()",
        "open('note.txt', 'w').write(str(np.random.rand()))\nfd = sys.stdout.fileno()\n__import__('os').write(fd, b'hidden')",
    ]
    code = "print(x, open('note.txt').read())"
    first = sandbox.run(code, [table], history)
    assert first.ok
    assert "hidden" not in first.output
    assert sandbox.run(code, [table], history).output == first.output
    # Each execution starts from the same folder: nothing of the last one is there.
    assert "FileNotFoundError" in sandbox.run("open('note.txt')").output


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("x = 1\n1 / 0", "cell 1, line 2: 1 / 0\nZeroDivisionError: division by zero\n"),
        ("def f(n):\n    return {}[n]\nf('k')", "cell 1, line 3: f('k')\ncell 1, line 2, in f: return {}[n]\nKeyError: 'k'\n"),
        ("x = = 1", "cell 1, line 1: x = = 1\nSyntaxError: invalid syntax\n"),
        ("print('before')\nraise ValueError('v')", "before\ncell 1, line 2: raise ValueError('v')\nValueError: v\n"),
        ("import pandas as pd\npd.DataFrame({'a': [1]})['b']", "cell 1, line 2: pd.DataFrame({'a': [1]})['b']\nKeyError: 'b'\n"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "cell 1, line 3: raise E\nE: <exception str() failed>\n"),
        ("raise KeyboardInterrupt", "cell 1, line 1: raise KeyboardInterrupt\nKeyboardInterrupt\n"),
    ],
)  # fmt: skip
def test_an_error_is_a_short_traceback(sandbox: Sandbox, code: str, output: str) -> None:
    result = sandbox.run(code)
    assert (result.ok, result.verdict, result.output) == (False, "error", output)


def test_success_is_the_exit_status(sandbox: Sandbox) -> None:
    assert sandbox.run("import sys\nprint('w', file=sys.stderr)\nsys.exit(0)").ok
    assert not sandbox.run("raise SystemExit('stop here')").ok
    assert sandbox.run("").ok


def test_sets_print_in_the_same_order_in_every_server(sandbox: Sandbox) -> None:
    code = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    with Sandbox(LIMITS, workers=1) as other:
        assert other.run(code).output == sandbox.run(code).output


def test_names_with_blanks_quotes_and_unicode(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "o'b \"q\" é表.csv"
    path.write_text("a\n5\n")
    assert sandbox.run(f"print(open({path.name!r}).read())", [str(path)]).output == "a\n5\n\n"


def test_large_files_are_seen_without_a_copy(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    path.write_text("a\n" + "1\n" * 3_000_000)
    result = attack(sandbox, "print(len(open('large.csv').read())); open('large.csv', 'a')", (str(path),))
    assert result.output.startswith("6000002\n")
    assert not result.ok
    assert path.stat().st_size == 6000002


def test_results_are_not_mixed_up(sandbox: Sandbox) -> None:
    futures = [sandbox.submit(f"print({number} ** 2)") for number in range(40)]
    assert [future.result().output for future in futures] == [f"{number**2}\n" for number in range(40)]


def test_executions_run_side_by_side(sandbox: Sandbox) -> None:
    started = time.monotonic()
    futures = [sandbox.submit("import time\ntime.sleep(0.8)") for _ in range(2)]
    wait(futures)
    assert time.monotonic() - started < 1.5


def test_capture_keeps_head_and_tail() -> None:
    capture = Capture(20)
    for number in range(1000):
        capture.feed(f"{number:04d}".encode())
    assert capture.text() == "000000010002"[:10] + "\n... 3980 bytes left out ...\n" + "9709980999"
    small = Capture(20)
    small.feed("é".encode() * 10)
    assert small.text() == "é" * 10


# ---- attacks and accidents -------------------------------------------------------------------------------------------

ATTACKS = {
    "endless loop": ("while True: pass", {"timeout"}, "stopped after"),
    "endless sleep": ("time.sleep(100)", {"timeout"}, "stopped after 3 s"),
    "memory bomb": ("x = [bytearray(2**20) for _ in range(10**6)]", {"memory"}, "MemoryError"),
    "one huge allocation": ("import numpy as np\nnp.zeros(10**10)", {"memory", "error"}, "Memory"),
    "memory of many processes": (
        "for _ in range(5):\n    if os.fork() == 0:\n        x = b'x' * (100 * 2**20); time.sleep(60)\ntime.sleep(60)",
        {"memory", "timeout"}, "",
    ),
    "fork bomb": ("while True:\n    try: os.fork()\n    except OSError: pass", {"killed", "timeout"}, ""),
    "thread bomb": (
        "import threading\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        {"error", "memory", "timeout"}, "",
    ),
    "descriptor exhaustion": ("x = [open('/dev/null') for _ in range(10**5)]", {"error"}, "Too many open files"),
    "huge output": ("print('start' + 'x' * 10**7 + 'end')", {"ok"}, "bytes left out"),
    "endless output": ("while True: print('y' * 1000)", {"timeout"}, "bytes left out"),
    "output of bytes": ("os.write(1, bytes(range(256)))", {"ok"}, "abc"),
    "double fork": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nprint('gone')",
        {"ok"}, "gone",
    ),
    "child that ignores signals": (
        "import importlib\ns = importlib.import_module('sig' + 'nal')\n"
        "if os.fork() == 0:\n    for n in (1, 2, 3, 15): s.signal(n, s.SIG_IGN)\n    time.sleep(60)\nprint('left')",
        {"ok"}, "left",
    ),
    "os._exit with success": ("os._exit(0)", {"ok"}, ""),
    "os._exit with failure": ("os._exit(5)", {"error"}, ""),
    "crash in C": ("import importlib\nimportlib.import_module('ctypes').string_at(0)", {"killed"}, "SIG"),
    "abort": ("os.abort()", {"killed"}, "SIG"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", {"error"}, "RecursionError"),
    "deeper recursion": ("sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", {"memory", "killed", "timeout"}, ""),
    "closed stdout": ("sys.stdout.close()\nprint('x')", {"error"}, "ValueError"),
    "closed descriptors": ("os.closerange(0, 100)\n1 / 0", {"error"}, ""),
    "stdin": ("print(repr(sys.stdin.read()))", {"ok"}, "''"),
    "write over the table": ("open('t.csv', 'w').write('x')", {"error"}, "PermissionError"),
    "file too large": ("open('big', 'wb').write(b'x' * 2**22)", {"error"}, "File too large"),
    "folder without rights": ("os.makedirs('a/b'); open('a/b/f', 'w').close(); os.chmod('a', 0); os.chmod('.', 0)", {"ok"}, ""),
    "shadowing module": ("open('random.py', 'w').write('1 / 0')\nimport random, string\nprint(random.random() < 1)", {"ok"}, "True"),
    "excepthook and streams": ("sys.excepthook = 5; sys.stderr = None; sys.stdout = 3\n1 / 0", {"error"}, "ZeroDivisionError"),
    "changed builtins": ("import builtins\nbuiltins.print = None; builtins.len = None; import pandas; pandas.read_csv = 0", {"ok"}, ""),
    "raised limits": (
        "import importlib\nr = importlib.import_module('reso' + 'urce')\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
        {"error"}, "ValueError",
    ),
}  # fmt: skip

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
    import socket

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
    assert "Error" in result.output


def test_privileges_are_gone(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    result = attack(sandbox, "print(sorted(os.environ))\nprint(os.getpid())\nos.setuid(12345)")
    assert "API" not in result.output
    assert "PermissionError" in result.output or "OSError" in result.output
    if "pid namespace" in sandbox.enforced():
        assert "\n1\n" in result.output


# ---- the first look ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    ["import os\nos.system('ls')", "import os as o\no.execv('x', [])", "from os import popen", "import subprocess", "import socket as s",
     "from urllib.request import urlopen", "x = input()", "import ctypes.util", "eval(input())"],
)  # fmt: skip
def test_refusals_are_clear(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert (result.ok, result.verdict) == (False, "refused")
    assert result.output.startswith("Refused: ")
    assert "is not available here" in result.output


@pytest.mark.parametrize("code", [MEAN, "import os\nos.path.join('a', 'b')", "system('x')", "df.kill(1)", "x = = 1", "\0"])
def test_ordinary_code_is_not_refused(code: str) -> None:
    assert calls.refusal(code) is None


# ---- the server --------------------------------------------------------------------------------------------------------


def test_a_killed_server_is_replaced_and_the_execution_retried() -> None:
    with Sandbox(LIMITS, workers=2) as sandbox:
        future = sandbox.submit("import time\ntime.sleep(1)\nprint('done')")
        time.sleep(0.3)
        tree = descendants(sandbox.server_pid)
        os.kill(tree[min(1, len(tree) - 1)], signal.SIGKILL)
        assert future.result(60).output == "done\n"
        assert sandbox.restarts == 1
        for pid in tree:
            assert pid not in descendants(os.getpid())
            assert not Path(f"/proc/{pid}").exists() or b" Z " in Path(f"/proc/{pid}/stat").read_bytes()
        future = sandbox.submit("import time\ntime.sleep(100)")
        for restarts in (1, 2):
            while sandbox.restarts != restarts or len(descendants(sandbox.server_pid)) < len(tree):
                time.sleep(0.01)
            os.kill(sandbox.server_pid, signal.SIGKILL)
        assert future.result(60).verdict == "killed"
        assert sandbox.run("print(1)").output == "1\n"


def test_closing_ends_everything() -> None:
    before = {pid for pid in descendants(os.getpid())}
    sandbox = Sandbox(LIMITS, workers=1)
    base, pid = sandbox._link.base, sandbox.server_pid
    futures = [sandbox.submit("import time\ntime.sleep(100)") for _ in range(2)]
    time.sleep(0.2)
    tree = descendants(pid)
    sandbox.close()
    sandbox.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(10)
    assert not os.path.exists(base)
    assert not any(os.path.exists(f"/proc/{gone}") for gone in tree)
    assert set(descendants(os.getpid())) <= before
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("1")


def test_a_forgotten_sandbox_is_closed() -> None:
    sandbox = Sandbox(LIMITS, workers=1)
    base, pid = sandbox._link.base, sandbox.server_pid
    del sandbox
    gc.collect()
    assert not os.path.exists(base)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_the_end_of_the_interpreter_ends_the_server(ending: str) -> None:
    code = (
        "import os, sys\nfrom groupwise.rollout.sandbox import Sandbox\nsandbox = Sandbox()\n"
        "print(sandbox.server_pid, sandbox._link.base, flush=True)\n"
        "future = sandbox.submit('import time; time.sleep(100)')\n"
    )
    found = subprocess.run([sys.executable, "-c", code + ending], stdout=subprocess.PIPE, text=True, timeout=60)
    pid, base = found.stdout.split()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.02)
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or " Z " in status.read_text()
    if "kill" in ending:
        assert os.listdir(base) == []
        os.rmdir(base)  # A killed interpreter can tidy up nothing; an empty folder is all that remains.
    else:
        assert not os.path.exists(base)


def test_bad_input_is_one_sentence(sandbox: Sandbox, table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        sandbox.run("1", ["/nowhere/t.csv"])
    copy = tmp_path / "t.csv"
    copy.write_text("a\n1\n")
    with pytest.raises(UserError, match="same name"):
        sandbox.run("1", [table, str(copy)])
    with pytest.raises(UserError, match="workers is 0"):
        Sandbox(workers=0)
    with pytest.raises(ValueError, match="wall_s is 0"):
        Limits(wall_s=0)


def test_a_machine_that_isolates_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = client.BOOT.replace(
        "; main()", "; import _sandbox.kernel as k; k._works = lambda flags: False; k.landlock_version = lambda: 0; main()"
    )
    monkeypatch.setattr(client, "BOOT", boot)
    with pytest.raises(UserError, match="isolation = 'none'"):
        Sandbox(LIMITS)
    with Sandbox(Limits(wall_s=3, isolation="none"), workers=1) as bare:
        assert not any("namespace" in line or "Landlock" in line for line in bare.enforced())
        assert attack(bare, ATTACKS["double fork"][0]).output == "gone\n"
        assert attack(bare, ATTACKS["child that ignores signals"][0]).output == "left\n"
        assert attack(bare, "time.sleep(100)").verdict == "timeout"
        assert attack(bare, "while True:\n    try: os.fork()\n    except OSError: pass").verdict in ("killed", "timeout")
