"""Benchmarks: each layout is recognised, its gold answers score 1, and others score what is computed by hand."""

import contextlib
import csv
import json
import os
import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.data.benchmarks import Benchmark, BenchmarkItem, read_benchmark
from groupwise.data.outcomes import Outcome, summarise
from groupwise.data.scorers import labels_met, parts_met, rouge_l, score
from groupwise.engine.errors import UserError
from groupwise.rollout.sandbox import Execution, Limits, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory

DATA = Path(os.environ.get("GROUPWISE_DATA", ""))
TABLE = "a,b\n1,5\n2,6\n4,8.5\n"


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def dabench(folder: Path) -> None:
    (folder / "da-dev-tables").mkdir()
    (folder / "da-dev-tables" / "t.csv").write_text(TABLE)
    head = {"constraints": "c", "format": "@x[..]", "file_name": "t.csv", "concepts": ["Summary Statistics"]}
    levels = ("easy", "medium", "hard", "hard", "hard", "hard")
    rows = [{**head, "id": number, "question": f"q{number}", "level": level} for number, level in enumerate(levels)]
    rows[4]["file_name"], rows[5]["file_name"] = "none.csv", "../t.csv"
    labels = [[["x", "2.33"]], [["x", "1"], ["y", "b"]], [["x", "1"], ["y", "2"], ["z", "3"]]]
    (folder / "da-dev-questions.jsonl").write_text("no row\n" + lines(rows))
    (folder / "da-dev-labels.jsonl").write_text(
        lines([{"id": number, "common_answers": pairs} for number, pairs in enumerate(labels)])
    )


def tablebench(folder: Path) -> None:
    table = {"columns": ["year", "n, all"], "data": [[2001, "1,000"], [2002, 'a "b"']]}
    kinds = [
        ("FactChecking", "MatchBased", "Yes"),
        ("NumericalReasoning", "Counting", "211.19"),
        ("DataAnalysis", "StatisticalAnalysis", "9.34, 1.18"),
        ("DataAnalysis", "ImpactAnalysis", "Positive impact"),
        ("DataAnalysis", "CausalAnalysis", "No, the cat sat on a mat"),
        ("Visualization", "ChartGeneration", "y_references = [[1]]"),
        ("FactChecking", "MatchBased", ""),
    ]
    rows = [
        {"id": str(n), "qtype": kind, "qsubtype": subtype, "table": table, "question": f"q{n}", "answer": answer}
        for n, (kind, subtype, answer) in enumerate(kinds)
    ]
    (folder / "TableBench.jsonl").write_text(lines([*rows, rows[0]]))


def bird(folder: Path) -> None:
    (folder / "dev_databases" / "shop").mkdir(parents=True)
    with sqlite3.connect(folder / "dev_databases" / "shop" / "shop.sqlite") as connection:
        connection.executescript("CREATE TABLE t(a INT, b TEXT); INSERT INTO t VALUES (1,'x'),(2,'y'),(3,'y');")
    head = {"db_id": "shop", "question": "Which b?", "evidence": "b is text", "difficulty": "simple"}
    queries = ["SELECT b FROM t", "SELECT a, b FROM t ORDER BY a DESC", "SELECT nothing FROM t", "DROP TABLE t"]
    rows = [{**head, "question_id": number, "SQL": query} for number, query in enumerate(queries)]
    rows.append({**rows[0], "question_id": 9, "db_id": "none"})
    (folder / "dev.json").write_text(json.dumps(rows))
    (folder / "dev_tables.json").write_text(json.dumps([{"db_id": "shop", "table_names": ["t"]}]))


def qrdata(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "t.csv").write_text(TABLE)
    rows = [
        ("numerical", "0.20", ["Statistics"]),
        ("numerical", "12%", ["Causality"]),
        ("multiple_choice", "control group", []),
        ("numerical", "many", []),
    ]
    (folder / "QRData.json").write_text(
        json.dumps(
            [
                {
                    "data_description": "About t.", "question": "q", "data_files": ["t.csv"], "answer": answer,
                    "meta_data": {"question_type": kind, "keywords": keywords},
                }
                for kind, answer, keywords in rows
            ]
        )
    )  # fmt: skip


def gsm8k(folder: Path) -> None:
    answers = ["48+24 = <<48+24=72>>72\n#### 72", "#### 1,080", "#### -0.5", "#### none", "no end"]
    (folder / "test.jsonl").write_text(lines([{"question": "q", "answer": answer} for answer in answers]))


def aime(folder: Path) -> None:
    rows = [{"Problem": "p", "Answer": 73}, {"problem": "p", "answer": "025"}, {"problem": "p", "answer": 1000}]
    (folder / "aime.jsonl").write_text(lines([*rows, {"problem": "p", "answer": "x"}]))


def gpqa(folder: Path) -> None:
    fields = ["Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))]
    with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, "High-level domain"])
        writer.writerows([f"q{n}", f"right {n}", "wrong, 1", "wrong 2", "wrong 3", "Physics"] for n in range(40))
        writer.writerow(["q", "same", "same", "2", "3", "Physics"])


LAYOUTS = {
    "dabench": (dabench, 3, {"no field 'id'": 1, "no label": 1, ".csv file not found": 1, "file name is a path": 1}),
    "tablebench": (tablebench, 5, {"charts are not scored": 1, "empty field": 1, "repeated id": 1}),
    "bird": (bird, 2, {"gold SQL fails (error)": 2, ".sqlite file not found": 1}),
    "qrdata": (qrdata, 3, {"answer is no number": 1}),
    "gsm8k": (gsm8k, 3, {"no number behind ####": 2}),
    "aime": (aime, 2, {"answer is no integer from 0 to 999": 1, "malformed row": 1}),
    "gpqa": (gpqa, 40, {"two options are the same": 1}),
}


@pytest.fixture(scope="module")
def roomy() -> Sandbox:
    with Sandbox(Limits(wall_s=20)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory, roomy: Sandbox) -> dict[str, Benchmark]:
    found = {}
    for name, (write, *_) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        found[name] = read_benchmark(folder, work=folder / "work", mode="agentic", sandbox=roomy)
    return found


def answered(item: BenchmarkItem, answer: str | None, executions: tuple[Execution, ...] = ()) -> Trajectory:
    status = "void" if answer is None else "answered"
    return Trajectory(item.task, 0, [], status, answer=answer, executions=list(executions))


def correct(item: BenchmarkItem, answer: str | None) -> bool | None:
    return score(item.rule, answered(item, answer)).correct


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_bad_rows_are_dropped_with_a_reason(
    name: str, benchmarks: dict[str, Benchmark]
) -> None:
    _, usable, dropped = LAYOUTS[name]
    found = benchmarks[name]
    assert found.name == name
    assert len(found.items) == usable
    reasons = [drop.reason for drop in found.dropped]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == dropped
    modes = {item.task.mode for item in found.items}
    assert modes == ({"reflection"} if name in ("gsm8k", "aime", "gpqa") else {"agentic"})
    assert all(Path(file).is_file() for item in found.items for file in item.task.files)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gold_answers_score_1_and_no_answer_scores_0(name: str, benchmarks: dict[str, Benchmark]) -> None:
    for item in benchmarks[name].items:
        gold = score(item.rule, answered(item, item.task.answer))
        assert gold.correct is True
        assert all(points == weight for points, weight in gold.measures.values())
        for nothing in (None, "", "no idea"):
            none = score(item.rule, answered(item, nothing))
            assert not none.correct
            assert all(points == 0 for points, weight in none.measures.values() if item.rule != "rouge_l")


# ---- DABench ---------------------------------------------------------------------------------------------------------


def published(labels: list[list[list[str]]], responses: list[str]) -> tuple[float, float, float]:
    """The three measures as the benchmark's paper defines them, written anew with loops."""
    right_questions = right_pairs = pairs = 0
    shares = 0.0
    for label, response in zip(labels, responses, strict=True):
        said = {match[1]: match[2] for match in re.finditer(r"@(\w+)\[(.*?)\]", response)}
        right = 0
        for name, value in label:
            if name in said:
                with contextlib.suppress(ValueError):
                    right += said[name] == value or abs(float(said[name]) - float(value)) < 1e-6
        right_pairs += right
        pairs += len(label)
        shares += right / len(label)
        right_questions += right == len(label)
    return right_questions / len(labels), shares / len(labels), right_pairs / pairs


def dabench_measures(items: list[BenchmarkItem], answers: list[str]) -> dict[str, float]:
    outcomes = []
    for item, answer in zip(items, answers, strict=True):
        found = score(item.rule, answered(item, answer))
        outcomes.append(Outcome(item.task.id, "", item.level, found.correct, "right", 1, 1, (), found.measures))
    return summarise(outcomes)["measures"]


def test_dabench_is_scored_as_published(benchmarks: dict[str, Benchmark]) -> None:
    items = benchmarks["dabench"].items
    assert [item.level for item in items] == ["easy", "medium", "hard"]
    answers = ["@x[2.35]", "@y[b] and @x[1.0000001]", "@x[1] @y[5] @z[3.0]"]
    measures = dabench_measures(items, answers)
    # By hand: question 0 is wrong, 1 right with both pairs, 2 has two of three.
    assert measures["accuracy_by_question"] == pytest.approx(1 / 3)
    assert measures["proportional_accuracy_by_question"] == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert measures["accuracy_by_sub_question"] == pytest.approx(4 / 6)
    assert measures["accuracy_within_3_percent"] == pytest.approx(2 / 3)
    assert [correct(item, answer) for item, answer in zip(items, answers, strict=True)] == [False, True, False]


@given(st.lists(st.lists(st.sampled_from(["1", "1.0", "0.99", "b", "B", ""]), min_size=4, max_size=4), min_size=1))
def test_dabench_measures_equal_the_definition(rows: list[list[str]]) -> None:
    labels = [[["x", row[0]], ["y", row[1]]] for row in rows]
    responses = [f"@x[{row[2]}] or @y[{row[3]}]" for row in rows]
    items = [
        BenchmarkItem(Task(str(n), "q", (), "", ", ".join(f"@{k}[{v}]" for k, v in label), "named", "t"), "dabench")
        for n, label in enumerate(labels)
    ]
    measures = dabench_measures(items, responses)
    names = ("accuracy_by_question", "proportional_accuracy_by_question", "accuracy_by_sub_question")
    assert [measures[name] for name in names] == pytest.approx(published(labels, responses))


@pytest.mark.skipif(not (DATA / "dabench").is_dir(), reason="GROUPWISE_DATA names no folder that holds dabench")
def test_real_dabench_labels(tmp_path: Path, roomy: Sandbox) -> None:
    items = read_benchmark(DATA / "dabench", work=tmp_path, mode="datamind", sandbox=roomy).items
    labels = {
        f"dabench-{row['id']}": row["common_answers"]
        for row in map(json.loads, (DATA / "dabench" / "labels.jsonl").read_text().splitlines())
    }
    gold = [labels[item.task.id] for item in items]
    whole = [" ".join(f"@{name}[{value}]" for name, value in pairs) for pairs in gold]
    broken = [re.sub(r"\d\]", "7]", text, count=1) for text in whole]
    names = ("accuracy_by_question", "proportional_accuracy_by_question", "accuracy_by_sub_question")
    for answers in (whole, broken):
        measures = dabench_measures(items, answers)
        expected = published(gold, answers)
        assert [measures[name] for name in names] == pytest.approx(expected)
        assert (expected[0] == 1) == (answers is whole)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_tablebench_is_scored_by_type(benchmarks: dict[str, Benchmark]) -> None:
    yes, number, statistics, impact, causal = benchmarks["tablebench"].items
    assert Path(yes.task.files[0]).read_text() == 'year,"n, all"\n2001,"1,000"\n2002,"a ""b"""\n'
    assert correct(yes, "yes")
    assert not correct(yes, "No")
    assert correct(number, "211.194")  # rounded to the gold's decimals
    assert not correct(number, "211.2")
    assert correct(statistics, "10.2, 1.1")  # within 10 %
    half = score(statistics.rule, answered(statistics, "10.2, 1.4"))
    assert (half.correct, half.measures["exact_match_10_percent"]) == (False, (0.5, 1.0))
    assert not correct(impact, "Negative impact")
    free = score(causal.rule, answered(causal, "Yes, the dog sat on the mat"))
    # Without articles five words each, of which "sat on mat" are common.
    assert free.measures["rouge_l"][0] == pytest.approx(3 / 5)
    assert free.correct is None


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "share"),
    [
        ("a, b", "a, b", 0.0, 1.0),
        ("b, a", "a, b", 0.0, 0.0),
        ("a", "a, b", 0.0, 0.5),
        ("a, b, c", "a, b", 0.0, 1.0),
        ("5.25", "5.3", 0.0, 1.0),
        ("5.24", "5.3", 0.0, 0.0),
        ("1.09, 2", "1, 2", 0.1, 1.0),
        ("1.2, 2", "1, 2", 0.1, 0.5),
        ("0.124", "12.4%", 0.0, 1.0),
        ("France", "france", 0.0, 1.0),
    ],
)
def test_parts_of_an_answer(answer: str, gold: str, tolerance: float, share: float) -> None:
    assert parts_met(answer, gold, tolerance=tolerance) == share


@given(st.lists(st.sampled_from("abcd"), max_size=7), st.lists(st.sampled_from("abcd"), min_size=1, max_size=7))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    def longest(x: list[str], y: list[str]) -> int:
        if not x or not y:
            return 0
        if x[0] == y[0]:
            return 1 + longest(x[1:], y[1:])
        return max(longest(x[1:], y), longest(x, y[1:]))

    words = [[f"w{letter}" for letter in letters] for letters in (one, other)]
    common = longest(*words)
    precision, recall = common / max(len(one), 1), common / len(other)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(words[0]), "The " + ", ".join(words[1])) == pytest.approx(expected)


def test_sql_is_scored_by_the_rows_of_the_result(benchmarks: dict[str, Benchmark], roomy: Sandbox) -> None:
    repeated, ordered = benchmarks["bird"].items
    assert repeated.task.language == "sql"
    assert repeated.task.question == "Which b?\nb is text"
    assert "CREATE TABLE t" in repeated.task.description
    assert repeated.level == "simple"
    for item, query, right in (
        (repeated, "SELECT DISTINCT b FROM t", True),  # sets of rows, as published
        (repeated, "SELECT b FROM t WHERE a > 1", False),
        (ordered, "SELECT a, b FROM t ORDER BY a", True),
        (ordered, "SELECT b, a FROM t", False),
    ):
        ran = roomy.run(query, list(item.task.files), language="sql")
        file = ran.output.split()[-1]
        assert score(item.rule, answered(item, f"It is in {file}", (ran,))).correct is right
        assert not score(item.rule, answered(item, "other.csv", (ran,))).correct


def test_qrdata_takes_numbers_within_3_percent_and_the_named_option(benchmarks: dict[str, Benchmark]) -> None:
    number, percent, choice = benchmarks["qrdata"].items
    assert [item.task.task_type for item in (number, percent, choice)] == ["statistics", "causality", "data analysis"]
    assert number.task.description.startswith("About t.\nread_csv(")
    assert [correct(number, said) for said in ("0.205", "It is 20%.", "0.21", "0.2 or 0.3")] == [
        True,
        True,
        False,
        False,
    ]
    assert correct(percent, "0.12")
    assert [correct(choice, said) for said in ("Control group.", "treatment group")] == [True, False]


def test_numbers_of_text_questions_are_exact(benchmarks: dict[str, Benchmark]) -> None:
    whole, thousands, negative = benchmarks["gsm8k"].items
    said = ("72", "72.0", "$72", "There are 72 clips.", "73", "72.5", "48 + 24 = 72")
    assert [correct(whole, one) for one in said] == [True, True, True, True, False, False, False]
    assert correct(thousands, "1080")
    assert correct(negative, "-.5")
    first, second = benchmarks["aime"].items
    assert [correct(second, one) for one in ("25", "025", "26", r"\boxed{25}")] == [True, True, False, True]
    assert (first.task.answer, second.task.answer) == ("73", "25")


def test_the_options_of_gpqa_are_shuffled_the_same_way_each_time(
    benchmarks: dict[str, Benchmark], tmp_path: Path, roomy: Sandbox
) -> None:
    items = benchmarks["gpqa"].items
    letters = [item.task.answer[0] for item in items]
    assert set(letters) == set("ABCD")
    for number, item in enumerate(items):
        assert item.task.answer[1:] == f". right {number}"
        assert f"\n{item.task.answer}\n" in item.task.question
        letter = item.task.answer[0]
        assert correct(item, letter)
        assert not any(correct(item, other) for other in "ABCD" if other != letter)
    gpqa(tmp_path)
    again = read_benchmark(tmp_path, work=tmp_path / "work", mode="datamind", sandbox=roomy)
    assert [item.task for item in again.items] == [item.task for item in items]


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="GROUPWISE_DATA names no folder that holds gsm8k")
def test_every_gold_of_the_real_text_questions_parses(tmp_path: Path, roomy: Sandbox) -> None:
    found = read_benchmark(DATA / "gsm8k", work=tmp_path, mode="datamind", sandbox=roomy)
    assert (len(found.items), found.dropped) == (2000, [])
    assert all(correct(item, item.task.answer) for item in found.items)
    assert not any(correct(item, item.task.answer + "1") for item in found.items)


def test_folders_that_hold_no_benchmark_or_two_are_one_sentence(tmp_path: Path, roomy: Sandbox) -> None:
    def sentence() -> str:
        with pytest.raises(UserError) as error:
            read_benchmark(tmp_path / "b", work=tmp_path, mode="datamind", sandbox=roomy)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in sentence()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "t.csv").write_text(TABLE)
    (tmp_path / "b" / "x.json").write_bytes(b"\xff\xfe{")
    (tmp_path / "b" / "y.jsonl").write_text("[" * 100_000)
    for name in ("DABench", "TableBench", "BIRD", "QRData", "GPQA", "GSM8K", "AIME"):
        assert name in sentence()
    (tmp_path / "b" / "one.jsonl").write_text(lines([{"question": "q", "answer": "#### ?"}]))
    assert "none of the 1 rows" in sentence()
    (tmp_path / "b" / "two.jsonl").write_text(lines([{"problem": "q", "answer": 3}]))
    assert "aime and gsm8k" in sentence()


def test_labels_are_met_by_name() -> None:
    assert labels_met("@a[1] @b[x]", "@a[1.0], @b[y], @c[]") == {"a": True, "b": False, "c": False}
    assert labels_met(None, "@a[nan]") == {"a": False}
