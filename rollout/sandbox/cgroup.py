"""Control groups: limits on all executions of a server together, where the machine lets this process make a group.

They are the last line behind the limits on each execution: they count kernel memory, pipes and shared pages too.
Versions 1 and 2 of the interface serve; version 2 gives a process that shares its group with others no say.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress

# Of version 1: controller, and the file that takes its limit; version 2 calls the second "memory.max".
FILES_V1 = {"pids": "pids.max", "memory": "memory.limit_in_bytes"}
FILES_V2 = {"pids": "pids.max", "memory": "memory.max"}
PREFIX = "groupwise-sandbox-"


def enter(name: str, processes: int, memory_bytes: int) -> list[str]:
    """Puts this process, and all that it starts, into a new group.

    Args:
        name: of the group, starting with PREFIX and unlike those of other servers.
        processes: processes and threads at once.
        memory_bytes: bytes of memory.

    Returns:
        The group's folders, to be given to `remove`; none where no limit could be set.
    """
    made = []
    for parent, files in _own_groups():
        _sweep(parent)
        folder = os.path.join(parent, name)
        try:
            os.mkdir(folder)
            for controller, file in files.items():
                _write(os.path.join(folder, file), processes if controller == "pids" else memory_bytes)
            _write(os.path.join(folder, "cgroup.procs"), os.getpid())
        except OSError:
            remove([folder])
            continue
        made.append(folder)
    return made


def remove(folders: list[str], patience_s: float = 0.0) -> None:
    """Removes groups whose processes have ended; the kernel may need a moment after the last of them."""
    deadline = time.monotonic() + patience_s
    for folder in folders:
        while True:
            try:
                os.rmdir(folder)
            except OSError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    time.sleep(0.005)
                    continue
            break


def _own_groups() -> list[tuple[str, dict[str, str]]]:
    """The folders of this process's present groups, each with the files of the limits that it takes."""
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    for _, controllers, path in lines:
        if not controllers:
            found.append((f"/sys/fs/cgroup{path}", FILES_V2))
        for name in set(controllers.split(",")) & FILES_V1.keys():
            # A container may show its own group as the root of the tree.
            places = (f"/sys/fs/cgroup/{controllers}{path}", f"/sys/fs/cgroup/{controllers}")
            place = next((place for place in places if os.path.isdir(place)), places[0])
            found.append((place, {name: FILES_V1[name]}))
    return [(folder, files) for folder, files in found if os.path.exists(os.path.join(folder, "cgroup.procs"))]


def _sweep(parent: str) -> None:
    """Removes what servers left whose client was killed; groups in use stay."""
    with suppress(OSError):
        remove([os.path.join(parent, name) for name in os.listdir(parent) if name.startswith(PREFIX)])


def _write(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))
