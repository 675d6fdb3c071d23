"""Sessions: both ways of keeping state give the same observations, failed chunks leave no trace, nothing is left."""

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sandboxes import LIMITS, PRELUDE, left_behind

from groupwise.engine.errors import UserError
from groupwise.rollout.sandbox import Execution, Sandbox, Session
from groupwise.rollout.sandbox.tree import descendants

CHUNKS = (
    "import random, numpy as np, pandas as pd\nd = pd.read_csv('t.csv')\nx = []",
    "x.append(len(x)); print(x)",
    "print(random.random(), np.random.rand())",
    "d['c'] = d['a'] * len(x); print(d['c'].sum())",
    "open('note.txt', 'a').write('line\\n'); print(open('note.txt').read())",
    "import os\nos.makedirs('sub/deep', exist_ok=True); print(sorted(os.listdir('.')))",
    "x.append('bad'); open('note.txt', 'w').write('bad'); random.random()\nraise ValueError(x)",
    "os.remove('t.csv')\n1 / 0",
    "print(undefined)",
    "def f(n): return n * 2\nprint(f(len(x)))",
    "print(f(3))",
    "import warnings; warnings.warn('care')",
    "raise SystemExit(0)",
    "raise SystemExit('no')",
    "x = = 1",
    "try: print(open('note.txt').read())\nexcept OSError as error: print(error)",
    "print(pd.read_csv('t.csv')['a'].mean(), list(d.columns))",
    "print(os.getcwd(), os.environ['HOME'])",
)
NASTY = (
    "if os.fork() == 0: time.sleep(60)\nprint('left')",
    "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('started')",
    "os._exit(0)",
    "try: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nprint('all')",
    "os.abort()",
    "sys.stdout.close()",
    "os.chmod('.', 0)",
    "os.mkfifo('pipe')",
    "sys.stdout = sys.stderr = None",
    "os.fork = os.kill = os.dup2 = None",
    "print(random.random())",
    "import random\nrandom.seed(5)",
    "print('fine')",
)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Sandbox, Sandbox]]:
    with Sandbox(LIMITS, workers=2) as replaying, Sandbox(LIMITS, workers=2, execution="forked") as forking:
        yield replaying, forking


def seen(result: Execution) -> tuple[str, str]:
    return result.verdict, result.output


@pytest.mark.parametrize("seed", range(6))
def test_both_ways_see_the_same(both: tuple[Sandbox, Sandbox], table: str, seed: int) -> None:
    draw = random.Random(seed)
    chunks = [CHUNKS[0], *(draw.choice(CHUNKS) for _ in range(14))]
    with both[0].open([table]) as replaying, both[1].open([table]) as forking:
        for chunk in chunks:
            assert seen(replaying.run(chunk)) == seen(forking.run(chunk)), chunk
        assert replaying.history == forking.history
    wait_until_empty(both[1])


@pytest.mark.parametrize("seed", range(4))
def test_both_ways_see_the_same_of_attacks(both: tuple[Sandbox, Sandbox], seed: int) -> None:
    chunks = random.Random(seed).sample(NASTY, len(NASTY))
    with both[0].open() as replaying, both[1].open() as forking:
        for chunk in (PRELUDE, "import random\nx = 1", *chunks):
            assert seen(replaying.run(chunk)) == seen(forking.run(chunk)), chunk
    wait_until_empty(both[1])
    assert both[0].restarts == both[1].restarts == 0


def wait_until_empty(sandbox: Sandbox) -> None:
    """Closing a session says so to the server and does not wait."""
    sandbox.run("1")
    assert left_behind(sandbox) == []


def test_the_paused_process_is_stopped_and_alone(both: tuple[Sandbox, Sandbox]) -> None:
    sandbox = both[1]
    if "pid namespace" not in sandbox.enforced():
        pytest.skip("needs PID namespaces")
    session = sandbox.open()
    assert session.run(PRELUDE + "if os.fork() == 0:\n    while True: pass").ok

    def states() -> list[str]:
        found = []
        for pid in descendants(sandbox.server_pid)[2:]:
            with suppress(OSError):  # what was left running may end at this moment
                found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        return found

    deadline = time.monotonic() + 10
    while states() != ["S", "T"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states() == ["S", "T"]
    session.close()
    session.close()
    wait_until_empty(sandbox)


def test_a_chunk_that_is_out_of_time_is_forgotten(both: tuple[Sandbox, Sandbox]) -> None:
    for sandbox in both:
        with sandbox.open() as session:
            session.run("x = 1")
            assert session.run("x = 2\nwhile True: pass").verdict == "timeout"
            assert session.run("print(x)").output == "1\n"


@pytest.mark.parametrize("chunk", ["os.closerange(3, 200)", "for n in range(150): open(f'f{n}', 'w').close()"])
def test_what_cannot_be_kept_is_replayed(both: tuple[Sandbox, Sandbox], chunk: str) -> None:
    """The paused process has lost its socket, or its folder is too large to be copied."""
    with both[0].open() as replaying, both[1].open() as forking:
        for code in (PRELUDE, "x = 1", chunk, "x += 1", "1 / 0", "print(x)"):
            assert seen(replaying.run(code)) == seen(forking.run(code)), code
    wait_until_empty(both[1])


def test_many_sessions_are_not_mixed_up(both: tuple[Sandbox, Sandbox]) -> None:
    for sandbox in both:
        sessions = [sandbox.open() for _ in range(12)]
        for number in range(3):
            futures = [session.submit(f"x{number} = {place}") for place, session in enumerate(sessions)]
            assert all(future.result().ok for future in futures)
        for place, session in enumerate(sessions):
            assert session.run("print(x0, x1, x2)").output == f"{place} {place} {place}\n"
            session.close()
        wait_until_empty(sandbox)


def test_a_forgotten_session_is_closed(both: tuple[Sandbox, Sandbox]) -> None:
    sandbox = both[1]
    sandbox.open().run("x = 1")
    gc.collect()
    wait_until_empty(sandbox)


def test_one_chunk_at_a_time(both: tuple[Sandbox, Sandbox]) -> None:
    with both[0].open() as session:
        future = session.submit("import time; time.sleep(0.2)")
        with pytest.raises(RuntimeError, match="one chunk at a time"):
            session.submit("1")
        assert future.result().ok
        assert session.run("1").ok


def test_a_file_that_changes_under_a_session_is_named(both: tuple[Sandbox, Sandbox], tmp_path: Path) -> None:
    path = tmp_path / "changing.csv"
    path.write_text("a\n1\n")
    for sandbox in both:
        with sandbox.open([str(path)]) as session:
            assert session.run("print(open('changing.csv').read())").output == "a\n1\n\n"
            path.write_text("a\n22\n")
            with pytest.raises(UserError, match=r"changing\.csv was changed or removed"):
                session.run("1")
        path.write_text("a\n1\n")
    with both[0].open([str(path)]) as session:
        path.unlink()
        with pytest.raises(UserError, match="was changed or removed"):
            session.run("1")


def test_bad_input_is_one_sentence(both: tuple[Sandbox, Sandbox]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        both[0].open(["/nowhere/t.csv"])
    with pytest.raises(UserError, match="'python' or 'sql'"):
        both[0].open(language="julia")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'replay' or 'forked'"):
        Sandbox(LIMITS, execution="kept")  # type: ignore[arg-type]


def test_a_lost_server_is_replaced_by_a_replay() -> None:
    with Sandbox(LIMITS, workers=2, execution="forked") as sandbox, sandbox.open() as session:
        session.run("x = 1")
        future = session.submit("import time; time.sleep(0.6); x += 1; print(x)")
        time.sleep(0.2)
        os.kill(sandbox.server_pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="tried once more"):
            result = future.result(60)
        assert (result.output, result.retried) == ("2\n", True)
        again = session.run("print(x)")
        assert (again.output, again.retried) == ("2\n", False)
        wait_until_only(sandbox, session)


def wait_until_only(sandbox: Sandbox, session: Session) -> None:
    session.close()
    wait_until_empty(sandbox)


def test_collection_while_a_lock_is_held_does_not_hang() -> None:
    """A garbage collection runs finalizers in any thread at any line, so also in one that is sending."""
    with Sandbox(LIMITS, workers=1, execution="forked") as sandbox:
        session = sandbox.open()
        session.run("x = 1")
        gone = weakref.ref(session)

        def drop() -> None:
            nonlocal session
            with sandbox._link.lock:
                del session
                gc.collect()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert gone() is None
        wait_until_empty(sandbox)
