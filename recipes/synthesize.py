"""Real tables -> tasks with known answers -> expert trajectories whose code was executed.

    python -m groupwise.recipes.synthesize train [data.tables=DIR]

Writes into ``RUN/data``: ``experts-00000.jsonl`` and on, the expert trajectories, whose tasks GRPO samples too, with
``manifest.json``; ``eval.jsonl``, tasks on tables kept apart; the tables' views below ``tables/``; and ``report.json``,
``report.md``, ``report.png``. A run that was stopped goes on by the same command, and its data are the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.filters import Filters
from ..data.production import Production, assign_strata, scripted_works
from ..data.report import markdown, plot
from ..data.tables import Table, find_tables, shared_headers, split_tables
from ..data.tasks import evaluation_views, headers, make_problems, training_views
from ..engine.atomic import write_atomically
from ..engine.config import Config
from ..engine.metrics import ProgressBar
from ..rollout.grammar import GRAMMARS
from ..rollout.sandbox import Sandbox
from ..rollout.task import write_tasks
from .rollouts import open_sandbox
from .run import Run, launch

ROUNDS = 4  # the first, and those in which other problems stand in for what was dropped


def synthesize(run: Run) -> Path:
    """Makes the data of a run, on its first rank, and returns the folder; complete data is left as it is."""
    folder = run.folder / "data"
    if run.is_main and not (folder / "report.json").exists():
        with open_sandbox(run) as sandbox:
            report = _make(run.config, folder, sandbox)
        write_atomically(folder / "report.md", markdown(report))
        write_atomically(folder / "report.json", json.dumps(report, indent=1))
    run.mesh.barrier()
    return folder


def shares_with_code(modes: Mapping[str, float]) -> dict[str, float]:
    """Of the shares of the grammars, those in which code runs."""
    return {mode: share for mode, share in modes.items() if share and GRAMMARS[mode].code}


def _make(config: Config, folder: Path, sandbox: Sandbox) -> dict[str, Any]:
    data, seed = config.data, config.run.seed
    tables, dropped = find_tables(data.tables or None)
    training, held_out = split_tables(tables, seed=seed)
    modes, tables_folder = data.mode_shares(), folder / "tables"

    # Names of the evaluation tables never come up in training.
    views = training_views(training, max(1, data.num_trajectories * 2 // 5), seed=seed, avoid=headers(held_out))
    problems = make_problems(views, data.num_trajectories, seed=seed, name="train", folder=tables_folder, modes=modes)
    strata = assign_strata(problems, data.strata_shares(), seed)
    with ProgressBar(len(problems), "synthesize") as bar:
        production = Production(
            folder, Filters(), inputs=_hash(tables), threads=2 * config.sandbox.workers, on_done=bar.advance
        )
        for number in range(1, ROUNDS + 1):
            strata = production.run(scripted_works(problems, strata, sandbox, seed))
            if not strata or number == ROUNDS:
                break
            problems = make_problems(
                views, len(strata), seed=seed, name=f"train{number}", folder=tables_folder,
                modes=shares_with_code(modes) or modes,
            )  # fmt: skip
        production.finish()
    views = evaluation_views(held_out, data.num_eval_tasks // 2 + 1, seed=seed)
    to_ask = make_problems(views, data.num_eval_tasks, seed=seed, name="eval", folder=tables_folder, modes=modes)
    write_tasks(folder / "eval.jsonl", (problem.task for problem in to_ask))
    plot(production.report, folder / "report.png")
    return {
        **production.report.to_dict(),
        "training_tables": sorted(table.name for table in training),
        "evaluation_tables": sorted(table.name for table in held_out),
        "evaluation_headers": sorted(headers(held_out)),
        "shared_headers": shared_headers(training, held_out),
        "dropped_tables": {drop.source: drop.reason for drop in dropped},
    }


def _hash(tables: Sequence[Table]) -> str:
    """Of what trajectories are made from, so that a run whose tables changed meanwhile is not gone on with."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update(f"{table.name}\n{table.frame.to_csv(index=False)}\n".encode())
    return digest.hexdigest()


def _recipe(run: Run) -> None:
    folder = synthesize(run)
    report = json.loads((folder / "report.json").read_text())
    run.say(json.dumps({key: report[key] for key in ("count", "types", "strata", "grammars", "dropped")}, indent=1))


if __name__ == "__main__":
    launch(_recipe)
