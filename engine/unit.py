"""The unit of sharding: one flat buffer whose views are the parameters of a block, and this rank's shard of it.

A unit knows how to become whole, to be freed and to reduce its gradient; when it does so is ``engine/shard.py``'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from .mesh import Mesh

ALIGNMENT = 32  # elements: each parameter starts on a 64-byte boundary in bfloat16, as vectorised kernels like it


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its unit's flat buffer, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


class Shard:
    """This rank's part of one unit: what the optimiser, the clipping and the checkpoint see.

    Attributes:
        name: the unit's name in the module, "" for the root.
        data: [n] the master weights; float32 for a trained model.
        grad: [n] float32, the sum over ranks and micro-batches since the last ``zero_grad``, or None.
        start: the element of the unit's flat buffer that ``data[0]`` is.
        numel: elements of the whole unit without the padding to the world size.
        slots: the parameters of the unit, matrices first.
        decay_numel: weight decay is for matrices alone, and they are ``data[:decay_numel]``.
    """

    def __init__(self, name: str, slots: list[Slot], mesh: Mesh, dtype: torch.dtype) -> None:
        self.name, self.slots = name, slots
        self.numel = _aligned(slots[-1].offset + slots[-1].numel) if slots else 0
        part = _aligned(-(-self.numel // mesh.world_size))
        self.start = mesh.rank * part
        matrices = max((slot.offset + slot.numel for slot in slots if len(slot.shape) >= 2), default=0)
        self.decay_numel = min(max(matrices - self.start, 0), part)
        self.data = torch.zeros(part, dtype=dtype, device=mesh.device)
        self.grad: torch.Tensor | None = None

    def overlaps(self) -> Iterator[tuple[Slot, slice, slice]]:
        """For each parameter with elements here: its slot, their place in the shard, their place in the parameter."""
        end = self.start + self.data.numel()
        for slot in self.slots:
            first, last = max(slot.offset, self.start), min(slot.offset + slot.numel, end)
            if first < last:
                yield slot, slice(first - self.start, last - self.start), slice(first - slot.offset, last - slot.offset)

    def nonfinite(self) -> list[str]:
        """Names of the parameters that have a NaN or an infinity in this rank's part of the gradient."""
        if self.grad is None:
            return []
        return [slot.name for slot, here, _ in self.overlaps() if not torch.isfinite(self.grad[here]).all()]


class Unit:
    """One flat buffer, the parameters that are views of it, and this rank's shard of it."""

    def __init__(
        self, name: str, parameters: list[tuple[str, nn.Parameter]], mesh: Mesh, dtype: torch.dtype, master: torch.dtype
    ) -> None:
        self.mesh = mesh
        parameters = sorted(parameters, key=lambda named: named[1].ndim < 2)  # stable: matrices first
        slots, offset = [], 0
        for label, parameter in parameters:
            slots.append(Slot(label, tuple(parameter.shape), offset, parameter.numel()))
            offset = _aligned(offset + parameter.numel())
        self.parameters = [parameter for _, parameter in parameters]
        self.shard = Shard(name, slots, mesh, master)
        for slot, here, there in self.shard.overlaps():
            source = self.parameters[slots.index(slot)].detach()
            self.shard.data[here].copy_(source.reshape(-1)[there])
        self.is_master = mesh.world_size == 1 and dtype == master  # then the shard itself is the buffer
        numel = self.shard.data.numel() * mesh.world_size
        self.flat = self.shard.data if self.is_master else torch.empty(numel, dtype=dtype, device=mesh.device)
        for slot, parameter in zip(slots, self.parameters, strict=True):
            # It keeps its own version counter, so that a second gather does not look like a change to autograd.
            parameter.data = self._view(self.flat, slot)
            parameter.grad = None
        self.pinned = self.is_master
        self.is_whole = True
        self._gathering: dist.Work | None = None
        self._gradient: torch.Tensor | None = None
        self._reducing: tuple[dist.Work | None, torch.Tensor, torch.Tensor] | None = None
        self.free()

    @staticmethod
    def _view(flat: torch.Tensor, slot: Slot) -> torch.Tensor:
        return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def start_gather(self) -> None:
        """Begin to make the parameters whole, in the compute dtype; nothing if they are or are about to be."""
        if self.is_whole:
            return
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        own = self.flat[self.shard.start : self.shard.start + self.shard.data.numel()]
        own.copy_(self.shard.data)  # cast before the gather: fewer bytes travel
        self._gathering = self.mesh.all_gather_into(self.flat, own)
        self.is_whole = True

    def wait(self) -> None:
        """Return when a gather that was started has ended."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def free(self) -> None:
        """Take the buffer's storage away, unless it is the master itself or held whole."""
        if self.pinned or not self.is_whole:
            return
        self.wait()
        self.flat.untyped_storage().resize_(0)
        self.is_whole = False

    def begin_gradient(self) -> None:
        """Give every parameter its place in one flat gradient, for autograd to add to."""
        if self.is_master:
            if self.shard.grad is None:
                self.shard.grad = torch.zeros_like(self.shard.data)
            self._gradient = self.shard.grad
        else:
            self._gradient = torch.zeros(self.flat.numel(), dtype=self.flat.dtype, device=self.flat.device)
        for slot, parameter in zip(self.shard.slots, self.parameters, strict=True):
            parameter.grad = self._view(self._gradient, slot)

    def start_reduce(self) -> None:
        """Begin to sum the flat gradient over the ranks, in float32."""
        gradient, self._gradient = self._gradient, None
        assert gradient is not None
        for parameter in self.parameters:
            parameter.grad = None
        if self.is_master:
            return
        gradient = gradient.float()
        if self.mesh.world_size == 1:
            self._reducing = (None, gradient, gradient)
            return
        part = torch.empty(self.shard.data.numel(), dtype=torch.float32, device=self.flat.device)
        self._reducing = (self.mesh.reduce_scatter_into(part, gradient), part, gradient)

    def finish_reduce(self) -> None:
        """Add the sum to the shard's gradient."""
        if self._reducing is None:
            return
        work, part, _ = self._reducing
        self._reducing = None
        if work is not None:
            work.wait()
        if self.shard.grad is None:
            self.shard.grad = part
        else:
            self.shard.grad.add_(part)

    def master(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, from the master weights, as its own CPU tensor; a collective."""
        flat = self.shard.data
        if self.mesh.world_size > 1:
            flat = torch.empty(flat.numel() * self.mesh.world_size, dtype=flat.dtype, device=flat.device)
            work = self.mesh.all_gather_into(flat, self.shard.data)
            assert work is not None
            work.wait()
        for slot in self.shard.slots:
            yield slot.name, self._view(flat, slot).to("cpu", copy=True)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
