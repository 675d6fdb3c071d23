"""The one optimisation step of every recipe: accumulate over micro-batches, clip, update.

The loss is a sum whose divisor, a count over all ranks and micro-batches, is known before the backward pass; so
neither the split into micro-batches nor the number of ranks can change the update.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from .batch import Batch, empty_batch
from .mesh import Mesh
from .optim import AdamW, clip_grad_norm
from .shard import ShardedModel

LossFunction = Callable[[ShardedModel, Batch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]

MAX_BAD_STEPS = 5  # not finite, in a row, end the run

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite.

    Attributes:
        names: the parameters whose gradient was not finite in the last of them, over all ranks.
    """

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Update:
    """What one step did, the same on every rank.

    Attributes:
        loss: summed over micro-batches and ranks.
        grad_norm: global, before clipping.
        lr: the learning rate.
        skipped: 1 where nothing was changed, because the loss or the norm was not finite; of ``merged``, their number.
        stats: the loss function's, added up over micro-batches and ranks; extremes where a name ends in _max or _min.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: int = 0
    stats: dict[str, float] = field(default_factory=dict)


def optimise(
    policy: ShardedModel,
    optimizer: AdamW,
    batches: Sequence[Batch],
    loss_fn: LossFunction,
    *,
    mesh: Mesh,
    lr: float,
    max_grad_norm: float,
    reduce_every_microbatch: bool = True,
    keep: Callable[[Update], Path] | None = None,
) -> Update:
    """Make one update from this rank's micro-batches; a collective.

    Ranks may have different numbers of micro-batches: the shorter ones go on with empty batches. Where no rank has
    any, nothing moves, and the update has no stats.

    Args:
        policy: its shards' gradients are dropped before and after.
        optimizer: over ``policy.shards``.
        batches: this rank's micro-batches.
        loss_fn: ``(policy, batch)`` -> the scalar sum of this batch's losses, divided by the GLOBAL count, and 0-dim
            statistics. It runs the policy's forward exactly once, also on an empty batch.
        mesh: the ranks.
        lr: learning rate of this step.
        max_grad_norm: global norm to clip at; 0 for no clipping.
        reduce_every_microbatch: False sums gradients over the ranks after the last micro-batch alone; until then each
            rank holds whole gradients.
        keep: called on every rank with an update that was skipped, before it may end the run: it keeps what the step
            was made of, and says where. Collectives may run in it.

    Raises:
        NonFiniteError: the ``MAX_BAD_STEPS``-th step in a row was not finite.
    """
    batches = level(batches, mesh)
    if not batches:
        return Update(0.0, 0.0, lr)
    policy.zero_grad()
    totals: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches, 1):
        loss, stats = loss_fn(policy, batch)
        policy.backward(loss, reduce=reduce_every_microbatch or number == len(batches))
        _accumulate(totals, {"loss": loss, **stats})
        del loss, stats  # they hold the graph, which the next forward need not live beside
    grad_norm = clip_grad_norm(policy.shards, max_grad_norm, mesh)
    reduced = _over_ranks(totals, mesh)
    loss_sum = reduced.pop("loss")
    finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
    update = Update(loss_sum, grad_norm, lr, int(not finite), reduced)
    if update.skipped:
        _leave_out(policy, optimizer, update, mesh, keep)
    else:
        optimizer.step(lr)
    policy.zero_grad()
    return update


def merged(updates: Sequence[Update]) -> Update:
    """The updates of one step, passes and mini-batches, as one record.

    Of the updates that had batches and were not skipped, or of all where there is none: loss and gradient norm are
    means, and stats add up, with extremes as ever. A ``NAME_loss`` of the stats holds its divisor, so it is a mean,
    over the updates that had tokens of that kind (``NAME_tokens``).

    Args:
        updates: at least one; the learning rate is that of the last.
    """
    made = [update for update in updates if update.stats and not update.skipped] or updates
    stats = _joined([update.stats for update in made])
    for name in stats:
        if name.endswith("_loss"):
            tokens = name.removesuffix("loss") + "tokens"
            stats[name] /= max(1, sum(update.stats.get(tokens, 0.0) > 0 for update in made))
    return Update(
        loss=fmean(update.loss for update in made),
        grad_norm=fmean(update.grad_norm for update in made),
        lr=updates[-1].lr,
        skipped=sum(update.skipped for update in updates),
        stats=stats,
    )


def level(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """``batches`` and as many empty ones as make all ranks have the same number; a collective.

    Whatever runs a sharded model over its batches needs it: each forward gathers weights from all ranks.
    """
    most = int(mesh.all_reduce(torch.tensor([len(batches)], device=mesh.device), "max").item())
    return [*batches, *(empty_batch(mesh.device) for _ in range(most - len(batches)))]


def _leave_out(
    policy: ShardedModel,
    optimizer: AdamW,
    update: Update,
    mesh: Mesh,
    keep: Callable[[Update], Path] | None,
) -> None:
    """Count and say a step that is not finite, and end the run when it was one too many."""
    in_row = optimizer.skip()
    found = mesh.all_gather_object([name for shard in policy.shards for name in shard.nonfinite()])
    names = sorted({name for names in found for name in names})
    message = (
        f"step left out: loss {update.loss}, gradient norm {update.grad_norm}, "
        f"{in_row} in a row; not finite: {', '.join(names[:5]) or 'no gradient'}{' …' if len(names) > 5 else ''}"
    )
    if tokens := update.stats.get("nonfinite"):
        first = update.stats["nonfinite_min"]
        message += f"; tokens with a non-finite input: {tokens:.0f}, the first at index {first:.0f} of its micro-batch"
    policy.zero_grad()
    if keep is not None:
        message += f"; it is kept in {keep(update)}"
    if mesh.rank == 0:
        logger.warning(message)
    if in_row >= MAX_BAD_STEPS:
        raise NonFiniteError(message, names)


def _merge(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    if name.endswith("_max"):
        return torch.maximum(ours, theirs)
    if name.endswith("_min"):
        return torch.minimum(ours, theirs)
    return ours + theirs


def _accumulate(totals: dict[str, torch.Tensor], stats: Mapping[str, torch.Tensor]) -> None:
    for name, value in stats.items():
        value = value.detach().double()
        totals[name] = _merge(name, totals[name], value) if name in totals else value


def _over_ranks(totals: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, float]:
    """Totals over all ranks, in the order of the ranks; one transfer from the device, one collective."""
    own = dict(zip(totals, torch.stack([value.reshape(()) for value in totals.values()]).tolist(), strict=True))
    return _joined(mesh.all_gather_object(own))


def _joined(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    totals: dict[str, torch.Tensor] = {}
    for row in rows:
        _accumulate(totals, {name: torch.tensor(value, dtype=torch.float64) for name, value in row.items()})
    return {name: value.item() for name, value in totals.items()}
