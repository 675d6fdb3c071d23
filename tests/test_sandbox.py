"""The sandbox: right results, clear errors, nothing left behind; `test_sandbox_attacks.py` has the attacks."""

import gc
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from attacks import DEAF_CHILD, DOUBLE_FORK, FORKS_UNTIL_IT_CANNOT
from sandboxes import LIMITS, attack, left_behind

from groupwise.engine.errors import UserError
from groupwise.rollout.sandbox import Limits, Sandbox, calls, client
from groupwise.rollout.sandbox.run import Capture
from groupwise.rollout.sandbox.tree import descendants

MEAN = "import pandas as pd\ndf = pd.read_csv('t.csv')\nprint(df['a'].mean())"


# ---- results --------------------------------------------------------------------------------------------------------


def test_a_chunk_reads_its_table(sandbox: Sandbox, table: str) -> None:
    result = sandbox.run(MEAN, [table])
    assert (result.ok, result.output, result.verdict) == (True, "19.5\n", "ok")
    assert 0 < result.wall_s < LIMITS.wall_s
    assert left_behind(sandbox) == []


def test_history_is_replayed_without_its_output(sandbox: Sandbox, table: str) -> None:
    history = [
        "import os, random, sys, numpy as np\nprint('hidden')\nprint('hidden', file=sys.stderr)\nx = random.random()",
        "open('note.txt', 'w').write(str(np.random.rand()))\nos.write(sys.stdout.fileno(), b'hidden')",
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
        (
            "def f(n):\n    return {}[n]\nf('k')",
            "cell 1, line 3: f('k')\ncell 1, line 2, in f: return {}[n]\nKeyError: 'k'\n",
        ),
        ("x = = 1", "cell 1, line 1: x = = 1\nSyntaxError: invalid syntax\n"),
        ("print('before')\nraise ValueError('v')", "before\ncell 1, line 2: raise ValueError('v')\nValueError: v\n"),
        (
            "import pandas as pd\npd.DataFrame({'a': [1]})['b']",
            "cell 1, line 2: pd.DataFrame({'a': [1]})['b']\nKeyError: 'b'\n",
        ),
        (
            "class E(Exception):\n    def __str__(self): raise self\nraise E",
            "cell 1, line 3: raise E\nE: <exception str() failed>\n",
        ),
        ("raise KeyboardInterrupt", "cell 1, line 1: raise KeyboardInterrupt\nKeyboardInterrupt\n"),
    ],
)
def test_an_error_is_a_short_traceback(sandbox: Sandbox, code: str, output: str) -> None:
    result = sandbox.run(code)
    assert (result.ok, result.verdict, result.output) == (False, "error", output)


def test_success_is_the_exit_status(sandbox: Sandbox) -> None:
    assert sandbox.run("import sys\nprint('w', file=sys.stderr)\nsys.exit(0)").ok
    stopped = sandbox.run("print('first')\nraise SystemExit('second')")
    assert (stopped.ok, stopped.output) == (False, "first\nsecond\n")
    assert sandbox.run("").ok


def test_sets_print_in_the_same_order_in_every_server(sandbox: Sandbox) -> None:
    code = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    with Sandbox(LIMITS, workers=1) as other:
        assert other.run(code).output == sandbox.run(code).output


def test_names_with_blanks_quotes_and_unicode(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / 'o\'b "q" é表.csv'
    path.write_text("a\n5\n")
    assert sandbox.run(f"print(open({path.name!r}).read())", [str(path)]).output == "a\n5\n\n"


def test_workbooks_and_databases_are_read_and_not_written(sandbox: Sandbox, tmp_path: Path) -> None:
    book, database = tmp_path / "my 'book'.xlsx", tmp_path / "données.sqlite"
    pd.DataFrame({"a": [1, 2, 3]}).to_excel(book, index=False)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t AS SELECT 4 AS a")
    connection.close()
    before = [path.read_bytes() for path in (book, database)]
    files = [str(book), str(database)]
    assert sandbox.run(f"import pandas as pd\nprint(pd.read_excel({book.name!r})['a'].sum())", files).output == "6\n"
    opened = f"import sqlite3\nc = sqlite3.connect({database.name!r})\n"
    assert sandbox.run(opened + "print(c.execute('SELECT a FROM t').fetchone())", files).output == "(4,)\n"
    assert "readonly" in sandbox.run(opened + "c.execute('DELETE FROM t')", files).output
    assert not sandbox.run(f"import pandas as pd\npd.DataFrame().to_excel({book.name!r})", files).ok
    assert [path.read_bytes() for path in (book, database)] == before


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
    code = "import time\nprint(time.monotonic())\ntime.sleep(0.8)\nprint(time.monotonic())"
    futures = [sandbox.submit(code) for _ in range(2)]
    begins, ends = zip(*(map(float, future.result().output.split()) for future in futures), strict=True)
    assert max(begins) < min(ends)


def test_capture_keeps_head_and_tail() -> None:
    capture = Capture(20)
    for number in range(1000):
        capture.feed(f"{number:04d}".encode())
    assert capture.text() == "000000010002"[:10] + "\n... 3980 bytes left out ...\n" + "9709980999"
    small = Capture(20)
    small.feed("é".encode() * 10)
    assert small.text() == "é" * 10


@pytest.mark.slow
def test_ten_thousand_executions_in_a_row() -> None:
    """None is lost or mixed up, both sides' memory stays flat, no process and no descriptor is left."""
    with Sandbox(LIMITS, workers=8) as sandbox:
        server = descendants(sandbox.server_pid)[-1]

        def burst(first: int, count: int) -> None:
            waiting = {number: sandbox.submit(f"print({number} * 3)") for number in range(first, first + 8)}
            for number in range(first, first + count):
                assert waiting.pop(number).result(60).output == f"{number * 3}\n"
                if (following := number + 8) < first + count:
                    waiting[following] = sandbox.submit(f"print({following} * 3)")

        burst(0, 1000)
        gc.collect()
        before = [resident(os.getpid()), resident(server)]
        descriptors = len(os.listdir("/proc/self/fd"))
        burst(1000, 9000)
        gc.collect()
        after = [resident(os.getpid()), resident(server)]
        assert all(late / early <= 1.02 for early, late in zip(before, after, strict=True)), (before, after)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert sandbox.restarts == 0
        assert left_behind(sandbox) == []
    assert not [pid for pid in descendants(os.getpid())[1:] if b" Z " in Path(f"/proc/{pid}/stat").read_bytes()]


def has_ended(pid: int) -> bool:
    try:
        return b" Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


# ---- the first look -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.system('ls')",
        "import os as o\no.execv('x', [])",
        "from os import popen",
        "import subprocess",
        "import socket as s",
        "from urllib.request import urlopen",
        "x = input()",
        "import ctypes.util",
        "eval(input())",
    ],
)
def test_refusals_are_clear(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert (result.ok, result.verdict) == (False, "refused")
    assert result.output.startswith("Refused: ")
    assert "is not available here" in result.output


@pytest.mark.parametrize(
    "code", [MEAN, "import os\nos.path.join('a', 'b')", "system('x')", "df.kill(1)", "x = = 1", "\0"]
)
def test_ordinary_code_is_not_refused(code: str) -> None:
    assert calls.refusal(code) is None


# ---- the server -----------------------------------------------------------------------------------------------------


def test_a_killed_server_is_replaced_and_the_execution_retried() -> None:
    with Sandbox(replace(LIMITS, wall_s=20), workers=2) as sandbox:
        idle = len(descendants(sandbox.server_pid))
        future = sandbox.submit("import time\ntime.sleep(2)\nprint('done')")
        while len(tree := descendants(sandbox.server_pid)) == idle:
            time.sleep(0.01)
        with warnings.catch_warnings(record=True) as said:
            os.kill(tree[min(1, len(tree) - 1)], signal.SIGKILL)
            result = future.result(60)
        assert "tried once more" in str(said[0].message)
        assert (result.output, result.retried) == ("done\n", True)
        assert sandbox.restarts == 1
        for pid in tree:
            assert pid not in descendants(os.getpid())
            assert has_ended(pid)
        future = sandbox.submit("import time\ntime.sleep(100)")
        for restarts in (1, 2):
            while sandbox.restarts != restarts or len(descendants(sandbox.server_pid)) < len(tree):
                time.sleep(0.01)
            os.kill(sandbox.server_pid, signal.SIGKILL)
        assert future.result(60).verdict == "killed"
        last = sandbox.run("print(1)")
        assert (last.output, last.retried) == ("1\n", False)


def test_closing_ends_everything() -> None:
    before = set(descendants(os.getpid()))
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


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), 9)"])
def test_the_end_of_the_interpreter_ends_the_server(ending: str) -> None:
    code = (
        "import os, sys\nfrom groupwise.rollout.sandbox import Sandbox\nsandbox = Sandbox()\n"
        "print(sandbox.server_pid, sandbox._link.base, flush=True)\n"
        "future = sandbox.submit('import time; time.sleep(100)')\n"
    )
    found = subprocess.run([sys.executable, "-c", code + ending], stdout=subprocess.PIPE, text=True, timeout=60)
    pid, base = found.stdout.split()
    deadline = time.monotonic() + 10
    while not has_ended(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert has_ended(int(pid))
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
        "; main()",
        "; import _sandbox.kernel as k; k._works = lambda flags: False; k.landlock_version = lambda: 0; main()",
    )
    monkeypatch.setattr(client, "BOOT", boot)
    with pytest.raises(UserError, match="isolation = 'none'"):
        Sandbox(LIMITS)
    with Sandbox(Limits(wall_s=1.5, isolation="none"), workers=1) as bare:
        assert not any("namespace" in line or "Landlock" in line for line in bare.enforced())
        assert attack(bare, DOUBLE_FORK).output == "gone\n"
        assert attack(bare, DEAF_CHILD).output == "left\n"
        assert attack(bare, "time.sleep(100)").verdict == "timeout"
        assert attack(bare, FORKS_UNTIL_IT_CANNOT).verdict in ("killed", "timeout")
        # Without PID namespaces there is no paused process, so a session replays.
    with Sandbox(Limits(wall_s=3, isolation="none"), execution="forked") as bare, bare.open() as session:
        assert session.run("x = 1").ok
        assert session.run("print(x)").output == "1\n"
