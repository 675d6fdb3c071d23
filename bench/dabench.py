"""Questions of InfiAgent-DABench, answered end to end by an agent whose policy is a script, in both tool grammars.

    python -m groupwise.bench.dabench --data FOLDER [--rerun] [--out FILE]

FOLDER holds the benchmark's ``questions.jsonl``, ``labels.jsonl`` and ``tables/``. The programs of
``dabench_programs.toml`` go through ``run_agent``, the real tokenizer and the real sandbox, and the answer is what came
back in the last observation: a value that is lost or changed on the way is an answer not reached.

``datamind`` and ``agentic`` count the questions whose answer ``rewards.answer`` finds right (numbers within 3 %);
``exact`` those right in both grammars by the benchmark's own rule: each value is the label's text, or a number within
1e-6 of it. ``runs`` are executions in both grammars, and ``failed_runs`` those that fail, as each planned mistake does.

With ``--rerun`` each trajectory is saved as a notebook, which is validated and run again in a new kernel:
``same_cells`` print what the sandbox printed and end with the same error, ``other_cells`` do not.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import nbformat
from nbclient import NotebookClient

from groupwise.bench import common
from groupwise.data.benchmarks import read_benchmark
from groupwise.data.scorers import labels_met
from groupwise.engine.tokenizer import Tokenizer
from groupwise.rewards.answer import trajectory_correct
from groupwise.rollout.agent import AgentLimits, run_agent
from groupwise.rollout.generation import Completion
from groupwise.rollout.grammar import GRAMMARS, Grammar, all_tags
from groupwise.rollout.notebook import save_notebook
from groupwise.rollout.sampler import SamplingParams
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Trajectory

MODES = ("datamind", "agentic")
PROGRAMS = Path(__file__).with_name("dabench_programs.toml")
# The pieces of a program, with the thought before each.
PIECES = {"first": "I read the table.", "mistake": "I go on.", "then": "I compute what is asked."}
LIMITS = AgentLimits(max_tokens_per_turn=4096, max_trajectory_tokens=16384)
VOCABULARY = 4096
KERNELS = 2  # at once

Program = Mapping[str, str]
Script = Generator[str, str, None]


class ScriptedSampler:
    """A sampler whose turns are written by scripts, one for each prompt; each is sent the observation it caused.

    Args:
        tokenizer: turns become its ids; prompts and observations are read from ids alone.
        scripts: by the prompt's text.
    """

    def __init__(self, tokenizer: Tokenizer, scripts: Mapping[str, Script]) -> None:
        self._tokenizer, self._scripts = tokenizer, scripts
        self._under_way: dict[int, Script] = {}
        self._ids: dict[int, list[int]] = {}
        self._finished: list[Completion] = []
        self._count = 0

    @property
    def has_work(self) -> bool:
        """Whether a turn waits to be polled."""
        return bool(self._finished)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        """Starts the prompt's script."""
        self._count += 1
        self._under_way[self._count] = self._scripts[self._tokenizer.decode(prompt_ids)]
        self._ids[self._count] = list(prompt_ids)
        self._write(self._count, next(self._under_way[self._count]), params)
        return self._count

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Sends the script what was observed."""
        self._ids[request_id] += token_ids
        self._write(request_id, self._under_way[request_id].send(self._tokenizer.decode(token_ids)), params)

    def cancel(self, request_id: int) -> None:
        """Ends the script."""
        self._under_way.pop(request_id).close()
        del self._ids[request_id]

    def poll(self) -> list[Completion]:
        """The turns written since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def token_ids(self, request_id: int) -> Sequence[int]:
        """All that was read and written."""
        return self._ids[request_id]

    def is_waiting(self, request_id: int) -> bool:
        """No script waits for memory."""
        return False

    def _write(self, request_id: int, turn: str, params: SamplingParams) -> None:
        ids = self._tokenizer.encode(turn)
        reason: Literal["stop", "length"] = "stop" if len(ids) <= params.max_tokens else "length"
        ids = ids[: params.max_tokens]
        self._ids[request_id] += ids
        certain = [0.0] * len(ids)
        self._finished.append(Completion(request_id, ids, certain, certain, reason, self._tokenizer.decode(ids)))


def script(grammar: Grammar, program: Program) -> Script:
    """The turns of a trajectory: the program's pieces, then what the last one's observation says."""
    observation = ""
    for name, thought in PIECES.items():
        if name in program:
            observation = yield grammar.render_turn("code", thought, program[name])
    said = observation.strip().removeprefix(f"<{grammar.result}>").removesuffix(f"</{grammar.result}>")
    yield grammar.render_turn("answer", "The output is the answer.", said)


def read_programs() -> dict[int, Program]:
    """The programs by question."""
    return {int(number): program for number, program in tomllib.loads(PROGRAMS.read_text()).items()}


def read_tasks(folder: Path, mode: str) -> dict[int, Task]:
    """The benchmark's questions as tasks, by number; the gold answer is in the form that the question asks for."""
    with Sandbox() as sandbox:
        items = read_benchmark(folder, work=folder, mode=mode, sandbox=sandbox).items
    return {int(item.task.id.removeprefix("dabench-")): item.task for item in items}


def run(tasks: Mapping[int, Task], programs: Mapping[int, Program]) -> tuple[dict[int, Trajectory], Tokenizer]:
    """One trajectory of each task that has a program, and the tokenizer of all."""
    asked = {number: tasks[number] for number in programs}
    texts = [text for number, task in asked.items() for text in (task.question, *programs[number].values())]
    tokenizer = Tokenizer.train(texts, VOCABULARY, all_tags(MODES))
    scripts = {}
    for number, task in asked.items():
        grammar = GRAMMARS[task.mode]
        scripts[grammar.prompt(task, tokenizer)] = script(grammar, programs[number])
    with Sandbox() as sandbox:
        groups = run_agent(
            ScriptedSampler(tokenizer, scripts), sandbox, list(asked.values()), tokenizer=tokenizer,
            num_generations=1, params=SamplingParams(), limits=LIMITS, seed=0,
        )  # fmt: skip
    return {number: group.trajectories[0] for number, group in zip(asked, groups, strict=True)}, tokenizer


def reaches(trajectory: Trajectory) -> bool:
    """Whether the answer is the gold one."""
    return trajectory_correct(trajectory)


def exact(trajectory: Trajectory) -> bool:
    """Whether the benchmark's own rule accepts the answer."""
    return all(labels_met(trajectory.answer, trajectory.task.answer).values())


def rerun(trajectory: Trajectory, tokenizer: Tokenizer, file: Path) -> list[bool]:
    """Whether each execution's cell gives the same output again, in a notebook that is saved, read and run anew."""
    save_notebook(file, trajectory, tokenizer)
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    _, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]  # the first sets the kernel up
    for cell in cells:
        cell.outputs = []
    folder = {"metadata": {"path": str(file.parent)}}
    NotebookClient(notebook, timeout=120, resources=folder, extra_arguments=["--log-level=ERROR"]).execute()
    executions = trajectory.executions
    return [_is_same(cell.outputs, execution) for cell, execution in zip(cells, executions, strict=True)]


def _is_same(outputs: Sequence[nbformat.NotebookNode], execution: Execution) -> bool:
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    if not errors:
        return execution.ok and printed == execution.output
    # Between the two stand the lines of code that led to the error.
    whole = execution.output.rstrip()
    return not execution.ok and whole.startswith(printed) and whole.endswith(errors[0])


def rerun_all(trajectories: Sequence[Trajectory], tokenizer: Tokenizer) -> list[list[bool]]:
    """`rerun` for several trajectories, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(KERNELS) as pool:
        files = [Path(folder) / f"{number}.ipynb" for number in range(len(trajectories))]
        return list(pool.map(lambda one, file: rerun(one, tokenizer, file), trajectories, files))


def table_rows(found: Mapping[str, Mapping[int, Trajectory]]) -> list[common.Row]:
    """A row for each table, and one for all; `found` holds the trajectories of each grammar by question."""
    tables: dict[str, list[int]] = {}
    for number, trajectory in found[MODES[0]].items():
        tables.setdefault(trajectory.task.table, []).append(number)
    rows = [{"table": table, **_counts(found, numbers)} for table, numbers in sorted(tables.items())]
    total = {"table": "all", **_counts(found, list(found[MODES[0]]))}
    return [*rows, {**total, "share": sum(total[mode] for mode in MODES) / (len(MODES) * total["questions"])}]


def _counts(found: Mapping[str, Mapping[int, Trajectory]], numbers: Sequence[int]) -> common.Row:
    asked = {mode: [found[mode][number] for number in numbers] for mode in MODES}
    every = [one for mode in MODES for one in asked[mode]]
    return {
        "questions": len(numbers),
        **{mode: sum(reaches(one) for one in asked[mode]) for mode in MODES},
        "exact": sum(all(exact(found[mode][number]) for mode in MODES) for number in numbers),
        "runs": sum(len(one.executions) for one in every),
        "failed_runs": sum(not execution.ok for one in every for execution in one.executions),
    }


def main() -> None:
    own = common.parser(__doc__)
    own.add_argument("--data", type=Path, required=True, help="folder with questions.jsonl, labels.jsonl and tables/")
    own.add_argument("--rerun", action="store_true", help="also run every trajectory again as a notebook")
    args = own.parse_args()
    if not (args.data / "questions.jsonl").is_file():
        own.error(f"--data {args.data}: no questions.jsonl there; give the folder of the benchmark's files")
    programs = read_programs()
    found: dict[str, dict[int, Trajectory]] = {}
    cells: list[bool] = []
    for mode in MODES:
        found[mode], tokenizer = run(read_tasks(args.data, mode), programs)
        trajectories = list(found[mode].values())
        reruns = rerun_all(trajectories, tokenizer) if args.rerun else [[] for _ in trajectories]
        for one, same in zip(trajectories, reruns, strict=True):
            cells += same
            if not reaches(one):
                print(f"not reached: {one.task.id}, {mode}, {one.status}")
                print(f"    said: {(one.answer or '').splitlines()}\n    gold: {one.task.answer}")
            if not all(same):
                print(f"other output: {one.task.id}, {mode}")
    rows = table_rows(found)
    if args.rerun:
        rows[-1] |= {"same_cells": sum(cells), "other_cells": len(cells) - sum(cells)}
    common.report("dabench", rows, args)


if __name__ == "__main__":
    main()
