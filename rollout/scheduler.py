"""Which sequences compute in the next step, and which give their memory back when it runs short.

A request is waiting (for its prompt, or for an observation, to be prefilled), running (one token a step) or idle
(finished, its blocks kept for :meth:`Scheduler.resume`). Requests are served in the order in which they came. Nothing
is ever lost: a request whose blocks are taken keeps its tokens, and they are computed again when it is next admitted.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .cache import BlockTables, Copies


@dataclass(eq=False)
class Prompt:
    """A prompt that several requests begin with, kept in the cache until the last of them has started."""

    token_ids: bytes  # int32, the name under which equal prompts find each other
    length: int
    pending: int = 0  # requests that have not started yet
    row: int = -1
    hidden: Tensor | None = None  # [H] at its last token, from which the first token of each request is drawn


@dataclass(eq=False)
class Request:
    """One sequence: what the scheduler must know of it."""

    number: int
    token_ids: list[int]
    prompt: Prompt | None = None  # until the first admission
    state: Literal["waiting", "running", "idle"] = "waiting"
    row: int = -1  # in the block tables; -1: nothing stored
    computed: int = 0  # tokens that were stored at some time, so that computing them again is counted

    def __lt__(self, other: "Request") -> bool:
        return self.number < other.number


R = TypeVar("R", bound=Request)


class Admission(NamedTuple, Generic[R]):
    """A request that starts to run: tokens from ``cached`` on are to be computed."""

    request: R
    cached: int
    recomputed: int  # of the tokens to compute, those that had been stored before
    prompt: Prompt | None  # to be filled by the first of a group, or read by the others (then nothing is computed)


class Scheduler(Generic[R]):
    """Continuous batching over one pool of blocks.

    Args:
        tables: the pool.
        concurrency: most requests that run together; 0 for as many as memory holds.
        prefill_tokens: tokens to prefill in one step; one request is admitted even if it has more.
    """

    def __init__(self, tables: BlockTables, *, concurrency: int, prefill_tokens: int) -> None:
        self.tables = tables
        self.concurrency = concurrency
        self.prefill_tokens = prefill_tokens
        self.running: list[R] = []
        self.preemptions = 0
        self.evictions = 0
        self._waiting: list[R] = []  # a heap by number
        self._idle: dict[int, R] = {}  # by number, the one that finished first comes first
        self._prompts: dict[bytes, Prompt] = {}
        self._rows: NDArray[np.int64] | None = None

    @property
    def has_work(self) -> bool:
        """Whether some request waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the running requests, in their order."""
        if self._rows is None:
            self._rows = np.array([request.row for request in self.running], np.int64)
        return self._rows

    def submit(self, request: R) -> None:
        """Queues a new request; its prompt is shared with the requests that wait with the same one."""
        name = np.asarray(request.token_ids, np.int32).tobytes()
        prompt = self._prompts.setdefault(name, Prompt(name, len(request.token_ids)))
        prompt.pending += 1
        request.prompt = prompt
        heapq.heappush(self._waiting, request)

    def resume(self, request: R) -> None:
        """Queues an idle request again, whose ``token_ids`` have grown."""
        del self._idle[request.number]
        request.state = "waiting"
        heapq.heappush(self._waiting, request)

    def finish(self, requests: Sequence[R]) -> None:
        """Running requests become idle and keep their blocks while nobody needs them more."""
        if requests:
            self._leave(requests)
            for request in requests:
                request.state = "idle"
                self._idle[request.number] = request

    def remove(self, request: R) -> None:
        """Forgets a request in whatever state it is and gives its blocks back."""
        if request.state == "running":
            self._leave([request])
        elif request.state == "idle":
            del self._idle[request.number]
        else:
            self._waiting.remove(request)
            heapq.heapify(self._waiting)
        self._started(request)
        self._forget(request)

    def admit(self) -> tuple[list[Admission[R]], Copies]:
        """Starts the requests that fit: into ``concurrency``, the token budget, and the free blocks.

        Returns:
            The admissions, their rows reserved for all their tokens, and the copies to make before computing.
        """
        admissions: list[Admission[R]] = []
        copies: Copies = []
        budget = self.prefill_tokens
        while self._waiting and (not self.concurrency or len(self.running) < self.concurrency):
            request = self._waiting[0]
            if not self._fits(request):
                break
            cached = self._cached(request)
            tokens = len(request.token_ids) - cached
            if admissions and tokens > budget:
                break
            budget -= tokens
            heapq.heappop(self._waiting)
            prompt = self._open(request)
            if tokens:
                copies += self.tables.reserve(request.row, tokens)
            if prompt is not None and prompt.row < 0 and prompt.pending:
                prompt.row = self.tables.fork(request.row, prompt.length)
            request.state = "running"
            recomputed = max(0, request.computed - cached)
            self.running.append(request)
            self._rows = None
            admissions.append(Admission(request, cached, recomputed, prompt))
        return admissions, copies

    def make_room(self) -> Copies:
        """Reserves one more token for every running request, taking blocks from others if it must.

        Taken in this order: shared prompts, idle requests, waiting ones, and the running request that came last.

        Returns:
            The copies to make before computing.
        """
        while self.tables.needed_for_next(self.rows) > self.tables.free_blocks:
            if not self._evict():
                self._preempt(max(self.running))
                self.preemptions += 1
        return self.tables.reserve_next(self.rows)

    def flush(self) -> None:
        """Voids everything stored. Running requests wait again; all tokens will be computed anew."""
        for request in list(self.running):
            self._preempt(request)
        for other in (*self._waiting, *self._idle.values()):
            other.row = -1
        for prompt in self._prompts.values():
            prompt.row = -1
        self.tables.flush()

    def _shared(self, request: R) -> Prompt | None:
        """The stored prompt that a request without a row can be forked from."""
        prompt = request.prompt
        return prompt if prompt is not None and prompt.row >= 0 else None

    def _cached(self, request: R) -> int:
        if request.row >= 0:
            return int(self.tables.lengths[request.row])
        prompt = self._shared(request)
        return prompt.length if prompt else 0

    def _needed(self, request: R) -> int:
        """Blocks for all tokens of a waiting request and the one that it will draw."""
        tables, total = self.tables, len(request.token_ids) + 1
        cached = self._cached(request)
        if request.row >= 0:
            return tables.needed(request.row, total - cached)
        return tables.blocks_of(total) - cached // tables.block_size

    def _fits(self, request: R) -> bool:
        if self.running:
            # Each running request may soon need a block: admitting into the last ones would only preempt at once.
            return self._needed(request) + len(self.running) <= self.tables.free_blocks
        while self._needed(request) > self.tables.free_blocks:
            if not self._evict(keep=request):
                raise RuntimeError(f"request {request.number} does not fit into an empty KV cache")
        return True

    def _open(self, request: R) -> Prompt | None:
        """Gives a request its row, forked from its prompt where that is stored; returns the prompt to fill or read."""
        prompt = request.prompt
        if request.row < 0:
            stored = self._shared(request)
            request.row = self.tables.fork(stored.row, stored.length) if stored else self.tables.open()
        self._started(request)
        return prompt

    def _started(self, request: R) -> None:
        """A request needs its prompt no longer; the last one to say so frees it."""
        prompt, request.prompt = request.prompt, None
        if prompt is not None:
            prompt.pending -= 1
            if not prompt.pending:
                self._close_prompt(prompt)
                del self._prompts[prompt.token_ids]

    def _leave(self, requests: Sequence[R]) -> None:
        gone = {request.number for request in requests}
        self.running = [request for request in self.running if request.number not in gone]
        self._rows = None

    def _preempt(self, request: R) -> None:
        self._leave([request])
        self._forget(request)
        request.state = "waiting"
        heapq.heappush(self._waiting, request)

    def _evict(self, keep: R | None = None) -> bool:
        """Takes the blocks of one holder that does not run; False when there is none."""
        for prompt in self._prompts.values():
            if prompt.row >= 0:
                self._close_prompt(prompt)
                return True
        waiting = sorted(self._waiting, reverse=True)
        for request in (*self._idle.values(), *waiting):
            if request.row >= 0 and request is not keep:
                self._forget(request)
                self.evictions += 1
                return True
        return False

    def _forget(self, request: R) -> None:
        if request.row >= 0:
            request.computed = max(request.computed, int(self.tables.lengths[request.row]))
            self.tables.close(request.row)
            request.row = -1

    def _close_prompt(self, prompt: Prompt) -> None:
        if prompt.row >= 0:
            self.tables.close(prompt.row)
            prompt.row = -1
