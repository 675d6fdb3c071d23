"""Tables: the same rows are the same table in whatever form they are written, and any changed row makes another."""

import csv
import io
import random
import time
from collections import Counter

import pandas as pd
import pytest

from groupwise.rewards.answer import answer_correct, needs_judge, trajectory_correct
from groupwise.rewards.table_match import same_table
from groupwise.rollout.sandbox.execution import Execution
from groupwise.rollout.sandbox.sql import SqlLimits, run_sql
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory

GOLD = "city,total\nOslo,10\nRome,2.5\nRome,2.5\nBonn,\n"


def task(answer: str = GOLD, answer_type: str = "table", language: str = "python") -> Task:
    return Task("t", "q", (), "", answer, answer_type, "aggregation", language=language)


def write(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def random_table(draw: random.Random, num_rows: int) -> list[list[str]]:
    """Few different values, so that rows repeat."""
    values = ["a", "b, c", 'd "e"', "x|y", "", "7", "-3", "0.25", "1234567890123"]
    width = draw.randint(2, 4)
    return [[draw.choice(values) for _ in range(width)] for _ in range(num_rows)]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (GOLD, True),
        ("city,total\nBonn,\nRome,2.5\nOslo,10\nRome,2.5", True),  # another order
        ("a,b\nOslo,10.0\nROME,2.50\nrome,2.5\nBonn,NULL", True),  # other names, other forms
        ("Oslo,10\nRome,2.5\nRome,2.5\nBonn,", True),  # without a header
        ("city\ttotal\nOslo\t10\nRome\t2.5\nRome\t2.5\nBonn\tNaN", True),
        ("city|total\nOslo|10\nRome|2.5\nRome|2.5\nBonn|", True),
        ("Here it is:\n\n| city | total |\n|:--|--:|\n| Oslo | 10 |\n| Rome | 2.5 |\n| Rome | 2.5 |\n| Bonn | |", True),
        ("The table:\n```csv\n" + GOLD + "```\nDone.", True),
        ("city,total\nOslo,10\nRome,2.5\nBonn,", False),  # a duplicate is missing
        ("city,total\nOslo,10\nOslo,10\nRome,2.5\nBonn,", False),  # another row twice
        ("city,total\nOslo,2.5\nRome,10\nRome,2.5\nBonn,", False),  # the same cells in other rows
        ("city,total\nOslo,10\nRome,2.5\nRome,2.5\nBonn,0", False),  # NULL is not 0
        ("total,city\n10,Oslo\n2.5,Rome\n2.5,Rome\n,Bonn", False),  # columns in another order
        ("city,total,n\nOslo,10,1\nRome,2.5,1\nRome,2.5,1\nBonn,,1", False),
        ("city,total\nOslo,10\nRome,2.5\nRome,2.5\nBonn", False),
        ("", False),
        ("10", False),
    ],
)
def test_rows_as_wholes(said: str, right: bool) -> None:
    assert answer_correct(said, task()) is right


def test_order_decides_only_where_it_is_asked_for() -> None:
    said = "city,total\nRome,2.5\nOslo,10\nRome,2.5\nBonn,\n"
    assert answer_correct(said, task())
    assert not answer_correct(said, task(answer_type="ordered_table"))
    assert answer_correct(GOLD, task(answer_type="ordered_table"))


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("0.001", "0.009", False),
        ("3.14", "3.14159", True),
        ("3.14159", "3.14", True),
        ("3.15", "3.14159", False),
        ("1.13", "1.125", True),  # both ways to round a half
        ("1.12", "1.125", True),
        ("0.54", "0.5", False),  # 8 % are more than rounding
        ("0.01", "0.009", False),
        ("3", "3.14", False),
        ("100.4", "100", False),
        ("0.30000000000000004", "0.3", True),
        ("1e-05", "0.00001", True),
        ('"1,234.50"', "1234.5", True),
        ("$5", "5", True),
        ("1577836800001", "1577836800000", False),  # whole numbers are exact
        ("12345678901234567", "12345678901234568", False),
        ("2020-01-05", "2020-01-05 00:00:00", True),
        ("2020-01-06", "2020-01-05", False),
        ("Petal_Length", "petal length", True),
        ("nan", "0", False),
        ("inf", "-inf", False),
    ],
)
def test_cells_by_value(said: str, gold: str, right: bool) -> None:
    for one, other in ((said, gold), (gold, said)):
        for ordered in (True, False):
            assert same_table(f"k,v\nx,{one}\n", f"k,v\nx,{other}\n", ordered=ordered) is right


def test_a_table_without_rows_needs_its_header() -> None:
    gold = task("city,total\n")
    assert answer_correct("City,Total", gold)
    assert not answer_correct("Oslo,10", gold)
    assert not answer_correct(GOLD, gold)
    assert not answer_correct("7\n5", task("n\n5\n"))  # two tries, not a header and a value
    assert answer_correct("5", task("n\n5\n"))


@pytest.mark.parametrize("seed", range(150))
def test_equals_the_count_of_rows(seed: int) -> None:
    draw = random.Random(seed)
    gold = random_table(draw, draw.randint(1, 12))
    said = [list(row) for row in gold]
    draw.shuffle(said)
    change = draw.choice(["none", "cell", "drop", "copy", "swap"])
    if change == "cell":
        draw.choice(said)[draw.randrange(len(gold[0]))] = draw.choice(["a", "7", "0.5", "new"])
    elif change == "drop":
        said.pop()
    elif change == "copy":
        said[0] = list(said[-1])
    elif change == "swap":
        said[0][0], said[-1][0] = said[-1][0], said[0][0]
    header = ["name"] * len(gold[0])
    texts = [write([header, *said])]
    bars = [[cell.replace("|", "\\|") for cell in row] for row in [header, ["---"] * len(header), *said]]
    texts.append("\n".join(f"| {' | '.join(row)} |" for row in bars))
    for text in texts:
        same = Counter(map(tuple, said)) == Counter(map(tuple, gold))
        assert same_table(text, write([header, *gold]), ordered=False) is same
        assert same_table(text, write([header, *gold]), ordered=True) is (said == gold)


@pytest.mark.parametrize("seed", range(20))
def test_equals_pandas_for_results_in_other_orders_and_roundings(seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.choice("abc"), draw.randint(0, 9), draw.uniform(1, 100)) for _ in range(60)]
    sums = pd.DataFrame(rows, columns=["g", "n", "x"]).groupby(["g", "n"])["x"].sum().reset_index()
    other = pd.DataFrame(draw.sample(rows, 60), columns=["g", "n", "x"]).groupby(["g", "n"])["x"].sum().reset_index()
    other = other.sample(frac=1, random_state=seed)
    gold = sums.to_csv(index=False)
    assert same_table(other.to_csv(index=False), gold, ordered=False)  # added up in another order
    assert same_table(other.round(2).to_csv(index=False), gold, ordered=False)
    other.iloc[0, 2] += 0.02
    assert not same_table(other.to_csv(index=False), gold, ordered=False)
    assert not same_table(other.round(2).to_csv(index=False), gold, ordered=False)


def test_ten_thousand_rows_take_seconds_at_most() -> None:
    draw = random.Random(0)
    header = ["id", "day", "name", "value"]
    rows = [
        [str(n % 5000), f"2020-{n % 12 + 1:02d}-01", draw.choice("abc"), repr(draw.random())] for n in range(10_000)
    ]
    said = [list(row) for row in draw.sample(rows, len(rows))]
    start = time.process_time()
    assert same_table(write([header, *said]), write([header, *rows]), ordered=False)
    said[5][3] = "2.0"
    assert not same_table(write([header, *said]), write([header, *rows]), ordered=False)
    equal = "a,b\n" + "1.5,x\n" * 10_000  # every row the same, and none of the other's
    assert not same_table(equal, equal.replace("1.5", "1.6"), ordered=False)
    assert time.process_time() - start < 30


def ended(answer: str | None, results: list[str | None], *, language: str = "sql", kind: str = "table") -> Trajectory:
    """A trajectory whose queries gave these results in order, None for one that failed."""
    executions = [
        Execution(table is not None, f"1 row\n1 rows x 2 columns, written to result_{number}.csv", "ok", 0.1, table)
        for number, table in enumerate(results, 1)
    ]
    return Trajectory(task(answer_type=kind, language=language), 0, [], "answered", "", answer, executions)


WRONG = GOLD.replace("10", "11")


@pytest.mark.parametrize(
    ("answer", "results", "language", "right"),
    [
        ("The result is in result_1.csv.", [GOLD], "sql", True),
        ("result_1.csv", [GOLD], "python", True),
        ("result_1.csv", [GOLD, WRONG], "sql", True),
        ("result_2.csv", [GOLD, WRONG], "sql", False),
        ("result_2.csv", [WRONG, GOLD, None], "sql", True),
        ("result_1.csv or result_2.csv", [GOLD, GOLD], "sql", False),
        ("result_9.csv", [GOLD], "sql", False),
        ("The query lists them.", [WRONG, GOLD, None], "sql", False),  # an answer must say which
        ("The query lists them.", [GOLD, WRONG], "sql", False),
        ("The query lists them.", [GOLD], "python", False),
        ("The query lists them.", [None], "sql", False),
        (GOLD, [WRONG], "sql", True),
        (WRONG, [GOLD], "sql", False),  # the answer is a table itself
        (WRONG + "see result_1.csv", [GOLD], "sql", True),  # not one table: it names the file
        ("", [GOLD], "sql", False),
        (None, [GOLD], "sql", False),
    ],
)
def test_the_answer_may_name_the_file_of_a_query(
    answer: str | None, results: list[str | None], language: str, right: bool
) -> None:
    assert trajectory_correct(ended(answer, results, language=language)) is right


def test_a_results_header_is_no_row() -> None:
    trajectory = ended("result_1.csv", ["Oslo,10\nRome,2.5\nRome,2.5\nBonn,\n"])
    assert not trajectory_correct(trajectory)
    assert not trajectory_correct(ended("result_1.csv", [WRONG.replace("Oslo,11", "Oslo,10\nx")]))
    ordered = ended("result_1.csv", [GOLD], kind="ordered_table")
    assert trajectory_correct(ordered)


def test_a_real_query_against_the_gold(tmp_path) -> None:
    import sqlite3

    frame = pd.DataFrame({"g": ["b", "a", "b", "c"], "x": [1.5, 2.0, None, 0.1]})
    with sqlite3.connect(tmp_path / "t.db") as database:
        frame.to_sql("t", database, index=False)
    gold = frame.groupby("g")["x"].mean().reset_index().to_csv(index=False)
    for query, right in (("avg(x)", True), ("sum(x)", True), ("count(*)", False)):
        target = tmp_path / "result_1.csv"
        sql = f"SELECT g, {query} FROM t GROUP BY g ORDER BY g DESC"
        shown = run_sql(sql, [str(tmp_path / "t.db")], str(target), limits=SqlLimits())
        execution = Execution(True, shown, "ok", 0.1, target.read_text())
        for kind, asked in (("table", right), ("ordered_table", False)):
            asker = task(gold, kind, "sql")
            trajectory = Trajectory(asker, 0, [], "answered", "", "See result_1.csv", [execution])
            assert trajectory_correct(trajectory) is asked


def test_only_free_text_needs_a_judge() -> None:
    assert not needs_judge("no table", task())
    assert needs_judge("another text", task("a text", "free"))
