"""What concurrency costs and gives: the sampler's memory for keys and values, and its speed, on the same work.

    python -m groupwise.bench.concurrency [--shapes 8x384x1024x6x2x8192x64x1x32x128x64] [--out FILE] [--plot FILE.png]

A shape is as in bench/sampler.py. ``concurrency`` is the most sequences that decode together; ``kv_peak_mib`` the
keys and values that lie in the cache at the most, whole blocks of 16 tokens, MiB; ``relative_speed`` the tokens of a
second over those at the highest concurrency. Tokens must be the same at each, or it stops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from groupwise.bench import common
from groupwise.bench.sampler import (
    GPU_SHAPES,
    block_bytes,
    make_sampler,
    ours,
    random_model,
    random_prompts,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# One sequence at a time takes long on a CPU.
CPU_SHAPES = [(8, 384, 1024, 6, 2, 8192, prompts, samples, 32, 128, 64) for prompts, samples in ((64, 1), (8, 8))]
LEVELS = (1, 2, 4, 8, 16, 32, 64)


def measure(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    model = random_model(shape[:6], shape[9] + shape[10], args.device)
    samplers = {level: make_sampler(model, shape, concurrency=level) for level in LEVELS}
    new, mark = shape[10], torch.zeros(0, device=args.device)
    prompts = random_prompts(shape, 100)
    expected = ours(samplers[LEVELS[-1]])(prompts, new, True)
    for level, sampler in samplers.items():
        if ours(sampler)(prompts, new, True) != expected:
            sys.exit(f"concurrency: tokens at {level} are not those at {LEVELS[-1]}")
    inputs = [(mark, random_prompts(shape, seed)) for seed in range(args.repeats)]
    runs: dict[str, Callable[..., Any]] = {
        str(level): lambda _, prompts, sampler=sampler: ours(sampler)(prompts, new, True)
        for level, sampler in samplers.items()
    }
    times = common.in_turns(runs, inputs, args.repeats, warm=0)
    return [
        {
            "layers x H x I x Hq x Hkv x V": "x".join(map(str, shape[:6])),
            "prompts x samples": f"{shape[6]}x{shape[7]}",
            "prompt + new": f"{shape[8]}-{shape[9]} + {new}",
            "concurrency": level,
            "ours_ms": times[str(level)],
            "kv_peak_mib": sampler.stats["peak_blocks"] * block_bytes(model) / 2**20,
            "relative_speed": times[str(LEVELS[-1])] / times[str(level)],
        }
        for level, sampler in samplers.items()
    ]


def draw(rows: list[common.Row], device: str, file: Path) -> None:
    """Memory and speed over concurrency, a line for each shape."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    figure.suptitle(device, fontsize=10)
    names = list(rows[0])[:3]
    for work in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == work]
        levels = [row["concurrency"] for row in own]
        for axes, column in zip(panels, ("kv_peak_mib", "relative_speed"), strict=True):
            axes.plot(levels, [row[column] for row in own], marker="o", markersize=4, label=", ".join(work[1:]))
    labels = ("peak of keys and values, MiB", f"tokens a second, relative to {LEVELS[-1]}")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(LEVELS, [str(level) for level in LEVELS])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="sequences that decode together", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(title="prompts x samples, tokens", fontsize=8, title_fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    args = common.arguments(__doc__, repeats=(1, 1), plot="memory and speed over concurrency")
    defaults = [shape for shape in GPU_SHAPES if shape[6:8] == (64, 1)][:1] if args.device == "cuda" else CPU_SHAPES
    rows = [row for shape in common.parse_shapes(args.shapes, defaults) for row in measure(shape, args)]
    common.report("concurrency", rows, args)
    if args.plot is not None:
        draw(rows, torch.cuda.get_device_name() if args.device == "cuda" else "CPU", args.plot)


if __name__ == "__main__":
    main()
