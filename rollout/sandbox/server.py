"""The warm server: a process with numpy and pandas imported that forks a child for each execution.

`client.Sandbox` starts it with a bare environment and talks to it over a socket: frames of four length bytes and
JSON. It runs several executions at once, first come first served, and ends when its client does. It never imports
torch, and it never runs model code itself.
"""

from __future__ import annotations

import gc
import io
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
import warnings
from collections import deque
from typing import Any

from . import kernel
from .limits import Job, Limits
from .run import PAGE, Context, Run, private_pages


class Server:
    """The event loop. `workers` executions run at once, the rest wait in order."""

    def __init__(self, channel: socket.socket, context: Context, base: str, workers: int) -> None:
        self.channel, self.context, self.base, self.workers = channel, context, base, workers
        self.selector = selectors.DefaultSelector()
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Run] = {}
        self.received = bytearray()
        self.open = True
        self.count = 0
        self.own_pages = private_pages("self")

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
                        run.check(now, self.own_pages)
                while self.open and self.waiting and len(self.running) < self.workers:
                    self._start(self.waiting.popleft())
        finally:
            for run in list(self.running.values()):
                run.finish(set(self.running))

    def _handle(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self.channel:
            self._receive()
            return
        run: Run = key.data
        if run.pid not in self.running:
            return  # Both of its descriptors were ready, and the other came first.
        if key.fd == run.output:
            if not run.read():
                self.selector.unregister(run.output)
            return
        if run.output in self.selector.get_map():
            self.selector.unregister(run.output)
        self.selector.unregister(run.handle)
        del self.running[run.pid]
        self._reply(run.finish(set(self.running)))

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
            self.waiting.append(Job(**json.loads(self.received[4 : 4 + size])))
            del self.received[: 4 + size]

    def _start(self, job: Job) -> None:
        self.count += 1
        folder = os.path.join(self.base, str(self.count))
        try:
            run = Run(job, self.context, folder)
        except OSError as error:
            self._reply({"id": job.id, "failure": f"the sandbox could not start an execution: {error}"})
            return
        self.running[run.pid] = run
        self.selector.register(run.output, selectors.EVENT_READ, run)
        self.selector.register(run.handle, selectors.EVENT_READ, run)

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


def main() -> None:
    """Entry point; the client gives descriptor, base folder, workers and limits as JSON in the first argument."""
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=settings["channel"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    features = kernel.isolate_server(settings["base"])
    hello: dict[str, Any] = {"isolates": features.isolates, "enforced": features.describe()}
    limits = Limits(**settings["limits"])
    warm_up()
    gc.collect()
    gc.disable()
    # Forked children then neither scan nor copy what is here.
    gc.freeze()
    with open("/proc/self/statm", "rb") as file:
        baseline = int(file.read().split()[0]) * PAGE
    context = Context(limits, features, kernel.interpreter_paths(), baseline)
    send(channel, json.dumps(hello).encode())
    Server(channel, context, settings["base"], settings["workers"]).serve()
