"""Answers: forms that say the same are equal, values that differ are not, and no text makes it fail."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.engine.errors import UserError
from groupwise.rewards.answer import answer_correct, named_values
from groupwise.rewards.value_match import normalise, parse_number, parse_numbers, same_value
from groupwise.rollout.task import ANSWER_TYPES, Task

ALPHABET = st.text(alphabet="0123456789.,-+%$€()[]@/: eEabnoyNaT_'\"*\n½５−", max_size=24)


def task(answer: str, answer_type: str = "text") -> Task:
    return Task("t", "q", (), "", answer, answer_type, "aggregation")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", 1234.5),
        ("1.234,50", 1234.5),
        ("1 234 567", 1234567),
        ("1'234.5", 1234.5),
        ("1_000", 1000),
        ("12,5", 12.5),
        ("$1,234.5", 1234.5),
        ("-$3", -3),
        ("$-3", -3),
        ("5 USD", 5),
        ("EUR 5", 5),
        ("7€.", 7),
        ("(12)", -12),
        ("($1,200)", -1200),
        ("12%", 12),
        ("12 percent", 12),
        ("1.2 million", 1.2e6),
        ("1e-3", 0.001),
        ("+.5", 0.5),
        ("3.", 3),
        ("**42**", 42),
        ("~ 4", 4),
        ("−3", -3),
        ("５", 5),
    ],
)
def test_number_forms(text: str, value: float) -> None:
    assert parse_number(text) == pytest.approx(value, rel=1e-15)
    assert answer_correct(text, task(str(value), "number"))
    assert answer_correct(str(value), task(text, "number"))


@pytest.mark.parametrize(
    "text", ["", " ", "nan", "inf", "1e999", "1,23,45", "1.2.3", "12:30", "3-4", "a1", "-", "%", "()"]
)
def test_texts_that_are_no_number(text: str) -> None:
    assert parse_number(text) is None


@given(st.floats(-1e9, 1e9), st.floats(-0.2, 0.2))
def test_three_percent_of_the_right_number(gold: float, share: float) -> None:
    said = gold * (1 + share)
    right = abs(said - gold) <= max(0.03 * abs(gold), 1e-6)
    if abs(abs(said - gold) - max(0.03 * abs(gold), 1e-6)) > 1e-9 * max(abs(gold), 1e-6):  # not on the edge itself
        assert answer_correct(repr(said), task(repr(gold), "number")) == right


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("0.001", "0.009", False),
        ("0.009", "0.001", False),
        ("0", "0.0000001", True),
        ("0.01", "0", False),
        ("12%", "0.12", True),
        ("12%", "12", True),
        ("0.12", "12%", True),
        ("1.2%", "0.12", False),
        ("-5", "5", False),
        ("The mean is 12.5 kg.", "12.5", True),
        ("between 12.5 and 13", "12.5", False),
        ("12.5, 99", "12.5", False),
        ("none", "12.5", False),
        ("nan", "nan", False),
        ("0", "nan", False),
        ("nan", "0", False),
    ],
)
def test_number_answers(said: str, gold: str, right: bool) -> None:
    assert answer_correct(said, task(gold, "number")) is right


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("Yes", "yes", True),
        ("true.", "Yes", True),
        ("Yes, clearly", "yes", True),
        ("No, not at all", "yes", False),
        ("no correlation", "no", False),
        ("N", "No", True),
        ("Petal_Length", "petal length", True),
        ("`petal-length`", "petal_length", True),
        ("(B)", "b", True),
        ("setosa", "versicolor", False),
        ("setosa, versicolor", "Setosa,Versicolor", True),
        ("1,234.50", "1234.5", True),
        ("1234.6", "1234.5", False),  # exact where the type is not a number
        ("-5", "5", False),
        ("2020-01-05", "Jan 5, 2020", True),
        ("2020/01/05", "2020-01-05", True),
        ("2020-01-06", "2020-01-05", False),
        ("ＡＢ", "ab", True),
        ("yes", "Yes, clearly", True),
        ("1577836800001", "1577836800000", False),
        ("12345678901234567", "12345678901234568", False),
        ("0.30000000000000004", "0.3", True),
    ],
)
def test_other_answers_are_exact_after_normalisation(said: str, gold: str, right: bool) -> None:
    assert answer_correct(said, task(gold, "choice")) is right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("@mean[3.01], @best[Setosa]", True),
        ("@best[setosa]\n@mean[$3.00] @extra[9]", True),
        ("@mean[3.2] @best[setosa]", False),
        ("@mean[3.0]", False),
        ("@mean[3.0] @mean[4.0] @best[setosa]", False),  # two tries
        ("@mean[3 or 4] @best[setosa]", False),
        ("3.0, setosa", False),
    ],
)
def test_named_values(said: str, right: bool) -> None:
    assert answer_correct(said, task("@mean[3.0] @best[setosa]", "named")) is right
    assert named_values("@A[1] @a[2] @b[x]") == {"a": None, "b": "x"}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("@counts[314,577] @values[9.03, 9.00] @rows[]", True),  # 314,577 alone would be one number
        ("@counts[[314, 577]] @values[[9.03, 9]] @rows[[]]", True),
        ("@counts[314, 578] @values[9.03, 9.0] @rows[]", False),  # no tolerance: they may be identifiers
        ("@counts[577, 314] @values[9.03, 9.0] @rows[]", False),
        ("@counts[314, 577, 0] @values[9.03, 9.0] @rows[]", False),
        ("@counts[314 577] @values[9.03, 9.0] @rows[]", False),
        ("@counts[314, 577] @values[9.03, 9.0] @rows[0]", False),
        ("@counts[314, 577] @values[9.03, 9.0]", False),
    ],
)
def test_named_lists(said: str, right: bool) -> None:
    assert answer_correct(said, task("@counts[314, 577], @values[9.03,9.0], @rows[]", "named")) is right


@pytest.mark.parametrize("said", [None, "", "  \n"])
@pytest.mark.parametrize("kind", ["number", "text"])
def test_no_answer_is_wrong(said: str | None, kind: str) -> None:
    assert not answer_correct(said, task("", kind))
    assert not answer_correct(said, task("0", kind))


@settings(max_examples=1000, deadline=None)
@given(ALPHABET | st.text(max_size=20), ALPHABET | st.text(max_size=20))
def test_any_two_texts_compare(one: str, other: str) -> None:
    for kind in ("number", "choice"):
        assert answer_correct(one, task(other, kind)) in (True, False)
    if normalise(one) not in ("", *"yn", "yes", "no", "true", "false") and not named_values(other + one):
        # exact comparison does not know which of both is the right one
        lead = {normalise(text)[:5].split(" ")[0].split(",")[0] for text in (one, other)}
        if not lead & {"y", "n", "yes", "no", "true", "false"}:
            assert same_value(one, other, tolerance=0.0) == same_value(other, one, tolerance=0.0)
    assert all(math.isfinite(value) for value, _ in parse_numbers(one))


@settings(max_examples=300, deadline=None)
@given(ALPHABET | st.text(max_size=20))
def test_a_text_equals_itself(text: str) -> None:
    if text.strip() and not named_values(text) and normalise(text) != "nan":
        assert answer_correct(text, task(text, "choice"))


def test_many_random_numbers_in_every_dress() -> None:
    draw = random.Random(0)
    dresses = ["{:,.2f}", "${:,.2f}", "{:.2f} USD", "{:.2f}", "{:e}", "**{:.2f}**", "about {:.2f}", "It is {:.2f}."]
    for _ in range(2000):
        value = round(draw.uniform(-1, 1) * 10 ** draw.randint(0, 7), 2)
        said = draw.choice(dresses).format(value).replace("$-", "-$")
        assert answer_correct(said, task(f"{value:.2f}", "number")), (said, value)
        if abs(value) > 1:
            assert not answer_correct(said, task(f"{value * 1.05:.6f}", "number")), (said, value)


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        *[(said, gold, True) for gold in ("B", "(b)", "B.", "b)") for said in ("B", "b)", "(B)", "**B**", "Option B")],
        ("The answer is B.", "B", True),
        ("The correct answer is option (b).", "B", True),
        ("B. Paris", "B", True),
        ("It is B because the mean is larger.", "B", True),
        ("The answer is A because it grows.", "A", True),
        ("A house", "A", False),
        ("C", "B", False),
        ("The answer is C.", "B", False),
        ("B or C", "B", False),
        ("B, C", "B", False),
        ("(B) and (C)", "B", False),
        ("Option B, or option C", "B", False),
        ("B. or rather C.", "B", False),
        ("It is not B", "B", False),
        ("Bonn", "B", False),
        ("", "B", False),
        ("B", "B. Paris", True),
        ("Paris", "B. Paris", True),
        ("paris.", "(B) Paris", True),
        ("The answer is Paris.", "B. Paris", True),
        ("B: Paris", "B. Paris", True),
        ("B - Paris", "B. Paris", True),
        ("B. London", "B. Paris", False),
        ("C. Paris", "B. Paris", False),
        ("Paris (C)", "B. Paris", False),
        ("Paris or London", "B. Paris", False),
        ("London", "B. Paris", False),
    ],
)
def test_choices(said: str, gold: str, right: bool) -> None:
    assert answer_correct(said, task(gold, "choice")) is right


def test_an_unknown_answer_type_is_refused_in_one_sentence() -> None:
    for kind in ANSWER_TYPES:
        assert task("1", kind).answer_type == kind
    with pytest.raises(
        UserError, match=r"^task 't' has answer_type 'numbers'; expected one of number, choice, .*free$"
    ):
        task("1", "numbers")
