"""Trajectories that start with turns which are already written."""

from dataclasses import replace

import pytest
from scripted import DATAMIND, LIMITS, Characters, ScriptedSandbox, answer, code, rollout, task

from groupwise.engine.errors import UserError
from groupwise.rewards.tags import tag_checks
from groupwise.rollout.notebook import to_notebook
from groupwise.rollout.trajectory import Trajectory

UNCLOSED = "<think>t</think>\n<code>\nb\n"


def test_an_opening_runs_and_the_policy_goes_on() -> None:
    script = {(0, 2): code("c"), (0, 3): answer("3"), (1, 2): answer("4")}
    groups, sampler, sandbox = rollout(script, generations=2, openings=[[code("bad"), code("b")]])
    first, second = groups[0].trajectories
    writers = ["prompt", "forced", "environment", "forced", "environment", "model"]
    assert [span.writer for span in second.spans] == writers
    assert [span.writer for span in first.spans] == [*writers, "environment", "model"]
    assert (first.turns, second.turns, first.answer, second.answer) == (4, 3, "3", "4")
    assert [execution.ok for execution in first.executions] == [False, True, True]
    assert sorted(sandbox.calls) == sorted([("bad", ()), ("b", ()), ("bad", ()), ("b", ()), ("c", ("b",))])
    assert {stream[2] for stream in sampler.streams.values()} == {2, 3}
    assert first.model_text(Characters()) == [code("bad"), code("b"), code("c"), answer("3")]
    example = first.to_example()
    assert sum(example.loss_mask) == first.completion_tokens == len(code("c")) + len(answer("3"))
    assert example.old_logprobs is not None


def test_each_task_has_its_own_opening_and_none_changes_nothing() -> None:
    script = {(0, 0): answer("3"), (0, 1): answer("4")}
    groups, sampler, _ = rollout(script, tasks=[task(0), task(1)], openings=[[], [code("a")]])
    assert [group.trajectories[0].answer for group in groups] == ["3", "4"]
    plain, _, _ = rollout(script, tasks=[task(0), task(1)])
    assert plain[0].trajectories[0].spans == groups[0].trajectories[0].spans
    assert sorted(sampler.released) == [0, 1]


def test_going_on_from_any_step_of_a_trajectory_gives_the_same_trajectory() -> None:
    """The sampler is asked for the same turn of the same stream behind the same ids."""

    script = [code("a"), code("bad"), code("b"), answer("3")]
    whole = rollout(script)[0][0].trajectories[0]
    for turns in range(1, 4):
        groups, sampler, _ = rollout(script, openings=[whole.model_text(Characters())[:turns]])
        assert groups[0].trajectories[0].token_ids == whole.token_ids
        assert sampler.contexts[0] == whole.token_ids


@pytest.mark.parametrize(
    ("opening", "status", "turns", "executions"),
    [
        ([code("a")] * 4, "turn_limit", 4, 3),
        ([code("a")] * 7, "turn_limit", 4, 3),
        ([code("bad"), code("bad"), code("a")], "error_limit", 2, 2),
        ([code("x" * 300), code("y" * 300), code("z" * 300)], "token_limit", 2, 2),
    ],
)
def test_limits_hold_in_an_opening_too(opening: list[str], status: str, turns: int, executions: int) -> None:
    groups, sampler, _ = rollout([answer("3")], openings=[opening])
    found = groups[0].trajectories[0]
    assert (found.status, found.turns, len(found.executions)) == (status, turns, executions)
    assert not sampler.contexts
    assert len(found.token_ids) <= LIMITS.max_trajectory_tokens


@pytest.mark.parametrize("text", [answer("3"), "no tags", "", code("a") + code("b")])
def test_what_is_no_code_turn_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"turn 2 of the opening of task 't0' is (answer|void), expected code"):
        rollout([answer("3")], openings=[[code("a"), text]])


def test_an_opening_for_each_task() -> None:
    with pytest.raises(UserError, match="1 openings for 2 tasks"):
        rollout([answer("3")], tasks=[task(0), task(1)], openings=[[]])
    with pytest.raises(UserError, match="is answer, expected code of 'reflection'"):
        rollout([answer("3")], tasks=[task(mode="reflection")], openings=[["<think>t</think><answer>3</answer>"]])


def mended() -> Trajectory:
    """A written turn, and one of the policy, both without their last tag."""
    return rollout({(0, 1): UNCLOSED, (0, 2): answer("3")}, openings=[[UNCLOSED]])[0][0].trajectories[0]


def test_closing_tags_are_told_from_turns() -> None:
    found = mended()
    writers = ["prompt", "forced", "forced", "environment", "model", "forced", "environment", "model"]
    assert [span.writer for span in found.spans] == writers
    assert found.turns == 3
    assert found.model_text(Characters()) == [f"{UNCLOSED}</code>", f"{UNCLOSED}</code>", answer("3")]


def test_notebook_shows_who_wrote_a_turn() -> None:
    cells = to_notebook(mended(), Characters()).cells
    code_cells = [cell for cell in cells if cell.cell_type == "code"][1:]
    assert [cell.source for cell in code_cells] == ["b", "b"]
    assert [cell.metadata["groupwise"]["writer"] for cell in code_cells] == ["forced", "model"]
    assert [cell.metadata["groupwise"]["turn"] for cell in code_cells] == [0, 1]


def test_the_form_of_what_the_policy_did_not_write_is_not_judged() -> None:
    found = rollout({(0, 1): answer("3")}, openings=[[UNCLOSED.replace("<think>t</think>", "")]])[0][0].trajectories[0]
    assert all(tag_checks(found, Characters()).values())
    assert DATAMIND.parse_turn(found.model_text(Characters())[0]).repairs == ["missing_thought"]


def test_a_limit_of_time_does_not_ask_the_sampler_for_what_it_has_not_yet() -> None:
    limits, sandbox = replace(LIMITS, max_wall_s=60.0), ScriptedSandbox(delay_s=0.02)
    groups, _, _ = rollout({(0, 1): answer("3")}, openings=[[code("a")]], limits=limits, sandbox=sandbox)
    assert groups[0].trajectories[0].status == "answered"
