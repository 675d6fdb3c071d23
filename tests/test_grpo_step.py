"""What a step of GRPO asks, keeps and learns from, by ranks that are threads of one process."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from groupwise.data.trajectories import Expert
from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.objective import group_advantages
from groupwise.engine.step import Update
from groupwise.recipes.grpo import ask, has_contrast, set_advantages, to_minibatches
from groupwise.recipes.measure import measure
from groupwise.recipes.rewarding import Rewarding
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Span, Status, Trajectory


def expert(number: int) -> Expert:
    task = Task(f"task-{number}", "q", (), "", "1", "number", "counting")
    return Expert(task, (("model", "x" * (number % 7)),), "success", "datamind", "sum")


TOKENIZER: Any = None  # nothing is read before the mistake is found
POOL = [expert(number) for number in range(60)]


def trajectory(task: Task, sample: int, right: float, status: Status = "answered", scored: bool = True) -> Trajectory:
    spans = [Span("prompt", [5, 6, 7]), Span("model", [8, 9, 10 + sample], [-1.0] * 3)]
    return Trajectory(task, sample, spans, status, answer="1", rewards={"answer": right}, reward=right, scored=scored)


def group(task: Task, rights: Sequence[float]) -> Group:
    return Group(task, [trajectory(task, sample, right) for sample, right in enumerate(rights)])


class Ranks:
    """Threads that exchange what they have."""

    def __init__(self, size: int) -> None:
        self.size, self._values, self._barrier = size, [None] * size, threading.Barrier(size, timeout=60)

    def run(self, work: Callable[[Any], Any], *overrides: str) -> list[Any]:
        results: list[Any] = [None] * self.size
        config = load_config(None, overrides)

        def body(rank: int) -> None:
            def gather(value: Any) -> list[Any]:
                self._values[rank] = value
                self._barrier.wait()
                found = list(self._values)
                self._barrier.wait()
                return found

            mesh = SimpleNamespace(rank=rank, world_size=self.size, all_gather_object=gather)
            results[rank] = work(SimpleNamespace(mesh=mesh, config=config, is_main=rank == 0))

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_tasks_without_contrast_are_replaced_until_there_are_enough(ranks: int) -> None:
    rounds: list[tuple[int, int]] = []

    def work(run: Any) -> list[tuple[list[Expert], list[Group]]]:
        def sample(mine: Sequence[Expert], number: int) -> list[Group]:
            rounds.append((number, len(mine)))
            # Every third task is one that the policy solves now and then.
            return [group(e.task, [1, 0] if int(e.task.id[5:]) % 3 == 0 else [1, 1]) for e in mine]

        return ask(run, POOL, 4, sample)

    options = ("grpo.prompts_per_step=8", "grpo.max_sampling_rounds=20")
    found = Ranks(ranks).run(work, *options)
    groups = [one for _, part in found for one in part]
    settings = load_config().reward
    assert sum(has_contrast(one, settings) for one in groups) == 8
    asked = [sum(size for number, size in rounds if number == each) for each in range(1 + max(n for n, _ in rounds))]
    assert asked[0] == 8
    assert asked == sorted(asked, reverse=True)
    for experts, part in found:
        assert [e.task for e in experts] == [one.task for one in part]
    again = Ranks(ranks).run(work, *options)
    assert [[e.task.id for e in experts] for experts, _ in again] == [
        [e.task.id for e in experts] for experts, _ in found
    ]


def test_a_step_goes_on_with_fewer_groups_after_the_last_round(capsys: pytest.CaptureFixture[str]) -> None:
    def work(run: Any) -> tuple[list[Expert], list[Group]]:
        return ask(run, POOL, 0, lambda mine, number: [group(e.task, [1, number % 2]) for e in mine[:1]])

    ((asked, groups),) = Ranks(1).run(work, "grpo.prompts_per_step=4", "grpo.max_sampling_rounds=2")
    assert len(asked) == 4 + 3
    assert len(groups) == 2
    assert "step 1: after 2 rounds 1 of 4 groups have contrast" in capsys.readouterr().out
    ((asked, _),) = Ranks(1).run(work, "grpo.prompts_per_step=4")
    assert len(asked) == 4  # without dynamic sampling there is one round


def test_contrast_is_that_of_the_answers_where_they_are_rewarded_and_of_the_rewards_elsewhere() -> None:
    tied = group(POOL[0].task, [1, 1])
    tied.trajectories[0].reward = 0.3
    assert not has_contrast(tied, load_config().reward)
    assert has_contrast(tied, load_config(None, ["reward.answer_weight=0"]).reward)
    assert not has_contrast(tied, load_config(None, ["reward.answer_weight=0", "reward.kind=datamind"]).reward)


def step_of(*overrides: str) -> Any:
    return SimpleNamespace(config=load_config(None, overrides), mesh=Mesh())


def test_a_sample_without_a_verdict_is_out_of_its_group_and_out_of_the_loss() -> None:
    task = POOL[0].task
    scored = [trajectory(task, 0, 1.0), trajectory(task, 1, 0.0), trajectory(task, 3, 0.0)]
    whole = Group(task, [*scored[:2], trajectory(task, 2, 0.0, scored=False), scored[2]])
    run = step_of()
    set_advantages(whole, run)
    assert [t.advantage for t in scored] == group_advantages([1.0, 0.0, 0.0]).tolist()
    ((batch,),) = to_minibatches(run, [whole], [])
    assert whole.trajectories[2].advantage == 0
    assert int((batch.weight != 0).sum()) == 9


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], {"answered", "error_limit"}),
        (["grpo.mask_void=false"], {"answered", "error_limit", "void", "token_limit", "turn_limit"}),
        (["reward.overlong_buffer=8"], {"answered", "error_limit", "token_limit", "turn_limit"}),
    ],
)
def test_void_and_truncated_trajectories_bear_loss_only_as_configured(overrides: list[str], kept: set[str]) -> None:
    statuses: list[Status] = ["answered", "void", "token_limit", "turn_limit", "error_limit", "failed"]
    task = POOL[0].task
    members = [trajectory(task, n, float(n == 0), status) for n, status in enumerate(statuses)]
    run = step_of(*overrides)
    set_advantages(Group(task, members), run)
    ((batch,),) = to_minibatches(run, [Group(task, members)], [])
    last = {10 + n: status for n, status in enumerate(statuses)}
    bearing = {last[int(token)] for token in batch.targets[batch.weight != 0] if int(token) in last}
    assert bearing == kept
    # All of them stay in the mean and the deviation.
    assert members[0].advantage == group_advantages([1.0, *[0.0] * 5]).tolist()[0]


def test_minibatches_part_the_groups_and_each_is_a_mean_of_its_own() -> None:
    run = step_of("grpo.num_minibatches=3")
    groups = [group(one.task, [1, 0, number % 2]) for number, one in enumerate(POOL[:7])]
    for one in groups:
        set_advantages(one, run)
    parts = to_minibatches(run, groups, [])
    assert len(parts) == 3
    rows = [sum(int((batch.weight != 0).sum()) for batch in part) for part in parts]
    assert sum(rows) == 7 * 3 * 3
    for part in parts:
        assert sum(batch.weight.sum() for batch in part) == pytest.approx(1.0)
    whole = [batch for part in to_minibatches(step_of(), groups, []) for batch in part]
    tokens = sorted(int(t) for batch in whole for t in batch.targets[batch.weight != 0])
    assert tokens == sorted(int(t) for part in parts for batch in part for t in batch.targets[batch.weight != 0])


def test_the_record_counts_what_the_judge_left_out() -> None:
    task = POOL[0].task
    one = Group(task, [trajectory(task, 0, 1.0), trajectory(task, 1, 0.0), trajectory(task, 2, 0.0, scored=False)])
    run = step_of("reward.judge=m@http://localhost:1/v1")
    set_advantages(one, run)
    record = measure(run, [one], Update(0.5, 0.1, 1e-3))
    assert record["rewards/unjudged"] == pytest.approx(1 / 3)
    assert record["reward"] == record["rewards/answer"] == 0.5
    assert (record["groups/asked"], record["groups/contrasted"], record["frac_reward_zero_std"]) == (1, 1, 0)
    nobody = Group(task, [trajectory(task, 0, 0.0, scored=False)])
    record = measure(run, [nobody], Update(0.0, 0.0, 1e-3))
    assert record["rewards/unjudged"] == 1
    assert "reward" not in record


def test_what_cannot_be_rewarded_is_named_before_training() -> None:
    free = dataclasses.replace(POOL[0].task, answer_type="free")
    with pytest.raises(UserError, match=r"'task-0' is free text, but reward.judge is empty"):
        Rewarding(step_of(), TOKENIZER, [free])
    with pytest.raises(UserError, match=r"reward.overlong_buffer is 8192, expected less than .* 8192"):
        Rewarding(step_of("reward.overlong_buffer=8192"), TOKENIZER, [])
    with pytest.raises(UserError, match=r"grpo.dual_clip is 3, but cispo"):
        load_config(None, ["grpo.dual_clip=3", "grpo.loss_type=cispo"])
