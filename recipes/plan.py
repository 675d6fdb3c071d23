"""The memory of a run before it is launched: bytes of each phase on each rank, and a refusal where they do not fit.

    python -m groupwise.recipes.plan CONFIG [section.key=value ...] [--gpus 8x141GB]

GPUs are named by their number and their memory as vendors state it, in decimal GB. Without ``--gpus`` the ranks are
those of this launch (``WORLD_SIZE``, or one for each GPU) and the memory is this machine's. What does not fit ends with
status 2 and one sentence that names the smallest change that does.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from ..engine.config import Config, describe_settings, load_config
from ..engine.errors import UserError
from ..engine.hf import read_config
from ..engine.mesh import Mesh
from ..engine.metrics import peak_memory_gib
from ..engine.planner import Plan, plan_memory
from ..engine.proposal import check_fits


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
            config = with_shape(config)
            self.plan = plan_memory(config, mesh.world_size, mesh.device.type, phases)
            check_fits(config, self.plan, free_memory(mesh.device, mesh.local_world_size))

    def report(self) -> str:
        """One line for the end of a run: planned against measured, of this rank."""
        if self.plan is None:
            return "memory: not planned"
        planned = f"memory: planned {_spell(self.plan.peak)} (phase {self.plan.fullest.name})"
        if self._device.type == "cuda":
            measured = torch.cuda.max_memory_allocated(self._device)
            return f"{planned}, measured {_spell(measured)}; planned / measured {self.plan.peak / measured:.2f}"
        grown = int((peak_memory_gib(self._device) - self._before) * 2**30)
        beside = "with libraries, Python objects, data, and freed memory that malloc keeps"
        return f"{planned} of tensors; resident memory grew by at most {_spell(grown)}, {beside}"


def with_shape(config: Config) -> Config:
    """The configuration with the shape of the model in ``model.folder``, if there is one."""
    if not config.model.folder:
        return config
    return dataclasses.replace(config, model=read_config(config.model.folder))


def free_memory(device: torch.device, local_ranks: int) -> float:
    """Bytes that a rank may take: all of its GPU, or its share of what this machine has available."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return available * 1024 / local_ranks


def parse_gpus(text: str) -> tuple[int, float]:
    """("8x141GB") -> (8, 141e9).

    Raises:
        UserError: it is written otherwise.
    """
    match = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)GB", text)
    if match is None:
        raise UserError(f"--gpus is {text!r}, expected their number and the memory of one, such as 8x141GB")
    return int(match[1]), float(match[2]) * 1e9


def plan(argv: Sequence[str]) -> None:
    """Prints the table of a command line and checks that it fits.

    Raises:
        UserError: it does not, or the command line is wrong.
    """
    words, gpus = [], ""
    rest = iter(argv)
    for word in rest:
        if word == "--gpus" or word.startswith("--gpus="):
            gpus = word.partition("=")[2] or next(rest, "")
            ranks, memory = parse_gpus(gpus)
        else:
            words.append(word)
    path = words[0] if words and "=" not in words[0] else None
    config = with_shape(load_config(path, words[1:] if path else words))
    device_type = "cuda"
    if not gpus:
        found = torch.cuda.device_count()
        ranks = int(os.environ.get("WORLD_SIZE", found or 1))
        device_type = "cuda" if found >= ranks else "cpu"
        memory = free_memory(torch.device(device_type), ranks)
    planned = plan_memory(config, ranks, device_type)
    Console().print(planned.table())
    check_fits(config, planned, memory)
    print(f"fits: phase {planned.fullest.name} needs {_spell(planned.peak)} of the {_spell(memory)} of a rank")


def _spell(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def main() -> None:
    """Entry point; a mistake of the user, and a plan that does not fit, end with one sentence and status 2."""
    argv = sys.argv[1:]
    if any(word in ("-h", "--help") for word in argv):
        print(f"{__doc__}\nSettings and their defaults:{describe_settings()}")
        return
    try:
        plan(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
