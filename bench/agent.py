"""How well the many-turn loop overlaps writing with running code: the time of both beside that of each alone.

    python -m groupwise.bench.agent [--shapes 2x128x64x32x3x8x8] [--out FILE]

A shape is layers x hidden x tokens of a turn x trajectories x code turns of each x workers of the sandbox x sequences
that decode together. A random model writes turns of this length in the real sampler; what it wrote is then taken for
code that sleeps for a second in the real sandbox, and the last turn for an answer.

``generation`` is the time of the loop where code takes none, ``execution`` where turns take none, ``both`` that of
both, and ``share`` that of generation in the sum of the first two. ``ratio`` is ``both`` over the longer of them:
1 where the shorter is hidden. What cannot be hidden is the first turn and the last: where all sequences decode together
and end their turns together, that is much of it. Ids must be the same whether code takes time or not, or it stops.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from groupwise.bench import common
from groupwise.bench.sampler import NoText, random_model
from groupwise.engine.model import Model
from groupwise.rollout.agent import AgentLimits, run_agent
from groupwise.rollout.cache import KVCache
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.generation import Completion
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.sampler import Sampler
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.task import Task

GRAMMAR = GRAMMARS["datamind"]
CODE = GRAMMAR.render_turn("code", "wait", "import time\ntime.sleep(1)")
ANSWER = GRAMMAR.render_turn("answer", "waited", "1")
VOCABULARY, BLOCK_SIZE, MAX_TOKENS = 8192, 16, 2048
SHAPES = [(2, 128, tokens, 32, 3, 8, 8) for tokens in (32, 64, 128)] + [(2, 128, 64, 32, 3, 8, 32)]


class Numbers(NoText):
    """A tokenizer of an id a character; what the model writes has no text."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) % self.vocab_size for character in text]

    def chat_prompt(self, system: str, user: str) -> str:
        return system + user


class Told:
    """A sampler that samples as it does, and whose turns are then taken for code, the last for an answer."""

    def __init__(self, sampler: Sampler, code_turns: int) -> None:
        self._sampler, self._code_turns = sampler, code_turns
        self._turns: dict[int, int] = {}
        self.extend, self.cancel, self.token_ids = sampler.extend, sampler.cancel, sampler.token_ids
        self.is_waiting = sampler.is_waiting

    @property
    def has_work(self) -> bool:
        return self._sampler.has_work

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        number = self._sampler.submit(prompt_ids, params, stream=stream)
        self._turns[number] = 0
        return number

    def poll(self) -> list[Completion]:
        return [self._told(done) for done in self._sampler.poll()]

    def _told(self, done: Completion) -> Completion:
        self._turns[done.request_id] += 1
        text = CODE if self._turns[done.request_id] <= self._code_turns else ANSWER
        return Completion(done.request_id, done.token_ids, done.logprobs, done.sampling_logprobs, "stop", text)


class Instant:
    """A sampler whose turns are there at once."""

    def __init__(self) -> None:
        self._held: list[list[int]] = []
        self._ready: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self._ready)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        self._held.append(list(prompt_ids))
        self._ready.append(len(self._held) - 1)
        return self._ready[-1]

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        self._held[request_id] += token_ids
        self._ready.append(request_id)

    def cancel(self, request_id: int) -> None:
        pass

    def poll(self) -> list[Completion]:
        ready, self._ready = self._ready, []
        for number in ready:
            self._held[number].append(0)
        return [Completion(number, [0], [0.0], [0.0], "stop", "") for number in ready]

    def token_ids(self, request_id: int) -> Sequence[int]:
        return self._held[request_id]

    def is_waiting(self, request_id: int) -> bool:
        return False


class NoTime:
    """A sandbox and its sessions, in which code takes no time."""

    def open(self, files: Sequence[str], language: str) -> NoTime:
        return self

    def submit(self, code: str) -> Future[Execution]:
        future: Future[Execution] = Future()
        future.set_result(Execution(True, "", "ok", 0.0))
        return future

    def close(self) -> None:
        pass


def rollout(sampler: Any, sandbox: Any, shape: tuple[int, ...], seed: int) -> tuple[float, list[list[int]]]:
    """Seconds of one run of the loop, and the ids of its trajectories."""
    tokens, trajectories, code_turns = shape[2:5]
    tasks = [Task(str(number), "How long?", (), "", "1", "number", "counting") for number in range(trajectories)]
    limits = AgentLimits(
        max_turns=code_turns + 1,
        max_tokens_per_turn=tokens,
        max_trajectory_tokens=MAX_TOKENS,
        max_observation_tokens=64,
    )
    start = time.perf_counter()
    groups = run_agent(
        sampler, sandbox, tasks, tokenizer=Numbers(VOCABULARY), num_generations=1,  # type: ignore[arg-type]
        params=SamplingParams(), limits=limits, seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    found = [group.trajectories[0] for group in groups]
    if any(each.answer != "1" or len(each.executions) != code_turns for each in found):
        sys.exit("agent: a trajectory did not run all its code")
    return seconds, [each.token_ids for each in found]


def make_sampler(model: Model, concurrency: int, trajectories: int) -> Sampler:
    """With memory for all trajectories at once."""
    blocks = trajectories * (MAX_TOKENS // BLOCK_SIZE) + 1
    gib = blocks * KVCache.block_bytes(model.config, BLOCK_SIZE, model.output_weight.dtype) / 2**30
    return Sampler(model, Numbers(VOCABULARY), kv_memory=gib, block_size=BLOCK_SIZE, concurrency=concurrency)


def measure(shape: tuple[int, ...], args: Any) -> common.Row:
    layers, hidden, tokens, trajectories, code_turns, workers, concurrency = shape
    heads = hidden // 64
    model = random_model(
        (layers, hidden, hidden * 8 // 3, heads, max(1, heads // 3), VOCABULARY), MAX_TOKENS, args.device
    )
    sampler = make_sampler(model, concurrency, trajectories)
    with Sandbox(workers=workers, execution="forked") as sandbox:
        runs: dict[str, Callable[[], tuple[Any, Any]]] = {
            "generation": lambda: (Told(sampler, code_turns), NoTime()),
            "execution": lambda: (Told(Instant(), code_turns), sandbox),  # type: ignore[arg-type]
            "both": lambda: (Told(sampler, code_turns), sandbox),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for seed in range(args.repeats):
            ids = {}
            for name, make in runs.items():
                seconds, ids[name] = rollout(*make(), shape, seed)
                times[name].append(seconds)
            if ids["both"] != ids["generation"]:
                sys.exit("agent: the time that code takes changed what was sampled")
    generation, execution, both = (statistics.median(times[name]) for name in runs)
    return {
        "layers x hidden": f"{layers}x{hidden}",
        "tokens a turn": tokens,
        "trajectories x code turns": f"{trajectories}x{code_turns}",
        "workers": workers,
        "concurrency": concurrency,
        "share": generation / (generation + execution),
        "generation_ms": generation * 1e3,
        "execution_ms": execution * 1e3,
        "both_ms": both * 1e3,
        "ratio": both / max(generation, execution),
    }


def main() -> None:
    args = common.arguments(__doc__, repeats=(3, 1))
    rows = [measure(shape, args) for shape in common.parse_shapes(args.shapes, SHAPES)]
    common.report("agent", rows, args)


if __name__ == "__main__":
    main()
