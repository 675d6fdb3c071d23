"""Real tables -> tasks with known answers -> expert trajectories whose code was executed.

    python -m groupwise.recipes.synthesize train [data.tables=DIR]

Writes into ``RUN/data``: ``experts-00000.jsonl`` and on, the expert trajectories, whose tasks GRPO samples too, with
``manifest.json``; ``eval.jsonl``, tasks on tables kept apart; the tables' views below ``tables/``; and ``report.json``,
``report.md``, ``report.png``. A run that was stopped goes on by the same command, and its data are the same.
"""

import json
from pathlib import Path
from typing import Any

from ..data.benchmarks import Benchmark, read_benchmark
from ..data.filters import Filters
from ..data.production import MANIFEST, Production
from ..data.report import markdown, plot
from ..data.tables import shared_headers
from ..engine.atomic import write_atomically
from ..rollout.sandbox import Sandbox
from ..rollout.task import write_tasks
from .rollouts import open_sandbox
from .run import Run, launch
from .sources import Sources
from .teaching import REQUESTS, ModelTeacher, teach_by_script


def synthesize(run: Run) -> Path:
    """Makes the data of a run, on its first rank, and returns the folder; complete data is left as it is."""
    folder = run.folder / "data"
    if run.is_main and not (folder / "report.json").exists():
        with open_sandbox(run) as sandbox:
            report = _make(run, folder, sandbox)
        write_atomically(folder / "report.md", markdown(report))
        write_atomically(folder / "report.json", json.dumps(report, indent=1))
    run.mesh.barrier()
    return folder


def _make(run: Run, folder: Path, sandbox: Sandbox) -> dict[str, Any]:
    data = run.config.data
    sources = Sources(run.config, folder / "tables")
    benchmark = _benchmark(run, folder, sandbox)
    filters = Filters(item.task.question for item in benchmark.items) if benchmark else Filters()
    taught: dict[str, Any] = {}  # what a model's teaching cost, and how often its attempts agreed
    if data.teacher == "scripted":
        production = Production(folder, filters, inputs=sources.digest(), threads=2 * run.config.sandbox.workers)
        teach_by_script(run, sources, production, sandbox)
    else:
        # All is made again from the replies on disk, at no cost, with what is learnt on the way.
        (folder / MANIFEST).unlink(missing_ok=True)
        production = Production(folder, filters, inputs=sources.digest(), threads=REQUESTS)
        taught = ModelTeacher(run, folder, sandbox).teach(sources, production)
    production.finish()
    problems = sources.evaluation_problems(data.num_eval_tasks, "eval", data.mode_shares())
    write_tasks(folder / "eval.jsonl", (problem.task for problem in problems))
    plot(production.report, folder / "report.png")
    training, evaluation = sources.training, sources.evaluation
    against = {"evaluation": evaluation.headers} | ({benchmark.name: benchmark.headers()} if benchmark else {})
    return {
        **production.report.to_dict(),
        **taught,
        "training_tables": training.names,
        "evaluation_tables": evaluation.names,
        "evaluation_headers": sorted(evaluation.headers),
        "shared_headers": {name: shared_headers(training.headers, found) for name, found in against.items()},
        "dropped_tables": {drop.source: drop.reason for drop in sources.dropped},
        "omitted_columns": {
            table.name: {drop.source: drop.reason for drop in table.omitted}
            for table in (*training.tables, *evaluation.tables)
            if table.omitted
        },
    }


def _benchmark(run: Run, folder: Path, sandbox: Sandbox) -> Benchmark | None:
    """The benchmark that the run is to be evaluated on, whose questions must not be trained on."""
    if not run.config.evaluate.benchmark:
        return None
    mode = "datamind"  # of no account: only questions and tables are looked at
    return read_benchmark(run.config.evaluate.benchmark, work=folder / "benchmark", mode=mode, sandbox=sandbox)


def _recipe(run: Run) -> None:
    folder = synthesize(run)
    report = json.loads((folder / "report.json").read_text())
    run.say(json.dumps({key: report[key] for key in ("count", "types", "strata", "grammars", "dropped")}, indent=1))


if __name__ == "__main__":
    launch(_recipe, stages=("synthesize",))
