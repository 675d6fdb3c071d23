"""AdamW and gradient clipping on shards: each rank updates its own part, and only a norm travels.

optimizer = AdamW(policy.shards, lr=1e-6, weight_decay=0.1)
grad_norm = clip_grad_norm(policy.shards, 1.0, mesh)
optimizer.step(lr)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from .errors import UserError
from .mesh import Mesh
from .unit import Shard

CHUNK = 2**24  # elements that are updated at once where a copy of them is needed
BFLOAT16_DECAY = 1 - 2**-8  # beyond it a bfloat16 average stands still: what it loses in a step is rounded away

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # data, gradient, first and second moment


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), fused, on shards.

    Args:
        shards: of a ShardedModel; ``data`` is updated in place from ``grad``.
        lr: learning rate where ``step`` is given none.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: for matrices alone; norms, biases and other vectors never decay.
        moments_dtype: float32, or bfloat16 for half of their memory; the arithmetic is in float32.

    Where the shards live in the host's memory (``ShardedModel(offload=True)``) the moments do too, and the update is
    made there; gradients come over piece by piece, the next one while one is used.

    Raises:
        UserError: a number out of its range; bfloat16 moments with a beta at which they would stand still.

    Attributes:
        steps: updates made.
        skipped: updates left out because something was not finite; ``skipped_in_row`` of them since the last update.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (0.0 <= lr < math.inf and 0.0 <= weight_decay < math.inf and eps > 0.0):
            raise UserError(f"lr {lr}, weight_decay {weight_decay} and eps {eps} must be finite and not negative.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise UserError(f"betas are {betas} but each must be at least 0 and below 1.")
        if moments_dtype == torch.bfloat16 and max(betas) > BFLOAT16_DECAY:
            raise UserError(
                f"betas are {betas}, but bfloat16 moments stand still above {BFLOAT16_DECAY:.3f}; lower them or take "
                "float32 moments."
            )
        self.shards = list(shards)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.exp_avg = [_zeros_beside(shard.data, moments_dtype) for shard in self.shards]
        self.exp_avg_sq = [_zeros_beside(shard.data, moments_dtype) for shard in self.shards]
        self.steps = self.skipped = self.skipped_in_row = 0

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Update every shard with a learning rate; gradients are kept until ``zero_grad``.

        Raises:
            RuntimeError: a shard has no gradient.
        """
        without = [shard.name for shard in self.shards if shard.grad is None]
        if without:
            raise RuntimeError(f"unit {without[0]!r} has no gradient; run a backward pass before the step.")
        self.steps += 1
        self.skipped_in_row = 0
        for decays in (True, False):
            parts = [slice(0, s.decay_numel) if decays else slice(s.decay_numel, None) for s in self.shards]
            self._update(parts, self.lr if lr is None else lr, self.weight_decay if decays else 0.0)

    def _update(self, parts: list[slice], lr: float, weight_decay: float) -> None:
        rows = [
            (shard.data[part], shard.grad[part], first[part], second[part])
            for shard, part, first, second in zip(self.shards, parts, self.exp_avg, self.exp_avg_sq, strict=True)
            if shard.grad is not None and shard.data[part].numel()
        ]
        if not rows:
            return
        data, grad, moment, _ = rows[0]  # all are of a kind
        if grad.device == data.device and moment.dtype == data.dtype:
            self._fused(rows, lr, weight_decay)
            return
        pieces = (piece for row in rows for piece in zip(*(tensor.split(CHUNK) for tensor in row), strict=True))
        for piece in _beside_data(pieces):
            self._in_float32(piece, lr, weight_decay)

    def _in_float32(self, piece: Row, lr: float, weight_decay: float) -> None:
        data, grad, first, second = piece
        moments = first.float(), second.float()
        self._fused([(data, grad, *moments)], lr, weight_decay)
        first.copy_(moments[0])
        second.copy_(moments[1])

    def _fused(self, rows: Sequence[Row], lr: float, weight_decay: float) -> None:
        data, grads, first, second = (list(column) for column in zip(*rows, strict=True))
        adamw(
            data,
            grads,
            first,
            second,
            [],
            # adamw counts each of these up by itself before it uses them
            list(torch.full((len(data),), self.steps - 1.0, device=data[0].device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def skip(self) -> int:
        """Count a step that is left out, and return how many there were in a row."""
        self.skipped += 1
        self.skipped_in_row += 1
        return self.skipped_in_row

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the moments of each unit by its name: the tensors themselves, not copies."""
        names = [shard.name for shard in self.shards]
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "exp_avg": dict(zip(names, self.exp_avg, strict=True)),
            "exp_avg_sq": dict(zip(names, self.exp_avg_sq, strict=True)),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` of an optimiser with the same shards gave.

        Raises:
            KeyError: a unit or a counter is missing.
        """
        for index, shard in enumerate(self.shards):
            self.exp_avg[index].copy_(state["exp_avg"][shard.name])
            self.exp_avg_sq[index].copy_(state["exp_avg_sq"][shard.name])
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]


def _zeros_beside(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(data.numel(), dtype=dtype, device=data.device, pin_memory=data.is_pinned())


def _beside_data(pieces: Iterable[Row]) -> Iterator[Row]:
    """The pieces with their gradients where their weights are; the next one is copied while one is used."""
    waiting: list[tuple[Row, torch.cuda.Event | None]] = []
    for data, grad, first, second in pieces:
        copied = None
        if grad.device != data.device:
            host = torch.empty_like(grad, device=data.device, pin_memory=True)
            grad = host.copy_(grad, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        waiting.append(((data, grad, first, second), copied))
        if len(waiting) > 1:
            yield _when_copied(*waiting.pop(0))
    for row, copied in waiting:
        yield _when_copied(row, copied)


def _when_copied(row: Row, copied: torch.cuda.Event | None) -> Row:
    if copied is not None:
        copied.synchronize()
    return row


@torch.no_grad()
def clip_grad_norm(shards: Sequence[Shard], max_norm: float, mesh: Mesh) -> float:
    """Scale all gradients so that their global L2 norm is at most ``max_norm``; return the norm before.

    The shards of one copy of the model are disjoint and their padding is 0, so the sum of their squares over its ranks
    is that of the whole model.
    Nothing is scaled where ``max_norm`` is 0 or the norm is not finite.
    """
    grads = [shard.grad for shard in shards if shard.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if grads:
        squares += torch.stack(torch._foreach_norm(grads)).double().square().sum()
    norm = math.sqrt(mesh.all_reduce(squares, over="shards").item())
    if math.isfinite(norm) and 0.0 < max_norm < norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
