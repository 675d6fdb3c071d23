"""Packages that code imports: only allowed ones, once, as wheels, in time; no network is needed or used."""

import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from groupwise.engine.errors import UserError
from groupwise.rollout.sandbox.install import Installation, Installer


def wheel(folder: Path, distribution: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> None:
    """Writes a wheel as the format's specification has it; the hashes in RECORD may be left out."""
    name = distribution.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the one place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    """Every process that was started; at the end none of their groups is left."""
    processes: list[subprocess.Popen] = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield processes
    patience = time.monotonic() + 10  # what pip started itself is reaped by the machine's first process
    while any(map(is_alive, processes)):
        assert time.monotonic() < patience


def is_alive(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(installer: Installer, code: str) -> str:
    """What code prints that finds the installer's folder at the end of its path."""
    code = f"import sys; sys.path.append({installer.folder!r})\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout


def test_an_allowed_package_is_installed_once(tmp_path: Path, wheels: Path, started: list[subprocess.Popen]) -> None:
    wheel(wheels, "groupwise-tiny", {"tiny/__init__.py": "value = 7\n", "tiny/deep.py": "value = 8\n"})
    installer = Installer(["tiny=groupwise-tiny"], str(tmp_path / "packages"))
    code = "def f():\n    from tiny.deep import value\n    print(value)\nf()"
    assert installer.ensure(code) == Installation(("groupwise-tiny",))
    assert run(installer, code) == "8\n"
    assert installer.ensure("import tiny as t, os") == Installation()
    assert len(started) == 2
    # What an earlier run left in the folder is there for another installer.
    assert Installer(["tiny=groupwise-tiny"], installer.folder).ensure("import tiny") == Installation()
    assert len(started) == 2


@pytest.mark.parametrize(
    "code",
    [
        "import other",
        "from . import tiny",
        "from .tiny import x",
        "import os, json, numpy",
        "x = 'import tiny'",
        "import tiny(",
    ],
)
def test_nothing_else_starts_pip(tmp_path: Path, wheels: Path, started: list[subprocess.Popen], code: str) -> None:
    for name in ("other", "tiny", "json", "numpy"):
        wheel(wheels, name, {f"{name}.py": ""})
    installer = Installer(["tiny", "json", "numpy"], str(tmp_path / "packages"))
    assert installer.ensure(code, "NameError: name 'tiny' is not defined") == Installation()
    assert started == []
    assert os.listdir(installer.folder) == []


def test_a_module_that_a_run_did_not_find(tmp_path: Path, wheels: Path) -> None:
    wheel(wheels, "tiny", {"tiny/__init__.py": ""})
    installer = Installer(["tiny"], str(tmp_path / "packages"))
    code = "import importlib\nimportlib.import_module('tiny.deep')"
    output = subprocess.run([sys.executable, "-P", "-c", code], stderr=subprocess.PIPE, text=True).stderr
    assert installer.ensure(code) == Installation()
    assert installer.ensure(code, output).new == ("tiny",)


def test_a_module_that_pandas_asks_for(tmp_path: Path, wheels: Path) -> None:
    wheel(wheels, "tabulate", {"tabulate.py": ""})
    installer = Installer(["tabulate"], str(tmp_path / "packages"))
    code = "import sys, pandas\nsys.modules['tabulate'] = None\n"
    code += "try: pandas.DataFrame().to_markdown()\nexcept ImportError as error: print(error)"
    assert installer.ensure(code, run(installer, code)).new == ("tabulate",)


def test_what_a_package_requires_comes_if_it_is_allowed_too(tmp_path: Path, wheels: Path) -> None:
    wheel(
        wheels,
        "first",
        {"first.py": "", "space/a.py": "value = 1"},
        ("Se.Cond>=1", "third", "fourth; extra == 'all'", "numpy<1"),
    )
    wheel(wheels, "se_cond", {"second.py": "", "space/b.py": "value = 2"}, ("first",))
    for name in ("third", "fourth", "numpy"):
        wheel(wheels, name, {f"{name}.py": ""})
    installer = Installer(["first", "second=se-cond", "fourth", "numpy"], str(tmp_path / "packages"))
    assert installer.ensure("import first").new == ("first", "se-cond")
    modules = sorted(name for name in os.listdir(installer.folder) if name.endswith(".py"))
    assert modules == ["first.py", "second.py"]
    assert run(installer, "from space import a, b; print(a.value + b.value)") == "3\n"


def test_no_code_of_a_package_runs(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "setup.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nimport setuptools\nsetuptools.setup(name='tiny')"
    )
    with tarfile.open(wheels / "tiny-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "tiny-1.0/setup.py")
    problem = Installer(["tiny"], str(tmp_path / "packages")).ensure("import tiny").problem
    assert problem.startswith("The package tiny is allowed but could not be installed: No matching distribution")
    assert not (tmp_path / "ran").exists()


def test_a_module_of_the_current_folder_does_not_take_part(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(wheels, "tiny", {"tiny.py": "value = 7"})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "pip.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Installer(["tiny"], "packages").ensure("import tiny") == Installation(("tiny",))


def test_without_network_one_sentence_says_so_and_nothing_is_tried_again(
    tmp_path: Path, started: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    installer = Installer(["tiny"], str(tmp_path / "packages"), timeout_s=60)
    sentence = "The package tiny is allowed but could not be installed: [Errno 111] Connection refused."
    for output in ("", "ModuleNotFoundError: No module named 'tiny'"):
        assert installer.ensure("import tiny", output) == Installation((), sentence)
    assert len(started) == 1


def test_a_folder_that_cannot_be_written_is_a_problem_and_no_crash(tmp_path: Path, wheels: Path) -> None:
    wheel(wheels, "tiny", {"tiny.py": ""})
    installer = Installer(["tiny"], str(tmp_path / "packages"))
    (tmp_path / "packages").rmdir()
    (tmp_path / "packages").write_text("")
    assert "File exists" in installer.ensure("import tiny").problem


def ask_for_a_password(server: socket.socket) -> None:
    connection = server.accept()[0]
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n")


def test_the_time_limit_holds_for_what_pip_starts_too(
    tmp_path: Path, started: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "keyring").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nsleep 60\n")
    (tmp_path / "bin" / "keyring").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_KEYRING_PROVIDER", "subprocess")
    monkeypatch.delenv("PIP_NO_INDEX")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://somebody@127.0.0.1:{server.getsockname()[1]}/simple")
        thread = threading.Thread(target=ask_for_a_password, args=(server,))
        thread.start()
        installer = Installer(["tiny"], str(tmp_path / "packages"), timeout_s=4)
        start = time.monotonic()
        assert installer.ensure("import tiny").problem.endswith("could not be installed: pip was stopped after 4 s.")
    assert time.monotonic() - start < 30
    thread.join()
    assert (tmp_path / "asked").exists()
    assert started[0].returncode == -9
    assert os.listdir(installer.folder) == []


def test_threads_that_want_the_same_package(tmp_path: Path, wheels: Path, started: list[subprocess.Popen]) -> None:
    wheel(wheels, "tiny", {"tiny.py": "value = 7"})
    installer = Installer(["tiny"], str(tmp_path / "packages"))
    found: list[tuple[tuple[str, ...], str]] = []

    def want() -> None:
        result = installer.ensure("import tiny")
        found.append((result.new, str(os.path.exists(f"{installer.folder}/tiny.py"))))

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert sorted(found) == [((), "True")] * 5 + [(("tiny",), "True")]


def test_a_call_from_within_a_call_comes_back(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(wheels, "tiny", {"tiny.py": ""})
    installer = Installer(["tiny"], str(tmp_path / "packages"))
    inner: list[Installation] = []
    original = subprocess.Popen.communicate

    def communicate(self: subprocess.Popen, *arguments: object, **options: object) -> object:
        inner.append(installer.ensure("import tiny"))  # as a finalizer in a garbage collection might
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    assert installer.ensure("import tiny").new == ("tiny",)
    assert inner == [Installation()]


@pytest.mark.parametrize(
    "entry",
    ["", "scikit-learn", "-e .", "--pre", "x=--pre", "a b", "x=", "=x", "x==1", "x;y", "x @ http://h", "./x", "ü"],
)
def test_what_is_no_name_is_refused(tmp_path: Path, entry: str) -> None:
    with pytest.raises(UserError, match=r"expected 'name' or 'import=distribution'"):
        Installer([entry], str(tmp_path))


def test_the_time_limit_is_above_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="timeout_s of the packages is 0"):
        Installer([], str(tmp_path), timeout_s=0)
