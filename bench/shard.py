"""A training step of our sharding beside that of PyTorch's ``fully_shard``: time, peak memory, and equal losses.

    python -m groupwise.bench.shard [--shapes 2x8x512x512] [--out FILE]

Shapes are ranks x layers x hidden x tokens of a rank. Both train the same decoder on the same tokens with a fused AdamW
and clipping, in the same processes, in turns: float32 over gloo on a CPU; bfloat16 with float32 master weights over
nccl on GPUs, one rank each (``fully_shard`` then runs in a group of one). ``time_ratio`` and ``memory_ratio`` are ours
over theirs. Memory is that of PyTorch's tensors, at its highest, from nothing to the end of a contender's second step:
on a GPU as the allocator counts it, on a CPU between operations; what gloo or nccl hold themselves is not counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groupwise.bench import common
from groupwise.engine import AdamW, Mesh, Model, ShardedModel
from groupwise.engine.config import ModelConfig
from groupwise.engine.model import PackedAttention
from groupwise.engine.optim import clip_grad_norm

GPU_SHAPES = [(1, 28, 1536, 8192)]
CPU_SHAPES = [(2, 8, 512, 512), (4, 8, 512, 256)]
LR, MAX_NORM, CHECKED_STEPS = 1e-4, 1.0, 5

Step = Callable[[Tensor], Tensor]  # token ids [T] -> loss


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under this mode held after any operation.

    On a CPU the profiler's count is no use here: what gloo's threads free it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it runs first, and its operations on local tensors come here
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is Tensor:  # subclasses hold no bytes of their own
                storage = StorageWeakRef(x.untyped_storage())
                self._live.setdefault(storage.cdata, storage)
        self._live = {cdata: storage for cdata, storage in self._live.items() if not storage.expired()}
        # Asked each time: a storage can be resized without an operation.
        held = map(torch.UntypedStorage._new_with_weak_ptr, self._live)
        total = sum(storage.nbytes() for storage in held if storage is not None)
        self.peak = max(self.peak, total)
        return out


def peak_mib(run: Callable[..., Any], form: Any, device: torch.device) -> float:
    if device.type == "cuda":
        return common.peak_extra_mib(run, (form,), device)
    with LiveBytes() as live:
        run(form)
    return live.peak / 2**20


def make_model(layers: int, hidden: int, mesh: Mesh) -> Model:
    heads = hidden // 64
    config = ModelConfig(
        vocab_size=151936 if mesh.device.type == "cuda" else 4096,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )
    return Model(config).to(mesh.device)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    tokens = len(ids)
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=ids.device)
    positions = torch.arange(tokens, device=ids.device)
    logprob, _ = model(ids, positions, PackedAttention(bounds, tokens), targets=ids.roll(-1))
    return -logprob.sum() / tokens


def ours(model: Model, mesh: Mesh, dtype: torch.dtype) -> Step:
    policy = ShardedModel(model, mesh, compute_dtype=dtype)
    optimizer = AdamW(policy.shards, lr=LR)

    def step(ids: Tensor) -> Tensor:
        policy.zero_grad()
        loss = loss_of(policy, ids)
        policy.backward(loss)
        clip_grad_norm(policy.shards, MAX_NORM, mesh)
        optimizer.step()
        return loss.detach()

    return step


def theirs(model: Model, mesh: Mesh, dtype: torch.dtype) -> Step:
    grid = init_device_mesh(mesh.device.type, (mesh.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=grid, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)  # sums, as ours are
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.detach()

    return step


def measure(rank: int, shape: tuple[int, ...], args: Namespace, folder: str) -> None:
    """What one rank does; rank 0 leaves the row of the table in ``folder``."""
    world_size, layers, hidden, tokens = shape
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with Mesh.create(init_method=f"file://{folder}/rendezvous") as mesh:
        if mesh.group is None:
            backend = "nccl" if args.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(rank)
        inputs = [(torch.randint(4096, (tokens,), generator=generator).to(mesh.device),) for _ in range(3)]
        contenders = {form.__name__: form for form in (ours, theirs)}

        def train(form: Callable[..., Step]) -> None:
            step = form(make_model(layers, hidden, mesh), mesh, dtype)
            for _ in range(2):
                step(*inputs[0])

        memory = {name: peak_mib(train, form, mesh.device) for name, form in contenders.items()}
        steps = {name: form(make_model(layers, hidden, mesh), mesh, dtype) for name, form in contenders.items()}
        check(steps, inputs, 1e-5 if dtype == torch.float32 else 2e-2)
        times = common.in_turns(steps, inputs, args.repeats)
        row = {
            "ranks x layers x hidden x tokens": "x".join(map(str, shape)),
            "threads": torch.get_num_threads(),
            **{f"{name}_ms": time for name, time in times.items()},
            **{f"{name}_peak_mib": peak for name, peak in memory.items()},
            "time_ratio": times["ours"] / times["theirs"],
            "memory_ratio": memory["ours"] / memory["theirs"],
        }
        if rank == 0:
            torch.save(row, f"{folder}/row")
        del steps
        if mesh.group is None:
            dist.destroy_process_group()


def check(steps: dict[str, Step], inputs: list[tuple[Tensor]], tolerance: float) -> None:
    """Stop unless both have the same losses."""
    for number in range(CHECKED_STEPS):
        first, second = (step(*inputs[number % len(inputs)]).item() for step in steps.values())
        if abs(first - second) > tolerance * abs(second):
            sys.exit(f"shard: the loss of step {number} is {first}, that of fully_shard {second}")


def main() -> None:
    args = common.arguments(__doc__)
    rows = []
    for shape in common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (shape, args, folder), nprocs=shape[0])
            rows.append(torch.load(Path(folder) / "row"))
    common.report("shard", rows, args)


if __name__ == "__main__":
    main()
