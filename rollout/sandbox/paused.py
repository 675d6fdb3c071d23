"""A session whose state is kept: a paused process, forked for each chunk, instead of a replay of what came before.

Three processes live in the PID namespace of a session. The first supervises: it alone talks to the server, and no
model code ever runs in it. Its child holds the state after the last chunk that succeeded, and waits. A chunk runs in a
fork of that: if it succeeds, the fork ends the process that it came from and waits in its place; if it fails, it is
gone with all that it changed in memory, and the other one waits on. Between chunks all but the first are stopped.

What a chunk sees is what a replay would show it, but for process numbers and for threads, which no fork has.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from io import FileIO

# All by name, as model code may change the modules.
from os import _exit, close, dup2, fork, fstat, kill, wait4
from os import open as open_descriptor
from random import getstate, setstate
from signal import SIGCONT, SIGKILL, SIGSTOP
from socket import recv_fds
from typing import NoReturn

from .cells import DONE, Cells

KEPT, ENDED = b"kept", b"ended"
MESSAGE_BYTES = 64


def supervise(control: socket.socket, history: list[str]) -> NoReturn:
    """Serves a session in this process, the first of its PID namespace.

    A message on `control` brings two descriptors: of the code, and of a pipe for what it prints. The answer is KEPT, or
    ENDED with the status of `wait4` and the CPU seconds.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Whoever ends here needs no farewell.
    if fork() == 0:
        control.close()
        ours.close()
        _hold(theirs, history)
    theirs.close()
    while True:
        message, descriptors, _, _ = recv_fds(control, MESSAGE_BYTES, 2)
        if not message:
            _exit(0)
        _signal_all(SIGCONT)
        socket.send_fds(ours, [message], descriptors)
        for descriptor in descriptors:
            close(descriptor)
        answer = ours.recv(MESSAGE_BYTES)
        _signal_all(SIGSTOP)
        if not answer:  # Model code ended every process but this one.
            _exit(1)
        control.send(answer)


def _hold(channel: socket.socket, history: list[str]) -> NoReturn:
    """Replays the history, then lets forks of this process run what comes."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        dup2(1, 3)
        cells = Cells()
        cells.replay(history)
        identity = fstat(channel.fileno()).st_ino
        while True:
            message, descriptors, _, _ = recv_fds(channel, MESSAGE_BYTES, 2)
            if not message:
                break
            code, output = descriptors
            with FileIO(code) as file:
                text = file.read().decode()
            state = getstate()
            pid = fork()
            if pid == 0:
                setstate(state)  # The module seeds itself anew in a fork.
                _try_chunk(cells, text, output, channel, identity)
            else:
                close(output)
                _, status, usage = wait4(pid, 0)
                _signal_all(SIGKILL)
                channel.send(b"%s %d %.3f" % (ENDED, status, usage.ru_utime + usage.ru_stime))
    finally:
        _signal_all(SIGKILL)
        _exit(1)


def _try_chunk(cells: Cells, code: str, output: int, channel: socket.socket, identity: int) -> None:
    """Runs a chunk in this fork; returns if it succeeded and this process is now the one that waits."""
    status = cells.run(code, output)
    is_open = False
    with suppress(OSError):
        is_open = fstat(channel.fileno()).st_ino == identity  # Model code may have closed it.
    if status != DONE or not is_open:
        _exit(status)
    null = open_descriptor("/dev/null", os.O_RDWR)
    for descriptor in (1, 2, 3):
        dup2(null, descriptor)
    close(null)
    close(output)
    # The process that this one came from, and whatever the code left running.
    _signal_all(SIGKILL)
    with suppress(ChildProcessError):
        while True:
            wait4(-1, 0)
    channel.send(KEPT)


def _signal_all(number: int) -> None:
    """To every process of the namespace but the first and this one."""
    with suppress(ProcessLookupError):
        kill(-1, number)
