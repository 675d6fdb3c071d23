"""Length rewards against the figures of the papers."""

import itertools

import pytest

from groupwise.rewards.length import length_cost, length_reward, overlong_cost


def test_length_reward() -> None:
    assert [length_reward(n) for n in (0, 1, 256)] == [1.0, 1.0, 1.0]
    assert length_reward(640) == pytest.approx(0.75)  # half way from 256 to 1024
    assert [length_reward(n) for n in (1024, 5000)] == [0.5, 0.5]
    values = [length_reward(n) for n in range(0, 1200)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert length_reward(257) == pytest.approx(1 - 0.5 / 768)


@pytest.mark.parametrize(
    ("tokens", "coef", "target", "cost"),
    [
        (0, 0.1, 100, 0.0),
        (100, 0.1, 100, 0.0),
        (150, 0.1, 100, 0.05),
        (300, 0.1, 100, 0.2),
        (9999, 0.1, 100, 0.5),
        (300, 0, 100, 0),
    ],
)
def test_length_cost(tokens: int, coef: float, target: int, cost: float) -> None:
    assert length_cost(tokens, coef, target) == pytest.approx(cost)


def test_overlong_cost_is_that_of_dapo() -> None:
    limit, buffer = 100, 20
    for tokens in range(130):
        # arXiv 2503.14476, eq. 13, with its names
        if tokens <= limit - buffer:
            punishment = 0.0
        elif tokens <= limit:
            punishment = ((limit - buffer) - tokens) / buffer
        else:
            punishment = -1.0
        assert overlong_cost(tokens, limit, buffer) == pytest.approx(-punishment)
