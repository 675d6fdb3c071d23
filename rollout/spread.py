"""Which rank samples which tasks."""

from collections.abc import Sequence


def spread(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Indices of the tasks of each rank: nearly equal costs, and counts that differ by at most one.

    The costliest task goes first, always to the rank with the least cost so far among those that may have another
    (longest processing time first; Graham, SIAM Journal on Applied Mathematics 17(2), 1969). What a task's trajectories
    become does not depend on its rank.

    Args:
        costs: of each task, in any unit, such as tokens.
        num_ranks: at least 1.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for place, task in enumerate(sorted(range(len(costs)), key=lambda index: -costs[index])):
        most = place // num_ranks + 1  # each round gives every rank one task
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < most), key=lambda r: loads[r])
        ranks[rank].append(task)
        loads[rank] += costs[task]
    return [sorted(tasks) for tasks in ranks]
