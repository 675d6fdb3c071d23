"""What every benchmark shares: its command line, its clock, and its report.

A benchmark checks correctness before it times. A time is the median of warm runs over inputs that rotate, so that none
finds its own in a cache; everything that is compared is timed in the same process, in turns. On a CPU only ratios are
reported: its absolute times say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels import linear

Row = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that runs once, on the CPU: --out."""
    own = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--out", type=Path, default=None, help="also write the JSON record to this file")
    own.set_defaults(device="cpu", repeats=1)
    return own


def arguments(description: str | None, repeats: tuple[int, int] = (20, 7), plot: str = "") -> argparse.Namespace:
    """The command line of a benchmark that times: --device, --repeats, --shapes, --out.

    Args:
        description: the module's docstring.
        repeats: how often each is timed on a GPU and on a CPU if the command does not say.
        plot: what --plot draws; without it there is no such option.
    """
    own = parser(description)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    own.add_argument("--device", default=available, choices=["cpu", "cuda"], help="default: a GPU if there is one")
    often = f"timed runs of each; default {repeats[0]} on a GPU, {repeats[1]} on a CPU"
    own.add_argument("--repeats", type=int, default=0, help=often)
    own.add_argument("--shapes", nargs="*", default=None, metavar="SIZExSIZE", help="shapes instead of the default")
    if plot:
        own.add_argument("--plot", type=Path, default=None, help=f"also draw {plot} into this file, .png")
    args = own.parse_args()
    if args.device == "cuda" and available == "cpu":
        own.error("--device cuda: PyTorch sees no GPU; use --device cpu")
    args.repeats = args.repeats or repeats[args.device == "cpu"]
    return args


def parse_shapes(texts: Sequence[str] | None, default: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes such as "4096x128x512", each with as many sizes as the default ones."""
    if not texts:
        return list(default)
    shapes = [tuple(int(size) for size in text.split("x") if size.isdigit()) for text in texts]
    for text, shape in zip(texts, shapes, strict=True):
        if len(shape) != len(default[0]) or 0 in shape:
            raise SystemExit(f"--shapes: {text!r} is no shape; expected {len(default[0])} sizes such as {default[0]}")
    return shapes


def able(contenders: dict[str, Callable[..., Any]], arguments: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """Those that run here; who does not (not installed, no compiler) is named with the reason, and left out."""
    found = {}
    for name, run in contenders.items():
        try:
            run(*arguments)
            found[name] = run
        except Exception as error:  # of any kind: they are not ours
            reason = (str(error).strip() or "no message").splitlines()[0]
            print(f"{name} is left out: {type(error).__name__}: {reason}")
    return found


def in_turns(
    contenders: dict[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]], repeats: int, warm: int = 2
) -> Row:
    """Median milliseconds of each contender; each run takes the next of ``inputs``, and the contenders alternate.

    ``warm`` runs of each come first and do not count.
    """
    device = next(x.device for x in inputs[0] if isinstance(x, Tensor))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-warm, repeats):
        for name, run in contenders.items():
            elapsed = _milliseconds(run, inputs[i % len(inputs)], device)
            if i >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run(*arguments)
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host gets ahead: its own time does not count
    begin.record()
    run(*arguments)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_extra_mib(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> float:
    """Memory that ``run`` makes PyTorch hold on ``device`` at its peak beside what it held before, results included.

    On a CPU the profiler does not see what threads of gloo free, and what an earlier count left behind counts as freed:
    there it is for work of one process whose results are dropped.
    """
    if device.type != "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(*arguments)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        return max(itertools.accumulate(changes), default=0) / 2**20
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(*arguments)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def balance(device: str) -> float:
    """Operations of a large matrix product in the time in which a copy moves one byte."""
    size, moved, dtype = (8192, 1 << 30, torch.bfloat16) if device == "cuda" else (2048, 1 << 27, torch.float32)
    factor = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)  # read and written
    contenders = {"product": lambda factor, _: linear(factor, factor), "copy": lambda _, source: source.clone()}
    times = in_turns(contenders, [(factor, source)], 5)
    return (2 * size**3 / times["product"]) / (moved / times["copy"])


def error(got: Tensor, true: Tensor) -> float:
    """Largest difference, as a share of the largest true value."""
    return ((got.double() - true.double()).abs().max() / true.double().abs().max().clamp(min=1e-30)).item()


def report(name: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Print a table, then one JSON line; write the JSON where --out says.

    Where rows have ``flops_per_byte``, operations by bytes that must move, the record tells the device's own balance of
    the two: ``bench/roofline.py`` draws both.
    """
    on_gpu = args.device == "cuda"
    rows = [{k: v for k, v in row.items() if v is not None and (on_gpu or not k.endswith("_ms"))} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    head = {"bench": name, **_environment(args.device), "repeats": args.repeats}
    if any("flops_per_byte" in row for row in rows):
        head["balance_flops_per_byte"] = balance(args.device)
    record = json.dumps({**head, "rows": rows})
    print(record)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(record + "\n")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _environment(device: str) -> Row:
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit.stdout.strip() or None,
    }
