"""No answer, however odd, makes a comparison fail, slow or count as right where it is empty."""

import random
import time

import pytest

from groupwise.rewards.answer import answer_correct, needs_judge, trajectory_correct
from groupwise.rewards.value_match import same_value
from groupwise.rollout.sandbox.execution import Execution
from groupwise.rollout.task import ANSWER_TYPES, Task
from groupwise.rollout.trajectory import Trajectory

PIECES = (
    "", " ", "\n", "\t", "\x00", "\r", "\x1b[0m", "\u200b", "\ufeff", "é", "e\u0301\u0327", "ß", "İ", "½", "５", "−",
    "漢字", "🙂", "\ud800", "ﷺ", "NaN", "nan", "inf", "-inf", "None", "null", "0", "-0", "1", "42", "007", "3.14",
    "1e999", "1e-999", "9" * 400, "." * 5, "1,234.50", "1.234,50", "1 234", "1'234", "$", "€", "£5", "5 USD", "12%",
    "12 percent", "million", "2020-01-05", "Jan 5, 2020", "2020-13-45", "0000-00-00", "12:30", "yes", "No", "true", "y",
    "A", "B", "(b)", "B.", "Option C", "The answer is", "or", "not", "Paris", "a_b-c", ",", ";", "|", "\\|", "---", "[",
    "]", "(", ")", "@", "@name[", "@mean[3.0]", "@x[[1, 2]]", "{", "}", '"', "'", '""', "`", "```", "```csv\n",
    "a,b\n1,2\n", "| a | b |\n|---|---|\n| 1 | 2 |\n", "x\ty\n1\t2\n", "result_1.csv", "*", "~", "≈", "about",
)  # fmt: skip


def nasty(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return "".join(chr(draw.randrange(0x3000)) for _ in range(draw.randint(0, 12)))
    return draw.choice(("", "", " ", ", ", "\n")).join(draw.choices(PIECES, k=draw.choice((0, 1, 1, 2, 3, 5, 9))))


def compare_pairs(count: int, seed: int) -> int:
    """Compares so many pairs of texts under every property; returns how many were right."""
    draw, right = random.Random(seed), 0
    for number in range(count):
        said, gold = nasty(draw), nasty(draw)
        if draw.random() < 0.2:
            said = draw.choice((gold, gold.upper(), f" {gold}.", f"({gold})", gold.replace(",", ", ")))
        kind = ANSWER_TYPES[number % len(ANSWER_TYPES)]
        task = Task("t", "q", (), "", gold, kind, "aggregation", language=draw.choice(("python", "sql")))
        found = answer_correct(said, task)
        assert found in (True, False), (said, gold)
        assert not (found and needs_judge(said, task))
        if not said.strip() or said.strip().lower() == "nan":
            assert not found, (said, gold, kind)
        execution = Execution(True, "written to result_1.csv", "ok", 0.1, nasty(draw))
        trajectory = Trajectory(task, 0, [], "answered", "", said, [execution])
        assert trajectory_correct(trajectory) >= found
        assert same_value(said, gold, tolerance=0.0) == same_value(gold, said, tolerance=0.0), (said, gold)
        assert same_value(said, said, tolerance=0.0), said
        right += found
    return right


def test_three_thousand_pairs() -> None:
    assert compare_pairs(3_000, seed=0) > 100


@pytest.mark.slow
def test_a_hundred_thousand_pairs() -> None:
    assert compare_pairs(100_000, seed=1) > 3_000


HUGE = (
    "1", "1,", "1,234,", "111 ", "1.", "-", "(", "[", "[]", "@", "@a[", "@a[1]", "@a[[", "a", "a ", " ", "\n", "A ",
    "not ", "the ", "|", "||", "\\|", "| a\n", "`", "```\n", '"', '",', "'", "a,b\n", "a\tb\n", "1,2\n", "e1", "1e1 ",
    "$", "a.csv", "a-", "-.csv", "½", "\u0301\u0327", "ﷺ", "5 million ", "2020-01-05 ", "yes,", "no. ", "'111", "_111",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ANSWER_TYPES)
def test_a_hundred_kilobytes_take_linear_time(kind: str) -> None:
    golds = {"number": "3.5", "choice": "B. Paris", "named": "@a[1], @b[x]", "table": "a,b\n1,2\n"}
    task = Task("t", "q", (), "", golds.get(kind, golds["table"]), kind, "aggregation", language="sql")
    for piece in HUGE:
        text = (piece * (100_000 // len(piece) + 1))[:100_000]
        for end in ("", "x"):
            trajectory = Trajectory(task, 0, [], "answered", "", text + end)
            start = time.process_time()
            assert not trajectory_correct(trajectory)
            same_value(text, text + end, tolerance=0.0)
            assert time.process_time() - start < 20, piece  # quadratic time is minutes
