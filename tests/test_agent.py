"""The many-turn loop: every trajectory ends as it should, nothing waits for anything else, nothing is left behind."""

import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from scripted import (
    BROKEN,
    DATAMIND,
    LIMITS,
    Characters,
    ScriptedSampler,
    ScriptedSandbox,
    SlowSandbox,
    answer,
    code,
    rollout,
    run,
    task,
)

from groupwise.engine.errors import UserError
from groupwise.rollout.agent import AgentLimits, run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.sampler import Completion
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Trajectory


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


def test_a_trajectory_has_one_session_from_its_first_code_on() -> None:
    script = {(0, 0): code("a"), (0, 1): code("bad"), (0, 2): code("c"), (0, 3): answer("3"), (1, 0): answer("3")}
    _, _, sandbox = rollout(script, tasks=[replace(task(), language="sql")], generations=2)
    assert sandbox.calls == [("a", ()), ("bad", ("a",)), ("c", ("a",))]
    assert [session.language for session in sandbox.sessions] == ["sql"]


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
    assert (broken.status, broken.error, whole.status) == ("failed", BROKEN, "answered")
    assert sum(broken.to_example().loss_mask) == 0
    assert sorted(sampler.released) == sorted(sampler.contexts)


def test_reflection_runs_nothing() -> None:
    reflection = GRAMMARS["reflection"]
    groups, _, sandbox = rollout(
        [reflection.render_turn("answer", "t", "3")], tasks=[task(mode="reflection")], generations=2
    )
    assert [found.answer for found in groups[0].trajectories] == ["3", "3"]
    assert not sandbox.calls


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


def test_errors_of_the_sandbox_end_the_run_and_free_all() -> None:
    class Broken(ScriptedSandbox):
        def execute(self, text: str) -> Future[Execution]:
            future: Future[Execution] = Future()
            future.set_exception(RuntimeError("no space left"))
            return future

    sampler, sandbox = ScriptedSampler([code("a"), answer("3")]), Broken()
    with pytest.raises(RuntimeError, match="no space left"):
        run(sampler, sandbox, [task(), task(1)])
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)


@pytest.mark.parametrize("polls", range(1, 10))
def test_an_interrupt_leaves_nothing(polls: int) -> None:
    class Interrupted(ScriptedSampler):
        def poll(self) -> list[Completion]:
            if self.steps == polls:
                raise KeyboardInterrupt
            return super().poll()

    script = {(sample, turn): code("a") for sample in range(3) for turn in range(2)}
    script |= {(0, 0): code("slow"), (1, 2): answer("3"), (2, 2): answer("3")}
    sampler, sandbox = Interrupted(script), SlowSandbox()
    with pytest.raises(KeyboardInterrupt):
        run(sampler, sandbox, [task(), task(1)])
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)
    assert all(future.cancelled() for future in sandbox.slow_ones)


def test_an_interrupt_while_it_sleeps_leaves_nothing() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    sampler, sandbox = ScriptedSampler([code("slow")]), SlowSandbox()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(sampler, sandbox, [task()])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)
    assert all(future.cancelled() for future in sandbox.slow_ones)


@pytest.mark.parametrize("polls", range(1, 10))
def test_a_stop_gives_up_what_is_under_way_at_once(polls: int) -> None:
    script = {(sample, turn): code("a") for sample in range(3) for turn in range(2)}
    script |= {(0, 0): code("slow"), (1, 2): answer("3"), (2, 2): answer("3")}
    sampler, sandbox = ScriptedSampler(script), SlowSandbox()
    groups = run_agent(
        sampler, sandbox, [task(), task(1)], tokenizer=Characters(), num_generations=3, params=SamplingParams(),
        limits=LIMITS, seed=0, stop=lambda: sampler.steps == polls,
    )  # fmt: skip
    assert (len(groups), sampler.steps) == (2, polls)
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)
    assert all(future.cancelled() for future in sandbox.slow_ones)


def test_a_stop_does_not_wait_for_tools() -> None:
    asked = threading.Event()
    threading.Timer(0.1, asked.set).start()
    sampler, sandbox = ScriptedSampler([code("slow")]), SlowSandbox()
    run_agent(
        sampler, sandbox, [task()], tokenizer=Characters(), num_generations=1, params=SamplingParams(),
        limits=LIMITS, seed=0, stop=asked.is_set,
    )  # fmt: skip
    assert all(future.cancelled() for future in sandbox.slow_ones)


@dataclass
class Clock:
    """Time that passes only where a test says so."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class ClockedSampler(ScriptedSampler):
    """Each step takes a second of the clock; a request begins when there are less than ``places`` before it."""

    clock: Clock = field(default_factory=Clock)
    places: int = 99
    never: int = -1  # a request that does not finish

    def is_waiting(self, request_id: int) -> bool:
        return request_id - len(self.released) >= self.places

    def can_end(self, request_id: int) -> bool:
        return not self.is_waiting(request_id) and request_id != self.never

    def poll(self) -> list[Completion]:
        self.clock.now += 1
        return super().poll()


def timed(monkeypatch: pytest.MonkeyPatch, sampler: ClockedSampler, sandbox: SlowSandbox, max_wall_s: float) -> Group:
    monkeypatch.setattr("groupwise.rollout.agent.time", sampler.clock)
    found = run(sampler, sandbox, [task()], limits=replace(LIMITS, max_wall_s=max_wall_s), generations=4)
    assert sorted(sampler.released) == sorted(sampler.contexts)
    assert all(session.closed for session in sandbox.sessions)
    return found[0]


def test_a_trajectory_that_waits_for_its_code_ends_when_its_time_is_over() -> None:
    script = {(sample, turn): code("a") for sample in range(4) for turn in range(3)}
    script |= {(sample, 3): answer("3") for sample in range(4)} | {(2, 1): code("slow")}
    sandbox, started = SlowSandbox(), time.perf_counter()
    group = rollout(script, generations=4, sandbox=sandbox, limits=replace(LIMITS, max_wall_s=0.3))[0][0]
    assert 0.3 <= time.perf_counter() - started < 3
    assert [found.status for found in group.trajectories] == ["answered", "answered", "time_limit", "answered"]
    late = group.trajectories[2]
    assert [span.writer for span in late.spans] == ["prompt", "model", "environment", "model"]
    assert late.is_void
    assert len(late.executions) == 1
    assert sandbox.slow_ones[0].cancelled()


def test_what_comes_out_too_late_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(SlowSandbox):
        """Its slow code has begun, so it cannot be cancelled, and ends when another one is asked for later."""

        def execute(self, text: str) -> Future[Execution]:
            if text == "slow":
                future = super().execute(text)
                future.set_running_or_notify_cancel()
                return future
            if text == "last":
                self.slow_ones[0].set_result(Execution(True, "late", "ok", 0.0))
            return super().execute(text)

    script = {(sample, turn): code("a") for sample in range(4) for turn in range(3)}
    script |= {(sample, 3): answer("3") for sample in range(4)} | {(0, 0): code("slow"), (1, 2): code("last")}
    sampler = ClockedSampler(script, places=1)
    group = timed(monkeypatch, sampler, Late(), 4.5)
    assert [found.status for found in group.trajectories] == ["time_limit", "answered", "answered", "answered"]
    assert group.trajectories[0].executions == []


def test_a_turn_under_way_is_dropped_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    group = timed(monkeypatch, ClockedSampler([code("a"), answer("3")], never=1), SlowSandbox(), 20.0)
    assert [found.status for found in group.trajectories] == ["answered", "time_limit", "answered", "answered"]
    assert sum(group.trajectories[1].to_example().loss_mask) == 0


def test_waiting_for_a_place_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    group = timed(monkeypatch, ClockedSampler([code("a"), answer("3")], places=1), SlowSandbox(), 2.5)
    assert [found.status for found in group.trajectories] == ["answered"] * 4


def test_ids_that_are_not_the_samplers_are_one_sentence() -> None:
    class Lossy(ScriptedSampler):
        def poll(self) -> list[Completion]:
            return [replace(done, logprobs=done.logprobs[:-1]) for done in super().poll()]

    class Forgetful(ScriptedSampler):
        def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
            super().extend(request_id, token_ids[:-1], params)

    for sampler, words in (
        (Lossy([answer("3")]), r"of task 't0' has 35 sampled ids and 34 log-probabilities"),
        (Forgetful([code("a"), answer("3")]), r"the ids of sample 0 of task 't0' are not those that the sampler holds"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(sampler, ScriptedSandbox(), [task()], generations=1)
        assert sorted(sampler.released) == sorted(sampler.contexts)


def test_a_file_that_is_missing_is_said_before_anything_begins(tmp_path: Path) -> None:
    sampler = ScriptedSampler([answer("3")])
    with pytest.raises(UserError, match=r"file .*gone\.csv does not exist"):
        run(sampler, ScriptedSandbox(), [task(), replace(task(1), files=(str(tmp_path / "gone.csv"),))])
    assert not sampler.contexts


def test_a_file_that_vanishes_or_changes_fails_its_trajectories_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"{number}.csv" for number in range(3)]
    for file in files:
        file.write_text("a\n1\n")

    class Meddled(ScriptedSampler):
        def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
            super().extend(request_id, token_ids, params)
            files[1].write_text("other\n")

        def poll(self) -> list[Completion]:
            files[0].unlink(missing_ok=True)
            return super().poll()

    tasks = [replace(task(number), files=(str(file),)) for number, file in enumerate(files)]
    with Sandbox(workers=1) as sandbox:
        script = [code("print(open(__import__('os').listdir('.')[0]).read())")] * 2 + [answer("3")]
        groups = run(Meddled(script), sandbox, tasks, limits=replace(LIMITS, max_turns=3), generations=1)
    gone, changed, whole = (group.trajectories[0] for group in groups)
    assert (gone.status, changed.status, whole.status) == ("failed", "failed", "answered")
    assert "0.csv does not exist" in gone.error
    assert "1.csv was changed or removed" in changed.error
    assert (len(gone.executions), len(changed.executions), len(whole.executions)) == (0, 1, 2)
    assert sum(sum(found.to_example().loss_mask) for found in (gone, changed)) == 0
    assert "of task 't0' failed" in caplog.text


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
    with pytest.raises(UserError, match="max_wall_s is 0"):
        AgentLimits(max_wall_s=0)
