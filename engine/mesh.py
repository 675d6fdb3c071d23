"""Where this process stands among the others: rank, device, backend, and the collectives that everything else uses.

``torchrun --nproc-per-node 2 -m groupwise.recipes.grpo …`` gives each process its environment; without that
environment the world is one process, no process group exists, and every collective returns what it was given.

The ranks stand in a grid: ``shard_size`` neighbours hold the parts of one copy of the model, and the ranks with the
same place in their row hold the same part of each copy (hybrid sharding). With four ranks and ``shard_size`` 2::

    copy 0:  rank 0, rank 1        shards: ranks of one row        replicas: ranks of one column
    copy 1:  rank 2, rank 3
"""

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from .errors import UserError
from .watch import Collective, RankLost, Watch

Over = Literal["world", "shards", "replicas"]
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# PyTorch 2.13 gave these two new names, and warns of the old ones, the only ones that 2.11 knows.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Mesh:
    """The ranks of one launch. Make it with :meth:`create`, end it with :meth:`close` or a ``with`` block.

    Every collective raises RankLost, whose message names the rank and the collective, where another rank died, failed
    or did not come in time; ``engine/watch.py`` says how that is known. All ranks enter the same ones in one order.

    Attributes: ``rank``, ``world_size``, ``local_rank``, ``local_world_size``, ``device`` (where this rank computes),
    ``backend`` ("nccl", "gloo", or "none" in a world of one), ``shard_size`` (ranks that hold one copy of the model),
    ``shard_rank`` (this rank's place among them), ``num_replicas`` (copies of the model), ``replica_rank`` (which of
    them this rank helps to hold), ``group`` (None in a world of one) and ``watch`` (an eye on the other ranks).
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        local_world_size: int = 1,
        device: torch.device | None = None,
        backend: str = "none",
        group: dist.ProcessGroup | None = None,
        shard_size: int = 0,
        timeout_s: float = 600.0,
        reason: str = "",
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.shard_size = _divisor(shard_size, world_size)
        self.num_replicas = world_size // self.shard_size
        self.replica_rank, self.shard_rank = divmod(rank, self.shard_size)
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.device = device or torch.device("cpu")
        self.backend, self.group, self._reason = backend, group, reason
        self.watch = Watch(rank, world_size, timeout_s, on_cuda=backend == "nccl")
        self._groups = {"world": group, "shards": group, "replicas": None}
        if group is not None and self.num_replicas > 1:
            ranks = torch.arange(world_size).view(self.num_replicas, self.shard_size)
            self._groups["shards"] = _row(ranks, rank)
            self._groups["replicas"] = _row(ranks.T, rank)

    @classmethod
    def create(cls, timeout_s: float = 600.0, shard_size: int = 0, init_method: str = "env://") -> "Mesh":
        """Join the launch that the environment describes.

        CUDA with nccl when this machine has a GPU for each of its ranks, otherwise CPU with gloo; on a CPU the cores
        are divided among the ranks of the machine.

        Args:
            timeout_s: seconds after which a collective that some rank never entered ends this rank.
            shard_size: ranks that hold one copy of the model, a divisor of all; 0: all of them, one copy.
            init_method: how the ranks find each other; torchrun's environment by default.

        Raises:
            UserError: RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no valid number; shard_size does not divide
                the number of ranks; the ranks do not meet, or could not meet again after a restart.
        """
        world_size = _env_int("WORLD_SIZE", 1, minimum=1)
        rank = _env_int("RANK", 0)
        local_rank = _env_int("LOCAL_RANK", rank)
        local_world_size = _env_int("LOCAL_WORLD_SIZE", world_size, minimum=1)
        if rank >= world_size:
            raise UserError(f"RANK is {rank} but WORLD_SIZE is {world_size}; launch the ranks with torchrun.")
        _divisor(shard_size, world_size)  # said before the ranks meet
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus >= local_world_size:
            device, backend, reason = torch.device("cuda", local_rank), "nccl", ""
            torch.cuda.set_device(device)
        else:
            reason = "no GPU" if gpus == 0 else f"{gpus} GPU for {local_world_size} ranks on this machine"
            device, backend = torch.device("cpu"), "gloo"
            if local_world_size > 1:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        group, store = None, None
        if world_size > 1:
            timeout = timedelta(seconds=2 * timeout_s + 30)  # the watch, which names the rank, comes first
            several_hosts = world_size != local_world_size
            try:
                store = _store(init_method, rank, world_size, several_hosts, timeout)
                dist.init_process_group(
                    backend,
                    store=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                    device_id=device if backend == "nccl" else None,
                )
            except RuntimeError as error:
                raise UserError(_why_they_do_not_meet(error, init_method, rank, backend)) from error
            group = dist.group.WORLD
        mesh = cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            device=device,
            backend=backend if world_size > 1 else "none",
            group=group,
            shard_size=shard_size,
            timeout_s=timeout_s,
            reason=reason,
        )
        if store is not None:
            mesh.watch.start(store)
        return mesh

    def describe(self) -> str:
        """One line for the start of a run: how many ranks, on what, and why not on GPUs."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks over {self.backend}"
        if self.num_replicas > 1:
            ranks += f" ({self.num_replicas} copies of the model, each on {self.shard_size})"
        if self.device.type == "cuda":
            return f"{ranks} on {torch.cuda.get_device_name(self.device)}"
        threads = torch.get_num_threads()
        where = f"cpu with {threads} thread{'' if threads == 1 else 's'} a rank"
        return f"{ranks} on {where}" + (f" ({self._reason})" if self._reason else "")

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", over: Over = "world") -> torch.Tensor:
        """Reduce ``tensor`` (any shape, on ``device``) over the ranks, in place, and return it; op: sum, max or min."""
        if (group := self._groups[over]) is not None:
            with self.watch.inside(f"all-reduce ({op}) over the {over}"):
                dist.all_reduce(tensor, op=REDUCTIONS[op], group=group)
        return tensor

    def all_gather_into(self, whole: torch.Tensor, part: torch.Tensor, label: str = "") -> Collective | None:
        """Start gathering ``part[n]`` of each shard rank into ``whole[shard_size * n]``; wait() before use.

        ``part`` may be this rank's own slice of ``whole``; ``label`` says in an error what was gathered.
        """
        if (group := self._groups["shards"]) is None:
            return None
        if self.backend == "gloo":  # its all-gather receives into a copy; this is in place, in half of the time
            pieces = whole.chunk(self.shard_size)
            pieces[self.shard_rank].copy_(part)
            broadcasts = [partial(dist.broadcast, piece, group_src=i) for i, piece in enumerate(pieces)]
            return self._start("all-gather", label, group, broadcasts)
        return self._start("all-gather", label, group, [partial(_all_gather, whole, part)])

    def reduce_scatter(self, whole: torch.Tensor, label: str = "") -> Collective | None:
        """Start summing ``whole[shard_size * n]`` over the shard ranks, in place.

        Afterwards this rank's slice of n holds its part of the sum, and the rest is undefined.
        """
        if (group := self._groups["shards"]) is None:
            return None
        part = whole.chunk(self.shard_size)[self.shard_rank]
        # gloo's reduce-scatter is an all-reduce of a copy
        in_place = partial(dist.all_reduce, whole) if self.backend == "gloo" else partial(_reduce_scatter, part, whole)
        return self._start("reduce-scatter", label, group, [in_place])

    def sum_replicas(self, part: torch.Tensor, label: str = "") -> Collective | None:
        """Start summing ``part``, in place, over the ranks that hold the same part of each copy of the model."""
        if (group := self._groups["replicas"]) is None:
            return None
        return self._start("all-reduce over the replicas", label, group, [partial(dist.all_reduce, part)])

    def _start(
        self, what: str, label: str, group: dist.ProcessGroup, parts: Sequence[Callable[..., dist.Work]]
    ) -> Collective:
        call = self.watch.enter(f"{what} of {label}" if label else what)
        call.start([partial(part, group=group, async_op=True) for part in parts])
        return call

    def broadcast(self, tensor: torch.Tensor, shard_rank: int) -> torch.Tensor:
        """Fill ``tensor`` on all ranks of this copy of the model with that of one of them, in place."""
        if (group := self._groups["shards"]) is not None:
            with self.watch.inside("broadcast over the shards"):
                dist.broadcast(tensor, group=group, group_src=shard_rank)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, in the order of the ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.watch.inside("all-gather of objects"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The picklable ``value`` of rank ``src``, on every rank."""
        if self.group is None:
            return value
        box = [value]
        with self.watch.inside(f"broadcast of an object of rank {src}"):
            dist.broadcast_object_list(box, src=src, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.group is not None:
            with self.watch.inside("barrier"):
                dist.barrier(group=self.group)

    def close(self) -> None:
        """Leave the process group; safe to call twice.

        A gloo process whose threads are still held by live objects at its end may abort, so garbage is collected and
        the ranks wait for each other before the group is destroyed.
        """
        if self.group is None:
            return
        gc.collect()
        self.watch.announce("")
        self.barrier()
        self._destroy()

    def announce(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends, and of what."""
        if isinstance(error, RankLost):
            self.watch.announce(error.cause)
        elif isinstance(error, KeyboardInterrupt):
            self.watch.announce("")
        else:
            kind, said = type(error).__name__, str(error).strip().partition("\n")[0]
            self.watch.announce(f"{self.watch.names([self.rank])} ended with {kind}{said and ': '}{said}")

    def _destroy(self) -> None:
        self.watch.stop()
        self.group = None
        self._groups = dict.fromkeys(self._groups)
        gc.collect()
        dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self.group is not None:  # the other ranks may be elsewhere: waiting for them would hide the error
            self.announce(error)
            self._destroy()


def _store(init_method: str, rank: int, world_size: int, several_hosts: bool, timeout: timedelta) -> dist.Store:
    """Where the ranks meet.

    torchrun keeps one store for all attempts, in which a restarted rank would find the addresses of dead ones, so each
    attempt takes a prefix. Of several hosts each counts its own attempts: there torchrun must make a store for each.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if several_hosts and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            "torchrun --max-restarts on several hosts hands restarted ranks the addresses of dead ones; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun on every host."
        )
    store: dist.Store = next(dist.rendezvous(init_method, rank, world_size, timeout=timeout))[0]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store if several_hosts else dist.PrefixStore(f"attempt {attempt}", store)


def _why_they_do_not_meet(error: RuntimeError, init_method: str, rank: int, backend: str) -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    where = address if init_method == "env://" else init_method
    if "EADDRINUSE" in str(error):
        return f"the port of {where} is in use on this host; choose another MASTER_PORT, or let torchrun choose it."
    return (
        f"rank {rank} did not meet the others by way of {where} ({str(error).splitlines()[0]}); see that this is rank "
        f"0's host, which all others reach, and that {backend.upper()}_SOCKET_IFNAME names the network between them."
    )


def _divisor(shard_size: int, world_size: int) -> int:
    if world_size % (shard_size or world_size):
        raise UserError(
            f"shard_size is {shard_size}, which does not divide the {world_size} ranks of this launch; choose a "
            "divisor, or 0 for one copy of the model over all ranks."
        )
    return shard_size or world_size


def _row(ranks: torch.Tensor, rank: int) -> dist.ProcessGroup | None:
    """The group of the row that holds ``rank``; a collective over all ranks, and None where rows are of one rank."""
    if ranks.shape[1] == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return group


def _env_int(name: str, default: int, minimum: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdigit() or int(text) < minimum:
        raise UserError(f"{name} is {text!r} but must be an integer of at least {minimum}; launch with torchrun.")
    return int(text)
