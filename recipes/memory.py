"""Memory of a run: planned at its start, watched while it goes on, and compared at its end."""

import dataclasses
import threading
from collections.abc import Sequence

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
    """Largest resident memory of this process and all its children, by looking twice a second."""

    def __init__(self) -> None:
        self._peak, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            self._peak = max(self._peak, tree_rss_gib())

    def stop(self) -> float:
        """Ends the watch and returns the peak in GiB; shared pages count once for each process."""
        self._ended.set()
        self._thread.join()
        return max(self._peak, tree_rss_gib())
