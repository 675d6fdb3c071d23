"""Questions for SQL: a query gives the answer, which was computed without it; slips and misspelt names do not."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from small_databases import small_database

from groupwise.data.asking.questions import Question
from groupwise.data.asking.sql_operations import SQL_OPERATIONS
from groupwise.data.databases import Database, find_databases
from groupwise.rewards.answer import answer_correct, trajectory_correct
from groupwise.rewards.table_match import same_result
from groupwise.rollout.sandbox import Limits, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory

CHINOOK = Path(os.environ.get("GROUPWISE_DATA", "")) / "sqlite"
TYPES = {
    "counting", "aggregation", "distribution", "comparison", "ranking", "data preprocessing", "descriptive",
    "multi-hop numerical", "time-based calculation", "anomaly detection",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(), workers=2) as own:
        yield own


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("shop")
    small_database(folder / "shop.sqlite")
    return find_databases(folder)[0][0]


def ask(database: Database, count: int) -> list[Question]:
    """`count` different questions of each operation, or as many as it has in a number of tries."""
    found = []
    for operation in SQL_OPERATIONS:
        asked: dict[str, Question] = {}
        for seed in range(20 * count):
            if len(asked) < count and (question := operation.ask(database, Random(seed))):
                asked[question.text] = question
        found += asked.values()
    return found


def check(sandbox: Sandbox, database: Database, folder: Path, questions: list[Question]) -> None:
    files = [str(database.write(folder))]
    runs = {}
    for number, question in enumerate(questions):
        # Names outside double quotes, so that a misspelt one is an error and not a text.
        misspelt = question.code.replace(question.columns[0], f"no_{question.columns[0]}")
        queries = (question.code, question.slip[1], misspelt)
        runs[number] = [sandbox.submit(query, files, language="sql") for query in queries]
    for number, (right, slip, wrong) in runs.items():
        question, ordered = questions[number], questions[number].answer_type == "ordered_table"
        result, slipped = right.result(60), slip.result(60)
        assert result.ok, (question, result.output)
        assert result.table is not None
        assert same_result(result.table, question.answer, ordered=ordered), (question, result.table)
        assert result.table.splitlines()[0] == question.answer.splitlines()[0], question
        assert slipped.ok, (question, slipped.output)
        assert slipped.table is not None
        assert not same_result(slipped.table, question.answer, ordered=ordered), (question, slipped.table)
        assert not wrong.result(60).ok, question


def test_queries_give_the_answers_of_the_small_shop(sandbox: Sandbox, shop: Database, tmp_path: Path) -> None:
    questions = ask(shop, 2)
    assert {question.operation for question in questions} == {operation.name for operation in SQL_OPERATIONS}
    assert len(questions) >= 40
    check(sandbox, shop, tmp_path, questions)


@pytest.mark.skipif(not CHINOOK.is_dir(), reason="the real database is not here")
def test_queries_give_the_answers_of_a_real_shop(sandbox: Sandbox, tmp_path: Path) -> None:
    (database,), _ = find_databases(CHINOOK)
    questions = ask(database, 1)
    assert len(questions) == len(SQL_OPERATIONS)
    check(sandbox, database, tmp_path, questions)


def test_operations_are_worded_in_several_ways_and_of_known_types() -> None:
    assert len({operation.name for operation in SQL_OPERATIONS}) == len(SQL_OPERATIONS) >= 15
    for operation in SQL_OPERATIONS:
        assert len(set(operation.wordings)) >= 2
        assert operation.task_type in TYPES
        assert ("order" in " ".join(operation.wordings) or "first" in " ".join(operation.wordings)) == operation.ordered


def test_the_same_chance_asks_the_same(shop: Database) -> None:
    for operation in SQL_OPERATIONS:
        assert operation.ask(shop, Random(5)) == operation.ask(shop, Random(5))
    wordings = Counter(SQL_OPERATIONS[0].ask(shop, Random(seed)).wording for seed in range(60))  # type: ignore[union-attr]
    assert set(wordings) == {0, 1, 2}


def test_a_database_without_what_is_asked_for_gives_no_question(shop: Database) -> None:
    bare = Database("bare", shop.path, ())
    assert all(operation.ask(bare, Random(0)) is None for operation in SQL_OPERATIONS)
    alone = Database("alone", shop.path, (next(table for table in shop.tables if table.name == "order"),))
    for operation in SQL_OPERATIONS:
        question = operation.ask(alone, Random(1))
        assert question is None or "JOIN" not in question.code


def test_an_answer_may_name_the_file_of_the_result(sandbox: Sandbox, shop: Database, tmp_path: Path) -> None:
    question = next(found for found in ask(shop, 1) if found.operation == "join_top")
    file = str(shop.write(tmp_path))
    task = Task(
        "t", question.text, (file,), shop.description, question.answer, question.answer_type, question.task_type,
        table=shop.table, language="sql",
    )  # fmt: skip
    right, slip = (sandbox.run(code, [file], language="sql") for code in (question.code, question.slip[1]))
    name = right.output.split()[-1]
    assert name == "result_1.csv"
    assert answer_correct(question.answer, task)
    assert trajectory_correct(Trajectory(task, 0, [], executions=[right], answer=f"See {name}."))
    assert not trajectory_correct(Trajectory(task, 0, [], executions=[slip], answer=f"See {name}."))
