"""A sampler and a sandbox that follow a script, for the tests of the many-turn loop."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from groupwise.rollout.agent import AgentLimits, Executes, run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.sampler import Completion
from groupwise.rollout.sandbox import Execution
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group

BROKEN = "no number is finite"
LIMITS = AgentLimits(
    max_turns=4, max_tokens_per_turn=200, max_trajectory_tokens=900, max_observation_tokens=60, max_consecutive_errors=2
)
DATAMIND = GRAMMARS["datamind"]


def code(text: str) -> str:
    return DATAMIND.render_turn("code", "t", text)


def answer(text: str) -> str:
    return DATAMIND.render_turn("answer", "t", text)


def task(number: int = 0, mode: str = "datamind") -> Task:
    return Task(f"t{number}", "How many?", (), "", "3", "number", "counting", mode)


class Characters:
    """A tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def chat_prompt(self, system: str, user: str) -> str:
        return f"[{system}][{user}]"


@dataclass
class ScriptedSampler:
    """A sampler whose turns come from a script: (stream, turn) -> text, one finished turn a step, in random order.

    It keeps what it was given, so that a test can compare it with the trajectory.
    """

    script: dict[tuple[int, int], str] | Sequence[str]
    seed: int = 0
    contexts: dict[int, list[int]] = field(default_factory=dict)
    streams: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    queue: list[tuple[int, SamplingParams]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    steps: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        number = len(self.contexts)
        self.contexts[number] = list(prompt_ids)
        self.streams[number] = stream
        self.queue.append((number, params))
        return number

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        assert request_id not in self.released
        self.contexts[request_id] += token_ids
        task_number, sample, turn = self.streams[request_id]
        self.streams[request_id] = (task_number, sample, turn + 1)
        self.queue.append((request_id, params))

    def token_ids(self, request_id: int) -> list[int]:
        return self.contexts[request_id]

    def is_waiting(self, request_id: int) -> bool:
        return self.steps == 0

    def cancel(self, request_id: int) -> None:
        assert request_id not in self.released
        self.queue = [(number, params) for number, params in self.queue if number != request_id]
        self.released.append(request_id)

    def can_end(self, request_id: int) -> bool:
        return True

    def poll(self) -> list[Completion]:
        self.steps += 1
        ready = [entry for entry in self.queue if self.can_end(entry[0])]
        if not ready:
            return []
        number, params = random.Random(f"{self.seed},{self.steps}").choice(ready)
        self.queue.remove((number, params))
        _, sample, turn = self.streams[number]
        text = self.script[sample, turn] if isinstance(self.script, dict) else self.script[turn]
        ids = [ord(character) for character in text][: params.max_tokens]
        reason = "error" if text == BROKEN else "stop" if len(ids) == len(text) else "length"
        self.contexts[number] += ids
        logprobs = [-(index + 1) / 8 for index in range(len(ids))]
        text = "".join(map(chr, ids))
        return [Completion(number, ids, logprobs, logprobs, reason, text, BROKEN if reason == "error" else "")]


@dataclass
class ScriptedSandbox:
    """Echoes code; "bad" fails. With a delay, each execution takes that long on a thread of its own."""

    delay_s: float = 0.0
    calls: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    sessions: list["ScriptedSession"] = field(default_factory=list)

    def open(self, files: Sequence[str], language: str) -> "ScriptedSession":
        self.sessions.append(ScriptedSession(self, language))
        return self.sessions[-1]

    def execute(self, text: str) -> Future[Execution]:
        future: Future[Execution] = Future()
        ok = "bad" not in text
        result = Execution(ok, f"ran {text}\n", "ok" if ok else "error", 0.0)
        if self.delay_s:
            threading.Timer(self.delay_s, lambda: future.cancelled() or future.set_result(result)).start()
        else:
            future.set_result(result)
        return future


@dataclass
class ScriptedSession:
    """One chunk at a time; it must be closed once."""

    sandbox: ScriptedSandbox
    language: str
    history: tuple[str, ...] = ()
    busy: bool = False
    closed: bool = False

    def submit(self, text: str) -> Future[Execution]:
        assert not self.busy
        assert not self.closed
        self.sandbox.calls.append((text, self.history))
        self.busy = True
        future = self.sandbox.execute(text)
        future.add_done_callback(lambda done: self.take(text, done))
        return future

    def take(self, text: str, future: Future[Execution]) -> None:
        self.busy = False
        if not future.cancelled() and future.exception() is None and future.result().ok:
            self.history = (*self.history, text)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def rollout(
    script: dict[tuple[int, int], str] | Sequence[str],
    *,
    tasks: Sequence[Task] = (task(),),
    generations: int = 1,
    limits: AgentLimits = LIMITS,
    sandbox: ScriptedSandbox | None = None,
    seed: int = 0,
    openings: Sequence[Sequence[str]] | None = None,
) -> tuple[list[Group], ScriptedSampler, ScriptedSandbox]:
    sampler, sandbox = ScriptedSampler(script, seed), sandbox or ScriptedSandbox()
    groups = run_agent(
        sampler, sandbox, tasks, tokenizer=Characters(), num_generations=generations,
        params=SamplingParams(), limits=limits, seed=3, openings=openings,
    )  # fmt: skip
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)
    return groups, sampler, sandbox


def run(
    sampler: ScriptedSampler,
    sandbox: Executes,
    tasks: Sequence[Task],
    *,
    limits: AgentLimits = LIMITS,
    generations: int = 3,
) -> list[Group]:
    return run_agent(
        sampler, sandbox, tasks, tokenizer=Characters(), num_generations=generations,
        params=SamplingParams(), limits=limits, seed=0,
    )  # fmt: skip


@dataclass
class SlowSandbox(ScriptedSandbox):
    """Code with "slow" in it never ends by itself."""

    slow_ones: list[Future[Execution]] = field(default_factory=list)

    def execute(self, text: str) -> Future[Execution]:
        if "slow" not in text:
            return super().execute(text)
        self.slow_ones.append(Future())
        return self.slow_ones[-1]
