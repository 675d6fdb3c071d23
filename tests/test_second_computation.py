"""The scripted teacher's answers, from executed programs, equal what plain loops find for the text of the question."""

import random
from collections import Counter

import pytest
from plain_answers import PLAIN, composed, read_rows, read_slots
from small_tables import InProcess, rough_tables, small_tables

from groupwise.data import tasks, taxonomy, teachers
from groupwise.rewards.value_match import parse_numbers

OPERATIONS = {operation.name: operation for operation in taxonomy.ALL_OPERATIONS}


def agree(said, right):
    if isinstance(right, str) and parse_numbers(right) == []:
        return said.lower().partition(",")[0] == right.lower()
    numbers = parse_numbers(said)
    # Answers have three decimals.
    return len(numbers) == 1 and abs(numbers[0][0] - float(right)) <= 0.00051 + 1e-9 * abs(float(right))


def scripted_answer(problem, stratum):
    runner, history = InProcess(), []
    script = teachers.scripted(problem, stratum, random.Random(problem.task.id), "full")
    turn = next(script)
    while turn.kind == "code":
        result = runner.run(turn.content, problem.task.files, history)
        history += [turn.content] if result.ok else []
        turn = script.send(result)
    return turn.content


def second_answer(problem):
    """By loops over the file; None where the operation or the wording has no plain form."""
    question, rows = problem.question, read_rows(problem.view.csv)
    if question.operation in PLAIN:
        slots = read_slots(OPERATIONS[question.operation], question.text)
        return PLAIN[question.operation](rows, slots)
    if len(question.steps) > 1 and question.text.startswith(("Let ", "Step 1")):
        return composed(question.text, rows)
    return None


@pytest.fixture(scope="module")
def views():
    return tasks.training_views([*small_tables(), *rough_tables()], 60, seed=11)


def test_answers_equal_plain_loops(views, tmp_path):
    modes = {"datamind": 1}
    problems = tasks.make_problems(views, 420, seed=11, name="t", folder=tmp_path, modes=modes, detail="full")
    types, rounds = Counter(), Counter()
    for number, problem in enumerate(problems):
        right = second_answer(problem)
        if right is None:
            continue
        try:
            said = scripted_answer(problem, ("success", "corrected", "self_corrected")[number % 3])
        except teachers.Abandoned:  # a slip happens to give the right result
            continue
        assert agree(said, right), (problem.question.text, said, right)
        types[problem.task.task_type] += 1
        rounds[len(problem.question.steps)] += 1
    assert types.total() >= 200
    assert set(types) == set(taxonomy.TASK_TYPES)
    assert all(rounds[count] >= 5 for count in (2, 3, 4, 5)), rounds


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_form_is_met(views, name):
    rng = random.Random(name)
    asked = [(view, question) for view in views * 3 if (question := OPERATIONS[name].ask(view, rng))][:5]
    assert asked
    for view, question in asked:
        right = PLAIN[name](read_rows(view.csv), read_slots(OPERATIONS[name], question.text))
        assert agree(question.answer, right), (question.text, question.answer, right)
