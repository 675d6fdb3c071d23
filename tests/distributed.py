"""Run a function on several gloo ranks of this machine, and count what they send, for tests."""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["torch", "pytest", "groupwise.recipes.train", "groupwise.recipes.evaluate"]


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call ``fn(mesh, *args)`` on ``world_size`` gloo ranks and return the results in the order of the ranks.

    ``fn`` is a function at the top level of a test file; its results must survive torch.save.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message; the others are ended) or time ran out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(fn, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(world_size)]


class CountingMesh:
    """A mesh that counts its asynchronous collectives, and what is in them."""

    def __init__(self, mesh: Any) -> None:
        self._mesh, self.events = mesh, []
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)

    def _count(self, kind: str, tensor: torch.Tensor) -> None:
        self.calls[kind] += 1
        self.events.append(kind[0].upper())
        self.elements[kind] += tensor.numel()
        self.dtypes.add((kind, tensor.dtype))

    def all_gather_into(self, whole: torch.Tensor, part: torch.Tensor, label: str) -> Any:
        self._count("gather", whole)
        return self._mesh.all_gather_into(whole, part, label)

    def reduce_scatter(self, whole: torch.Tensor, label: str) -> Any:
        self._count("scatter", whole)
        return self._mesh.reduce_scatter(whole, label)

    def sum_replicas(self, part: torch.Tensor, label: str) -> Any:
        if self.num_replicas > 1:
            self._count("replicas", part)
        return self._mesh.sum_replicas(part, label)


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    running = list(ranks)
    while running:
        ended = multiprocessing.connection.wait([process.sentinel for process in running], deadline - time.monotonic())
        failed = [process for process in running if process.sentinel in ended and process.exitcode != 0]
        if failed:
            time.sleep(0.2)  # the rank that failed first has its say, not the one that lost its peer
            errors = [path.read_text() for path in sorted(folder.glob("error-*"), key=lambda p: p.stat().st_mtime)]
            first = errors[0] if errors else "it left no traceback"
            raise RuntimeError(f"rank {ranks.index(failed[0])} ended with status {failed[0].exitcode}:\n{first}")
        if not ended:
            raise RuntimeError(f"ranks {[ranks.index(process) for process in running]} did not end in time")
        running = [process for process in running if process.sentinel not in ended]


def _rank(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    from groupwise.engine.mesh import Mesh

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        with Mesh.create(timeout_s=120, init_method=f"file://{folder}/rendezvous") as mesh:
            result = fn(mesh, *args)
            torch.save(result, f"{folder}/result-{rank}")
            del result
    except BaseException:
        Path(f"{folder}/error-{rank}").write_text(traceback.format_exc())
        raise
