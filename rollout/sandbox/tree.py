"""Trees of processes, by the numbers that /proc shows."""

from __future__ import annotations

import os
import signal

PAGE = os.sysconf("SC_PAGE_SIZE")


def end_orphans(running: set[int]) -> None:
    """Kills and reaps every child of this process but those named, and what they leave, until none is left."""
    while True:
        orphans = [pid for pid in descendants(os.getpid(), depth=1)[1:] if pid not in running]
        if not orphans:
            return
        for pid in orphans:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def descendants(root: int, depth: int = 1 << 30) -> list[int]:
    """Process ids of `root` and the tree under it."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(name))
    found = [root]
    level = [root]
    while level and depth:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
        depth -= 1
    return found


def private_bytes(pid: int | str) -> int:
    """Resident bytes of a process that no file backs, shared memory included; 0 if it is gone."""
    total = 0
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    total += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return total


def address_space() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * PAGE


def outer_pid(handle: int) -> int:
    """The number in /proc of a pidfd's process, as /proc may be of another PID namespace than ours; -1 if gone."""
    with open(f"/proc/self/fdinfo/{handle}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)
