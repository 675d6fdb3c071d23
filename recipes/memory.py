"""Memory of a run: planned at its start, watched while it goes on, and compared at its end."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Self

import torch

from ..engine.config import Config
from ..engine.hf import read_config
from ..engine.mesh import Mesh
from ..engine.metrics import free_memory, peak_memory_gib, tree_rss_gib
from ..engine.planner import Plan, plan_memory
from ..engine.proposal import check_fits
from ..engine.settings import kv_bytes


class PlannedMemory:
    """The plan of a run, made and checked at its start, and compared at its end.

    Args:
        config: of the run.
        mesh: its ranks.
        phases: those of ``engine.planner.PHASES`` that it goes through; none: there is nothing to plan.

    Raises:
        UserError: this machine's memory is too small.
    """

    def __init__(self, config: Config, mesh: Mesh, phases: Sequence[str]) -> None:
        self._device = mesh.device
        self._before = peak_memory_gib(mesh.device)
        self.plan: Plan | None = None
        if phases:
            memory = free_memory(mesh.device, mesh.local_world_size)
            config = settled(config, memory)
            self.plan = plan_memory(config, mesh.world_size, mesh.device.type, phases)
            check_fits(config, self.plan, memory)

    def report(self) -> str:
        """One line for the end of a run: planned against measured, of this rank."""
        if self.plan is None:
            return "memory: not planned"
        planned = f"memory: planned {spell(self.plan.peak)} (phase {self.plan.fullest.name})"
        if self._device.type == "cuda":
            measured = torch.cuda.max_memory_allocated(self._device)
            return f"{planned}, measured {spell(measured)}; planned / measured {self.plan.peak / measured:.2f}"
        grown = int((peak_memory_gib(self._device) - self._before) * 2**30)
        beside = "with libraries, Python objects, data, and freed memory that malloc keeps"
        return f"{planned} of tensors; resident memory grew by at most {spell(grown)}, {beside}"


def settled(config: Config, memory: float) -> Config:
    """The configuration with the shape of ``model.folder``, if there is one, and ``rollout.kv_memory`` in GiB.

    ``memory``: bytes that a rank has, of which ``kv_memory`` may be a share.
    """
    rollout = dataclasses.replace(config.rollout, kv_memory=f"{kv_bytes(config.rollout.kv_memory, memory) / 2**30:.6g}")
    model = read_config(config.model.folder) if config.model.folder else config.model
    return dataclasses.replace(config, model=model, rollout=rollout)


def spell(size: float) -> str:
    """Bytes in decimal GB or MB, as vendors name memory."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


class MemoryWatch:
    """Looks at the memory of this process and all its children twice a second, within a ``with``.

    Attributes:
        peak_gib: the most that was resident; pages that they share count once for each process.
    """

    def __init__(self) -> None:
        self.peak_gib, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self._look()

    def _look(self) -> None:
        self.peak_gib = max(self.peak_gib, tree_rss_gib())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
