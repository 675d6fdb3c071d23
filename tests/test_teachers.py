import random

import pytest
from small_tables import InProcess, small_tables

from groupwise.data import tasks, teachers
from groupwise.rewards.answer import answer_correct


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    pool = tasks.training_views(small_tables(), 40, seed=5)
    folder = tmp_path_factory.mktemp("views")
    return tasks.make_problems(pool, 90, seed=5, name="t", folder=folder, modes={"datamind": 0.8, "reflection": 0.2})


def play(problem, stratum):
    """The turns of a script with the results of its code."""
    runner, history, played = InProcess(), [], []
    script = teachers.scripted(problem, stratum, random.Random(problem.task.id))
    turn = next(script)
    while True:
        if turn.kind == "answer":
            played.append((turn, None))
            return played
        result = runner.run(turn.content, problem.task.files, history)
        if result.ok:
            history.append(turn.content)
        played.append((turn, result))
        turn = script.send(result)


def with_code(problems):
    return [problem for problem in problems if problem.question.code]


def test_success_needs_no_second_try(problems):
    for problem in problems:
        played = play(problem, "success")
        assert len(played) == (2 if problem.question.code else 1)
        assert all(result is None or result.ok for _, result in played)
        assert not any(turn.mistake for turn, _ in played)
        assert answer_correct(played[-1][0].content, problem.task)


def test_corrected_fails_for_real_then_succeeds(problems):
    for problem in with_code(problems):
        (first, failed), (second, worked), (answer, _) = play(problem, "corrected")
        assert first.mistake
        assert not failed.ok
        assert worked.ok
        assert not second.mistake
        assert second.thought != first.thought
        assert answer_correct(answer.content, problem.task)


def test_self_corrected_runs_twice(problems):
    for problem in with_code(problems):
        (first, slipped), (second, worked), (answer, _) = play(problem, "self_corrected")
        assert first.mistake
        assert slipped.ok
        assert worked.ok
        assert "import" not in second.content  # the table read by the first chunk is still there
        assert answer_correct(answer.content, problem.task)


def test_failure_ends_with_a_wrong_answer(problems):
    for problem in problems:
        played = play(problem, "failure")
        assert not any(result.ok for _, result in played[:-1])
        assert all(turn.mistake for turn, _ in played)
        assert not answer_correct(played[-1][0].content, problem.task)


def test_each_kind_of_mistake_fails(problems):
    kinds = set()
    for problem in with_code(problems):
        for wrong, lesson in teachers.mistakes(problem, random.Random(1)):
            result = InProcess().run(wrong, problem.task.files)
            assert not result.ok, wrong
            kinds.add(result.output.partition(":")[0])
            assert lesson
    assert {"NameError", "KeyError", "AttributeError"} <= kinds


def test_a_mistake_that_works_is_abandoned(problems):
    problem = with_code(problems)[0]
    script = teachers.scripted(problem, "corrected", random.Random(0))
    next(script)
    with pytest.raises(teachers.Abandoned, match="did not fail"):
        script.send(InProcess().run("print(1)"))


def test_misspelling_changes_the_name():
    rng = random.Random(0)
    for name in ("a", "X", "12", "price", "net price (kg)", "ALL_UP"):
        assert all(teachers.misspell(name, rng) != name for _ in range(50))
