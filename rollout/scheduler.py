"""Which sequences compute in the next step, and which give their memory back when it runs short.

A request is waiting (for its prompt, or for an observation, to be prefilled), running (in a prefill, then a token a
step) or idle (finished, its blocks kept for :meth:`Scheduler.resume`). Turns start in the order in which they were
asked for, or while memory is short the oldest request first; a long prompt is prefilled in chunks while the others
decode. Nothing is ever lost: a request whose blocks are taken keeps its tokens, and they are computed again, or brought
back, when it is next admitted.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .cache import BlockTables, Copies, Saved, add_names


@dataclass(eq=False)
class Prompt:
    """A prompt that several requests begin with, kept in the cache until the last of them has started."""

    token_ids: bytes  # int32, the name under which equal prompts find each other
    length: int
    pending: int = 0  # requests that have not started yet
    row: int = -1
    first: "Request | None" = None  # computes it for all
    hidden: Tensor | None = None  # [H] at its last token, from which the first token of each request is drawn


@dataclass(eq=False)
class Request:
    """One sequence: what the scheduler must know of it."""

    number: int
    token_ids: list[int]
    prompt: Prompt | None = None  # until it has been computed
    state: Literal["waiting", "running", "idle"] = "waiting"
    row: int = -1  # in the block tables; -1: nothing stored
    stored: int = 0  # tokens of the row that have been computed; the others are reserved
    prefilling: bool = False  # running, and not yet at the end of its tokens
    drawn: int = 0  # running: tokens that the device draws and the host has not read
    stops: int = 0  # how often it ceased to run: tokens drawn before are not its own any more
    computed: int = 0  # tokens that were stored at some time, so that computing them again is counted
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for
    named: int = 0  # blocks of its row that bear their names
    saved: tuple[Saved, int] | None = None  # blocks in the host's memory, and how many tokens they hold

    def __lt__(self, other: "Request") -> bool:
        return self.number < other.number


R = TypeVar("R", bound=Request)


class Chunk(NamedTuple, Generic[R]):
    """Tokens ``start`` to ``stop`` of a request, to be computed; none where its prompt is stored as a whole."""

    request: R
    start: int
    stop: int
    prompt: Prompt | None  # that the request ends here: to be filled by the first of a group, and read by the others


class Step(NamedTuple, Generic[R]):
    """The prefill of one step, and what must be brought into the cache before it."""

    chunks: list[Chunk[R]]
    copies: Copies
    restores: list[tuple[NDArray[np.int32], Saved]]


class Scheduler(Generic[R]):
    """Continuous batching over one pool of blocks.

    Args:
        tables: the pool.
        concurrency: most requests that run together; 0 for as many as memory holds.
        prefill_tokens: tokens to prefill in one step.
        save: copies blocks into the host's memory where a request that gives way is to keep them; None: they are
            computed again.
    """

    def __init__(
        self,
        tables: BlockTables,
        *,
        concurrency: int,
        prefill_tokens: int,
        save: Callable[[NDArray[np.int32]], Saved] | None = None,
    ) -> None:
        self.tables = tables
        self.concurrency = concurrency
        self.prefill_tokens = prefill_tokens
        self.running: list[R] = []
        self.preemptions = 0
        self.evictions = 0
        self.found_tokens = 0  # stored already when a request was admitted
        self.recomputed_tokens = 0
        self._save = save
        self._waiting: list[R] = []  # in the order in which turns were asked for
        self._idle: dict[int, R] = {}  # by number, the one that finished first comes first
        self._prompts: dict[bytes, Prompt] = {}

    @property
    def has_work(self) -> bool:
        """Whether some request waits or runs."""
        return bool(self._waiting or self.running)

    def submit(self, request: R) -> None:
        """Queues a new request; its prompt is shared with the requests that wait with the same one."""
        name = array("i", request.token_ids).tobytes()
        prompt = self._prompts.setdefault(name, Prompt(name, len(request.token_ids)))
        prompt.pending += 1
        request.prompt = prompt
        self._waiting.append(request)

    def resume(self, request: R) -> None:
        """Queues an idle request again, whose ``token_ids`` have grown."""
        del self._idle[request.number]
        request.state = "waiting"
        self._waiting.append(request)

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
        self._started(request)
        self._close(request)

    def schedule(self) -> Step[R]:
        """The prefill of the next step: requests under way go on, then waiting ones start that fit.

        They fit into ``concurrency``, into the free blocks with all their tokens, and begin while ``prefill_tokens``
        are left. All its blocks are a request's from its start, so a prefill that began can end.
        """
        step: Step[R] = Step([], [], [])
        budget = self.prefill_tokens
        for request in self.running:
            if request.prefilling and budget:
                budget -= self._add_chunk(step, request, budget)
        while budget and self._waiting and (not self.concurrency or len(self.running) < self.concurrency):
            request = self._first()
            if (request.prompt is not None and request.prompt.first is not None) or not self._fits(request):
                break  # another one is computing its prompt; or memory is short
            self._waiting.remove(request)
            self._open(request, step)
            request.state, request.prefilling = "running", True
            self.running.append(request)
            budget -= self._add_chunk(step, request, budget)
        return step

    def make_room(self, requests: Sequence[R]) -> tuple[list[R], Copies]:
        """Reserves one more token for each of some running requests, taking blocks from others if it must.

        Taken in this order: shared prompts, idle requests, waiting ones, and the running request that came last.

        Returns:
            Those of the requests that still run, and the copies to make before computing.
        """
        kept = list(requests)
        while self.tables.needed_for_next(rows := rows_of(kept)) > self.tables.free_blocks:
            if not self._evict():
                victim = max(self.running)
                self._preempt(victim)
                kept = [request for request in kept if request is not victim]
        copies = self.tables.reserve_next(rows)
        for request in kept:
            request.stored += 1
        return kept, copies

    def name(self, request: R) -> None:
        """Names the full blocks of a running request, what they hold being known to be good."""
        full = min(request.stored, len(request.token_ids)) // self.tables.block_size
        if full > request.named:
            add_names(request.names, request.token_ids, self.tables.block_size)
            self.tables.name(request.row, request.named, request.names[request.named : full])
            request.named = full

    def flush(self) -> None:
        """Voids everything stored. Running requests wait again; all tokens will be computed anew."""
        running = self.running
        self._leave(running)
        for request in running:
            self._wait(request)
        for other in (*self._waiting, *self._idle.values()):
            self._close(other)
            other.saved = None
        for prompt in self._prompts.values():
            self._close_prompt(prompt)
        self.tables.flush()

    def _add_chunk(self, step: Step[R], request: R, budget: int) -> int:
        """Appends the next tokens of a prefill, at most ``budget``; returns how many."""
        start, length = request.stored, len(request.token_ids)
        request.stored = stop = min(length, start + budget)
        self.recomputed_tokens += max(0, min(stop, request.computed) - start)
        prompt = None
        if stop == length:
            request.prefilling = False
            prompt = request.prompt
            if prompt is not None and prompt.row < 0 and prompt.pending > 1:
                prompt.row = self.tables.fork(request.row, length)
            self._started(request)
        elif request.prompt is not None:
            request.prompt.first = request
        step.chunks.append(Chunk(request, start, stop, prompt))
        return stop - start

    def _names(self, request: R) -> list[bytes]:
        """Names of the blocks that a request may find: at least its last token is always computed."""
        add_names(request.names, request.token_ids, self.tables.block_size)
        return request.names[: (len(request.token_ids) - 1) // self.tables.block_size]

    def _first(self) -> R:
        """Who starts next.

        Turns in the order in which they were asked for: were the oldest requests to end first, the code of the last
        would run when nobody is left to decode beside it. But every request that has begun holds blocks, so while
        memory is short, the oldest comes first, and few are under way.
        """
        is_short = 2 * self.tables.free_blocks < self.tables.num_blocks
        return min(self._waiting) if is_short else self._waiting[0]

    def _fits(self, request: R) -> bool:
        if self.running:
            # Each running request may soon need a block: admitting into the last ones would only preempt at once.
            return self._needed(request) + len(self.running) <= self.tables.free_blocks
        while self._needed(request) > self.tables.free_blocks:
            if not self._evict(keep=request):
                raise RuntimeError(f"request {request.number} does not fit into an empty KV cache")
        return True

    def _needed(self, request: R) -> int:
        """Free blocks for all tokens of a waiting request and the one that it will draw."""
        tables, total = self.tables, len(request.token_ids) + 1
        if request.row >= 0:
            return tables.needed(request.row, total - int(tables.lengths[request.row]))
        if request.saved is not None:
            return tables.blocks_of(total)
        prompt = request.prompt
        if prompt is not None and prompt.row >= 0:
            return tables.blocks_of(total) - prompt.length // tables.block_size
        count, idle = tables.stored(self._names(request))
        return tables.blocks_of(total) - count + idle

    def _open(self, request: R, step: Step[R]) -> None:
        """Gives a request a row with room for all its tokens, and what is stored of them."""
        tables, length = self.tables, len(request.token_ids)
        prompt, restore = request.prompt, None
        if request.row >= 0:
            pass
        elif request.saved is not None:
            request.row = tables.open()
            restore, request.stored = request.saved
            request.saved = None
        elif prompt is not None and prompt.row >= 0:
            request.row, request.stored = tables.fork(prompt.row, length), length
            self.found_tokens += length
        else:
            request.row = tables.adopt(self._names(request))
            request.stored = int(tables.lengths[request.row])
            self.found_tokens += request.stored
        step.copies.extend(tables.reserve(request.row, length - int(tables.lengths[request.row])))
        if restore is not None:
            step.restores.append((tables.tables[request.row, : restore[0].shape[1]].copy(), restore))

    def _started(self, request: R) -> None:
        """A request needs its prompt no longer; the last one to say so frees it."""
        prompt, request.prompt = request.prompt, None
        if prompt is not None:
            prompt.pending -= 1
            if prompt.first is request:
                prompt.first = None
            if not prompt.pending:
                self._close_prompt(prompt)
                del self._prompts[prompt.token_ids]

    def _leave(self, requests: Sequence[R]) -> None:
        gone = {request.number for request in requests}
        self.running = [request for request in self.running if request.number not in gone]
        for request in requests:
            request.drawn = 0
            request.stops += 1
            # A last token that was computed already is computed again: what follows it is drawn from its state.
            request.stored = min(request.stored, len(request.token_ids) - 1)

    def _preempt(self, request: R) -> None:
        self._leave([request])
        self._give_way(request)
        self._wait(request)
        self.preemptions += 1

    def _wait(self, request: R) -> None:
        request.state, request.prefilling = "waiting", False
        if request.prompt is not None and request.prompt.first is request:
            request.prompt.first = None
        self._waiting.insert(0, request)

    def _holders(self, keep: R | None = None) -> list[R | Prompt]:
        """Who holds blocks and does not run, in the order in which they give way."""
        requests = [*self._idle.values(), *sorted(self._waiting, reverse=True)]
        prompts = [prompt for prompt in self._prompts.values() if prompt.row >= 0]
        return [*prompts, *(request for request in requests if request.row >= 0 and request is not keep)]

    def _evict(self, keep: R | None = None) -> bool:
        """Takes the blocks of one holder that does not run; False when there is none."""
        holder = next(iter(self._holders(keep)), None)
        if isinstance(holder, Prompt):
            self._close_prompt(holder)
        elif holder is not None:
            self._give_way(holder)
            self.evictions += 1
        return holder is not None

    def _give_way(self, request: R) -> None:
        """Takes a request's blocks; where it is to keep them, they are saved first."""
        if self._save is not None and request.row >= 0 and request.stored:
            blocks = self.tables.tables[request.row, : self.tables.blocks_of(request.stored)]
            request.saved = self._save(blocks.copy()), request.stored
        self._close(request)

    def _close(self, request: R) -> None:
        if request.row >= 0:
            request.computed = max(request.computed, request.stored)
            self.tables.close(request.row)
            request.row, request.stored, request.named = -1, 0, 0

    def _close_prompt(self, prompt: Prompt) -> None:
        if prompt.row >= 0:
            self.tables.close(prompt.row)
            prompt.row = -1


def rows_of(requests: Sequence[Request]) -> NDArray[np.int64]:
    """The rows of requests, in their order."""
    return np.array([request.row for request in requests], np.int64)
