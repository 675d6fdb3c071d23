"""`Installer`: packages that a chunk of code imports, if the configuration allows them, into a folder of the run.

    installer = Installer(["lifelines", "sklearn=scikit-learn"], "runs/7/packages", timeout_s=120)
    installer.ensure("import lifelines").problem  # "", or why it is not there

It runs in the trusted process, which has the network that the sandbox lacks. Only what the allow list names is ever
asked for: packages come without their dependencies, which are installed if they are on the list themselves. Only
wheels are taken, so nothing of a package runs here; what it does when it is imported, it does in the sandbox. Where
packages come from is pip's own configuration (`PIP_INDEX_URL`, `PIP_FIND_LINKS`, pip.conf).

Not protected against: a package on the list that is not what its name promises; a required version that differs from
the one installed, since dependencies are not resolved.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import distributions

from ...engine.errors import UserError

ENTRY = re.compile(r"(?:([A-Za-z_]\w*)=)?([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)", re.ASCII)
# The second is how pandas asks for what it needs for some formats.
MISSING = re.compile(r"(?:No module named '|`Import )(\w+)")
REQUIRED = re.compile(r"[\w.-]+")
BROKEN = re.compile(r"connection broken by .*: (.+?)['\")]+: /")
MAX_REASON_CHARS = 200


@dataclass(frozen=True)
class Installation:
    """What `Installer.ensure` did.

    Args:
        new: distributions installed just now; if there are any, code that missed them may run again.
        problem: one sentence for each allowed package that could not be installed, or "".
    """

    new: tuple[str, ...] = ()
    problem: str = ""


class Installer:
    """Installs allowed packages, each at most once; any thread may call it.

    Args:
        allow: names of distributions, "import=distribution" where the name to import is another.
        folder: where they go; made if it is not there. Code finds them with this folder on its `sys.path`, at the end.
        timeout_s: seconds for one package.

    Raises:
        UserError: an entry of `allow` is malformed, or `timeout_s` is not above 0.
    """

    def __init__(self, allow: Sequence[str], folder: str, timeout_s: float = 120.0) -> None:
        if not timeout_s > 0:
            raise UserError(f"timeout_s of the packages is {timeout_s}; expected a number above 0")
        self.allow = dict(map(_entry, allow))
        self.folder = os.path.realpath(folder)
        self.timeout_s = timeout_s
        self._problems: dict[str, str] = {}  # by distribution; "" for one that is there or on its way
        # Reentrant: a garbage collection under the lock may run code that comes back here.
        self._lock = threading.RLock()
        os.makedirs(self.folder, exist_ok=True)

    def ensure(self, code: str, output: str = "") -> Installation:
        """Installs what is allowed and missing.

        Args:
            code: a chunk of Python; its import statements count.
            output: what an earlier run of it printed; the modules that it did not find count too.
        """
        names = [*_imports(code), *MISSING.findall(output)]
        new: list[str] = []
        with self._lock:
            self._add(names, new)
            wanted = dict.fromkeys(self.allow[name] for name in names if name in self.allow)
            problems = [self._problems[name] for name in wanted if self._problems.get(name)]
        return Installation(tuple(new), " ".join(problems))

    def _add(self, names: Iterable[str], new: list[str]) -> None:
        for name in names:
            distribution = self.allow.get(name)
            if distribution is None or distribution in self._problems or self._importable(name):
                continue
            self._problems[distribution] = ""
            try:
                reason = self._install(distribution)
            except OSError as error:  # no space, no processes left
                reason = str(error)
            if reason:
                problem = f"The package {distribution} is allowed but could not be installed: {reason}."
                self._problems[distribution] = problem
            else:
                new.append(distribution)
                self._add(self._required(distribution), new)

    def _importable(self, name: str) -> bool:
        # By paths: a folder that happens to have this name where the process was started is not the module.
        importlib.invalidate_caches()
        spec = PathFinder.find_spec(name, [self.folder, *site.getsitepackages()])
        return name in sys.stdlib_module_names or spec is not None

    def _required(self, distribution: str) -> list[str]:
        """Names under which the allow list has what an installed distribution asks for."""
        names = {_normal(allowed): name for name, allowed in self.allow.items()}
        found = []
        for installed in distributions(name=distribution, path=[self.folder]):
            for line in installed.requires or ():
                required = REQUIRED.match(line)
                if required and "extra ==" not in line and _normal(required[0]) in names:
                    found.append(names[_normal(required[0])])
        return found

    def _install(self, distribution: str) -> str:
        """Installs one distribution; returns why it failed, or ""."""
        with tempfile.TemporaryDirectory(prefix="groupwise-packages-", ignore_cleanup_errors=True) as new:
            # -I: no module of the current folder or of PYTHONPATH takes pip's place.
            command = [
                sys.executable, "-I", "-m", "pip", "install", "--target", new, "--only-binary", ":all:", "--no-deps",
                "--no-input", "--disable-pip-version-check", "--no-color", "--progress-bar", "off", "--retries", "1",
                distribution,
            ]  # fmt: skip
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            try:
                output = process.communicate(timeout=self.timeout_s)[0]
            except subprocess.TimeoutExpired:
                return f"pip was stopped after {self.timeout_s:g} s"
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
            if process.returncode:
                return _reason(output)
            # Packages of one namespace share folders, which pip would not merge.
            shutil.copytree(new, self.folder, dirs_exist_ok=True)
        return ""


def _entry(text: str) -> tuple[str, str]:
    """(name to import, distribution) of an entry of the allow list."""
    found = ENTRY.fullmatch(text)
    name = found and (found[1] or found[2])
    if not found or not name or not name.isidentifier():
        raise UserError(
            f"the allowed package {text!r} is no name that can be imported; expected 'name' or 'import=distribution'"
        )
    return name, found[2]


def _imports(code: str) -> list[str]:
    """Top-level modules that the import statements of a chunk name."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # Running it gives the model the error itself.
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(output: str) -> str:
    """Why pip failed, from what it printed: a broken connection comes before the distribution that it did not find."""
    broken = BROKEN.search(output)
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    lines = [broken[1]] if broken else errors or output.strip().splitlines() or ["pip gave no reason"]
    return lines[-1].strip(" .")[:MAX_REASON_CHARS]
