"""The unit of sharding: one flat buffer whose views are the parameters of a block, and this rank's shard of it.

A unit knows how to become whole, to be freed and to reduce its gradient; when it does so is ``engine/shard.py``'s.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

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


@dataclass(frozen=True)
class Precision:
    """Types and place of a unit's tensors.

    Attributes:
        compute: dtype of the gathered parameters and of their gradients.
        master: dtype of the shard.
        reduce: dtype in which gradients are summed over ranks; over micro-batches they are summed in float32.
        offload: the shard lives in the host's memory.
    """

    compute: torch.dtype = torch.float32
    master: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    offload: bool = False


class Shard:
    """This rank's part of one unit: what the optimiser, the clipping and the checkpoint see.

    Attributes:
        name: the unit's name in the module, "" for the root.
        data: [n] the master weights; float32 for a trained model; pinned in the host's memory where offloaded.
        grad: [n] float32 on the mesh's device, the sum over ranks and micro-batches since the last ``zero_grad``, or
            None.
        start: the element of the unit's flat buffer that ``data[0]`` is.
        numel: elements of the whole unit without the padding to the number of shards.
        slots: the parameters of the unit, matrices first.
        decay_numel: weight decay is for matrices alone, and they are ``data[:decay_numel]``.
    """

    def __init__(self, name: str, slots: list[Slot], mesh: Mesh, precision: Precision) -> None:
        self.name, self.slots = name, slots
        self.numel = _aligned(slots[-1].offset + slots[-1].numel) if slots else 0
        part = _aligned(-(-self.numel // mesh.shard_size))
        self.start = mesh.shard_rank * part
        matrices = max((slot.offset + slot.numel for slot in slots if len(slot.shape) >= 2), default=0)
        self.decay_numel = min(max(matrices - self.start, 0), part)
        home = "cpu" if precision.offload else mesh.device
        pinned = precision.offload and mesh.device.type == "cuda"
        self.data = torch.zeros(part, dtype=precision.master, device=home, pin_memory=pinned)
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
    """One flat buffer, the parameters that are views of it, and this rank's shard of it.

    Args:
        name: in the module, "" for the root.
        parameters: with their names. Those on the meta device have no values yet: the shard stays zero.
        mesh: the ranks.
        precision: types, and where the shard lives.
    """

    def __init__(self, name: str, parameters: list[tuple[str, nn.Parameter]], mesh: Mesh, precision: Precision) -> None:
        self.mesh, self.precision = mesh, precision
        self._label = name or "the root"  # in errors of the network
        parameters = sorted(parameters, key=lambda named: named[1].ndim < 2)  # stable: matrices first
        slots, offset = [], 0
        for label, parameter in parameters:
            slots.append(Slot(label, tuple(parameter.shape), offset, parameter.numel()))
            offset = _aligned(offset + parameter.numel())
        self.shard = Shard(name, slots, mesh, precision)
        sources = dict(parameters)
        for slot, here, there in self.shard.overlaps():
            if not sources[slot.name].is_meta:
                self.shard.data[here].copy_(sources[slot.name].detach().reshape(-1)[there])
        # Then the shard itself is the buffer.
        self.is_master = mesh.shard_size == 1 and precision.compute == precision.master and not precision.offload
        numel = self.shard.data.numel() * mesh.shard_size
        empty = torch.empty(0 if self.is_master else numel, dtype=precision.compute, device=mesh.device)
        self.flat = self.shard.data if self.is_master else empty
        self.parameters = [self._become_view(slot, sources[slot.name]) for slot in slots]
        self.replaced = {old: new for (_, old), new in zip(parameters, self.parameters, strict=True) if old is not new}
        self._is_alone = mesh.world_size == 1  # then gradients go straight to the shard
        self.pinned = self.is_master
        self.is_whole = True
        self._gathering: dist.Work | None = None
        self._copied: torch.cuda.Event | None = None
        self._copy_stream = torch.cuda.Stream(mesh.device) if precision.offload and mesh.device.type == "cuda" else None
        self._unreduced: torch.Tensor | None = None  # of backwards whose reduction was put off, float32
        self._scattering: tuple[dist.Work | None, torch.Tensor] | None = None
        self._summing: tuple[dist.Work | None, torch.Tensor] | None = None
        self.free()

    def _become_view(self, slot: Slot, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter with its place in the buffer as data, under a version counter of its own.

        So a second gather does not look like a change to autograd. One of the meta device needs a new object.
        """
        if parameter.is_meta and not self.flat.is_meta:
            empty = torch.empty(0, dtype=self.flat.dtype, device=self.flat.device)
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        parameter.data = self._view(self.flat, slot)
        parameter.grad = None
        return parameter

    @staticmethod
    def _view(flat: torch.Tensor, slot: Slot) -> torch.Tensor:
        return flat[slot.offset : slot.offset + slot.numel].view(slot.shape)

    # Weights ---------------------------------------------------------------------------------------------------

    def start_gather(self) -> None:
        """Begin to make the parameters whole, in the compute dtype; nothing if they are or are about to be."""
        if self.is_whole:
            return
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        own = self.flat[self.shard.start : self.shard.start + self.shard.data.numel()]
        stream = self._copy_stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.mesh.device))  # the buffer's memory had another user
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            master = self.shard.data
            if stream is not None:
                master = master.to(self.mesh.device, non_blocking=True)  # copied as it is, then cast on the device
            if self.mesh.shard_size == 1 or master.dtype != own.dtype or master.device != own.device:
                master = own.copy_(master)  # cast before the gather: fewer bytes travel
            self._gathering = self.mesh.all_gather_into(self.flat, master, self._label)
            if stream is not None:
                self._copied = stream.record_event()
        self.is_whole = True

    def wait(self) -> None:
        """Return when a gather that was started has ended."""
        if self._copied is not None:
            self._copied.wait(torch.cuda.current_stream(self.mesh.device))
            self._copied = None
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

    def master(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, from the master weights, as its own CPU tensor, one at a time; a collective."""
        part = self.shard.data.numel()
        pieces = {slot.name: (self.shard.data[here], there) for slot, here, there in self.shard.overlaps()}
        for slot in self.shard.slots:
            whole = torch.empty(slot.numel, dtype=self.shard.data.dtype, device=self.mesh.device)
            if slot.name in pieces:
                piece, there = pieces[slot.name]
                whole[there] = piece.to(self.mesh.device)
            for rank in range(slot.offset // part, -(-(slot.offset + slot.numel) // part)):
                first, last = max(rank * part - slot.offset, 0), min((rank + 1) * part - slot.offset, slot.numel)
                self.mesh.broadcast(whole[first:last], rank)
            yield slot.name, whole.view(slot.shape).cpu()
            del whole  # while the next one is made, this one must not stay

    # Gradients -------------------------------------------------------------------------------------------------

    def lend_sums(self) -> None:
        """Where whole gradients are summed here, show each parameter its part of the sum so far, as ``main_grad``.

        Who computes a gradient may add it there, as the log-probability does with that of its weight: then it is
        neither rounded for each micro-batch nor held a second time. In float32 nothing is rounded, and gradients are
        left to be added in autograd's order. In the first micro-batch of a step there is no sum yet: its buffer would
        stand beside all activations, where the gradient alone takes less; later ones begin beside all sums anyway.
        """
        if self.precision.compute != torch.float32:
            self._show(self.shard.grad if self._is_alone else self._unreduced)

    def _show(self, flat: torch.Tensor | None) -> None:
        for slot, parameter in zip(self.shard.slots, self.parameters, strict=True):
            cast(Any, parameter).main_grad = None if flat is None else self._view(flat, slot)

    def start_reduce(self, reduce: bool = True) -> None:
        """Begin to sum the gradients over the ranks; without ``reduce`` keep them whole, for a later sum."""
        self._show(None)
        if self._is_alone:
            self.shard.grad = self._collect(self.shard.grad, torch.float32)
            return
        if self._unreduced is not None or not reduce:
            self._unreduced = self._collect(self._unreduced, torch.float32)
            if not reduce:
                return
            gradient, self._unreduced = self._unreduced.to(self.precision.reduce), None
        else:
            gradient = self._collect(None, self.precision.reduce)
        self._scattering = (self.mesh.reduce_scatter(gradient, self._label), gradient)

    def _collect(self, flat: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Take the parameters' gradients: add them to ``flat``, or copy them to a new flat buffer of ``dtype``.

        They lie apart until their backward is over: a buffer from its beginning on would stand beside activations that
        are freed meanwhile.
        """
        own = zip(self.shard.slots, self.parameters, strict=True)
        found = {slot: parameter.grad for slot, parameter in own if parameter.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None
        join: Callable[..., None] = torch._foreach_add_
        if flat is None:
            join = torch._foreach_copy_
            flat = torch.empty(self.flat.numel(), dtype=dtype, device=self.flat.device)
            end = 0
            for slot in found:
                flat[end : slot.offset].zero_()  # parameters without a gradient, and the gaps between them
                end = slot.offset + slot.numel
            flat[end:].zero_()
        if found:
            join([self._view(flat, slot) for slot in found], list(found.values()))
        return flat

    def sum_copies(self) -> None:
        """When the sum over one copy's ranks is there, begin that over the copies of the model."""
        if self._scattering is None:
            return
        work, gradient = self._scattering
        if work is not None:
            work.wait()
        self._scattering = None
        part = gradient[self.shard.start : self.shard.start + self.shard.data.numel()]
        self._summing = (self.mesh.sum_replicas(part, self._label), part)
        if self.mesh.num_replicas == 1:
            self.finish_reduce()

    def finish_reduce(self) -> None:
        """Add the sum to the shard's gradient."""
        self.sum_copies()
        if self._summing is None:
            return
        work, part = self._summing
        if work is not None:
            work.wait()
        self._summing = None
        if self.shard.grad is None:
            self.shard.grad = part.to(torch.float32, copy=self.mesh.shard_size > 1)  # the whole buffer can go
        else:
            self.shard.grad.add_(part)

    def check_gradients_taken(self) -> None:
        """Raise RuntimeError where autograd delivered a gradient after the block's own were collected."""
        for slot, parameter in zip(self.shard.slots, self.parameters, strict=True):
            if parameter.grad is not None:
                raise RuntimeError(f"a gradient of {slot.name} came after that of its block; is it used elsewhere?")

    def drop_gradient(self) -> None:
        """Forget every gradient, reduced or not."""
        self._show(None)
        self.shard.grad = self._unreduced = self._scattering = self._summing = None
        for parameter in self.parameters:
            parameter.grad = None


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
