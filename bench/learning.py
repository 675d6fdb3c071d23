"""What the two recipes' own ideas bring: runs of GRPO that differ in one of them, over several seeds, on a CPU.

    python -m groupwise.bench.learning [--configs datamind_small] [--seeds 0 1 2] [--jobs 2] [--runs FOLDER]
        [--out FILE] [--plot FILE.png]

``curriculum``: structure first and meaning last by a cosine, as Datarus-R1 does, beside meaning alone from the first
step on (``reward.lambda_max`` and ``lambda_min`` 0). ``hrm``: that curriculum with the hierarchical reward model beside
the same without it. ``mixing``: the experts' likelihood with a weight that falls from 0.9 to 0.05, as in DataMind,
beside none and beside a fixed 0.8. Configurations: ``datarus_small`` and ``datamind_small``.

The runs of a seed start from one SFT model and ask the same tasks. Each ends with ``pass_at_1`` on the evaluation
tasks, whose tables nothing trained on, one sample each as rollouts are drawn; ``tag``, the mean R_tag there, and
``tag_valid``, the share of trajectories that pass all five checks; and, for Datarus, ``recovery``: the share of right
answers where the first turn is written for the model and ends with an error, over tables never trained on. ``sft`` is
the model that all start from. Figures are means over the seeds with their standard errors. Runs that are finished are
read from FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

from groupwise.bench import common
from groupwise.data.trajectories import read_experts
from groupwise.engine.config import load_config
from groupwise.engine.mesh import Mesh
from groupwise.engine.metrics import read_records
from groupwise.recipes.grpo import grpo
from groupwise.recipes.hrm import hrm
from groupwise.recipes.policy import load_policy
from groupwise.recipes.rollouts import Rollouts
from groupwise.recipes.run import Run
from groupwise.recipes.sft import sft
from groupwise.recipes.synthesize import synthesize
from groupwise.rewards.answer import trajectory_correct
from groupwise.rewards.tags import tag_reward
from groupwise.rollout.task import Task, read_tasks
from groupwise.rollout.trajectory import Trajectory

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE = "sft"  # what all runs of a seed start from
FIXED = "grpo.mu_peak={0} grpo.mu_valley={0} grpo.mu_decay_steps=0"
RUNS = {
    "datarus_small": {
        "cosine": "",
        "semantic": "reward.lambda_max=0 reward.lambda_min=0",
        "no_hrm": "hrm.steps=0",
    },
    "datamind_small": {
        "dynamic": "",
        "gamma_0": f"{FIXED.format(0)} grpo.experts_per_step=0",
        "gamma_0.8": FIXED.format(0.8),
    },
}
SHARED = ("data", "tokenizer", "sft", "hrm")  # folders of a run that those of its seed have in common
CURVES = {"datarus_small": ("rewards/tag", "rewards/answer"), "datamind_small": ("rewards/answer",)}


def main() -> None:
    own = common.parser(__doc__)
    own.add_argument("--configs", nargs="+", default=list(RUNS), choices=list(RUNS), help="default: both")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, of one thread each")
    own.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the runs")
    own.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    own.add_argument("--plot", type=Path, default=None, help="also draw the runs step by step into this file, .png")
    own.add_argument("--only", nargs=3, metavar=("CONFIG", "RUN", "SEED"), help="do this run here and end")
    args = own.parse_args()
    if args.only:
        config, name, seed = args.only
        work(args.runs, config, name, int(seed), args.set)
        return
    run_all(args, [(config, BASE, seed) for seed in args.seeds for config in args.configs])
    run_all(args, [(config, name, seed) for seed in args.seeds for config in args.configs for name in RUNS[config]])
    rows = [row(args.runs, config, name, args.seeds) for config in args.configs for name in (BASE, *RUNS[config])]
    common.report("learning", rows, args)
    if args.plot:
        plot(args.runs, args.configs, args.seeds, args.plot)


def run_all(args: argparse.Namespace, todo: list[tuple[str, str, int]]) -> None:
    """Each in a process of its own, so many at a time; one that fails ends all."""
    waiting = [each for each in todo if not (folder_of(args.runs, *each) / "learning.json").exists()]
    working: list[tuple[tuple[str, str, int], subprocess.Popen[bytes]]] = []
    while waiting or working:
        while waiting and len(working) < args.jobs:
            config, name, seed = each = waiting.pop(0)
            command = [sys.executable, "-m", "groupwise.bench.learning", "--runs", str(args.runs)]
            command += ["--only", config, name, str(seed), "--set", *args.set]
            working.append((each, subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})))
        time.sleep(1)
        for each, process in list(working):
            if process.poll() is None:
                continue
            working.remove((each, process))
            print(" ".join(map(str, each)), "done" if not process.returncode else "failed", flush=True)
            if process.returncode:
                for _, other in working:
                    other.kill()
                raise SystemExit(f"{each} ended with status {process.returncode}")


def folder_of(runs: Path, config: str, name: str, seed: int) -> Path:
    return runs / f"{config}-{name}-{seed}"


def work(runs: Path, config: str, name: str, seed: int, overrides: Sequence[str]) -> None:
    """One run: the model that a seed's runs start from, or GRPO from there, and what it can do then."""
    folder = folder_of(runs, config, name, seed)
    options = [] if name == BASE else RUNS[config][name].split()
    where = [f"run.folder={runs}", f"run.name={folder.name}", f"run.seed={seed}"]
    run = Run(load_config(config, [*overrides, *options, *where]), Mesh.create(), phases=())
    if name == BASE:
        synthesize(run)
        model = sft(run)
        if run.config.hrm.steps:
            hrm(run)
    else:
        for shared in SHARED:
            source = folder_of(runs, config, BASE, seed) / shared
            if source.exists() and not (folder / shared).exists():
                (folder / shared).symlink_to(source.resolve())
        model = grpo(run)
    (folder / "learning.json").write_text(json.dumps(assess(run, model)))


def assess(run: Run, model: Path) -> dict[str, float]:
    """What a model does with the evaluation tasks, and after an error that was made for it."""
    policy = load_policy(run, model)
    with Rollouts(run, policy) as rollouts:
        tasks = list(read_tasks(run.folder / "data" / "eval.jsonl"))
        found = _sample(run, rollouts, tasks, "eval")
        tags = [tag_reward(trajectory, policy.tokenizer) for trajectory in found]
        result = {
            "pass_at_1": fmean(map(trajectory_correct, found)),
            "tag": fmean(tags),
            "tag_valid": fmean(tag == 1 for tag in tags),
        }
        judged = run.folder / "hrm" / "judged.jsonl"
        if judged.exists():
            result |= _recovery(run, rollouts, judged)
    report = run.folder / "hrm" / "report.json"
    if report.exists():
        scores = json.loads(report.read_text())
        result |= {key: scores[key] for key in ("auc_reward", "auc_model_score")}
        result |= {f"step_{key}": scores["all"]["steps"][key] for key in ("accuracy", "ece")}
    return result


def _sample(
    run: Run, rollouts: Rollouts, tasks: Sequence[Task], name: str, openings: Sequence[Sequence[str]] | None = None
) -> list[Trajectory]:
    """A trajectory for each task, drawn as in training."""
    settings = run.config.rollout
    groups = rollouts.sample(
        tasks,
        1,
        temperature=settings.temperature,
        seed=run.config.run.seed,
        record=f"learning/{name}",
        openings=openings,
    )
    return [group.trajectories[0] for group in groups]


def _recovery(run: Run, rollouts: Rollouts, judged: Path) -> dict[str, float]:
    experts = [expert for expert in read_experts(judged) if expert.stratum in ("corrected", "failure")]
    openings = [[expert.spans[0][1]] for expert in experts]
    found = _sample(run, rollouts, [expert.task for expert in experts], "recovery", openings)
    if any(trajectory.executions[0].ok for trajectory in found):
        raise RuntimeError("a mistake that was made for the model did not fail")
    return {"recovery": fmean(map(trajectory_correct, found)), "num_recovery": len(found)}


def row(runs: Path, config: str, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Means and standard errors over the seeds."""
    found = [json.loads((folder_of(runs, config, name, seed) / "learning.json").read_text()) for seed in seeds]
    values: dict[str, Any] = {"config": config, "run": name, "seeds": len(seeds)}
    for key in found[0]:
        values[key] = round(fmean(each[key] for each in found), 4)
        if len(found) > 1:
            values[f"{key}_se"] = round(stdev(each[key] for each in found) / math.sqrt(len(found)), 4)
    return values


def plot(runs: Path, configs: Sequence[str], seeds: Sequence[int], file: Path) -> None:
    """Each run step by step: mean over the seeds, with a band of one standard error."""
    panels = [(config, key) for config in configs for key in CURVES[config]]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (config, key) in zip(axes[0], panels, strict=True):
        for name in RUNS[config]:
            curves = [
                [record[key] for record in read_records(folder_of(runs, config, name, seed) / "grpo.jsonl")]
                for seed in seeds
            ]
            columns = list(zip(*curves, strict=False))
            middle = [fmean(column) for column in columns]
            error = [stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0.0 for c in columns]
            (line,) = axis.plot(middle, label=name)
            low, high = ([m + sign * e for m, e in zip(middle, error, strict=True)] for sign in (-1, 1))
            axis.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.2)
        axis.set(title=f"{config}: {key}", xlabel="step")
        axis.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
