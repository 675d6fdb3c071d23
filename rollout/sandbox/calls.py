"""A first look at model code, only to give the model a clear message; what holds is the kernel's work.

It sees names in the syntax tree, so it is easy to deceive, and it is not meant to stop anybody.
"""

from __future__ import annotations

import ast

MODULES = frozenset(
    {"subprocess", "socket", "ctypes", "multiprocessing", "pty", "asyncio", "urllib", "http", "requests", "ftplib",
     "smtplib", "telnetlib", "socketserver", "webbrowser", "signal", "resource", "pip"}
)  # fmt: skip
OS_CALLS = frozenset(
    {"system", "popen", "fork", "forkpty", "kill", "killpg", "posix_spawn", "posix_spawnp", "chroot", "setuid"}
)
READERS = frozenset({"input", "breakpoint"})


def refusal(code: str) -> str | None:
    """Why this code is not run, as one sentence for the model; None if nothing speaks against it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # Running it gives the model the error itself.
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if (name := _forbidden(node, aliases)) is not None:
            return f"Refused: {name} is not available here; use pandas on the files in the working folder."
    return None


def _forbidden(node: ast.AST, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Import):
        return next((alias.name for alias in node.names if alias.name.split(".")[0] in MODULES), None)
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module.split(".")[0] in MODULES:
            return node.module
        if node.module == "os":
            return next((f"os.{alias.name}" for alias in node.names if _is_os_call(alias.name)), None)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"os.{node.attr}" if aliases.get(node.value.id) == "os" and _is_os_call(node.attr) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
        return f"{node.func.id}()"
    return None


def _is_os_call(name: str) -> bool:
    return name in OS_CALLS or name.startswith(("exec", "spawn"))
