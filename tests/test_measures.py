"""Statistics of an evaluation against brute force, exact enumeration and simulation."""

import json
import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from groupwise.data.measures import (
    EXACT_TASKS,
    bootstrap_interval,
    code_errors,
    ending,
    paired_p_value,
    pass_at_k,
)
from groupwise.data.outcomes import Outcome, compare, summarise
from groupwise.engine.errors import UserError
from groupwise.recipes.compare import compare_results
from groupwise.recipes.scoreboard import draw, print_result, to_markdown
from groupwise.rollout.sandbox import Execution
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory


def outcome(task: str, right: bool | None, *, kind: str = "counting", level: str = "", tokens: int = 10) -> Outcome:
    end = "not_judged" if right is None else "right" if right else "wrong_value"
    return Outcome(task, kind, level, right, end, tokens, 2, (), {"share": (float(bool(right)), 2.0)})


@pytest.mark.parametrize("runs", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_run(runs: int) -> None:
    for right in range(runs + 1):
        results = [index < right for index in range(runs)]
        for k in range(1, runs + 1):
            subsets = list(combinations(results, k))
            assert pass_at_k(runs, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("arguments", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_what_is_no_number_of_runs(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 < k <= runs"):
        pass_at_k(*arguments)


@pytest.mark.parametrize("share", [0.95, 0.8])
def test_intervals_cover_the_truth_as_often_as_they_say(share: float) -> None:
    """Tasks of different difficulty, four runs each, which share it; a ratio with weights, too."""
    simulations = 200
    generator = np.random.default_rng(0)
    covered = {"clustered": 0, "ratio": 0, "as if independent": 0}
    for number in range(simulations):
        difficulty = generator.beta(0.5, 0.5, size=80)  # mean 1/2, mostly near 0 or 1
        runs = generator.random((80, 4)) < difficulty[:, None]
        options = {"share": share, "resamples": 1000, "seed": number}
        low, high = bootstrap_interval(runs.sum(1), np.full(80, 4.0), **options)
        covered["clustered"] += low <= 0.5 <= high
        pairs = np.where(difficulty > 0.5, 4, 1)  # these weigh more: E[4p; p > 1/2] + E[p; p < 1/2] over 5/2
        low, high = bootstrap_interval(pairs * runs[:, 0], pairs, **options)
        covered["ratio"] += low <= 0.5 + 0.6 / math.pi <= high
        low, high = bootstrap_interval(runs.reshape(-1), **options)
        covered["as if independent"] += low <= 0.5 <= high
    slack = 3 * math.sqrt(share * (1 - share) / simulations) + 0.01  # the bootstrap's own error with 80 tasks
    assert abs(covered["clustered"] / simulations - share) < slack
    assert abs(covered["ratio"] / simulations - share) < slack
    assert covered["as if independent"] / simulations < share - slack  # runs of a task are no new tasks


def test_an_interval_is_a_function_of_its_seed() -> None:
    values = np.random.default_rng(1).random(30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([0.5] * 4) == (0.5, 0.5)


def test_p_values_of_few_tasks_are_those_of_all_patterns_of_signs() -> None:
    generator = np.random.default_rng(2)
    for size in range(1, 9):
        differences = generator.integers(-3, 4, size=size) / 3
        total = abs(sum(differences))
        patterns = list(product((-1, 1), repeat=size))
        extreme = sum(abs(np.dot(signs, differences)) >= total - 1e-9 for signs in patterns)
        assert paired_p_value(differences) == pytest.approx(extreme / len(patterns))
    assert paired_p_value([]) == paired_p_value([0.0, 0.0]) == 1.0
    assert paired_p_value([1.0] * 10) == pytest.approx(2 / 2**10)


def test_drawn_p_values_agree_with_exact_ones_and_are_never_0() -> None:
    differences = np.full(EXACT_TASKS + 4, 1.0)
    differences[:6] = -1.0
    size = len(differences)
    # The number of heads is binomial: two-sided tail at 14 of 20.
    tail = sum(math.comb(size, heads) for heads in range(14, size + 1)) / 2**size
    assert paired_p_value(differences) == pytest.approx(2 * tail, abs=0.01)
    assert 0 < paired_p_value(np.full(60, 1.0)) < 1e-3


def test_p_values_are_uniform_under_the_null() -> None:
    generator = np.random.default_rng(3)
    p_values = [
        paired_p_value(generator.normal(size=size), flips=400, seed=seed) for seed in range(200) for size in (12, 40)
    ]
    for level in (0.05, 0.2, 0.5, 0.8):
        expected = 3 * math.sqrt(level * (1 - level) / len(p_values))
        assert abs(np.mean(np.array(p_values) <= level) - level) < expected + 0.005


# ---- how runs end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer_type", "gold", "answer", "word"),
    [
        ("number", "3", "4", "wrong_value"),
        ("number", "3", "it is 4 clips", "wrong_value"),
        ("number", "3", "4 or 5", "wrong_format"),
        ("number", "3", "many", "wrong_format"),
        ("text", "72", "seventy", "wrong_format"),
        ("text", "Paris", "Rome", "wrong_value"),
        ("choice", "B. Paris", "(C)", "wrong_value"),
        ("choice", "B. Paris", "Rome", "wrong_format"),
        ("choice", "yes", "no", "wrong_value"),
        ("named", "@a[1] @b[2]", "@a[1] @b[3]", "wrong_value"),
        ("named", "@a[1] @b[2]", "@a[1]", "wrong_format"),
        ("table", "a,b\n1,2\n", "a,b\n1,3", "wrong_value"),
        ("table", "a,b\n1,2\n", "result_1.csv", "wrong_value"),
        ("table", "a,b\n1,2\n", "1 and 2", "wrong_format"),
        ("text", "Paris", " ", "wrong_format"),
    ],
)
def test_wrong_answers_are_told_apart_by_their_form(answer_type: str, gold: str, answer: str, word: str) -> None:
    task = Task("t", "q", (), "", gold, answer_type, "counting")
    assert ending(Trajectory(task, 0, [], "answered", answer=answer), False) == word
    assert ending(Trajectory(task, 0, [], "answered", answer=answer), True) == "right"
    assert ending(Trajectory(task, 0, [], "answered", answer=answer), None) == "not_judged"
    assert ending(Trajectory(task, 0, [], "turn_limit"), False) == "turn_limit"


def test_errors_of_code_are_counted_by_the_class_of_the_exception(sandbox) -> None:
    programs = {
        "{}['x']": "KeyError",
        "x = (1": "SyntaxError",
        "class Boo(Exception):\n    pass\ndef f():\n    raise Boo('a\\nb: c')\nf()": "Boo",
        "while True:\n    pass": "timeout",
        "import os; os.system('ls')": "refused",
    }
    executions = [sandbox.run(program) for program in programs]
    executions.append(sandbox.run("print('cell 1, line 1: x\\nValueError')"))
    executions.append(Execution(False, "no such column: zz\n", "error", 0.1))
    assert code_errors(executions) == [*programs.values(), "error"]


# ---- summaries and comparisons ---------------------------------------------------------------------------------------


def test_a_summary_by_hand() -> None:
    outcomes = [
        *(outcome("a", right, level="easy", tokens=20) for right in (True, True, False, False)),
        *(outcome("b", right, level="hard", kind="ranking") for right in (False, False, False, False)),
        *(outcome("c", None, level="hard", kind="causal") for _ in range(4)),
    ]
    found = summarise(outcomes)
    assert (found["pass_at_1"], found["k"], found["num_tasks"], found["num_runs"]) == (2 / 8, 4, 3, 12)
    assert found["pass_at"] == pytest.approx({"1": 1 / 4, "2": (5 / 6) / 2, "4": 1 / 2})
    assert found["pass_at_k"] == 1 / 2
    assert found["not_judged"] == 4
    assert found["endings"] == {"wrong_value": 6, "not_judged": 4, "right": 2}
    assert found["measures"]["share"] == pytest.approx(2 / 24)
    assert (found["tokens"], found["tokens_right"]) == (pytest.approx(160 / 12), 20)
    assert {name: row["pass_at_1"] for name, row in found["by_level"].items()} == {"easy": 0.5, "hard": 0.0}
    assert list(summarise([outcome(level, True, level=level) for level in ("hard", "medium", "easy")])["by_level"]) == [
        "easy", "medium", "hard"
    ]  # fmt: skip
    assert set(found["by_type"]) == {"counting", "ranking"}
    assert found["intervals"]["pass_at_1"] == (0.0, 0.5)
    assert "by_level" not in summarise([outcome("a", True)])


@pytest.mark.parametrize(("outcomes", "words"), [([], "no task"), ([outcome("a", None)], "could be judged")])
def test_what_cannot_be_summarised_is_one_sentence(outcomes: list[Outcome], words: str) -> None:
    with pytest.raises(UserError, match=words):
        summarise(outcomes)


def test_a_comparison_is_task_by_task() -> None:
    one = [outcome(f"t{task}", task < 3) for task in range(9) for _ in range(2)]
    other = [outcome(f"t{task}", task < 8, tokens=14) for task in range(1, 10) for _ in range(3)]
    found = compare(one, other)
    assert (found["num_tasks"], found["only_one"], found["only_other"]) == (8, 1, 1)
    row = found["rows"]["pass_at_1"]
    # Of the tasks 1 to 8, two are right before and seven after; five differ, all in one direction.
    assert (row["one"], row["other"], row["difference"]) == pytest.approx((2 / 8, 7 / 8, 5 / 8))
    assert row["p_value"] == pytest.approx(2 / 2**5)
    assert row["interval"][0] < 5 / 8 < row["interval"][1]
    assert found["rows"]["share"]["difference"] == pytest.approx(5 / 16)
    assert found["rows"]["tokens"]["difference"] == 4
    back = compare(other, one)["rows"]["pass_at_1"]
    assert (back["difference"], back["p_value"]) == pytest.approx((-5 / 8, row["p_value"]))
    with pytest.raises(UserError, match="no judged task in common"):
        compare(one, [outcome("x", True)])


def result_file(file: Path, rights: int) -> Path:
    outcomes = [outcome(f"t{task}", task < rights, level="easy") for task in range(10) for _ in range(2)]
    result = {"benchmark": "x|y", **summarise(outcomes), "dropped": {"no label": 2}}
    file.write_text(json.dumps({**result, "outcomes": [one.to_dict() for one in outcomes]}))
    return file


def test_two_results_are_compared_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(result_file(tmp_path / f"{rights}.json", rights)) for rights in (3, 8)]
    compare_results(["--compare", *files], Console(width=200))
    printed = capsys.readouterr().out
    assert "pass at 1" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["rows"]["pass_at_1"]["difference"] == pytest.approx(0.5)
    for wrong, words in ((tmp_path / "none.json", "cannot be read"), (Path(__file__), "is no result")):
        with pytest.raises(UserError, match=words):
            compare_results(["--compare", files[0], str(wrong)], Console())
    with pytest.raises(UserError, match="--help"):
        compare_results(["--compare", files[0]], Console())


def test_a_result_is_shown_in_terminal_markdown_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(result_file(tmp_path / "r.json", 4).read_text())
    print_result(result, "grpo", Console(width=120))
    printed = capsys.readouterr().out
    text = to_markdown(result, "grpo")
    for words in ("pass@1", "pass@2", "share", "wrong_value", "no label", "easy", "counting"):
        assert words in printed
        assert words in text
    assert r"# grpo on x|y: 10 tasks, 20 runs" in text
    assert "| pass@1 | 0.4 | 0.1 to 0.7 | 10 |" in text
    draw(result, "grpo", tmp_path / "new" / "r.png")
    assert (tmp_path / "new" / "r.png").read_bytes().startswith(b"\x89PNG")
