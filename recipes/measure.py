"""The record of a GRPO step: what its groups earned and how they ended, over all ranks."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from ..engine.metrics import peak_memory_gib
from ..engine.objective import summarise
from ..engine.step import Update
from ..rollout.trajectory import TRUNCATED, Group
from .run import Run


def measure(run: Run, groups: Sequence[Group], update: Update) -> dict[str, float]:
    """The record of a step over all ranks, by the names practitioners read."""
    mine = [
        {
            "group": f"{run.mesh.rank}:{number}",
            "reward": trajectory.reward,
            "advantage": trajectory.advantage,
            "parts": trajectory.rewards,
            "tokens": trajectory.completion_tokens,
            "turns": trajectory.turns,
            "scored": trajectory.scored,
            "clipped": trajectory.status in TRUNCATED,
            "failed": trajectory.status == "failed",
            "executions": [execution.ok for execution in trajectory.executions],
        }
        for number, group in enumerate(groups)
        for trajectory in group.trajectories
    ]
    rows = [row for part in run.mesh.all_gather_object(mine) for row in part]
    scored = [row for row in rows if row["scored"]]
    groups_of: dict[str, list[dict[str, Any]]] = {row["group"]: [] for row in rows}
    for row in scored:
        groups_of[row["group"]].append(row)
    members = list(groups_of.values())
    deviations = [stdev(row["reward"] for row in group) if len(group) > 1 else 0.0 for group in members]
    executions = [ok for row in rows for ok in row["executions"]]
    record = {
        "frac_reward_zero_std": fmean(deviation == 0 for deviation in deviations),
        "groups/asked": float(len(members)),
        "groups/contrasted": float(sum(any(row["advantage"] for row in group) for group in members)),
        "completions/mean_length": fmean(row["tokens"] for row in rows),
        "completions/clipped_ratio": fmean(row["clipped"] for row in rows),
        "completions/failed_ratio": fmean(row["failed"] for row in rows),
        "completions/mean_turns": fmean(row["turns"] for row in rows),
        "tools/failure_frequency": 1 - fmean(executions) if executions else 0.0,
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "skipped_steps": float(update.skipped),
        "perf/peak_memory_gib": peak_memory_gib(run.mesh.device),
    }
    if run.config.reward.judge:
        record["rewards/unjudged"] = 1 - len(scored) / len(rows)
    if scored:
        record |= {"reward": fmean(row["reward"] for row in scored), "reward_std": fmean(deviations)}
        record |= {f"rewards/{name}": fmean(row["parts"][name] for row in scored) for name in scored[0]["parts"]}
    return {**record, **summarise(update.stats)}
