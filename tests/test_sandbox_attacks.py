"""Attacks and accidents: each ends in time with the right verdict, leaves nothing, and the next execution works."""

import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import ACCIDENTS, CONFINED, NETWORK, REFUSED_CALLS, C
from sandboxes import LIMITS, PRELUDE, attack

import groupwise
from groupwise.rollout.sandbox import Execution, Limits, Sandbox, client, seccomp

OWN_VARIABLES = ("HOME", "TMPDIR", "LC_CTYPE", "PWD")


ENDLESS = [name for name, (_, verdicts, _) in ACCIDENTS.items() if verdicts == {"timeout"}]


@pytest.mark.parametrize("name", [name for name in ACCIDENTS if name not in ENDLESS])
def test_accidents(sandbox: Sandbox, table: str, name: str) -> None:
    check_accident(name, attack(sandbox, ACCIDENTS[name][0], (table,)))
    assert Path(table).read_text().startswith("a,b\n0,x0")


def test_what_never_ends_is_stopped_in_time() -> None:
    """All at once: none keeps the server from stopping the others."""
    with Sandbox(LIMITS, workers=len(ENDLESS)) as own:
        futures = {name: own.submit(PRELUDE + ACCIDENTS[name][0]) for name in ENDLESS}
        for name, future in futures.items():
            check_accident(name, future.result(60))
        assert attack(own, "print('on')").output == "on\n"


def check_accident(name: str, result: Execution) -> None:
    _, verdicts, shown = ACCIDENTS[name]
    assert result.verdict in verdicts, result
    assert shown in result.output
    assert len(result.output) < LIMITS.output_bytes + 500
    assert result.wall_s < LIMITS.wall_s + 2


@pytest.mark.parametrize("name", CONFINED)
def test_nothing_outside_is_touched(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    if not any(line.startswith("Landlock") for line in sandbox.enforced()):
        pytest.skip("needs Landlock")
    (tmp_path / "secret").write_text("hidden")
    places = {"outside": tmp_path, "server": sandbox.server_pid, "base": sandbox._link.base}
    result = attack(sandbox, CONFINED[name].format(**places, project=groupwise.__file__))
    assert result.verdict == "error", result
    assert re.search("Error|Interrupt", result.output)
    assert "hidden" not in result.output
    assert "started" not in result.output.replace("echo started", "")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("secret", "hidden")]


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_the_kernel_refuses_calls(sandbox: Sandbox, name: str) -> None:
    if not any(line.startswith("seccomp") for line in sandbox.enforced()):
        pytest.skip("needs seccomp")
    column = ("x86_64", "aarch64").index(platform.machine())
    numbers = {
        "keyctl": "keyctl", "bpf": "bpf", "perf": "perf_event_open", "userfaultfd": "userfaultfd",
        "init_module": "init_module", "mq_open": "mq_open",
    }  # fmt: skip
    call = REFUSED_CALLS[name].format(
        server=sandbox.server_pid, **{key: seccomp.CALLS[known][column] for key, known in numbers.items()}
    )
    result = attack(sandbox, f"{C}print({call}, c.get_errno())")
    # EPERM, and for clone3 ENOSYS, so that the C library takes clone.
    assert result.output == ("-1 38\n" if name == "clone3" else "-1 1\n"), result


def test_modes_outside_cannot_be_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    if "read-only mounts" not in sandbox.enforced():
        pytest.skip("needs mount namespaces")
    path = tmp_path / "secret"
    path.write_text("hidden")
    before = path.stat()
    for change in ("chmod('{}', 0)", "utime('{}', (1, 1))", "truncate('{}', 0)", "chown('{}', 1, 1)"):
        assert attack(sandbox, "os." + change.format(path)).verdict == "error"
    assert path.stat() == before


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    path = str(tmp_path_factory.mktemp("sockets") / "s")
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        tcp.bind(("127.0.0.1", 0))
        abstract.bind("\0groupwise-test")
        named.bind(path)
        for listener in (tcp, abstract, named):
            listener.listen()
        yield {"port": tcp.getsockname()[1], "path": path}


@pytest.mark.parametrize("name", NETWORK)
def test_there_is_no_network(sandbox: Sandbox, ports: dict[str, object], name: str) -> None:
    if "network namespace" not in sandbox.enforced():
        pytest.skip("needs network namespaces")
    result = attack(sandbox, "socket = load('socket')\n" + NETWORK[name].format(**ports))
    assert result.verdict == "error", result
    assert "error" in result.output.lower()


def test_privileges_are_gone(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    with Sandbox(LIMITS, workers=1) as other:
        result = attack(other, "print(sorted(os.environ))\nprint(os.getpid())")
    assert "hidden" not in result.output
    assert set(re.findall(r"'(\w+)'", result.output.splitlines()[0])) <= {*client.ENVIRONMENT, *OWN_VARIABLES}
    if "pid namespace" in sandbox.enforced():
        assert "\n1\n" in result.output


def test_cpu_time_is_limited_in_every_process() -> None:
    with Sandbox(Limits(wall_s=20, cpu_s=1, memory_gib=0.125), workers=1) as sandbox:
        result = attack(sandbox, "while True: pass")
        assert (result.verdict, result.wall_s < 10) == ("timeout", True)
        assert "of CPU time" in result.output


def test_all_executions_together_are_limited(sandbox: Sandbox) -> None:
    groups = sandbox._link.groups
    if not groups:
        pytest.skip("needs a control group that this user may make")
    assert all(str(pid) for folder in groups for pid in Path(folder, "cgroup.procs").read_text().split())
    with Sandbox(LIMITS, workers=1) as other:
        own = other._link.groups
        assert set(own).isdisjoint(groups)
        limits = [Path(folder, "pids.max").read_text() for folder in own if os.path.exists(f"{folder}/pids.max")]
        assert limits == [] or int(limits[0]) < 2000
    assert not any(os.path.exists(folder) for folder in own)


def test_the_corpus_is_large() -> None:
    assert len(ACCIDENTS) + len(CONFINED) + len(REFUSED_CALLS) + len(NETWORK) >= 150
