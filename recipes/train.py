"""The main job: a table analyst from nothing, end to end.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.train train

Synthesis, SFT, evaluation, the hierarchical reward model where ``hrm.steps`` asks for one, GRPO, evaluation, plots.
Each stage leaves its result in the run's folder, so a run that was stopped goes on by the same command. The last line
of output is JSON.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..engine.atomic import write_atomically
from ..engine.planner import PHASES
from ..engine.plots import plot_run
from ..rollout.view import trajectory_panel
from .arithmetic import STAGES
from .evaluate import evaluate
from .grpo import grpo
from .hrm import hrm
from .memory import MemoryWatch
from .policy import load_policy
from .report import write_report
from .rollouts import Rollouts
from .run import Run, launch
from .sft import sft
from .synthesize import synthesize

LAST_LINE = ("job", "pass_at_1_sft", "pass_at_1_grpo", "wall_s", "peak_rss_gib")


def train(run: Run) -> None:
    """Runs all stages and writes ``RUN/summary.json`` and ``RUN/run.png``; shows a finished run as it was."""
    summary_file = run.folder / "summary.json"
    if summary_file.exists():
        run.say(f"{run.folder} is finished; for another run give run.name=NAME or remove the folder")
    else:
        with MemoryWatch() as memory:
            synthesize(run)
            results = {"sft": _evaluated(run, "sft", sft)}
            if run.config.hrm.steps:
                hrm(run)
            results["grpo"] = _evaluated(run, "grpo", grpo)
        peak = sum(run.mesh.all_gather_object(memory.peak_gib))
        if run.is_main:
            write_atomically(summary_file, json.dumps(_summary(run, results, peak), indent=1))
            plot_run(run.folder, run.folder / "run.png")
            write_report([run.folder])
        run.say(run.planned.report())
    if run.is_main:
        _show(run)


def _evaluated(run: Run, name: str, stage: Callable[[Run], Path]) -> dict[str, Any]:
    policy = load_policy(run, stage(run))
    with Rollouts(run, policy) as rollouts:
        return evaluate(run, policy, rollouts, name)


def _summary(run: Run, results: dict[str, dict[str, Any]], peak_rss_gib: float) -> dict[str, Any]:
    return {
        "job": "train",
        **{f"pass_at_1_{name}": round(result["pass_at_1"], 4) for name, result in results.items()},
        **{f"pass_at_{result['k']}_{name}": round(result["pass_at_k"], 4) for name, result in results.items()},
        "wall_s": round(run.elapsed_s(), 1),
        "peak_rss_gib": round(peak_rss_gib, 2),
        "seed": run.config.run.seed,
        "ranks": run.mesh.world_size,
        "device": str(run.mesh.device),
        "torch": torch.__version__,
        "results": {
            name: {key: value for key, value in result.items() if key != "outcomes"} for name, result in results.items()
        },
    }


def _show(run: Run) -> None:
    """Sampled trajectories, scores by task type, and the line of JSON that ends the job."""
    summary = json.loads((run.folder / "summary.json").read_text())
    console = Console()
    for record in summary["results"]["grpo"]["examples"]:
        console.print(trajectory_panel(record))
    table = Table(title="Tables never seen in training", title_justify="left")
    for column in ("task type", "tasks", "pass@1 SFT", "pass@1 GRPO"):
        table.add_column(column, justify="left" if column == "task type" else "right")
    before, after = summary["results"]["sft"], summary["results"]["grpo"]
    for name, row in after["by_type"].items():
        was = before["by_type"][name]["pass_at_1"]
        table.add_row(name, str(row["num_tasks"]), f"{was:.2f}", f"{row['pass_at_1']:.2f}")
    table.add_section()
    table.add_row("all", str(after["num_tasks"]), f"{before['pass_at_1']:.3f}", f"{after['pass_at_1']:.3f}")
    console.print(table)
    console.print(
        f"tokens an answer: {before['tokens']:.0f} -> {after['tokens']:.0f} | plots: {run.folder / 'run.png'} | "
        f"report: {run.folder / 'report.html'} | "
        f"numbers: {run.folder / 'summary.json'}",
        soft_wrap=True,
    )
    print(json.dumps({key: summary[key] for key in LAST_LINE}), flush=True)


if __name__ == "__main__":
    launch(train, phases=PHASES, stages=tuple(STAGES))
