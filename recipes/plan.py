"""The memory of a run before it is launched: bytes of each phase on each rank, and a refusal where they do not fit.

    python -m groupwise.recipes.plan CONFIG [section.key=value ...] [--gpus 8x141GB]

GPUs are named by their number and their memory as vendors state it, in decimal GB. Without ``--gpus`` the ranks are
those of this launch (``WORLD_SIZE``, or one for each GPU) and the memory is this machine's. What does not fit ends with
status 2 and one sentence that names the smallest change that does.
"""

import os
import re
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from ..engine.config import describe_settings, load_config
from ..engine.errors import UserError
from ..engine.metrics import free_memory
from ..engine.planner import plan_memory
from ..engine.proposal import check_fits
from .memory import settled, spell
from .run import DRY_RUN


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
        elif word != DRY_RUN:  # it is one
            words.append(word)
    path = words[0] if words and "=" not in words[0] else None
    config = load_config(path, words[1:] if path else words)
    device_type = "cuda"
    if not gpus:
        found = torch.cuda.device_count()
        ranks = int(os.environ.get("WORLD_SIZE", found or 1))
        device_type = "cuda" if found >= ranks else "cpu"
        memory = free_memory(torch.device(device_type), ranks)
    config = settled(config, memory)
    planned = plan_memory(config, ranks, device_type)
    Console().print(planned.table())
    check_fits(config, planned, memory)
    print(f"fits: phase {planned.fullest.name} needs {spell(planned.peak)} of the {spell(memory)} of a rank")


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
