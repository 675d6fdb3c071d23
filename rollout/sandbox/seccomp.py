"""A filter of system calls: what model code never needs is refused by the kernel with EPERM.

No socket is made, no program started, no namespace entered, no other process read or traced, no identity changed; and
calls whose only use here would be holes of the kernel (bpf, io_uring, keyrings, new mounts) are away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
CLONE_NEW_ANY = 0x7E020000  # every flag of clone that makes a namespace

# Numbers of each call on x86_64 and, after it, on aarch64; None where the architecture has no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171),
    "bind": (49, 200), "bpf": (321, 280), "chroot": (161, 51), "clock_adjtime": (305, 266), "clock_settime": (227, 112),
    "connect": (42, 203), "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281),
    "fanotify_init": (300, 262), "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "init_module": (175, 105), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioperm": (173, None), "iopl": (172, None),
    "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219),
    "listen": (50, 201), "memfd_create": (319, 279), "memfd_secret": (447, 447), "mount": (165, 40),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "mq_open": (240, 180), "msgget": (68, 186),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438), "pivot_root": (155, 41),
    "process_madvise": (440, 440), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "request_key": (249, 218), "semget": (64, 190), "setdomainname": (171, 162), "setfsgid": (123, 152),
    "setfsuid": (122, 151), "setgid": (106, 144), "setgroups": (116, 159), "sethostname": (170, 161),
    "setns": (308, 268), "setregid": (114, 143), "setresgid": (119, 149), "setresuid": (117, 147),
    "setreuid": (113, 145), "settimeofday": (164, 170), "setuid": (105, 146), "shmget": (29, 194), "socket": (41, 198),
    "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "uselib": (134, None), "userfaultfd": (323, 282),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), 435
X32 = 0x40000000  # x86_64 has a second table of calls from here on
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of classic BPF, and where they find the call's number, architecture and first argument.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000

_libc = ctypes.CDLL(None, use_errno=True)


def program() -> bytes | None:
    """The filter for this machine's architecture, None where its calls are not known here."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return None
    column, audit = ARCHITECTURES[machine]
    refused = sorted(number for numbers in CALLS.values() if (number := numbers[column]) is not None)
    # Each test jumps over what follows it: (code, to if true, to if false, value), the ends being named.
    lines: list[tuple[int, str | int, str | int, int]] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 0, "kill", audit),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        lines.append((AT_LEAST, "refuse", 0, X32))
    lines += [(EQUAL, "refuse", 0, number) for number in refused]
    # The C library takes clone where clone3, whose flags lie in memory, does not exist.
    lines += [(EQUAL, "absent", 0, CLONE3), (EQUAL, 0, "allow", CLONE[column])]
    lines += [(LOAD, 0, 0, ARGUMENT), (ANY_BIT, "refuse", "allow", CLONE_NEW_ANY)]
    ends = {"allow": ALLOW, "refuse": ERROR | errno.EPERM, "absent": ERROR | errno.ENOSYS, "kill": KILL}
    places = {name: len(lines) + order for order, name in enumerate(ends)}
    code = b""
    for place, (operation, true, false, value) in enumerate(lines):
        jumps = (places[to] - place - 1 if isinstance(to, str) else to for to in (true, false))
        code += struct.pack("HBBI", operation, *jumps, value)
    return code + b"".join(struct.pack("HBBI", RETURN, 0, 0, end) for end in ends.values())


def restrict_calls(code: bytes) -> None:
    """Puts the filter on this process and all that it starts, for good; needs no_new_privs.

    Raises:
        OSError: the kernel has no filters, or a container's own refuses this one.
    """
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), header, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
