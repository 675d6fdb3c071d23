"""Schedules against the formulas written out, and steps that do not add up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.engine.errors import UserError
from groupwise.engine.schedule import KINDS, Schedule, mixing_schedule


def test_cosine_is_the_curriculum_of_the_paper() -> None:
    schedule = Schedule("cosine", start=0.9, end=0.1, steps=40)
    for t in range(41):
        assert schedule(t) == pytest.approx(0.1 + 0.5 * (0.9 - 0.1) * (1 + math.cos(math.pi * t / 40)))
    assert schedule(0) == 0.9
    assert schedule(40) == 0.1
    assert schedule(1000) == 0.1


def test_linear_and_constant() -> None:
    linear = Schedule("linear", start=2.0, end=1.0, steps=14, warmup=4)
    assert [linear(t) for t in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert linear(9) == pytest.approx(1.5)
    assert linear(14) == 1.0
    constant = Schedule("constant", start=3.0, end=0.0, steps=5, warmup=2)
    assert [constant(t) for t in range(6)] == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0, 3.0])


@given(
    st.sampled_from(KINDS), st.floats(0, 5), st.floats(0, 5), st.integers(1, 50), st.integers(0, 50), st.integers(0, 99)
)
def test_values_stay_between_zero_and_the_ends(
    kind: str, start: float, end: float, steps: int, warmup: int, step: int
) -> None:
    schedule = Schedule(kind, start, end, max(steps, warmup), warmup)
    value = schedule(step)
    low = 0.0 if step < warmup else min(start, end)
    assert low - 1e-9 <= value <= max(start, end) + 1e-9
    if step == warmup < schedule.steps:
        assert value == pytest.approx(start)


def test_mixing_schedule() -> None:
    gamma = mixing_schedule(mu_peak=0.9, mu_valley=0.05, mu_warmup_steps=3, mu_decay_steps=10, total_steps=20)
    assert gamma(3) == pytest.approx(0.9)
    assert gamma(8) == pytest.approx((0.9 + 0.05) / 2)
    assert [gamma(t) for t in (13, 19)] == pytest.approx([0.05, 0.05])
    assert all(gamma(t) >= gamma(t + 1) for t in range(3, 19))
    flat = mixing_schedule(mu_peak=0.5, mu_valley=0.5, mu_warmup_steps=0, mu_decay_steps=0, total_steps=1)
    assert flat(0) == flat(7) == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cosin", 1.0, 0.0, 5, 0), "unknown"),
        (("cosine", 1.0, 0.0, 0, 0), "at least 1 step"),
        (("cosine", 1.0, 0.0, 5, -1), "no negative warm-up"),
        (("cosine", 1.0, 0.0, 5, 6), "longer than its 5 steps"),
        (("cosine", math.nan, 0.0, 5, 0), "finite"),
    ],
)
def test_bad_schedules_are_named(arguments: tuple[str, float, float, int, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Schedule(*arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu_decay_steps": 30}, "= 33 is more than the run's 20"),
        ({"mu_valley": 0.95}, "mu_valley 0.95"),
        ({"mu_peak": 1.5}, "mu_peak 1.5"),
        ({"mu_warmup_steps": -1}, "negative"),
    ],
)
def test_mixing_that_does_not_add_up_is_named(change: dict[str, float], words: str) -> None:
    settings = {"mu_peak": 0.9, "mu_valley": 0.05, "mu_warmup_steps": 3, "mu_decay_steps": 10, "total_steps": 20}
    with pytest.raises(UserError, match=words):
        mixing_schedule(**(settings | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        Schedule("linear", 1.0, 0.0, 5)(-1)
