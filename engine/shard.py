"""A module whose parameters live in shards: gathered before a block needs them, freed after it, gradients scattered.

Each block (an entry of ``model.layers``) is one :class:`Unit`, and everything else is the root unit. A unit has one
flat buffer, and its parameters are views of that buffer: gathering fills the buffer, freeing takes its storage away,
and gradients are written straight into a flat gradient. Nothing is copied in or out::

    policy = ShardedModel(Model(config), mesh, compute_dtype=torch.bfloat16)
    loss = ...                            # of policy(input_ids, positions, attention, targets=...)
    policy.backward(loss)                 # loss.backward() and, should this rank's loss lack a graph, the collectives
    optimizer.step(lr)                    # AdamW(policy.shards, ...)

The order of the collectives depends on the order of the units alone, never on which of them a rank really used. So a
rank with an empty batch, or one that skips a block, keeps the others company instead of hanging them.

    forward    G(root) G(0) | G(1) runs while 0 computes | … | 0 to L-1 are freed one after another
    backward   G(L-1) runs while the head computes | G(L-2) while L-1 computes | S(L-1), G(L-3) while L-2 … | S(root)

With several copies of the model (hybrid sharding, see ``engine/mesh.py``) a sum over the copies follows each S.
Gradients are SUMS over ranks and micro-batches: a loss is divided by its global count before the backward pass.

A model that no rank can hold is made on the meta device and filled tensor by tensor::

    with torch.device("meta"):
        model = Model(config)
    policy = ShardedModel(model, mesh)
    policy.fill(model.initial_weights(seed))       # or load_weights(policy, folder), from a Hugging Face folder
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .batch import Batch
from .mesh import Mesh
from .model import PackedAttention
from .unit import Precision, Shard, Unit

Blocks = Iterable[nn.Module]

_owned: WeakSet[nn.Module] = WeakSet()  # modules whose parameters already are views of some unit's buffer


class ShardedModel(nn.Module):
    """``module`` with sharded parameters; it is called as ``module`` is, and takes its parameters over.

    Args:
        module: any module with equal parameters on every rank; it moves to the mesh's device.
        mesh: the ranks.
        compute_dtype: dtype of the gathered parameters; the master weights stay float32.
        reduce_dtype: dtype in which gradients are summed over the ranks; over micro-batches they are summed in float32.
        reshard_after_forward: free a block after its forward and gather it again for its backward (two gathers a
            block and step), or keep it (one gather, more memory).
        activation_checkpointing: keep only the input of each block, and compute the block again in the backward pass.
        offload: the shards live in the host's memory, pinned, and are copied to the device when a block is gathered.
        units: the blocks in the order in which a forward runs them, or a function of the module that returns them;
            ``module.layers`` by default. A parameter of two blocks, or of a block and the rest, belongs to the root.
        trainable: False makes a frozen copy: master weights in compute_dtype, no gradients.

    Raises:
        ValueError: no ``layers`` and no ``units``; a module that is sharded already; parameters frozen in part; a
            buffer on the meta device.
        RuntimeError: from a forward that runs a block twice or out of order, from a backward that comes after
            another forward, and from a gradient that reaches a block after its gradient was reduced.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        *,
        compute_dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype = torch.float32,
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        offload: bool = False,
        units: Blocks | Callable[[nn.Module], Blocks] | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if module in _owned:
            raise ValueError("the module is sharded already; give each ShardedModel a module of its own.")
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        if trainable and frozen:
            raise ValueError(f"{frozen[0]} does not require a gradient; train all parameters or use trainable=False.")
        blocks = _blocks(module, units)
        self.module, self.mesh, self.compute_dtype = module, mesh, compute_dtype
        self._reshard, self._trainable = reshard_after_forward, trainable
        module.requires_grad_(trainable)
        _move_buffers(module, mesh.device)
        precision = Precision(compute_dtype, torch.float32 if trainable else compute_dtype, reduce_dtype, offload)
        grouped = _group_parameters(module, blocks)
        names = {part: name for name, part in module.named_modules()}
        own = zip(blocks, grouped[:-1], strict=True)
        self._units = [Unit(names[block], parameters, mesh, precision) for block, parameters in own]
        self._root = Unit("", grouped[-1], mesh, precision)
        _replace_parameters(module, {old: new for unit in self._all for old, new in unit.replaced.items()})
        self._grad_forward = False  # the forward that runs, or ran last, builds a graph
        self._pending = False  # its backward has not come yet
        self._in_backward = False
        self._reduce = True  # after this backward
        self._serial = 0  # of the last forward with a graph
        self._next = 0  # forward: the first unit whose gather is not issued; backward: the last unit that was reached
        self._latest = -1  # the last block that ran in this forward
        self._depth = 0  # of gathered()
        module.register_forward_pre_hook(lambda *_: self._before_forward())
        module.register_forward_hook(lambda _module, _args, output: self._after_forward(output))
        for index, block in enumerate(blocks):
            if activation_checkpointing and trainable:
                block.forward = _recomputed(block.forward)
            block.register_forward_pre_hook(lambda *_, i=index: self._before_unit(i))
            block.register_forward_hook(lambda _module, _args, output, i=index: self._after_unit(i, output))
        _owned.add(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module's forward takes and returns."""
        return self.module(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def shards(self) -> list[Shard]:
        """This rank's part of every unit: the root, then the blocks in order."""
        return [unit.shard for unit in self._all]

    @property
    def _all(self) -> list[Unit]:
        return [self._root, *self._units]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every shard (their memory is given back)."""
        for unit in self._all:
            unit.drop_gradient()

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set the master weights from whole tensors by name, one after another; every rank gets the same ones.

        Raises:
            ValueError: a tensor that the model has not, or of another shape, or one that is missing.
        """
        places: dict[str, list[tuple[torch.Tensor, slice]]] = {}
        shapes = {slot.name: slot.shape for shard in self.shards for slot in shard.slots}
        for shard in self.shards:
            for slot, here, there in shard.overlaps():
                places.setdefault(slot.name, []).append((shard.data[here], there))
        for name, tensor in weights:
            if shapes.pop(name, None) != tuple(tensor.shape):
                raise ValueError(f"{name} of shape {list(tensor.shape)} is no parameter of the model, or comes twice.")
            for own, there in places.get(name, []):
                own.copy_(tensor.reshape(-1)[there])
            del tensor  # while the next one is made, this one must not stay
        if shapes:
            raise ValueError(f"no values for {next(iter(shapes))} and {len(shapes) - 1} other parameters.")

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """All parameters whole at once, in the flat buffers themselves (no second copy), freed at the end.

        Yields the wrapped module, for reading: a change to its parameters is lost, and a step of the optimiser is
        seen only by the next ``gathered()``.
        """
        if self._depth == 0:
            for unit in self._all:
                unit.free()
                unit.start_gather()
            for unit in self._all:
                unit.wait()
                unit.pinned = True
        self._depth += 1
        try:
            yield self.module
        finally:
            self._depth -= 1
            if self._depth == 0:
                for unit in self._all:
                    unit.pinned = unit.is_master
                self._settle()

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of each target of a packed batch under this model, without a graph: [T] float32.

        For a module that is called as ``Model`` is; the logits are divided by ``temperature``.
        """
        attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
        with torch.no_grad():
            logprob, _ = self(
                batch.input_ids, batch.positions, attention, targets=batch.targets, temperature=temperature
            )
        return logprob

    def state_dict_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole master tensor on the CPU), unit by unit, then persistent buffers; every rank must run it out.

        A parameter under two names comes under the first, and names are those of the wrapped module.
        """
        for unit in self._all:
            yield from unit.master()
        persistent = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in persistent:
                yield name, buffer.to("cpu", copy=True)

    def backward(self, loss: torch.Tensor, reduce: bool = True) -> None:
        """``loss.backward()``, also when this rank's loss does not depend on the model: the collectives run anyway.

        Args:
            loss: a scalar.
            reduce: False keeps the gradients whole on this rank until a backward with True, the same on all ranks:
                less communication, more memory.
        """
        self._reduce = reduce
        try:
            if loss.requires_grad:
                loss.backward()
            if self._pending:
                with torch.no_grad():
                    self._begin_backward(self._serial, queue=False)
                    self._end_backward()
        finally:
            self._reduce = True

    # Forward ---------------------------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        if self._in_backward:  # an error ended the last backward half-way
            self._in_backward = self._pending = False
        self._grad_forward = torch.is_grad_enabled() and self._trainable
        if self._grad_forward:
            self._serial += 1
            self._pending = False
            self._root.lend_sums()
        for unit in self._all:
            unit.free()  # what an earlier forward left whole may be older than the master
        self._next, self._latest = 0, -1
        self._root.start_gather()
        self._gather_up_to(0)
        self._root.wait()

    def _gather_up_to(self, index: int) -> None:
        while self._next <= min(index, len(self._units) - 1):
            self._units[self._next].start_gather()
            self._next += 1

    def _before_unit(self, index: int) -> None:
        if self._in_backward:  # activation checkpointing runs the block again: it is whole
            return
        if self._grad_forward and index <= self._latest:
            name = self._units[index].shard.name
            raise RuntimeError(f"block {name} ran twice or out of order; a forward runs each unit once, in their order")
        self._latest = index
        self._gather_up_to(index + 1)
        self._units[index].start_gather()
        self._units[index].wait()

    def _after_unit(self, index: int, output: Any) -> None:
        if self._in_backward:
            return
        if self._grad_forward:
            for tensor in _tensors(output):
                tensor.register_hook(lambda _grad, serial=self._serial: self._backward_reaches(index, serial))
        if self._reshard or not (self._grad_forward or self._pending):
            self._units[index].free()

    def _after_forward(self, output: Any) -> None:
        self._gather_up_to(len(self._units) - 1)
        if self._grad_forward:
            self._pending = True
            for tensor in _tensors(output):
                tensor.register_hook(lambda _grad, serial=self._serial: self._begin_backward(serial))
        self._settle()

    def _settle(self) -> None:
        """Between passes only what a coming backward wants is whole."""
        if not self._pending:
            self._root.free()
        if not self._pending or self._reshard:
            for unit in self._units:
                unit.free()

    # Backward --------------------------------------------------------------------------------------------------

    def _begin_backward(self, serial: int, queue: bool = True) -> None:
        if serial != self._serial or not (self._pending or self._in_backward):
            raise RuntimeError("backward of an older forward: run each backward, once, before the next forward")
        if self._in_backward:
            return
        self._pending, self._in_backward = False, True
        self._next = len(self._units)
        if queue:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._root.start_gather()
        self._root.wait()
        if self._units:
            self._units[-1].start_gather()

    def _backward_reaches(self, index: int, serial: int) -> None:
        """The gradient of block ``index``'s output is there, so all later blocks are done.

        Autograd runs what was recorded last first; every use of a later block's parameters was recorded after this
        output, so their gradients are complete. A gradient that comes later all the same is found at the end.
        """
        self._begin_backward(serial)
        while self._next > index:
            self._next -= 1
            unit = self._units[self._next]
            unit.start_gather()
            unit.wait()
            self._reduce_after(self._next)  # before the next one is gathered: the memory serves again
            if self._next > 0:
                self._units[self._next - 1].start_gather()

    def _reduce_after(self, index: int) -> None:
        """Free and sum the unit after ``index``; one sum of each kind is under way, so buffers do not pile up."""
        for unit in self._units[index + 3 : index + 4]:
            unit.finish_reduce()
        for unit in self._units[index + 2 : index + 3]:
            unit.sum_copies()
        for unit in self._units[index + 1 : index + 2]:
            unit.free()
            unit.start_reduce(self._reduce)

    def _end_backward(self) -> None:
        self._backward_reaches(0, self._serial)
        self._reduce_after(-1)
        self._root.free()
        self._root.start_reduce(self._reduce)
        for unit in [*self._units[2::-1], self._root]:
            unit.finish_reduce()
        self._in_backward = False
        for unit in self._all:
            unit.check_gradients_taken()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` keeping its inputs alone for the backward pass, which runs it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta and device.type != "meta":
                whose = f"{name}.{key}" if name else key
                raise ValueError(f"the buffer {whose} is on the meta device; give it its values first.")
            part._buffers[key] = buffer if buffer is None else buffer.to(device)


def _replace_parameters(module: nn.Module, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    """Parameters of the meta device cannot take values: others stand in their places, wherever they are used."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter in replaced:
                part._parameters[key] = replaced[parameter]


def _blocks(module: nn.Module, units: Blocks | Callable[[nn.Module], Blocks] | None) -> list[nn.Module]:
    if units is None:
        if not hasattr(module, "layers"):
            kind = type(module).__name__
            raise ValueError(f"{kind} has no attribute 'layers'; say with units= which submodules are the blocks.")
        return list(cast(Blocks, module.layers))
    if isinstance(units, nn.ModuleList) or not callable(units):  # a ModuleList looks callable, as every module does
        return list(units)
    return list(units(module))


def _group_parameters(module: nn.Module, blocks: list[nn.Module]) -> list[list[tuple[str, nn.Parameter]]]:
    """The named parameters of each block, and last those of the root; a tied parameter appears once."""
    owners: dict[nn.Parameter, set[int]] = {}
    inside = {name: i for i, block in enumerate(blocks) for name, part in module.named_modules() if part is block}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        home = [index for prefix, index in inside.items() if name.startswith(prefix + ".")]
        owners.setdefault(parameter, set()).add(home[0] if home else len(blocks))
    grouped: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(blocks) + 1)]
    for name, parameter in module.named_parameters():
        own = owners[parameter]
        grouped[own.pop() if len(own) == 1 else -1].append((name, parameter))
    return grouped


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors with a graph in a module's output: a tensor, or tuples, lists and dicts of them."""
    if isinstance(tree, torch.Tensor):
        if tree.requires_grad:
            yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
