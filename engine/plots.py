"""One picture of a run, from the records on disk: what was not recorded is said in its place.

python -c "from groupwise.engine.plots import plot_run; plot_run('runs/train', 'runs/train/plots.png')"
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .curves import series, smooth
from .metrics import read_records

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2563eb", "#ea7317", "#2a9d62", "#7c4dbe", "#d1495b"
STACK = (BLUE, ORANGE, GREEN, PURPLE, RED, "#3aa6b9", "#b5a642", "#9aa5b1")
LENGTH = "completions/mean_length"

Records = Sequence[dict[str, Any]]


def plot_run(folder: str | Path, png: str | Path) -> None:
    """Draws loss, reward, pass@1, length, KL, entropy, tools and timing of a run into one PNG.

    Args:
        folder: of the run, with ``sft.jsonl``, ``grpo.jsonl`` and ``summary.json`` (keys ``pass_at_1_sft``,
            ``pass_at_1_grpo``, optionally the same with ``pass_at_3`` and with ``_stderr`` behind); any may be absent.
        png: is replaced whole or not at all.
    """
    folder, png = Path(folder), Path(png)
    sft, grpo = read_records(folder / "sft.jsonl"), read_records(folder / "grpo.jsonl")
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
    figure = Figure(figsize=(17, 7.6), dpi=110, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    figure.suptitle(f"groupwise · {folder.resolve().name}", x=0.012, ha="left", fontsize=15, color=INK, weight="bold")
    drawings: list[tuple[str, str, Callable[[Axes], bool]]] = [
        ("SFT loss", "step", lambda axes: _lines(axes, sft, {"loss": ("loss", BLUE)}, log=True)),
        ("Reward", "step", lambda axes: _reward(axes, grpo)),
        ("Answers on unseen tables", "", lambda axes: _passes(axes, summary)),
        ("Completion length, tokens", "step", lambda axes: _lines(axes, grpo, {LENGTH: ("mean", GREEN)})),
        ("KL to the reference, nats", "step", lambda axes: _lines(axes, grpo, {"kl": ("k3", PURPLE)})),
        ("Entropy, nats", "step", lambda axes: _lines(axes, grpo, {"entropy": ("policy", ORANGE)})),
        ("Tools and groups, share", "step", lambda axes: _shares(axes, grpo)),
        ("Time of a step, s", "step", lambda axes: _timing(axes, grpo)),
    ]
    for axes, (title, label, draw) in zip(panels, drawings, strict=True):
        dress(axes, title, label)
        if not draw(axes):
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=MUTED)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
    save(figure, png)


def save(figure: Figure, png: str | Path) -> None:
    """Writes a figure: the file is replaced whole or not at all. Its folder is made if need be."""
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    fresh = png.with_name(png.name + ".tmp")
    figure.savefig(fresh, format="png")
    os.replace(fresh, png)


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """Gives a panel its title, its axis' label and the house's colours."""
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.tick_params(which="both", labelsize=9, colors=MUTED, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(x=0.01)


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    means = smooth(values)
    if len(values) > 20:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=1)
    axes.plot(steps, means, color=color, linewidth=2, label=label, marker="o" if len(values) == 1 else None)


def _lines(axes: Axes, records: Records, names: dict[str, tuple[str, str]], log: bool = False) -> bool:
    drawn = 0
    for name, (label, color) in names.items():
        steps, values = series(records, name)
        if len(steps):
            _line(axes, steps, values, label, color)
            drawn += 1
            if log and values.min() > 0:
                axes.set_yscale("log")
                axes.grid(True, which="minor", color=GRID, linewidth=0.4)
    if drawn > 1:
        axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="best")
    return drawn > 0


def _reward(axes: Axes, records: Records) -> bool:
    steps, values = series(records, "reward")
    spread_steps, spread = series(records, "reward_std")
    if len(steps) and np.array_equal(steps, spread_steps):
        centre, width = smooth(values), smooth(spread)
        low, high = centre - width, centre + width
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.10, linewidth=0, label="± std in group")
    names = {"reward": ("reward", BLUE), "rewards/answer": ("answer right", GREEN), "rewards/tag": ("R_tag", ORANGE)}
    return _lines(axes, records, names)


def _passes(axes: Axes, summary: dict[str, Any]) -> bool:
    stages = [("sft", "SFT", MUTED), ("grpo", "GRPO", BLUE)]
    recorded = {key for key, value in summary.items() if value is not None}
    metrics = [name for name in ("pass_at_1", "pass_at_3") if recorded & {f"{name}_{stage}" for stage, *_ in stages}]
    for place, metric in enumerate(metrics):
        for shift, (stage, label, color) in zip((-0.2, 0.2), stages, strict=True):
            value = summary.get(f"{metric}_{stage}")
            if value is None:
                continue
            error = summary.get(f"{metric}_{stage}_stderr")
            name = label if place == 0 else None
            axes.bar(place + shift, value, 0.36, color=color, label=name, yerr=error, ecolor=INK)
            axes.text(place + shift, value + (error or 0) + 0.015, f"{value:.2f}", ha="center", fontsize=10, color=INK)
    if metrics:
        axes.set_xticks(range(len(metrics)), [metric.replace("_at_", "@") for metric in metrics])
        axes.set_xlim(-0.6, len(metrics) - 0.4)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(False, axis="x")
        axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left", ncols=2)
    return bool(metrics)


def _shares(axes: Axes, records: Records) -> bool:
    names = {
        "tools/failure_frequency": ("failed executions", RED),
        "completions/clipped_ratio": ("cut completions", ORANGE),
        "frac_reward_zero_std": ("groups without deviation", PURPLE),
    }
    drawn = _lines(axes, records, names)
    if drawn:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return drawn


def _timing(axes: Axes, records: Records) -> bool:
    names = sorted({name for record in records for name in record if name.startswith("timing_s/")} - {"timing_s/step"})
    if not names:
        return False
    steps = np.array([record["step"] + 1 for record in records], dtype=float)
    values = np.array([[record.get(name) or 0.0 for record in records] for name in names])
    order = np.argsort(-values.mean(axis=1), kind="stable")
    if len(order) > len(STACK):  # the smallest share one colour
        rest = order[len(STACK) - 1 :]
        values = np.vstack([values, values[rest].sum(axis=0)])
        names = [*names, "timing_s/other"]
        order = np.append(order[: len(STACK) - 1], len(names) - 1)
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    base = np.zeros(len(steps))
    for index, color in zip(order, STACK, strict=False):
        top = base + values[index]
        axes.stairs(top, edges, baseline=base, fill=True, color=color, label=names[index].split("/", 1)[1])
        base = top
    axes.set_ylim(0, np.quantile(base, 0.98) * 1.35 or 1.0)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="upper left", ncols=3, columnspacing=1.0)
    return True
