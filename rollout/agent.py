"""The many-turn loop: a policy writes, its code runs, it reads what came out, and writes on.

Every trajectory of every group is under way at once. While the code of some runs in the sandbox, the others decode;
the loop sleeps only when nobody decodes. Ids are kept as they were sampled: only observations are tokenised here.

The random stream of a turn is (task, sample, turn), so no trajectory depends on which others are sampled beside it,
or on how long any code takes, unless `max_wall_s` ends it.

A trajectory can start with turns that are already written: their code runs like any other, and then the policy goes on.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ..engine.errors import UserError
from .draw import SamplingParams
from .grammar import GRAMMARS, Grammar, ParsedTurn
from .sandbox import Execution
from .sandbox.client import task_files
from .task import Language, Task
from .trajectory import Group, Span, Status, Trajectory, cap_text

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer
    from .sampler import Completion

STOP_LOOK_S = 0.5  # between two looks whether to stop, while nobody decodes

logger = logging.getLogger(__name__)


class Samples(Protocol):
    """What the loop needs of `Sampler`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int: ...
    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None: ...
    def cancel(self, request_id: int) -> None: ...
    def poll(self) -> list[Completion]: ...
    def token_ids(self, request_id: int) -> Sequence[int]: ...
    def is_waiting(self, request_id: int) -> bool: ...


class Runs(Protocol):
    """What the loop needs of a `Session`: it remembers the chunks that succeeded."""

    def submit(self, code: str) -> Future[Execution]: ...
    def close(self) -> None: ...


class Executes(Protocol):
    """What the loop needs of `Sandbox`."""

    def open(self, files: Sequence[str], language: Language) -> Runs: ...


@dataclass(frozen=True)
class AgentLimits:
    """When a trajectory ends.

    Args:
        max_turns: model turns, never more than its grammar's.
        max_tokens_per_turn: tokens that the model writes in one turn; a turn that is cut ends the trajectory.
        max_trajectory_tokens: tokens in all, prompt and observations included.
        max_observation_tokens: tokens of one execution's output, head and tail kept; its tags come on top.
        max_consecutive_errors: so many failed executions in a row end it.
        max_wall_s: wall seconds from where the sampler takes it up; a turn under way is dropped then, and what its code
            would print is not waited for. None: no limit.
    """

    max_turns: int = 10
    max_tokens_per_turn: int = 2048
    max_trajectory_tokens: int = 8192
    max_observation_tokens: int = 1024
    max_consecutive_errors: int = 5
    max_wall_s: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "max_wall_s":
                if value is not None and not value > 0:
                    raise UserError(f"max_wall_s is {value}, expected more than 0, or None for no limit")
            elif value < 1:
                raise UserError(f"{item.name} is {value}, expected at least 1")


@dataclass
class _Episode:
    """A trajectory under way."""

    trajectory: Trajectory
    grammar: Grammar
    number: int  # its task's place in the random stream
    opening: Sequence[str] = ()  # its first turns
    request: int | None = None  # from the first turn that the policy writes
    session: Runs | None = None  # from its first code on
    deadline: float = math.inf  # by the monotonic clock
    length: int = 0  # tokens so far
    turns: int = 0
    errors: int = 0  # failed executions in a row

    def add(self, span: Span) -> None:
        self.trajectory.spans.append(span)
        self.length += len(span.token_ids)


def run_agent(
    sampler: Samples,
    sandbox: Executes,
    tasks: Sequence[Task],
    *,
    tokenizer: Tokenizer,
    num_generations: int,
    params: SamplingParams,
    limits: AgentLimits,
    seed: int,
    openings: Sequence[Sequence[str]] | None = None,
    progress: Callable[[Trajectory], None] | None = None,
    waited: Callable[[float], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """Samples groups of trajectories.

    Args:
        sampler: the policy, with the weights that are to be sampled from.
        sandbox: runs the code.
        tasks: one group for each, in this order; the mode of each names its grammar.
        num_generations: trajectories of a group.
        params: how tokens are drawn; its `stop`, `max_tokens` and `seed` are replaced by this function's own.
        limits: when a trajectory ends.
        seed: of the random numbers; the same seed, tasks and weights give the same trajectories.
        openings: for each task the texts of code turns with which all of its trajectories start, none by default; they
            are spans of the writer "forced", and they count as turns.
        progress: called with each trajectory as it ends.
        waited: called with the seconds of each time in which code ran and the sampler had nothing to do.
        stop: where it says so, what is under way is given up at once, and the groups are returned as they are.

    Raises:
        UserError: `num_generations` below 1, a task's file is missing, an opening is no code turn of its task's
            grammar, or a trajectory cannot fit the sampler.
        RuntimeError: the sandbox itself failed, or the sampler holds other ids than a trajectory.
    """
    if num_generations < 1:
        raise UserError(f"num_generations is {num_generations}, expected at least 1")
    openings = [()] * len(tasks) if openings is None else openings
    if len(openings) != len(tasks):
        raise UserError(f"{len(openings)} openings for {len(tasks)} tasks, expected one for each; an empty one is none")
    for task, opening in zip(tasks, openings, strict=True):
        task_files(task.files)
        _check_opening(task, opening)
    loop = _Loop(sampler, sandbox, tokenizer, replace(params, seed=seed), limits, progress, waited, stop)
    groups = [Group(task, [Trajectory(task, index, []) for index in range(num_generations)]) for task in tasks]
    try:
        for group, number, opening in zip(groups, _stream_numbers(tasks), openings, strict=True):
            loop.begin(group, number, opening)
        loop.run()
    finally:
        loop.abandon()
    return groups


class _Loop:
    """The state of one `run_agent`."""

    def __init__(
        self,
        sampler: Samples,
        sandbox: Executes,
        tokenizer: Tokenizer,
        params: SamplingParams,
        limits: AgentLimits,
        progress: Callable[[Trajectory], None] | None,
        waited: Callable[[float], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        self._sampler, self._sandbox, self._tokenizer = sampler, sandbox, tokenizer
        self._params, self._limits, self._progress = params, limits, progress
        self._waited, self._stop = waited, stop
        self._max_wall_s = limits.max_wall_s or math.inf
        self._episodes: list[_Episode] = []
        self._writing: dict[int, _Episode] = {}
        self._executing: dict[Future[Execution], _Episode] = {}
        self._executed: SimpleQueue[Future[Execution]] = SimpleQueue()

    def begin(self, group: Group, number: int, opening: Sequence[str]) -> None:
        """Starts a group with turns that are written; `number` is its task's place in the random stream."""
        grammar = GRAMMARS[group.task.mode]
        prompt_ids = self._tokenizer.encode(grammar.prompt(group.task, self._tokenizer))
        for trajectory in group.trajectories:
            episode = _Episode(trajectory, grammar, number, opening)
            self._episodes.append(episode)
            episode.add(Span("prompt", list(prompt_ids)))
            self._next_turn(episode)

    def run(self) -> None:
        """Works until every trajectory has ended, or until it is asked to stop."""
        while (self._writing or self._executing) and not self._stop():
            if self._sampler.has_work:
                for completion in self._sampler.poll():
                    self._read_turn(self._writing.pop(completion.request_id), completion)
            elif self._executing:
                self._wait()
            else:
                raise RuntimeError("the sampler lost a request: it has no work while trajectories wait for their turns")
            self._read_executions()
            self._end_late()

    def abandon(self) -> None:
        """Gives up what is under way, after an error, an interrupt or a stop; else there is nothing after `run`."""
        for future in self._executing:
            future.cancel()
        for episode in self._episodes:
            self._release(episode)

    def _wait(self) -> None:
        """Sleeps until an execution is done, until a trajectory has had its time, or until it is to look up."""
        deadline = min(episode.deadline for episode in self._executing.values())
        timeout = min(max(0.0, deadline - time.monotonic()), STOP_LOOK_S)
        begin, done = time.perf_counter(), None
        with suppress(Empty):
            done = self._executed.get(timeout=timeout)
        if self._waited is not None:
            self._waited(time.perf_counter() - begin)
        if done is not None:
            self._read_execution(done)

    def _read_executions(self) -> None:
        with suppress(Empty):
            while True:
                self._read_execution(self._executed.get_nowait())

    def _end_late(self) -> None:
        """Ends what has had its time."""
        if self._max_wall_s == math.inf:
            return
        now = time.monotonic()
        for request, episode in list(self._writing.items()):
            if self._is_late(episode, now):
                del self._writing[request]
                self._end(episode, "time_limit")
        for future, episode in list(self._executing.items()):
            if self._is_late(episode, now):
                del self._executing[future]
                future.cancel()
                self._end(episode, "time_limit")

    def _is_late(self, episode: _Episode, now: float) -> bool:
        request = episode.request
        if episode.deadline == math.inf and request is not None and not self._sampler.is_waiting(request):
            episode.deadline = now + self._max_wall_s
        return now >= episode.deadline

    def _next_turn(self, episode: _Episode) -> None:
        """Has the policy write the next turn, or takes it from the opening."""
        room = self._limits.max_trajectory_tokens - episode.length
        if episode.turns < len(episode.opening):
            self._write_opening(episode, episode.opening[episode.turns], room)
            return
        if room < 1:
            self._end(episode, "token_limit")
            return
        max_tokens = min(room, self._limits.max_tokens_per_turn)
        params = replace(self._params, stop=episode.grammar.stops, max_tokens=max_tokens)
        trajectory = episode.trajectory
        if episode.request is None:
            stream = (episode.number, trajectory.sample, episode.turns)
            episode.request = self._sampler.submit(trajectory.token_ids, params, stream=stream)
        else:
            behind = takewhile(lambda span: span.writer != "model", reversed(trajectory.spans))
            unread = [token for span in reversed(list(behind)) for token in span.token_ids]
            self._sampler.extend(episode.request, unread, params)
        self._writing[episode.request] = episode

    def _write_opening(self, episode: _Episode, text: str, room: int) -> None:
        token_ids = self._tokenizer.encode(text)
        if len(token_ids) > room:
            self._end(episode, "token_limit")
            return
        episode.add(Span("forced", token_ids))
        episode.turns += 1
        self._execute(episode, episode.grammar.parse_turn(text))

    def _read_turn(self, episode: _Episode, completion: Completion) -> None:
        """Takes a finished turn: it ends the trajectory, or its code goes to the sandbox."""
        trajectory = episode.trajectory
        episode.add(Span("model", list(completion.token_ids), list(completion.logprobs)))
        episode.turns += 1
        self._check_ids(trajectory, completion)
        if completion.finish_reason == "length":
            self._end(episode, "token_limit")
            return
        if completion.finish_reason == "error":
            self._fail(episode, completion.error)
            return
        turn = episode.grammar.parse_turn(completion.text)
        if turn.kind == "void":
            self._end(episode, "void")
        elif turn.kind == "answer":
            trajectory.answer = turn.content
            self._end(episode, "answered")
        else:
            self._execute(episode, turn)

    def _check_ids(self, trajectory: Trajectory, completion: Completion) -> None:
        """What is trained must be what the sampler read and wrote, token by token."""
        who = trajectory.name
        if len(completion.token_ids) != len(completion.logprobs):
            raise RuntimeError(
                f"{who} has {len(completion.token_ids)} sampled ids and {len(completion.logprobs)} log-probabilities, "
                "expected as many; the sampler is at fault"
            )
        if trajectory.token_ids != list(self._sampler.token_ids(completion.request_id)):
            raise RuntimeError(f"the ids of {who} are not those that the sampler holds; the loop or it is at fault")

    def _execute(self, episode: _Episode, turn: ParsedTurn) -> None:
        task = episode.trajectory.task
        if episode.turns >= min(self._limits.max_turns, episode.grammar.max_turns):
            # Nobody would read what this code prints.
            self._end(episode, "turn_limit")
            return
        if turn.missing:
            # The turn ended by itself without its closing tag; the observation must not start inside it.
            episode.add(Span("forced", self._tokenizer.encode(turn.missing)))
        try:
            if episode.session is None:
                episode.session = self._sandbox.open(task.files, task.language)
            future = episode.session.submit(turn.content)
        except UserError as error:  # its files are gone or have changed; those of others may be there
            self._fail(episode, str(error))
            return
        self._executing[future] = episode
        future.add_done_callback(self._executed.put)

    def _read_execution(self, future: Future[Execution]) -> None:
        """Takes a finished execution: its output is written into the trajectory, and the next turn starts."""
        episode = self._executing.pop(future, None)
        if episode is None:
            return  # its trajectory had had its time
        execution = future.result()
        episode.trajectory.executions.append(execution)
        episode.errors = 0 if execution.ok else episode.errors + 1
        output = cap_text(execution.output, self._tokenizer, self._limits.max_observation_tokens)
        token_ids = self._tokenizer.encode(episode.grammar.observation(output))
        if episode.length + len(token_ids) >= self._limits.max_trajectory_tokens:
            self._end(episode, "token_limit")
            return
        episode.add(Span("environment", token_ids))
        if episode.errors >= self._limits.max_consecutive_errors:
            self._end(episode, "error_limit")
        else:
            self._next_turn(episode)

    def _fail(self, episode: _Episode, error: str) -> None:
        trajectory = episode.trajectory
        trajectory.error = error
        logger.warning("sample %d of task %r failed: %s", trajectory.sample, trajectory.task.id, error)
        self._end(episode, "failed")

    def _end(self, episode: _Episode, status: Status) -> None:
        episode.trajectory.status = status
        self._release(episode)
        if self._progress is not None:
            self._progress(episode.trajectory)

    def _release(self, episode: _Episode) -> None:
        session, request = episode.session, episode.request
        episode.session = episode.request = None
        if session is not None:
            session.close()
        if request is not None:
            self._sampler.cancel(request)


def _check_opening(task: Task, opening: Sequence[str]) -> None:
    for number, text in enumerate(opening, 1):
        if (kind := GRAMMARS[task.mode].parse_turn(text).kind) != "code":
            raise UserError(
                f"turn {number} of the opening of task {task.id!r} is {kind}, expected code of {task.mode!r}"
            )


def _stream_numbers(tasks: Sequence[Task]) -> list[int]:
    """A number of 63 bits for each task, from its id: its samples do not depend on what is asked beside it.

    A task asked twice gets two, or its samples would be the same.
    """
    seen: Counter[str] = Counter()
    numbers = []
    for task in tasks:
        digest = hashlib.sha256(f"{task.id}\0{seen[task.id]}".encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "big") >> 1)
        seen[task.id] += 1
    return numbers
