"""The many-turn loop: a policy writes, its code runs, it reads what came out, and writes on.

Every trajectory of every group is under way at once. While the code of some runs in the sandbox, the others decode;
the loop sleeps only when nobody decodes. Ids are kept as they were sampled: only observations are tokenised here.

The random stream of a turn is (task, sample, turn), so no trajectory depends on which others are sampled beside it,
or on how long any code takes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ..engine.errors import UserError
from .draw import SamplingParams
from .grammar import GRAMMARS, Grammar, ParsedTurn
from .sandbox import Execution
from .task import Task
from .trajectory import Group, Span, Status, Trajectory, cap_text

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer
    from .sampler import Completion


class Samples(Protocol):
    """What the loop needs of `Sampler`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int: ...
    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None: ...
    def cancel(self, request_id: int) -> None: ...
    def poll(self) -> list[Completion]: ...


class Executes(Protocol):
    """What the loop needs of `Sandbox`."""

    def submit(self, code: str, files: Sequence[str] = (), history: Sequence[str] = ()) -> Future[Execution]: ...


@dataclass(frozen=True)
class AgentLimits:
    """When a trajectory ends.

    Args:
        max_turns: model turns, never more than its grammar's.
        max_tokens_per_turn: tokens that the model writes in one turn; a turn that is cut ends the trajectory.
        max_trajectory_tokens: tokens in all, prompt and observations included.
        max_observation_tokens: tokens of one execution's output, head and tail kept; its tags come on top.
        max_consecutive_errors: so many failed executions in a row end it.
    """

    max_turns: int = 10
    max_tokens_per_turn: int = 2048
    max_trajectory_tokens: int = 8192
    max_observation_tokens: int = 1024
    max_consecutive_errors: int = 5

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise UserError(f"{item.name} is {getattr(self, item.name)}, expected at least 1")


@dataclass
class _Episode:
    """A trajectory under way."""

    trajectory: Trajectory
    grammar: Grammar
    request: int | None = None
    length: int = 0  # tokens so far
    budget: int = 0  # tokens of the present turn, at most
    turns: int = 0
    errors: int = 0  # failed executions in a row
    history: list[str] = field(default_factory=list)  # chunks that succeeded

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
    progress: Callable[[Trajectory], None] | None = None,
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
        progress: called with each trajectory as it ends.

    Raises:
        UserError: `num_generations` below 1, a task's file is missing, or a trajectory cannot fit the sampler.
        RuntimeError: the sandbox itself failed.
    """
    if num_generations < 1:
        raise UserError(f"num_generations is {num_generations}, expected at least 1")
    loop = _Loop(sampler, sandbox, tokenizer, replace(params, seed=seed), limits, progress)
    groups = [Group(task, [Trajectory(task, index, []) for index in range(num_generations)]) for task in tasks]
    try:
        for group, number in zip(groups, _stream_numbers(tasks), strict=True):
            loop.begin(group, number)
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
    ) -> None:
        self._sampler, self._sandbox, self._tokenizer = sampler, sandbox, tokenizer
        self._params, self._limits, self._progress = params, limits, progress
        self._writing: dict[int, _Episode] = {}
        self._executing: dict[Future[Execution], tuple[_Episode, str]] = {}
        self._executed: SimpleQueue[Future[Execution]] = SimpleQueue()

    def begin(self, group: Group, number: int) -> None:
        """Submits the first turns of a group; `number` is its task's place in the random stream."""
        grammar = GRAMMARS[group.task.mode]
        prompt_ids = self._tokenizer.encode(grammar.prompt(group.task, self._tokenizer))
        for trajectory in group.trajectories:
            episode = _Episode(trajectory, grammar)
            episode.add(Span("prompt", list(prompt_ids)))
            if (params := self._turn_params(episode)) is None:
                self._end(episode, "token_limit")
                continue
            episode.request = self._sampler.submit(prompt_ids, params, stream=(number, trajectory.sample, 0))
            self._writing[episode.request] = episode

    def run(self) -> None:
        """Works until every trajectory has ended."""
        while self._writing or self._executing:
            if self._sampler.has_work:
                for completion in self._sampler.poll():
                    self._read_turn(self._writing.pop(completion.request_id), completion)
            elif self._executing:
                self._read_execution(self._executed.get())
            else:
                raise RuntimeError("the sampler lost a request: it has no work while trajectories wait for their turns")
            self._read_executions()

    def abandon(self) -> None:
        """Gives up what is under way, after an error or an interrupt; after `run` there is nothing."""
        for episode in self._writing.values():
            self._release(episode)
        for future, (episode, _) in self._executing.items():
            future.cancel()
            self._release(episode)

    def _read_executions(self) -> None:
        while True:
            try:
                future = self._executed.get_nowait()
            except Empty:
                return
            self._read_execution(future)

    def _turn_params(self, episode: _Episode) -> SamplingParams | None:
        """How the next turn is sampled, None if there is no room for it."""
        room = self._limits.max_trajectory_tokens - episode.length
        if room < 1:
            return None
        episode.budget = min(room, self._limits.max_tokens_per_turn)
        return replace(self._params, stop=episode.grammar.stops, max_tokens=episode.budget)

    def _read_turn(self, episode: _Episode, completion: Completion) -> None:
        """Takes a finished turn: it ends the trajectory, or its code goes to the sandbox."""
        trajectory = episode.trajectory
        episode.add(Span("model", list(completion.token_ids), list(completion.logprobs)))
        episode.turns += 1
        if completion.finish_reason != "stop":
            self._end(episode, "token_limit" if completion.finish_reason == "length" else "failed")
            return
        turn = episode.grammar.parse_turn(completion.text)
        if turn.kind == "void":
            self._end(episode, "void")
        elif turn.kind == "answer":
            trajectory.answer = turn.content
            self._end(episode, "answered")
        elif episode.turns >= min(self._limits.max_turns, episode.grammar.max_turns):
            # Nobody would read what this code prints.
            self._end(episode, "turn_limit")
        else:
            self._execute(episode, turn)

    def _execute(self, episode: _Episode, turn: ParsedTurn) -> None:
        if turn.missing:
            # The turn ended by itself without its closing tag; the observation must not start inside it.
            episode.add(Span("forced", self._tokenizer.encode(turn.missing)))
        future = self._sandbox.submit(turn.content, episode.trajectory.task.files, tuple(episode.history))
        self._executing[future] = (episode, turn.content)
        future.add_done_callback(self._executed.put)

    def _read_execution(self, future: Future[Execution]) -> None:
        """Takes a finished execution: its output is written into the trajectory, and the next turn starts."""
        episode, code = self._executing[future]
        execution = future.result()
        del self._executing[future]
        episode.trajectory.executions.append(execution)
        if execution.ok:
            episode.errors = 0
            episode.history.append(code)
        else:
            episode.errors += 1
        output = cap_text(execution.output, self._tokenizer, self._limits.max_observation_tokens)
        token_ids = self._tokenizer.encode(episode.grammar.observation(output))
        if episode.length + len(token_ids) >= self._limits.max_trajectory_tokens:
            self._end(episode, "token_limit")
            return
        forced = episode.trajectory.spans[-1]
        pending = forced.token_ids if forced.writer == "forced" else []
        episode.add(Span("environment", token_ids))
        params = self._turn_params(episode)
        if episode.errors >= self._limits.max_consecutive_errors:
            self._end(episode, "error_limit")
        elif params is None or episode.request is None:
            self._end(episode, "token_limit")
        else:
            self._sampler.extend(episode.request, [*pending, *token_ids], params)
            self._writing[episode.request] = episode

    def _end(self, episode: _Episode, status: Status) -> None:
        episode.trajectory.status = status
        self._release(episode)
        if self._progress is not None:
            self._progress(episode.trajectory)

    def _release(self, episode: _Episode) -> None:
        if episode.request is not None:
            self._sampler.cancel(episode.request)
            episode.request = None


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
