import random
import sqlite3
from collections import Counter

import pytest
from small_tables import InProcess, ran, rough_tables, small_tables

from groupwise.data import tasks, teachers
from groupwise.data.asking import questions
from groupwise.data.teaching import mistakes, sql_scripts
from groupwise.rewards.answer import answer_correct
from groupwise.rollout.task import Task


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    pool = tasks.training_views(small_tables(), 40, seed=5)
    folder = tmp_path_factory.mktemp("views")
    return tasks.make_problems(pool, 90, seed=5, name="t", folder=folder, modes={"datamind": 0.8, "reflection": 0.2})


def play(problem, stratum, detail="short"):
    """The turns of a script with the results of its code."""
    runner, history, played = InProcess(), [], []
    script = teachers.scripted(problem, stratum, random.Random(problem.task.id), detail)
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
        assert all(mistakes.misspell(name, rng) != name for _ in range(50))


# ---- full detail -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    pool = tasks.training_views([*small_tables(), *rough_tables()], 40, seed=6)
    folder = tmp_path_factory.mktemp("views")
    modes = {"datamind": 0.9, "reflection": 0.1}
    return tasks.make_problems(pool, 120, seed=6, name="t", folder=folder, modes=modes, detail="full")


def test_full_success_computes_one_step_a_turn(full):
    looks = 0
    for problem in full:
        played = play(problem, "success", "full")
        chunks = [result for _, result in played if result is not None]
        assert all(result.ok for result in chunks)
        assert not any(turn.mistake for turn, _ in played)
        extra = len(chunks) - len(problem.question.steps)
        assert extra in (0, 1)
        looks += extra
        assert answer_correct(played[-1][0].content, problem.task)
    assert 0.15 <= looks / len(full) <= 0.45


def test_full_corrected_fails_for_real_and_self_corrected_does_not(full):
    for problem in with_code(full):
        played = play(problem, "corrected", "full")
        for turn, result in played[:-1]:
            assert turn.mistake == (not result.ok)
        assert any(turn.mistake for turn, _ in played)
        assert answer_correct(played[-1][0].content, problem.task)
    abandoned = 0
    for problem in with_code(full)[:60]:
        try:
            played = play(problem, "self_corrected", "full")
        except teachers.Abandoned:
            abandoned += 1
            continue
        assert all(result.ok for _, result in played[:-1])
        assert sum(turn.mistake for turn, _ in played) == 1
        at = next(index for index, (turn, _) in enumerate(played) if turn.mistake)
        assert "read_csv" not in played[at + 1][0].content
        assert played[at][1].output != played[at + 1][1].output
        assert answer_correct(played[-1][0].content, problem.task)
    assert abandoned <= 5


def test_full_failure_gives_up_or_answers_wrong(full):
    ends = Counter()
    for problem in full:
        played = play(problem, "failure", "full")
        answer = played[-1][0]
        assert answer.mistake
        assert not answer_correct(answer.content, problem.task)
        ends[answer.content in ("unknown", "I could not find the answer.", "not available")] += 1
    assert min(ends.values()) > 10


def test_full_programs_are_varied(full):
    """The same problem is solved in many ways."""
    problem = next(
        problem for problem in full if problem.question.operation in ("median_above", "mean_above", "mean_since")
    )
    programs = set()
    for seed in range(60):
        script = teachers.scripted(problem, "success", random.Random(seed), "full")
        turn = next(script)
        programs.add((turn.thought, turn.content))
    assert len(programs) > 45
    code = "\n".join(content for _, content in programs)
    for form in (".loc[", "query(", "print(round(", "# ", "path =", "head(", "describe("):
        assert form in code, form


def test_every_kind_of_mistake_comes_up_and_fails(full):
    kinds, errors = set(), set()
    for number, problem in enumerate(with_code(full)):
        code = teachers.program(problem)
        frame = problem.view.frame
        texts = [name for name in frame if frame[name].dtype.kind not in "iufb"]
        rng = random.Random(number)
        header, _, rest = code.partition("\n")
        code = f"import numpy as np\n{header}\n{rest}"
        for wrong in mistakes.python_mistakes(code, "df", problem.question.columns, list(frame), texts, rng):
            result = InProcess().run(wrong.code, problem.task.files)
            assert not result.ok, (wrong.kind, wrong.code)
            assert wrong.lesson
            kinds.add(wrong.kind)
            errors.add(result.output.partition(":")[0])
    assert kinds == {
        "missing import", "wrong file", "wrong reader", "wrong column", "wrong method", "missing bracket",
        "open string", "number as text", "text as number", "past the end", "wrong name", "and", "bare list",
    }  # fmt: skip
    assert errors >= {
        "NameError", "KeyError", "AttributeError", "FileNotFoundError", "SyntaxError", "TypeError", "IndexError",
        "ValueError",
    }  # fmt: skip


# ---- SQL -------------------------------------------------------------------------------------------------------------


def sql_problem():
    question = questions.Question(
        operation="average", task_type="aggregation", wording=0, text="What is the average price of each kind?",
        answer="kind,average\na,2.0\nb,5.0", answer_type="table", thought="Average price by kind.",
        code="SELECT kind, avg(item.price) AS average FROM item GROUP BY kind",
        slip=("sum", "SELECT kind, sum(item.price) AS average FROM item GROUP BY kind"),
        columns=("item", "kind", "price"),
    )  # fmt: skip
    task = Task("q", question.text, (), "shop: item(kind text, price real)", question.answer, "table", "aggregation",
                language="sql")  # fmt: skip
    return tasks.Problem(task, question, None)


def select(query):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE item (kind TEXT, price REAL)")
    connection.executemany("INSERT INTO item VALUES (?, ?)", [("a", 1), ("a", 3), ("b", 5)])
    try:
        rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        return ran(False, str(error))
    return ran(True, f"{rows}\n{len(rows)} rows x 2 columns, written to result_7.csv")


def test_sql_answers_name_the_file_of_the_right_query():
    problem = sql_problem()
    seen = set()
    for seed in range(40):
        for stratum in teachers.STRATA:
            script = teachers.scripted(problem, stratum, random.Random(seed))
            turn, turns = next(script), []
            while turn.kind == "code":
                result = select(turn.content)
                turns.append((turn, result))
                turn = script.send(result)
            wrong = [result for one, result in turns if one.mistake]
            if stratum != "failure":
                assert turns[-1][0].content == problem.question.code
                assert "result_7.csv" in turn.content
                assert bool(wrong) == (stratum != "success")
                assert all(result.ok == (stratum == "self_corrected") for result in wrong)
            else:
                assert turn.mistake
                assert all(one.content != problem.question.code for one, _ in turns)
            seen.add((stratum, len(turns)))
    assert len(seen) >= 8


def test_every_sql_mistake_fails():
    problem, kinds = sql_problem(), Counter()
    for seed in range(20):
        found = sql_scripts.sql_mistakes(
            problem.question.code, problem.question.columns, problem.task.description, random.Random(seed)
        )
        for wrong in found:
            assert not select(wrong.code).ok, wrong.code
            kinds[wrong.kind] += 1
    assert kinds.keys() == {"wrong column", "wrong table", "wrong function", "missing bracket", "wrong keyword"}
