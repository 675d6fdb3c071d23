"""Real tables -> tasks with known answers -> expert trajectories whose code was executed.

    python -m groupwise.recipes.synthesize train [tables=DIR]

Writes into ``RUN/data``: ``experts.jsonl`` (expert trajectories, whose tasks GRPO samples too), ``eval.jsonl`` (tasks
on tables kept apart), the tables' views below ``tables/``, and ``report.json``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..data.tables import find_tables, shared_headers, split_tables
from ..data.tasks import evaluation_views, headers, make_problems, training_views
from ..data.trajectories import build_trajectories, write_experts
from ..engine.atomic import write_atomically
from ..engine.config import Config
from ..engine.metrics import ProgressBar
from ..rollout.sandbox import Sandbox
from ..rollout.task import write_tasks
from .rollouts import open_sandbox
from .run import Run, launch


def synthesize(run: Run) -> Path:
    """Makes the data of a run, on its first rank, and returns the folder; complete data is left as it is."""
    folder = run.folder / "data"
    if run.is_main and not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with open_sandbox(run) as sandbox:
                report = _make(run.config, folder, sandbox)
            write_atomically(folder / "report.json", json.dumps(report, indent=1))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # the files of tasks that no list names
            raise
    run.mesh.barrier()
    return folder


def _make(config: Config, folder: Path, sandbox: Sandbox) -> dict[str, Any]:
    data, seed = config.data, config.run.seed
    tables, dropped = find_tables(data.tables or None)
    training, held_out = split_tables(tables, seed=seed)
    modes = data.mode_shares()

    # Names of the evaluation tables never come up in training.
    views = training_views(training, max(1, data.num_trajectories * 2 // 5), seed=seed, avoid=headers(held_out))
    tables_folder = folder / "tables"
    to_solve = make_problems(views, data.num_trajectories, seed=seed, name="train", folder=tables_folder, modes=modes)
    with ProgressBar(len(to_solve), "synthesize") as bar:
        experts, report = build_trajectories(
            to_solve, sandbox, seed=seed, strata=data.strata_shares(), on_done=bar.advance
        )
    write_experts(folder / "experts.jsonl", experts)
    views = evaluation_views(held_out, data.num_eval_tasks // 2 + 1, seed=seed)
    to_ask = make_problems(views, data.num_eval_tasks, seed=seed, name="eval", folder=tables_folder, modes=modes)
    write_tasks(folder / "eval.jsonl", (problem.task for problem in to_ask))
    return {
        **report.to_dict(),
        "training_tables": sorted(table.name for table in training),
        "evaluation_tables": sorted(table.name for table in held_out),
        "evaluation_headers": sorted(headers(held_out)),
        "shared_headers": shared_headers(training, held_out),
        "dropped_tables": {drop.source: drop.reason for drop in dropped},
    }


def _recipe(run: Run) -> None:
    folder = synthesize(run)
    report = json.loads((folder / "report.json").read_text())
    run.say(json.dumps({key: report[key] for key in ("count", "types", "strata", "grammars", "dropped")}, indent=1))


if __name__ == "__main__":
    launch(_recipe)
