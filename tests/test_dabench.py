"""The scripted agent of the DABench benchmark: answers come through the sandbox, and a wrong program reaches nothing.

Real questions are asked where the environment variable GROUPWISE_DATA names a folder that holds ``dabench``.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from groupwise.bench.dabench import MODES, exact, reaches, read_programs, read_tasks, rerun_all, run, table_rows

DATA = Path(os.environ.get("GROUPWISE_DATA", "")) / "dabench"
READ = "import pandas as pd\ndf = pd.read_csv('t.csv')"
MEANS = {"first": READ, "then": "print(f\"@mean_a[{df['a'].mean():.2f}] @mean_b[{df['b'].mean():.2f}]\")"}
LARGEST = {
    "first": READ + "\nprint('@largest[nobody]')",  # not the last output: no answer
    "mistake": "row = df['A'].idxmax()",
    "then": "row = df['a'].idxmax()\nprint(f\"@largest[{df['name'][row]}]\")",
}
WRONG = {"first": READ, "then": "print(f\"@largest[{df['name'][0]}]\")"}
SILENT = {"first": READ + "\nprint('@largest[Zoe]')", "then": "row = df['a'].idxmax()"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of one table in DABench's files."""
    root = tmp_path_factory.mktemp("dabench")
    (root / "tables").mkdir()
    (root / "tables" / "t.csv").write_text("a,b,name\n1,5,Ann\n2,6,Bo\n4,8.5,Zoe\n")
    head = {"constraints": "None.", "file_name": "t.csv", "concepts": ["Summary Statistics"], "level": "easy"}
    largest = {**head, "question": "Who has the largest a?", "format": "@largest[name]"}
    questions = [{**head, "id": 1, "question": "What are the means?", "format": "@mean_a[mean], @mean_b[mean]"}]
    questions += [{**largest, "id": number, "question": f"{number}: who has the largest a?"} for number in (2, 3, 4)]
    labels = [{"id": 1, "common_answers": [["mean_b", "6.5"], ["mean_a", "2.33"]]}]
    labels += [{"id": number, "common_answers": [["largest", "Zoe"]]} for number in (2, 3, 4)]
    for name, lines in (("questions", questions), ("labels", labels)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_right_programs_reach_the_gold_answers_and_others_do_not(folder: Path) -> None:
    programs = {1: MEANS, 2: LARGEST, 3: WRONG, 4: SILENT}
    found = {mode: run(read_tasks(folder, mode), programs)[0] for mode in MODES}
    for trajectories in found.values():
        assert {number: one.status for number, one in trajectories.items()} == dict.fromkeys(programs, "answered")
        assert {number: reaches(one) for number, one in trajectories.items()} == {1: True, 2: True, 3: False, 4: False}
        assert [exact(one) for one in trajectories.values()] == [True, True, False, False]
        nothing = replace(trajectories[4].task, answer="@largest[]")
        assert not exact(replace(trajectories[4], task=nothing))
        assert [one.answer for one in trajectories.values()] == [
            "@mean_a[2.33] @mean_b[6.50]", "@largest[Zoe]", "@largest[Ann]", ""
        ]  # fmt: skip
        assert [execution.ok for execution in trajectories[2].executions] == [True, False, True]
        assert "KeyError" in trajectories[2].executions[1].output
    table, total = table_rows(found)
    assert (table["datamind"], table["agentic"], table["exact"], table["failed_runs"]) == (2, 2, 2, 2)
    assert (total["questions"], total["runs"], total["share"]) == (4, 18, 0.5)


def test_notebooks_run_again_and_a_difference_is_seen(folder: Path) -> None:
    found, tokenizer = run(read_tasks(folder, "agentic"), {2: LARGEST, 3: LARGEST})
    changed = found[3].executions
    changed[:] = [replace(one, output=one.output.replace("e", "E")) for one in changed]  # its error is a "KEyError" now
    assert rerun_all(list(found.values()), tokenizer) == [[True, True, True], [False, False, False]]


@pytest.mark.skipif(not DATA.is_dir(), reason="GROUPWISE_DATA names no folder that holds dabench")
def test_real_questions() -> None:
    programs, tasks = read_programs(), read_tasks(DATA, "agentic")
    assert len(programs) >= 60
    assert len({tasks[number].table for number in programs}) == len({task.table for task in tasks.values()})
    assert all(f'"{tasks[number].table}"' in program["first"] for number, program in programs.items())
    chosen = {number: programs[number] for number in (9, 14, 57, 58, 447, 451, 528, 665)}
    trajectories, _ = run(tasks, chosen)
    assert all(reaches(one) and exact(one) for one in trajectories.values())
    for number, one in trajectories.items():
        assert [execution.ok for execution in one.executions] == [name != "mistake" for name in chosen[number]]
