"""Whether the other ranks are still there: a rank that dies, hangs or fails is named, and the others stop.

Each rank counts the collectives that it enters. A thread of its own writes that count into the store through which the
ranks met, about once a second, and reads those of the others; a collective itself costs no access to the store. The
thread reaches a verdict where

- the process of another rank on this machine is gone, or another rank said that it ends with an error;
- a collective has used up all but the last seconds of ``timeout_s``: the ranks that entered fewest collectives are
  those it waits for, unless some give no sign of life at all. A rank may compute for as long as nobody waits for it.

That a rank was asked to stop travels the same way: ``stop_requested`` is true on all ranks within seconds.

The verdict is raised in the main thread by the collective that fails or that comes next. A main thread that is stuck in
a collective, or comes to none in two seconds, cannot raise it: then the thread ends the process with that sentence.

A store on a host that is cut off keeps its reader waiting without end, whatever its timeout. So a second thread writes
and reads, and the first one judges by what it brought.
"""

import atexit
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

GRACE_S = 2.0  # between what the main thread notices and what the watch does
UNLIMITED = timedelta(0)
_last_words = threading.Lock()


class RankLost(RuntimeError):
    """Another rank died, hangs or failed.

    Attributes: ``cause`` (what happened, as every rank may say it) and ``speaks_first`` (whether this rank is the one
    to say it; the others wait a second, in which torchrun may end them).
    """

    def __init__(self, sentence: str, cause: str, speaks_first: bool) -> None:
        super().__init__(sentence)
        self.cause, self.speaks_first = cause, speaks_first


class Collective(dist.Work):
    """A collective that this rank has entered; ``wait()`` before its result is used."""

    def __init__(self, watch: "Watch", number: int, what: str) -> None:
        super().__init__()
        self.number, self.what, self.since = number, what, time.monotonic()
        self._watch = watch
        self._works: list[dist.Work] = []
        self.has_left = False  # the host, which on CUDA may be before its end
        self._event: torch.cuda.Event | None = None

    def start(self, parts: Sequence[Callable[[], dist.Work]]) -> None:
        """Begin what it consists of."""
        with self._watch.explained(self):
            self._works = [part() for part in parts]

    def wait(self, timeout: timedelta = UNLIMITED) -> bool:
        """Return when the result is there, or, on CUDA, will be for what is launched from now on.

        Raises:
            RankLost: another rank is the reason why it never will be.
        """
        if self._works:
            with self._watch.explained(self):
                for work in self._works:
                    work.wait(timeout)
            self._works = []  # they hold the tensors
            self._watch.left(self)
        return True

    def is_completed(self) -> bool:
        works = self._works
        if works:
            return all(work.is_completed() for work in works)
        return self.has_left and (self._event is None or self._event.query())


@dataclass
class State:
    """What a rank tells the others: its process, the last collective that it entered, and how it ended."""

    pid: int = 0
    machine: str = ""
    host: str = ""
    beat: int = -1
    number: int = 0
    what: str = "no collective"
    age_s: float = 0.0  # since it entered that
    end: str | None = None  # the cause of its end; "" where it leaves of its own accord
    stopping: bool = False  # it was asked to stop
    heard: float = field(default_factory=time.monotonic)  # by the reader's clock

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self.heard


class Watch:
    """The collectives of this rank and, once it is started, an eye on the others.

    Args:
        rank, world_size: this rank's place in the launch.
        timeout_s: seconds in which a collective must end; where it does not, this rank has ended by then.
        on_cuda: collectives go on after the host has left them.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 600.0, on_cuda: bool = False) -> None:
        self.rank, self._on_cuda = rank, on_cuda
        self.stop_requested = False  # of any rank, as far as this one has heard
        self._mine = State(beat=0)
        self._latest_since = time.monotonic()
        self._under_way: dict[int, Collective] = {}  # changed by the main thread alone, oldest first
        self._peers = {peer: State() for peer in range(world_size) if peer != rank}
        self._period = min(1.0, timeout_s / 10)
        # The thread looks once a period, and the end comes up to GRACE_S after the verdict.
        self._patience_s = max(timeout_s - GRACE_S - 2 * self._period, timeout_s / 2)
        self._store: dist.Store | None = None
        self._gone: list[int] = []  # as it was before the latest exchange
        self._exchanged_at = -math.inf
        self._lost: RankLost | None = None
        self._lost_at = 0.0
        self._told = False  # the main thread knows the verdict, or ends for a reason of its own
        self._stopping = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # unlike an Event, safe in a signal handler
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()  # an exchange, or with False their end
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reader: threading.Thread | None = None

    def start(self, store: dist.Store) -> None:
        """Begin to beat in ``store``, that of the process group; returns when every rank has."""
        self._mine.pid, self._mine.machine, self._mine.host = os.getpid(), _machine(), socket.gethostname()
        self._store = dist.PrefixStore("watch", _own_connection(store))
        self._exchange()
        self._reader = threading.Thread(target=self._read, name="watch's store", daemon=True)
        self._reader.start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread in C++ when the interpreter goes aborts the process

    def stop(self) -> None:
        """End the threads; safe to call twice."""
        self._stopping = True
        if self._thread is not None and self._reader is not None:
            self._wake.put(None)
            self._due.put(False)
            self._thread.join(GRACE_S)
            self._reader.join(GRACE_S)
            self._thread = self._reader = self._store = None
            atexit.unregister(self.stop)

    # The main thread --------------------------------------------------------------------------------------------

    def enter(self, what: str) -> Collective:
        """Note that this rank enters a collective; called in the same order on every rank.

        Raises:
            RankLost: another rank will not come.
        """
        if self._lost is not None:
            self._told = True
            raise self._lost
        for number, earlier in list(self._under_way.items()):
            if not earlier.is_completed():
                break
            del self._under_way[number]
        call = Collective(self, self._mine.number + 1, what)
        self._mine.number, self._mine.what, self._latest_since = call.number, what, call.since
        self._under_way[call.number] = call
        return call

    def left(self, call: Collective) -> None:
        """Note that the host has left a collective."""
        if self._on_cuda:
            call._event = torch.cuda.Event()
            call._event.record()
        else:
            self._under_way.pop(call.number, None)
        call.has_left = True

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        """Around a collective that returns when it has ended, or is launched on CUDA."""
        call = self.enter(what)
        with self.explained(call):
            yield
        self.left(call)

    @contextmanager
    def explained(self, call: Collective) -> Iterator[None]:
        """An error of the network within it becomes the RankLost that is its reason."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                self._told = True
                self._look(GRACE_S, lambda: self._lost is not None)
                cause = f"{call.what} failed on {self.names([self.rank])}: {str(error).splitlines()[0]}"
                raise (self._lost or RankLost(cause, cause, speaks_first=True)) from error
            self._under_way.pop(call.number, None)
            raise

    def lost(self) -> RankLost | None:
        """Whether another rank is lost, by a look at them now."""
        beat = self._mine.beat
        self._look(GRACE_S / 4, lambda: self._lost is not None or self._mine.beat >= beat + 2)
        self._told = self._told or self._lost is not None
        return self._lost

    def announce(self, cause: str) -> None:
        """Tell the others why this rank ends ("rank 1 ended with …"); "" where it leaves of its own accord."""
        if self._mine.end is None:
            self._mine.end = cause
        self._told = self._told or bool(cause)
        beat = self._mine.beat
        self._look(GRACE_S / 4, lambda: self._mine.beat >= beat + 2)  # the first may have been under way

    def request_stop(self) -> None:
        """Tell the others that this rank was asked to stop; safe in a signal handler."""
        self.stop_requested = self._mine.stopping = True
        self._wake.put(None)

    def names(self, ranks: Sequence[int]) -> str:
        """What a sentence calls them: ranks 8 to 15 on host b; the host where the launch has several."""
        states = {**self._peers, self.rank: self._mine}
        several = len({state.host for state in states.values()}) > 1
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(f" on host {states[rank].host}" if several else "", []).append(rank)
        return " and ".join(f"{_numbers(them)}{where}" for where, them in by_host.items())

    def _look(self, seconds: float, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while self._thread is not None and not until() and time.monotonic() < deadline:
            self._wake.put(None)
            time.sleep(0.01)

    # The threads ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        idle = True
        while not self._stopping:
            if idle:
                self._due.put(True)
                idle = False
            with suppress(queue.Empty):
                self._done.get(timeout=self._period)
                idle = True
            if self._lost is None:
                recent = time.monotonic() - self._exchanged_at < GRACE_S
                gone = self._gone if recent else self._look_for_gone()
                self._lost, self._lost_at = self._judge(gone), time.monotonic()
            elif not self._told and time.monotonic() - self._lost_at > GRACE_S and not self._stopping:
                leave_process(1, f"error: {self._lost}", self._lost.speaks_first)
            with suppress(queue.Empty):
                self._wake.get(timeout=self._period)

    def _read(self) -> None:
        try:
            while self._due.get():
                gone = self._look_for_gone()
                self._exchange()  # after that: a rank says that it ends before it is gone
                self._gone, self._exchanged_at = gone, time.monotonic()
                self._done.put(None)
        except RuntimeError:  # the rank that serves the store may be the one that is lost
            self._exchanged_at = -math.inf

    def _look_for_gone(self) -> list[int]:
        return [rank for rank, peer in self._peers.items() if _process_state(peer, self._mine) in "ZX"]

    def _exchange(self) -> None:
        store = self._store
        assert store is not None
        if self._lost is not None and self._mine.end is None:
            self._mine.end = self._lost.cause
        self._mine.age_s = time.monotonic() - self._latest_since
        store.set(str(self.rank), json.dumps(asdict(self._mine)))
        self._mine.beat += 1
        for rank, text in zip(self._peers, store.multi_get([str(rank) for rank in self._peers]), strict=True):
            state = State(**{**json.loads(text), "heard": time.monotonic()})
            if state.beat != self._peers[rank].beat:
                self._peers[rank] = state
                self.stop_requested = self.stop_requested or state.stopping

    def _judge(self, gone: list[int]) -> RankLost | None:
        dead = [rank for rank in gone if self._peers[rank].end is None]
        if dead:
            pids = ", ".join(str(self._peers[rank].pid) for rank in dead)
            return self._verdict(f"{self.names(dead)} died (process {pids} is gone)", dead)
        for rank, peer in self._peers.items():
            if peer.end:
                return self._verdict(peer.end, [rank], relayed=True)
        for call in self._under_way.copy().values():
            if (waited := time.monotonic() - call.since) > self._patience_s and not call.is_completed():
                return self._overdue(call, waited)
        return None

    def _overdue(self, call: Collective, waited: float) -> RankLost:
        long = max(waited / 2, 3 * self._period)
        silent = [rank for rank, peer in self._peers.items() if peer.silence_s > long]
        fewest = min(peer.number for peer in self._peers.values())
        if time.monotonic() - self._exchanged_at > long:
            host = self._peers[0].host if self.rank else self._mine.host  # rank 0's, whoever serves it there
            servers = [rank for rank, peer in self._peers.items() if peer.host == host != self._mine.host]
            where = f" on host {host}" if servers else ""
            return self._verdict(f"the store of the launch{where} does not answer", servers)
        if silent:
            peer = self._peers[silent[0]]
            stopped = f" (process {peer.pid} is stopped)" if _process_state(peer, self._mine) == "T" else ""
            cause = f"{self.names(silent)} gave no sign of life for {peer.silence_s:.0f} s{stopped}"
            return self._verdict(cause, silent)
        if fewest >= call.number:
            return self._verdict(f"{call.what} did not end in {waited:.0f} s though every rank entered it", [])
        late = [rank for rank, peer in self._peers.items() if peer.number == fewest]
        peer = self._peers[late[0]]
        since = f", {peer.age_s + peer.silence_s:.0f} s ago" if peer.number else ""
        missed = f"did not enter {call.what} in {waited:.0f} s and had last entered {peer.what}{since}"
        return self._verdict(f"{self.names(late)} {missed}", late)

    def _verdict(self, cause: str, culprits: list[int], relayed: bool = False) -> RankLost:
        under_way = next(iter(self._under_way.copy().values()), None)
        where = f"was in {under_way.what}" if under_way else f"had last been in {self._mine.what}"
        lowest = min({self.rank, *self._peers} - set(culprits))
        return RankLost(f"{cause}; {self.names([self.rank])} {where}", cause, lowest == self.rank and not relayed)


def leave_process(status: int, sentence: str, at_once: bool) -> NoReturn:
    """End this process with a sentence on the console and in the file of torchrun's closing report.

    Args:
        status: the exit status.
        sentence: why it ends; "" says nothing.
        at_once: False for a rank whose sentence another one is about to say: torchrun may end it before it speaks.
    """
    with _last_words:  # whichever thread comes first speaks for the process
        if not at_once:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1.0)
        sys.stdout.flush()
        if sentence:
            print(sentence, file=sys.stderr, flush=True)
            if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                extra = {"timestamp": str(int(time.time()))}
                Path(report).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
        os._exit(status)  # other ranks may wait in a collective: leave without joining it


def _numbers(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _machine() -> str:
    """Where a process number means the same process: this boot of this machine, in this container; "" if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_state(peer: State, mine: State) -> str:
    """The letter of proc(5) of a process on this machine, "X" where it is gone and "?" elsewhere."""
    if not peer.machine or peer.machine != mine.machine:
        return "?"
    try:
        return Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _own_connection(store: dist.Store) -> dist.Store:
    """A second connection, so that a key for which the main thread waits holds nothing up; a file needs none."""
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    return store if isinstance(inner, dist.FileStore) else store.clone()  # type: ignore[attr-defined]
