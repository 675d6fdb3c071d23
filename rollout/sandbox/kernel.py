"""What the Linux kernel enforces on model code, by direct system calls: namespaces, Landlock, capabilities, rlimits.

None of it needs root. Each part is tried once at start; `Features` says which of them this machine grants. The filter
of system calls is in `seccomp.py`, the limits on all executions together in `cgroup.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from . import seccomp

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP = 1, 4, 8, 24
PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 38, 36
CAP_VERSION_3 = 0x20080522
READ_SEARCH = 1 << 2  # the capability to read every file and folder

# These numbers are the same on every architecture: system calls added since 2019 share one table.
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_RULE, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446

# Landlock's file-system rights by bit, and how many of them each version of its interface knows.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK, TRUNCATE = 1 << 6, 1 << 9, 1 << 11, 1 << 14
RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15

# What an interpreter may read beside its own folder. No EXECUTE anywhere: model code starts no program.
READABLE = (
    "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/timezone",
    "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random",
)  # fmt: skip

# Every execution sees its working folder here, so what it prints of its paths is the same each time. The place is
# there on all machines (Filesystem Hierarchy Standard) and holds nothing that an interpreter needs.
WORK = "/media"
MAX_FILES = 1 << 16  # descriptors of the server, which holds two for each paused session

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Features:
    """What this machine grants.

    Args:
        namespaces: names, for people.
        read_only_mounts: all but the working folders is mounted read-only.
        nested: each execution gets a PID namespace of its own inside the server's.
        per_job: flags of the other namespaces that each execution makes for itself; with `CLONE_NEWNS` among them it
            sees its working folder at `WORK`.
        landlock: version of its interface, 0 without.
        calls: the filter of system calls, None without.
        own_users: each execution gets a user id of its own, as root can give one.
    """

    namespaces: tuple[str, ...] = ()
    read_only_mounts: bool = False
    nested: bool = False
    per_job: int = 0
    landlock: int = 0
    calls: bytes | None = None
    own_users: bool = False

    @property
    def isolates(self) -> bool:
        """Whether there is any isolation at all: enough for `isolation = "auto"`."""
        return bool(self.landlock) or self.nested

    @property
    def counted(self) -> bool:
        """Whether an execution has a user that no other process has, so that the kernel counts its processes."""
        return self.own_users or bool(self.per_job & CLONE_NEWUSER)

    @property
    def work(self) -> bool:
        """Whether working folders are seen at `WORK`."""
        return bool(self.per_job & CLONE_NEWNS)

    def describe(self) -> list[str]:
        """One entry for each thing enforced."""
        lines = [f"{name} namespace" for name in self.namespaces]
        lines += ["read-only mounts"] if self.read_only_mounts else []
        if self.landlock:
            lines.append(f"Landlock (version {self.landlock}): reads of the interpreter and the task's files only")
            lines.append("Landlock: writes in the private folder only, no programs started")
            lines += ["Landlock: no TCP"] if self.landlock >= 4 else []
            lines += ["Landlock: no signals or abstract sockets to outside"] if self.landlock >= 6 else []
        if self.calls:
            lines.append("seccomp: no sockets, no programs, no tracing, no mounts")
        lines += ["no new privileges, no capabilities", "rlimits: CPU, address space, file size, files, core"]
        return [*lines, *(["rlimits: processes and threads"] if self.counted else [])]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Moves this process (and for PID its children) into new namespaces; maps the user onto itself.

    Raises:
        OSError: the kernel or a container's filter forbids it.
    """
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")
    if flags & CLONE_NEWUSER:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def fork_nested() -> int:
    """Forks like `os.fork`; the child is the first process of a new PID namespace inside the server's.

    One fork does where others need two, since the server owns its own namespace and so may come back to it.
    """
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    unshare(CLONE_NEWPID)
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            _check(_libc.setns(own, CLONE_NEWPID), "setns")
            os.close(own)
    return pid


def _works(flags: int) -> bool:
    """Whether the server can live in these namespaces and nest executions in it, tried in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            unshare(flags)
            if os.fork() == 0:
                if fork_nested() == 0:
                    os._exit(0)
                os._exit(os.wait()[1] != 0)
            os._exit(os.wait()[1] != 0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _succeeds(*steps: Callable[[], object]) -> bool:
    """Whether all of this can be done, tried in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            for step in steps:
                step()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _per_job(writable: str) -> int:
    """The namespaces that each execution can make for itself."""
    # A user namespace for each execution makes RLIMIT_NPROC count that execution alone; root has `become` for it.
    user = 0 if os.getuid() == 0 else CLONE_NEWUSER
    for flags in dict.fromkeys((CLONE_NEWIPC | CLONE_NEWNS | user, CLONE_NEWIPC | user, CLONE_NEWIPC)):
        if _succeeds(partial(enter_own, flags, writable)):
            return flags
    return 0


def enter_own(flags: int, folder: str) -> None:
    """Makes the namespaces of one execution, with its working folder at `WORK` if it has mounts of its own."""
    unshare(flags)
    if flags & CLONE_NEWNS:
        mount(folder, WORK, MS_BIND)


def new_user() -> int:
    """A user id that nobody has."""
    return 1 << 30 | int.from_bytes(os.urandom(4), "big") >> 3


def become(user: int) -> None:
    """Turns root's process into that of another user, by which the kernel counts its processes and threads.

    Of root's rights only that to read stays, as the interpreter may lie where only root looks; `drop_privileges` leaves
    it, and Landlock and the filter of calls say what it may be used for.
    """
    _check(_libc.prctl(PR_SET_KEEPCAPS, ctypes.c_ulong(1), 0, 0, 0), "prctl")
    os.setresuid(user, user, user)


def _try_users(folder: str) -> None:
    """Raises where root cannot give executions users of their own."""
    user = new_user()
    os.chown(folder, user, -1)
    become(user)
    drop_privileges(READ_SEARCH)
    os.mkdir(os.path.join(folder, "own"))


def isolate_server(writable: str) -> Features:
    """Puts the server into namespaces of its own, without network, all mounts read-only but the working folders.

    The process that returns is a child of the one that called, which waits for it and ends as it ends.

    Args:
        writable: the folder under which executions get their working folders.
    """
    names = {
        CLONE_NEWUSER: "user",
        CLONE_NEWNET: "network",
        CLONE_NEWNS: "mount",
        CLONE_NEWPID: "pid",
        CLONE_NEWIPC: "ipc",
    }
    wanted = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID
    # Root needs no user namespace for the others, and inside one it has but one user id.
    tries = (wanted & ~CLONE_NEWUSER, wanted) if os.getuid() == 0 else (wanted,)
    flags = next((flags for flags in tries if _works(flags)), 0)
    calls, landlock = seccomp.program(), landlock_version()
    if calls and not _succeeds(no_new_privileges, partial(seccomp.restrict_calls, calls)):
        calls = None
    if not flags:
        adopt_orphans()
        return Features(landlock=landlock, calls=calls)
    unshare(flags)
    read_only = False
    try:
        _read_only_mounts(writable)
        read_only = True
    except OSError:
        pass  # Some containers lock their mounts; Landlock does not depend on this.
    _become_first_process()
    per_job = _per_job(writable)
    trial = tempfile.mkdtemp(dir=writable)
    # Their right to read everything is harmless only behind these two.
    own_users = bool(calls and landlock and os.getuid() == 0) and _succeeds(partial(_try_users, trial))
    shutil.rmtree(trial)
    granted = tuple(name for flag, name in names.items() if (flags | per_job) & flag)
    return Features(granted, read_only, True, per_job, landlock, calls, own_users)


def _become_first_process() -> None:
    """Goes on in a child, the first process of the new PID namespace; the parent waits, then ends as the child did."""
    client = os.getppid()
    signals = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        _check(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")
        return
    os.closerange(3, MAX_FILES)
    patience = 5  # seconds in which a server whose client is gone may tidy up
    while True:
        got = signal.sigtimedwait(signals, 1.0)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        # The socket tells the server that its client is gone, unless a fork of the client still holds it.
        patience -= os.getppid() != client
        if patience == 0 or (got is not None and got.si_signo == signal.SIGTERM):
            os.kill(pid, signal.SIGKILL)


def mount(source: str | None, target: str, flags: int) -> None:
    """The system call, without a type or data."""
    encoded = os.fsencode(source) if source else None
    _check(_libc.mount(encoded, os.fsencode(target), None, ctypes.c_ulong(flags), None), "mount")


def _read_only_mounts(writable: str) -> None:
    def set_attributes(path: str, recursive: int, on: int, off: int) -> None:
        attributes = struct.pack("QQQQ", on, off, 0, 0)
        arguments = (AT_FDCWD, path.encode(), recursive, attributes, ctypes.c_size_t(len(attributes)))
        _check(_libc.syscall(SYS_MOUNT_SETATTR, *arguments), "mount_setattr")

    mount(None, "/", MS_REC | MS_PRIVATE)
    mount(writable, writable, MS_BIND)
    set_attributes("/", AT_RECURSIVE, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0)
    set_attributes(writable, 0, 0, MOUNT_ATTR_RDONLY)
    # User namespaces are set up by writing there; what else it has belongs to root.
    set_attributes("/proc", 0, 0, MOUNT_ATTR_RDONLY)


def landlock_version() -> int:
    """The version of Landlock's interface, 0 where the kernel has none."""
    return max(0, _libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def restrict_files(version: int, readable: Iterable[str], writable: str) -> None:
    """Landlock: from now on this process reads only what is named and writes only in one folder; no TCP.

    Args:
        version: `landlock_version()`, at least 1.
        readable: files and folders, those that do not exist are passed over.
        writable: the private folder.
    """
    handled = (1 << RIGHTS_BY_ABI.get(version, 16)) - 1
    network = 3 if version >= 4 else 0
    scoped = 3 if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, network, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _check(
        _libc.syscall(SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create_ruleset"
    )
    read = READ_FILE | READ_DIR
    write = handled & ~(EXECUTE | MAKE_CHAR | MAKE_BLOCK)
    rules = [*((path, read) for path in readable), ("/dev/null", read | WRITE_FILE), (writable, write)]
    for path, rights in rules:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= FILE_RIGHTS
        rule = struct.pack("=Qi", rights & handled, handle)
        _check(_libc.syscall(SYS_LANDLOCK_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(handle)
    _check(_libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def interpreter_paths() -> tuple[str, ...]:
    """Every folder from which a later import reads, and `READABLE`."""
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    return tuple(dict.fromkeys((*prefixes, *READABLE)))


def die_with_parent(parent: int) -> None:
    """This process is killed when its parent ends, also if it has ended already."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(9), 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children, so none can slip away."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0), "prctl")


def no_new_privileges() -> None:
    """No program that is started gets more rights than this process; a filter of calls needs it."""
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "prctl")


def drop_privileges(kept: int = 0) -> None:
    """Gives up every capability but those whose bits are in `kept`, and the ways to get one."""
    capability = 0
    while _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:
        capability += 1
    no_new_privileges()
    _check(_libc.capset(struct.pack("Ii", CAP_VERSION_3, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0)), "capset")
    # Others of the same user may not trace or read it.
    _check(_libc.prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "prctl")


def limit(what: int, soft: float, spare: int = 0) -> None:
    """Sets one rlimit, never above the hard limit that is in force."""
    hard = resource.getrlimit(what)[1]
    ceiling = int(soft) + spare if hard == resource.RLIM_INFINITY else min(hard, int(soft) + spare)
    try:
        resource.setrlimit(what, (min(int(soft), ceiling), ceiling))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", errno.EPERM) != errno.EPERM:
            raise
