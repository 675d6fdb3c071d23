"""The many-turn loop: ids, masks and ends are right whatever the model writes, and nothing waits for anything else."""

import itertools
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.engine.config import ModelConfig
from groupwise.engine.errors import UserError
from groupwise.engine.model import Model, PackedAttention
from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.agent import AgentLimits, run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.grammar import GRAMMARS, all_tags
from groupwise.rollout.sampler import Completion, Sampler
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Trajectory

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

    def poll(self) -> list[Completion]:
        self.steps += 1
        number, params = self.queue.pop(random.Random(f"{self.seed},{self.steps}").randrange(len(self.queue)))
        _, sample, turn = self.streams[number]
        text = self.script[sample, turn] if isinstance(self.script, dict) else self.script[turn]
        ids = [ord(character) for character in text][: params.max_tokens]
        reason = "error" if text == BROKEN else "stop" if len(ids) == len(text) else "length"
        self.contexts[number] += ids
        logprobs = [-(index + 1) / 8 for index in range(len(ids))]
        return [Completion(number, ids, logprobs, logprobs, reason, "".join(map(chr, ids)))]


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
) -> tuple[list[Group], ScriptedSampler, ScriptedSandbox]:
    sampler, sandbox = ScriptedSampler(script, seed), sandbox or ScriptedSandbox()
    groups = run_agent(
        sampler, sandbox, tasks, tokenizer=Characters(), num_generations=generations,
        params=SamplingParams(), limits=limits, seed=3,
    )  # fmt: skip
    return groups, sampler, sandbox


def only(script: Sequence[str], **options: object) -> Trajectory:
    return rollout(script, **options)[0][0].trajectories[0]  # type: ignore[arg-type]


def test_code_then_answer() -> None:
    groups, _, sandbox = rollout([code("a"), code("b"), answer("3")])
    found = groups[0].trajectories[0]
    assert (found.status, found.answer, found.turns) == ("answered", "3", 3)
    assert [span.writer for span in found.spans] == ["prompt", "model", "environment", "model", "environment", "model"]
    assert [execution.output for execution in found.executions] == ["ran a\n", "ran b\n"]
    assert sandbox.calls == [("a", ()), ("b", ("a",))]
    assert Characters().decode(found.spans[2].token_ids) == "\n<interpreter>ran a</interpreter>\n"


def test_failed_code_is_not_replayed() -> None:
    _, _, sandbox = rollout([code("a"), code("bad"), code("c"), answer("3")])
    assert sandbox.calls == [("a", ()), ("bad", ("a",)), ("c", ("a",))]


@pytest.mark.parametrize(
    ("script", "status", "turns"),
    [
        (["no tags at all"], "void", 1),
        ([code("a"), "<think>t</think>"], "void", 2),
        ([code("a")] * 9, "turn_limit", 4),
        ([code("bad"), code("bad"), answer("3")], "error_limit", 2),
        ([code("bad"), code("a"), code("bad"), answer("3")], "answered", 4),
        ([code("x" * 300)], "token_limit", 1),
        ([answer("3" * 300)], "token_limit", 1),
        ([code("y" * 150)] * 4, "token_limit", 4),
    ],
)
def test_ends(script: list[str], status: str, turns: int) -> None:
    found = only(script)
    assert (found.status, found.turns) == (status, turns)
    assert (found.answer is not None) == (status == "answered")
    assert len(found.token_ids) <= LIMITS.max_trajectory_tokens


def test_a_prompt_that_does_not_fit_ends_at_once() -> None:
    long = Task("t", "?" * 2000, (), "", "", "text", "counting")
    groups, sampler, _ = rollout([answer("3")], tasks=[long, task(1)])
    assert [group.trajectories[0].status for group in groups] == ["token_limit", "answered"]
    assert len(sampler.contexts) == 1


def test_missing_closing_tag_is_forced_and_not_trained() -> None:
    found = only(["<think>t</think>\n<code>\na\n", answer("3")])
    assert [span.writer for span in found.spans] == ["prompt", "model", "forced", "environment", "model"]
    assert Characters().decode(found.spans[2].token_ids) == "</code>"
    assert found.status == "answered"
    example = found.to_example()
    assert sum(example.loss_mask) == found.completion_tokens
    assert found.model_text(Characters())[0].endswith("</code>")


def test_observations_are_capped_in_the_middle() -> None:
    found = only([code("begin" + "x" * 120 + "end"), answer("3")])
    text = Characters().decode(found.spans[2].token_ids)
    assert text.startswith("\n<interpreter>ran begin")
    assert text.endswith("end</interpreter>\n")
    assert len(text) <= LIMITS.max_observation_tokens + len(DATAMIND.observation(""))


def test_a_turn_without_finite_numbers_fails_its_trajectory_alone() -> None:
    groups, sampler, _ = rollout({(0, 0): code("a"), (0, 1): BROKEN, (1, 0): answer("3")}, generations=2)
    broken, whole = groups[0].trajectories
    assert (broken.status, whole.status) == ("failed", "answered")
    assert sum(broken.to_example().loss_mask) == 0
    assert sorted(sampler.released) == sorted(sampler.contexts)


def test_reflection_runs_nothing() -> None:
    reflection = GRAMMARS["reflection"]
    groups, _, sandbox = rollout(
        [reflection.render_turn("answer", "t", "3")], tasks=[task(mode="reflection")], generations=2
    )
    assert [found.answer for found in groups[0].trajectories] == ["3", "3"]
    assert not sandbox.calls


turns = st.one_of(
    st.sampled_from(["a", "bad", "x" * 150]).map(code),
    st.sampled_from(["3", "4"]).map(answer),
    st.sampled_from(["", "void", "<think>t</think>\n<CODE>a", "<code>z</code>", "</interpreter><answer>1</answer>"]),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), generations=st.integers(1, 4), order=st.integers(0, 9))
def test_trained_ids_are_exactly_the_sampled_ids(data: st.DataObject, generations: int, order: int) -> None:
    script = {(sample, turn): data.draw(turns) for sample in range(generations) for turn in range(LIMITS.max_turns)}
    groups, sampler, _ = rollout(script, generations=generations, seed=order)
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert not sampler.has_work
    tokenizer = Characters()
    for found in groups[0].trajectories:
        context = sampler.contexts[found.sample]
        # What the sampler's context lacks is what nobody wrote after: a last observation, a last forced tag.
        assert found.token_ids[: len(context)] == context
        ends = list(itertools.accumulate(len(span.token_ids) for span in found.spans))
        unread = [span.writer for span, end in zip(found.spans, ends, strict=True) if end > len(context)]
        assert "model" not in unread
        written = [tokenizer.decode(span.token_ids) for span in found.spans if span.writer == "model"]
        whole = [script[found.sample, turn][: LIMITS.max_tokens_per_turn] for turn in range(found.turns)]
        if len(found.token_ids) == LIMITS.max_trajectory_tokens:  # which may have cut the last turn
            whole[-1] = whole[-1][: len(written[-1])]
        assert written == whole
        example = found.to_example()
        trained = [token for token, weight in zip(example.token_ids, example.loss_mask, strict=True) if weight]
        assert tokenizer.decode(trained) == "".join(written)
        assert example.old_logprobs is not None
        kept = [logprob for logprob, weight in zip(example.old_logprobs, example.loss_mask, strict=True) if weight]
        assert kept == [-(index + 1) / 8 for text in written for index in range(len(text))]
        assert len(found.token_ids) <= LIMITS.max_trajectory_tokens


def test_order_of_events_changes_nothing() -> None:
    script = {(sample, turn): code(f"{sample}{turn}") for sample in range(6) for turn in range(3)}
    script |= {(sample, 3): answer(str(sample)) for sample in range(6)}
    first = rollout(script, generations=6, seed=1)[0]
    second = rollout(script, generations=6, seed=2, sandbox=ScriptedSandbox(delay_s=0.002))[0]
    assert [found.token_ids for found in first[0].trajectories] == [found.token_ids for found in second[0].trajectories]
    assert [found.answer for found in first[0].trajectories] == list("012345")


def test_streams_name_the_task_and_not_its_place() -> None:
    def streams(tasks: list[Task]) -> dict[int, tuple[int, int, int]]:
        return rollout([answer("3")], tasks=tasks)[1].streams

    alone = streams([task(1)])[0]
    assert streams([task(0), task(1)])[1] == alone
    assert len({stream[0] for stream in streams([task(1), task(1)]).values()}) == 2


def test_executions_overlap_and_waiting_does_not_spin() -> None:
    count = 12
    script = [code("a"), code("b"), answer("3")]
    started, worked = time.perf_counter(), time.process_time()
    groups, sampler, _ = rollout(script, generations=count, sandbox=ScriptedSandbox(delay_s=0.15))
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - worked
    assert all(found.status == "answered" for found in groups[0].trajectories)
    assert sampler.steps == 3 * count
    assert wall_s < 0.15 * 2 * count / 3  # one after the other would take 0.15 * 2 * count
    assert cpu_s < 0.2


def test_errors_of_the_sandbox_end_the_run_and_free_the_sampler() -> None:
    class Broken(ScriptedSandbox):
        def execute(self, text: str) -> Future[Execution]:
            future: Future[Execution] = Future()
            future.set_exception(RuntimeError("no space left"))
            return future

    sampler = ScriptedSampler([code("a"), answer("3")])
    with pytest.raises(RuntimeError, match="no space left"):
        run_agent(
            sampler, Broken(), [task(), task(1)], tokenizer=Characters(), num_generations=3,
            params=SamplingParams(), limits=LIMITS, seed=0,
        )  # fmt: skip
    assert sorted(sampler.released) == sorted(sampler.contexts)


def test_progress_sees_each_trajectory_once() -> None:
    seen: list[Trajectory] = []
    sampler = ScriptedSampler([answer("3")])
    run_agent(
        sampler, ScriptedSandbox(), [task()], tokenizer=Characters(), num_generations=3, params=SamplingParams(),
        limits=LIMITS, seed=0, progress=seen.append,
    )  # fmt: skip
    assert sorted(found.sample for found in seen) == [0, 1, 2]


def test_bad_limits_are_refused() -> None:
    with pytest.raises(UserError, match="max_turns is 0"):
        AgentLimits(max_turns=0)


def test_real_rooms_fit_together() -> None:
    """A random model, the real sampler and the real sandbox: the same trajectories at any concurrency."""
    torch.manual_seed(0)
    texts = [code("print(1)"), answer("3"), "How many?", DATAMIND.system]
    tokenizer = Tokenizer.train(texts * 3, 340, all_tags())
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    model = Model(config)
    model.init_weights(1)
    limits = AgentLimits(max_tokens_per_turn=24, max_trajectory_tokens=200)
    tasks = [task(0), task(1, "agentic"), task(2, "reflection")]
    found = []
    with Sandbox(workers=1) as sandbox:
        for concurrency in (0, 1):
            sampler = Sampler(model, tokenizer, kv_memory=0.01, concurrency=concurrency)
            found.append(
                run_agent(
                    sampler, sandbox, tasks, tokenizer=tokenizer, num_generations=4,
                    params=SamplingParams(temperature=0.8), limits=limits, seed=5,
                )
            )  # fmt: skip
            assert sampler.stats["used_blocks"] == 0
    together, alone = ([each.token_ids for group in groups for each in group.trajectories] for groups in found)
    assert together == alone
    assert len({tuple(ids) for ids in together}) == len(together)
    for group in found[0]:
        for trajectory in group.trajectories:
            example = trajectory.to_example()
            assert example.old_logprobs is not None
            ids = torch.tensor(example.token_ids)
            attention = PackedAttention(torch.tensor([0, len(ids) - 1], dtype=torch.int32), len(ids) - 1)
            with torch.no_grad():
                logprobs, _ = model(ids[:-1], torch.arange(len(ids) - 1), attention, ids[1:], temperature=0.8)
            mask = torch.tensor(example.loss_mask[1:]) > 0
            assert torch.allclose(logprobs[mask], torch.tensor(example.old_logprobs[1:])[mask], atol=1e-4)
