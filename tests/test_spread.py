"""Tasks over ranks: all once, as many each, and nearly as long."""

from hypothesis import given
from hypothesis import strategies as st

from groupwise.rollout.spread import spread


@given(costs=st.lists(st.floats(0, 100), max_size=40), num_ranks=st.integers(1, 7))
def test_every_task_has_one_rank_and_ranks_differ_by_one_task_and_the_longest(
    costs: list[float], num_ranks: int
) -> None:
    ranks = spread(costs, num_ranks)
    assert sorted(index for tasks in ranks for index in tasks) == list(range(len(costs)))
    counts = [len(tasks) for tasks in ranks]
    assert max(counts) - min(counts) <= 1
    loads = [sum(costs[index] for index in tasks) for tasks in ranks]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9


def test_long_tasks_are_not_all_one_ranks() -> None:
    costs = [9.0, 1, 9, 1, 9, 1, 9, 1]
    assert {sum(costs[index] for index in tasks) for tasks in spread(costs, 2)} == {20.0}
