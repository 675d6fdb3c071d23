"""Bytes that a micro-batch of training moves between ranks, counted before anything is launched.

    traffic = count_traffic(config, num_ranks=1024, ranks_per_host=8, device_type="cuda")
    traffic.between / 50e9   # seconds on a network that brings each rank 50 GB/s

A rank gathers the units of its copy of the model, in the compute dtype, for the forward and again for the backward
pass; gradients are summed within the copy, and then its shard of them over the copies. What it receives is the least
that any schedule needs: what other hosts have enters a host once, in equal shares at its ranks, and is passed on there.
"""

import dataclasses
from dataclasses import dataclass

from .config import Config
from .errors import UserError
from .planner import compute_bytes, layout_of


@dataclass(frozen=True)
class Traffic:
    """Of one micro-batch with its sums, in bytes.

    Attributes: ``gathered`` and ``scattered`` (the whole buffers of all all-gathers and reduce-scatters), ``summed`` (a
    shard of the gradients, in all-reduces over the copies; 0 of one copy), and what a rank receives: ``within`` from
    ranks of its own host and ``between`` from other hosts.
    """

    gathered: int
    scattered: int
    summed: int
    within: float
    between: float


def count_traffic(config: Config, num_ranks: int, ranks_per_host: int, device_type: str) -> Traffic:
    """Count what a rank receives.

    Args:
        config: ``config.model`` is the shape; ``run.shard_size`` ranks hold one copy.
        num_ranks: of the launch.
        ranks_per_host: neighbours; the same on each host.
        device_type: "cuda" or "cpu".

    Raises:
        UserError: the ranks do not fill the hosts, or copies the hosts, nor hosts the copies.
    """
    layout = layout_of(dataclasses.replace(config.model, folder=""), num_ranks, config.run.shard_size)
    size, copies = layout.num_shards, layout.num_copies
    shard_near = min(size, ranks_per_host)  # ranks of a copy on a host
    copy_near = min(copies, max(1, ranks_per_host // size))  # copies on a host
    if size % shard_near or copies % copy_near or ranks_per_host % shard_near:
        raise UserError(
            f"{num_ranks} ranks, {size} for each copy of the model, do not fill hosts of {ranks_per_host} evenly; "
            "choose a run.shard_size that divides the ranks of a host or that they divide."
        )
    settings, element = config.optimizer, compute_bytes(config, device_type)
    root, blocks = layout.whole[0], sum(layout.whole[1:])
    reduced = element if settings.reduce_dtype == "compute" else 4
    gathered = element * (root + (2 if settings.reshard_after_forward else 1) * blocks) if size > 1 else 0
    scattered = reduced * (root + blocks) if size > 1 else 0
    summed = reduced * (root + blocks) // size if copies > 1 else 0
    parts = _received(gathered + scattered, shard_near, size // shard_near)
    sums = _received(2 * summed, copy_near, copies // copy_near)  # a reduce-scatter, and an all-gather of its result
    return Traffic(gathered, scattered, summed, parts[0] + sums[0], parts[1] + sums[1])


def _received(size: float, near: int, far: int) -> tuple[float, float]:
    """What a rank receives of a gather or a scatter of ``size`` over ``far`` hosts with ``near`` ranks each."""
    return size * (1 - 1 / near), size / near * (1 - 1 / far)
