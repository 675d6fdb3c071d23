"""The arithmetic of a launch in words, before it begins: prompts, trajectories, tokens, batches, steps, memory, time.

Every recipe says it at its start, and ``--dry-run`` on its command line stops there.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ..engine.config import Config
from ..engine.errors import UserError
from ..engine.metrics import read_records
from ..engine.planner import Plan
from .memory import spell

PACE = ("model", "data", "optimizer", "rollout", "reward")  # sections beside a stage's own that make a step's time


def in_words(config: Config, ranks: int, folder: Path, stages: Sequence[str], plan: Plan | None) -> str:
    """One paragraph.

    Args:
        config: of the run.
        ranks: of the launch.
        folder: of the run; records there and beside it tell how long a step took before.
        stages: those of ``STAGES`` that the recipe goes through.
        plan: the memory of a rank; None where none is planned.
    """
    sentences = [f"{stage}: {STAGES[stage](config, ranks)}" for stage in stages if stage != "hrm" or config.hrm.steps]
    if plan is not None:
        sentences.append(f"memory: {spell(plan.peak)} planned on each rank, most in the phase {plan.fullest.name}")
    for stage in stages:
        if (timed := step_seconds(config, folder, stage)) is not None:
            seconds, file = timed
            steps = config.to_dict()[stage]["steps"]
            total = _duration(seconds * steps)
            sentences.append(f"time: a step of {stage} took {seconds:.3g} s in {file}, so {steps:,} may take {total}")
    return ". ".join(sentences) + "."


def step_seconds(config: Config, folder: Path, stage: str) -> tuple[float, Path] | None:
    """The median time of a step, and the record it is from: this run's, or the newest beside it of such steps.

    None where nothing was timed. How many ranks made a record is not known.
    """
    beside = [other / f"{stage}.jsonl" for other in folder.parent.glob("*") if other != folder]
    others = sorted((file for file in beside if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)
    mine = _pace(config.to_dict(), stage)
    for file in [folder / f"{stage}.jsonl", *others]:
        try:
            if _pace(json.loads((file.parent / "config.json").read_text()), stage) != mine:
                continue
            records = read_records(file)
            gaps = [b["time"] - a["time"] for a, b in pairwise(records) if b["step"] == a["step"] + 1]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
            continue  # another program's, or of another version
        if gaps:
            return median(gaps), file
    return None


def _pace(config: dict[str, Any], stage: str) -> dict[str, Any]:
    own = {key: value for key, value in config.get(stage, {}).items() if key != "steps"}
    return {name: config[name] for name in PACE} | {stage: own}


def _synthesize(config: Config, ranks: int) -> str:
    data = config.data
    return f"{data.num_trajectories:,} expert trajectories, and {data.num_eval_tasks:,} tasks for evaluation"


def _sft(config: Config, ranks: int) -> str:
    return _fitted(config, config.sft.steps, ranks)


def _hrm(config: Config, ranks: int) -> str:
    return _fitted(config, config.hrm.steps, ranks)


def _fitted(config: Config, steps: int, ranks: int) -> str:
    size = config.sft.sequences_per_step
    return (
        f"a step: {size:,} expert trajectories{_over(ranks, -(-size // ranks), size)}; {_microbatches(config)}; "
        f"1 optimiser step; {steps:,} steps = {steps * size:,} trajectories"
    )


def _grpo(config: Config, ranks: int) -> str:
    grpo, longest = config.grpo, config.rollout.max_trajectory_tokens
    count = grpo.prompts_per_step * grpo.num_generations
    most = -(-grpo.prompts_per_step // ranks) * grpo.num_generations
    full = -(-most * longest // config.optimizer.tokens_per_microbatch)
    updates = grpo.num_iterations * grpo.num_minibatches
    words = [
        f"a step: {grpo.prompts_per_step:,} prompts x {grpo.num_generations:,} trajectories = "
        f"{_count(count, 'trajectory', 'trajectories')}{_over(ranks, most, count)}",
        f"at most {longest:,} tokens each = {count * longest:,} tokens, {_microbatches(config)}, "
        f"about {full:,} on a rank when full",
        _count(updates, "optimiser step", "optimiser steps"),
        f"{grpo.steps:,} steps = {grpo.steps * count:,} trajectories",
    ]
    if grpo.max_sampling_rounds > 1:
        words.insert(1, f"prompts without contrast replaced in up to {grpo.max_sampling_rounds - 1:,} more rounds")
    if updates > 1:
        words[-2] += f" ({grpo.num_iterations:,} x {grpo.num_minibatches:,} mini-batches)"
    if grpo.mu_peak:
        words.append(f"experts: those of the step's prompts and {grpo.experts_per_step:,} more")
    return "; ".join(words)


def _evaluate(config: Config, ranks: int) -> str:
    settings, name = config.evaluate, config.evaluate.benchmark
    if name:
        return f"the tasks of {name} x {settings.num_samples:,}"
    tasks = config.data.num_eval_tasks
    return f"{tasks:,} tasks x {settings.num_samples:,} = {tasks * settings.num_samples:,} trajectories"


STAGES: dict[str, Callable[[Config, int], str]] = {
    "synthesize": _synthesize,
    "sft": _sft,
    "hrm": _hrm,
    "grpo": _grpo,
    "evaluate": _evaluate,
}


def _over(ranks: int, most: int, count: int) -> str:
    each = f"{most:,} each" if most * ranks == count else f"at most {most:,} each"
    return " on 1 rank" if ranks == 1 else f" over {ranks:,} ranks, {each}"


def _microbatches(config: Config) -> str:
    return f"in micro-batches of {config.optimizer.tokens_per_microbatch:,} packed tokens"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
