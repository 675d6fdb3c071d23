"""The warm server: a process with numpy and pandas imported that forks a child for each execution.

`client.Sandbox` starts it with a bare environment and talks to it over a socket: frames of four length bytes and
JSON. It runs several executions at once, first come first served, and ends when its client does. It never imports
torch, and it never runs model code itself.
"""

from __future__ import annotations

import gc
import io
import json
import mimetypes
import os
import re
import resource
import selectors
import signal
import socket
import struct
import sys
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Any

from . import cgroup, kernel
from .job import Job
from .limits import Limits
from .process import Context, Process
from .run import Run
from .tree import address_space, private_bytes

SERVER_BYTES = 2**30
PLOTS = re.compile(r"\b(?:matplotlib|seaborn)\b")
SESSIONS = 512  # paused sessions have two processes each


class Server:
    """The event loop. `workers` executions run at once, the rest wait in order; paused sessions wait for their next."""

    def __init__(self, channel: socket.socket, context: Context, base: str, workers: int) -> None:
        self.channel, self.context, self.base, self.workers = channel, context, base, workers
        self.selector = selectors.DefaultSelector()
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Run] = {}  # by the number of the child
        self.paused: dict[int, Process] = {}  # by the number of the session
        self.received = bytearray()
        self.open = True
        self.plots = False  # whether matplotlib is imported
        self.count = 0

    def serve(self) -> None:
        """Works until the client is gone, then ends what runs."""
        self.selector.register(self.channel, selectors.EVENT_READ)
        try:
            while self.open:
                looks = [run.next_look for run in self.running.values()]
                pause = max(0.0, min(looks) - time.monotonic()) if looks else None
                for key, _ in self.selector.select(None if pause == float("inf") else pause):
                    self._handle(key)
                now = time.monotonic()
                for run in self.running.values():
                    if now >= run.next_look:
                        run.check(now)
                while self.open and self.waiting and len(self.running) < self.workers:
                    self._start(self.waiting.popleft())
        finally:
            for process in [*(run.process for run in self.running.values()), *self.paused.values()]:
                self._discard(process)

    def _children(self) -> set[int]:
        return {process.pid for process in self.paused.values()} | self.running.keys()

    def _handle(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self.channel:
            self._receive()
            return
        run: Run = key.data
        if run.process.pid not in self.running:
            return  # Two of its descriptors were ready, and another came first.
        if key.fd == run.output:
            if not run.read():
                self.selector.unregister(run.output)
            return
        for source in (run.output, run.process.handle, run.process.control):
            if source is not None and source in self.selector.get_map():
                self.selector.unregister(source)
        del self.running[run.process.pid]
        result, process = run.finish(self._children())
        if process is not None and run.job.session is not None:
            self.paused[run.job.session] = process
        if result is None:
            self.waiting.appendleft(replace(run.job, session=None))
        else:
            self._reply(result)

    def _receive(self) -> None:
        try:
            data = self.channel.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self.open = False
        self.received += data
        while len(self.received) >= 4:
            size = struct.unpack(">I", self.received[:4])[0]
            if len(self.received) < 4 + size:
                break
            message = json.loads(self.received[4 : 4 + size])
            del self.received[: 4 + size]
            if "close" in message:
                self._forget(message["close"])
            else:
                self.waiting.append(Job(**message))

    def _forget(self, session: int) -> None:
        if (process := self.paused.pop(session, None)) is not None:
            self._discard(process)

    def _discard(self, process: Process) -> None:
        process.end(self._children())
        process.folder.remove()

    def _start(self, job: Job) -> None:
        paused = self.paused.pop(job.session, None) if job.session is not None else None
        if paused is not None and paused.chunks != len(job.history):
            self._discard(paused)
            paused = None
        if not self.plots and any(PLOTS.search(chunk) for chunk in (job.code, *job.history)):
            self.plots = True
            with suppress(Exception):  # Not installed, perhaps: the code then says so itself.
                self.context = warm_plots(self.context)
        self.count += 1
        try:
            run = Run(job, self.context, os.path.join(self.base, str(self.count)), paused)
        except OSError as error:
            if paused is not None:
                self._discard(paused)
            self._reply({"id": job.id, "failure": f"the sandbox could not start an execution: {error}"})
            return
        self.running[run.process.pid] = run
        for source in (run.output, run.process.handle, run.process.control):
            if source is not None:
                self.selector.register(source, selectors.EVENT_READ, run)

    def _reply(self, result: dict[str, Any]) -> None:
        try:
            send(self.channel, json.dumps(result).encode())
        except OSError:
            self.open = False


def send(channel: socket.socket, data: bytes) -> None:
    """Sends one frame."""
    channel.sendall(struct.pack(">I", len(data)) + data)


def warm_up() -> None:
    """Imports numpy and pandas and touches what a small chunk uses, so that no execution pays for a first time."""
    warnings.simplefilter("ignore")
    mimetypes.init()  # reads files that executions may not, as libraries for .xlsx would
    import numpy as np
    import pandas as pd

    pd.set_option("mode.string_storage", "python")  # pyarrow would be imported by each execution anew
    text = "a,b,c,d\n" + "".join(f"{i},{i / 3},x{i % 3},2020-01-{i % 28 + 1:02d}\n" for i in range(50))
    table = pd.read_csv(io.StringIO(text))
    table["e"] = pd.to_datetime(table["d"])
    groups = table.groupby("c")["b"]
    shown: list[object] = [groups.mean(), groups.agg(["sum", "count"]), table.describe(), table[["a", "b"]].corr()]
    shown += [table["c"].unique(), table["c"].value_counts(), table.merge(table, on="a").tail(2), table.dtypes]
    shown += [table[table["a"] > 3]["b"].median(), table["c"].str.upper().iloc[0], table["e"].dt.month.nunique()]
    shown += [table.pivot_table(index="c", values="a"), table["b"].quantile(0.9), table["b"].rank().sum()]
    shown += [table.sort_values("b").head(), table.isna().sum()]
    shown += [np.polyfit(table["a"], table["b"], 1), np.corrcoef(table["a"], table["b"])]
    str(shown)
    table.to_csv(io.StringIO())


def warm_plots(context: Context) -> Context:
    """Imports matplotlib, which takes a second; a fork of a larger process costs more, so only where code plots."""
    import matplotlib.pyplot as plt

    plt.close(plt.figure())
    return settle(context.limits, context.features)


def settle(limits: Limits, features: kernel.Features) -> Context:
    """What executions share, measured when all is imported that will be."""
    gc.collect()
    gc.disable()
    # Forked children then neither scan nor copy what is here.
    gc.freeze()
    return Context(limits, features, kernel.interpreter_paths(), address_space(), private_bytes("self"))


def main() -> None:
    """Entry point; the client gives descriptor, base folder, workers and limits as JSON in the first argument."""
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=settings["channel"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits = Limits(**settings["limits"])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, kernel.MAX_FILES) if hard >= 0 else kernel.MAX_FILES, hard))
    warm_up()
    groups = cgroup.enter(os.path.basename(settings["base"]), *_together(limits, settings))
    features = kernel.isolate_server(settings["base"])
    enforced = [*features.describe(), *(["cgroup: processes and memory of all executions together"] if groups else [])]
    server = Server(channel, settle(limits, features), settings["base"], settings["workers"])
    hello = {"isolates": features.isolates, "nested": features.nested, "enforced": enforced, "groups": groups}
    send(channel, json.dumps(hello).encode())
    server.serve()


def _together(limits: Limits, settings: dict[str, Any]) -> tuple[int, int]:
    """Processes and bytes of memory of all executions at once, with room for the server and for paused sessions."""
    workers = settings["workers"]
    return workers * (limits.processes + 4) + SESSIONS, int(workers * 2 * limits.memory_gib * 2**30) + SERVER_BYTES
