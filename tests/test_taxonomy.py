import contextlib
import io
import itertools
import random
import re
import statistics
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from small_tables import rough_tables, small_tables

from groupwise.data import tasks, taxonomy, views
from groupwise.data.asking import composition, operations, questions, slots
from groupwise.engine.errors import UserError

OPERATIONS = {operation.name: operation for operation in taxonomy.ALL_OPERATIONS + taxonomy.ALL_REFLECTIONS}
BASIC = {operation.name for operation in operations.OPERATIONS + operations.REFLECTIONS}


def view_of(frame: pd.DataFrame) -> views.View:
    return views.View("t", "t.csv", frame.to_csv(index=False))


def printed(question: questions.Question, view: views.View) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(question.code, {"df": view.frame, "np": np})
    return output.getvalue().strip()


def computed(program: str, space: dict) -> object:
    """The value of the last line of a program."""
    before, _, expression = program.rpartition("\n")
    exec(before, space)
    return eval(expression, space)


def is_answer(value: object, step: questions.Step) -> bool:
    said = questions.spoken(value.item() if isinstance(value, np.generic) else value, step.shape)
    if said is None or step.shape != "number":
        return said == step.answer
    return abs(float(said) - float(step.answer)) <= 1e-5 * abs(float(step.answer)) + 1e-6


def agree(first: str, question: questions.Question) -> bool:
    if question.answer_type != "number":
        return first == question.answer
    return abs(float(first) - float(question.answer)) <= 0.01 * abs(float(question.answer))


@pytest.fixture(scope="module")
def pool():
    made = [*small_tables(), *rough_tables()]
    return tasks.training_views(made, 60, seed=3) + tasks.evaluation_views(made, 30, seed=3)


def questions_about(pool, operation, rng):
    """Views with a question each, from four rounds over all views in random order."""
    for view in rng.sample(pool * 4, 4 * len(pool)):
        if question := operation.ask(view, rng):
            yield view, question


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.expression])
def test_answers_equal_a_second_computation(pool, name):
    """Every form of the program gives the known answer, and the slip runs and mostly gives another."""
    rng = random.Random(name)
    operation = OPERATIONS[name]
    asked = list(itertools.islice(questions_about(pool, operation, rng), 15))
    assert len(asked) >= 10
    assert len(set(operation.wordings)) >= 2
    slipped = 0
    for view, question in asked:
        assert agree(printed(question, view), question)
        (step,) = question.steps
        assert step.answer == question.answer
        for form in step.forms:
            assert is_answer(computed(form, {"df": view.frame.copy(), "np": np}), step), form
        slipped += not is_answer(computed(step.slips[0][1], {"df": view.frame.copy(), "np": np}), step)
    assert slipped >= len(asked) / 3


@pytest.mark.parametrize("chain", composition.COMPOSITIONS, ids=lambda chain: chain.name)
def test_each_round_of_a_composed_question_has_its_known_answer(pool, chain):
    rng = random.Random(chain.name)
    asked = list(itertools.islice(questions_about(pool, chain, rng), 12))
    assert len(asked) == 12
    slipped = slips = 0
    for view, question in asked:
        assert len(question.steps) in chain.rounds
        assert question.task_type == chain.task_type
        assert agree(printed(question, view), question)
        space = {"df": view.frame, "np": np}
        for step in question.steps:
            for what, wrong in step.slips:
                assert what
                slips += 1
                slipped += not is_answer(computed(wrong, dict(space)), step)
            for form in step.forms:
                space[step.name] = computed(form, space)
                assert is_answer(space[step.name], step), form
        assert question.steps[-1].answer == question.answer
        # Each answer is the input of the next.
        for before, after in itertools.pairwise(question.steps):
            assert re.search(rf"\b{before.name}\b", after.forms[0])
    assert slipped > slips / 2


def test_degenerate_chains_are_not_asked():
    alike = view_of(pd.DataFrame({"a": [1, 2, 3] * 7, "b": [5, 5, 6] * 7}))
    rng = random.Random(0)
    for chain in composition.COMPOSITIONS:
        for _ in range(30):
            question = chain.ask(alike, rng)
            if question is None:
                continue
            space = {"df": alike.frame, "np": np}
            for step in question.steps:
                space[step.name] = computed(step.forms[0], space)
                rows = [len(value) for name, value in space.items() if name.startswith("rows_")]
                assert all(count >= composition.MIN_ROWS for count in rows)
            assert "nan" not in {step.answer for step in question.steps}


def test_answers_by_hand():
    frame = pd.DataFrame({"x": [4.0, 1.0, 2.0, None, 9.0] * 4, "y": [1, 2, 3, 4, 5] * 4, "g": list("aabbb") * 4})
    view = view_of(frame)
    x = [4.0, 1.0, 2.0, 9.0] * 4
    expected = {
        "mean": ("x", statistics.fmean(x)),
        "total": ("x", 64.0),
        "median": ("x", 3.0),
        "deviation": ("x", statistics.stdev(x)),
        "range": ("x", 8.0),
        "missing": ("x", 4),
        "distinct": ("x", 4),
    }
    for name, (column, value) in expected.items():
        assert OPERATIONS[name].gold(view.frame, {"a": column}) == pytest.approx(value), name
    gold = {name: OPERATIONS[name].gold for name in OPERATIONS}
    assert gold["count_above"](view.frame, {"a": "x", "value": 2.0}) == 8
    assert gold["count_below"](view.frame, {"a": "x", "value": 2.0}) == 4
    assert gold["share_above"](view.frame, {"a": "x", "value": 2.0}) == 40.0
    assert gold["count_group"](view.frame, {"g": "g", "value": "b"}) == 12
    assert gold["mean_group"](view.frame, {"a": "x", "g": "g", "value": "b"}) == 5.5
    assert gold["top_group"](view.frame, {"a": "x", "g": "g", "levels": ["a", "b"]}) == "b"
    assert gold["mean_above"](view.frame, {"a": "x", "b": "y", "value": 2}) == 5.5
    assert gold["mean_product"](view.frame, {"a": "x", "b": "y"}) == pytest.approx((4 + 2 + 6 + 45) / 4)
    assert gold["larger_mean"](view.frame, {"a": "x", "b": "y"}) == "x"


def test_reflections_are_answered_by_the_description(pool):
    for view in pool[:20]:
        text = view.description
        assert f", {len(view.frame)} rows:" in text
        for name in ("first_column", "last_column", "column_count", "column_type", "row_count"):
            question = OPERATIONS[name].ask(view, random.Random(0))
            assert question is not None
            assert question.code == ""
            assert question.steps == ()
            assert name == "column_count" or question.answer in text
        assert int(OPERATIONS["column_count"].ask(view, random.Random(0)).answer) == len(view.frame.columns)


def test_slips_run_and_differ_in_wording(pool):
    rng = random.Random(1)
    for operation in operations.OPERATIONS:
        question = next(question for view in pool * 3 if (question := operation.ask(view, rng)))
        assert question.slip[0]
        assert question.slip[1] != question.code


def test_ties_and_undefined_answers_are_not_asked():
    labels = [f"p{n}" for n in range(20)]
    tied = view_of(pd.DataFrame({"l": labels, "a": [0, 1, 2, 3, 3] * 4, "b": [5, 4, 3, 4, 5] * 4}))
    rng = random.Random(0)
    for name in ("top_label", "bottom_label", "at_largest", "nth_largest"):
        assert not any(OPERATIONS[name].ask(tied, rng) for _ in range(30)), name
    equal = view_of(pd.DataFrame({"g": ["x", "y"] * 10, "a": [n // 2 for n in range(20)]}))
    for name in ("top_group", "bottom_group"):
        assert not any(OPERATIONS[name].ask(equal, rng) for _ in range(30)), name


@pytest.mark.parametrize(
    ("value", "shape", "text"),
    [
        (2.0, "number", "2"),
        (0.5, "number", "0.5"),
        (1234.5678, "number", "1234.5678"),
        (0.00012, "number", None),
        (float("nan"), "number", None),
        (3e9, "number", None),
        (7, "count", "7"),
        (True, "check", "yes"),
        ("a b", "choice", "a b"),
    ],
)
def test_spoken(value, shape, text):
    assert questions.spoken(value, shape) == text


def test_literals_are_short_and_read_back():
    for value in (0.000123456, -17.26, 123456.7, 5, 1e-7, 99.96):
        short = slots.shorten(value)
        assert abs(short - value) <= 0.005 * abs(value) + 1e-12
        assert float(slots.literal(short)) == short
        assert "e" not in slots.literal(short)
    assert slots.literal("a b") == '"a b"'


def test_training_views_are_renamed_through_and_through():
    made = small_tables()
    for view in tasks.training_views(made, 40, seed=0, avoid=tasks.headers(made)):
        assert not {name.lower() for name in view.frame.columns} & {name.lower() for name in tasks.headers(made)}
        assert 20 <= len(view.frame) <= 60
        assert view.roles.numeric
        assert not set(view.frame.to_numpy().ravel().tolist()) & {"red", "green", "dark blue"}


def test_names_to_avoid_do_not_come_up():
    made = small_tables()
    first = {name for view in tasks.training_views(made, 30, seed=0) for name in view.frame.columns}
    avoiding = tasks.training_views(made, 30, seed=0, avoid=first)
    assert not {name for view in avoiding for name in view.frame.columns} & first


def test_evaluation_views_keep_names_and_rows():
    made = {table.name: table for table in small_tables()}
    for view in tasks.evaluation_views(list(made.values()), 20, seed=0):
        frame = made[view.table].frame
        pd.testing.assert_frame_equal(view.frame, frame[list(view.frame.columns)], check_dtype=False)
        assert sum(map(len, view.frame.columns)) <= views.MAX_HEADER_CHARS


def test_problems_are_balanced_different_and_the_same_for_a_seed(tmp_path):
    pool = tasks.training_views(small_tables(), 60, seed=0)
    modes = {"datamind": 0.6, "agentic": 0.2, "reflection": 0.2}

    def make(seed: int) -> list[tasks.Problem]:
        return tasks.make_problems(pool, 200, seed=seed, name="t", folder=tmp_path, modes=modes)

    problems = make(0)
    assert Counter(problem.task.mode for problem in problems) == {"datamind": 120, "agentic": 40, "reflection": 40}
    types = Counter(problem.task.task_type for problem in problems if problem.task.mode == "datamind")
    assert set(types) == set(taxonomy.task_types("short"))
    assert {problem.question.operation for problem in problems} <= BASIC
    assert max(types.values()) - min(types.values()) <= 3
    assert len({(problem.task.files, problem.task.question) for problem in problems}) == 200
    assert [problem.task for problem in make(0)] == [problem.task for problem in problems]
    assert [problem.task for problem in make(1)] != [problem.task for problem in problems]
    for problem in problems:
        assert pd.read_csv(problem.task.files[0]).equals(problem.view.frame)
        assert (problem.task.mode == "reflection") == (problem.question.code == "")


def test_full_detail_asks_all_and_nothing_twice(tmp_path):
    pool = tasks.training_views([*small_tables(), *rough_tables()], 40, seed=0)
    modes = {"datamind": 0.8, "agentic": 0.1, "reflection": 0.1}

    problems = tasks.make_problems(pool, 400, seed=0, name="t", folder=tmp_path, modes=modes, detail="full")
    types = Counter(problem.task.task_type for problem in problems if problem.question.code)
    assert set(types) == set(taxonomy.TASK_TYPES)
    assert max(types.values()) - min(types.values()) <= 6
    rounds = Counter(len(problem.question.steps) for problem in problems if problem.question.code)
    assert set(rounds) == {1, 2, 3, 4, 5}
    assert 0.15 <= 1 - rounds[1] / rounds.total() <= 0.4
    same = Counter((p.task.files, p.question.operation, p.question.asked) for p in problems)
    assert max(same.values()) == 1
    assert {problem.question.operation for problem in problems} > BASIC


def test_the_same_question_in_other_words_or_the_other_way_round_is_the_same():
    view = view_of(pd.DataFrame({"a": range(20), "b": [n * n % 17 for n in range(20)]}))
    questions_asked = [OPERATIONS["correlation"].ask(view, random.Random(seed)) for seed in range(40)]
    found = [question for question in questions_asked if question]
    assert len({question.text for question in found}) == 4
    assert len({question.asked for question in found}) == 1


def test_streams_give_different_views():
    made = small_tables()
    first = tasks.training_views(made, 10, seed=0, stream="sft")
    assert tasks.training_views(made, 10, seed=0, stream="sft") == first
    assert not {v.csv for v in tasks.training_views(made, 10, seed=0, stream="grpo")} & {v.csv for v in first}


def test_bad_requests_are_one_sentence(tmp_path):
    pool = tasks.training_views(small_tables(), 1, seed=0)
    with pytest.raises(UserError, match="unknown task type 'guessing'"):
        tasks.make_problems(pool, 1, seed=0, name="t", folder=tmp_path, types=["guessing"])
    with pytest.raises(UserError, match="use more views or ask for fewer"):
        tasks.make_problems(pool, 500, seed=0, name="t", folder=tmp_path)
    with pytest.raises(UserError, match="reflection mode"):
        tasks.make_problems(pool, 2, seed=0, name="t", folder=tmp_path, types=["impact"], modes={"reflection": 1})
    with pytest.raises(UserError, match="shares"):
        tasks.shares_to_counts({"a": -1, "b": 2}, 10)


def test_shares_are_exact():
    assert tasks.shares_to_counts({"a": 0.4, "b": 0.35, "c": 0.15, "d": 0.1}, 1000) == {
        "a": 400, "b": 350, "c": 150, "d": 100,
    }  # fmt: skip
    counts = tasks.shares_to_counts({"a": 1, "b": 1, "c": 1}, 100)
    assert sum(counts.values()) == 100
    assert max(counts.values()) - min(counts.values()) == 1


def test_every_type_has_a_description_and_operations():
    assert len(taxonomy.TASK_TYPES) == 18
    for kind in taxonomy.TASK_TYPES.values():
        assert kind.description
        assert 2 <= len(kind.exemplars) <= 3
        assert 3 <= len(kind.workflow) <= 6
        assert len(kind.operations) >= 5, kind.name
    assert set(taxonomy.TASK_TYPES) == {operation.task_type for operation in OPERATIONS.values()}


def test_short_form_has_the_basic_set():
    short = taxonomy.task_types("short")
    assert set(taxonomy.TASK_TYPES) - set(short) == {"causal", "domain specific"}
    found = {one.name for kind in short.values() for one in (*kind.operations, *kind.reflections)}
    assert found == BASIC


def test_wordings_do_not_collide():
    """No wording serves two operations: the operation must follow from the question."""
    seen = Counter(wording for operation in OPERATIONS.values() for wording in operation.wordings)
    assert max(seen.values()) == 1
