"""The recipe from a folder of tables and databases to trajectories, with programs and with a model as the teacher."""

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from endpoints import Said, reset, serving
from small_databases import small_database
from small_tables import small_tables

from groupwise.data.trajectories import Expert, read_experts
from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.recipes.run import Run
from groupwise.recipes.synthesize import synthesize
from groupwise.rewards.answer import answer_correct
from groupwise.rollout.task import read_tasks

FULL = ["data.detail=full", "data.num_trajectories=90", "data.num_eval_tasks=12", "data.modes=60/35/5"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for table in small_tables():
        table.frame.to_csv(folder / table.file, index=False)
    for name in ("shop", "store", "stall"):
        small_database(folder / f"{name}.sqlite")
    (folder / "noise.csv").write_bytes(b"\x00\x01\x02" * 99)
    return folder


def run_of(folder: Path, tables: Path, *settings: str) -> Run:
    return Run(load_config(None, [*FULL, f"data.tables={tables}", f"run.folder={folder}", *settings]), Mesh())


def contents(data: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in data.iterdir() if file.suffix in (".json", ".jsonl", ".md")}


def answer_of(expert: Expert) -> str:
    return re.sub(r"<[^>]*>", "", expert.spans[-1][1].rpartition("<answer>")[2]).strip()


@pytest.fixture(scope="module")
def made(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(run_of(tmp_path_factory.mktemp("made"), tables))


def test_tables_and_databases_become_trajectories(made: Path) -> None:
    data = made
    report, experts = json.loads((data / "report.json").read_text()), list(read_experts(data))
    assert len(experts) == report["count"] == 90
    assert report["strata"] == {"success": 36, "corrected": 31, "self_corrected": 14, "failure": 9}
    by_sql = [expert for expert in experts if expert.task.language == "sql"]
    assert 20 < len(by_sql) < 70
    for expert in by_sql:
        assert expert.task.files[0].endswith(".sqlite")
        assert Path(expert.task.files[0]).exists()
        if expert.stratum != "failure":
            assert re.search(r"result_\d+\.csv", answer_of(expert))
    for expert in experts:
        if expert.task.language == "python" and expert.stratum != "failure":
            assert answer_correct(answer_of(expert), expert.task)
    asked = list(read_tasks(data / "eval.jsonl"))
    assert {task.table for task in asked} <= set(report["evaluation_tables"])
    assert not set(report["training_tables"]) & set(report["evaluation_tables"])
    assert {"shop", "store", "stall"} & set(report["training_tables"])
    assert "binary" in report["dropped_tables"]["noise.csv"]
    # Another database of the same schema shares its names; the tables do not.
    assert "customer_id" in report["shared_headers"]["evaluation"]
    assert (data / "report.png").stat().st_size > 10_000


def test_the_benchmark_that_is_to_be_evaluated_on_is_looked_at(tmp_path: Path, tables: Path, made: Path) -> None:
    benchmark = tmp_path / "benchmark"
    (benchmark / "tables").mkdir(parents=True)
    shutil.copy(tables / "table1.csv", benchmark / "tables" / "held.csv")
    first = next(iter(read_experts(made)))
    long = next(expert for expert in read_experts(made) if len(expert.task.question.split()) > 16)
    questions = [
        {"id": number, "question": text, "concepts": ["x"], "constraints": "", "format": "@a[1]", "level": "easy",
         "file_name": "held.csv"}
        for number, text in enumerate((first.task.question, long.task.question))
    ]  # fmt: skip
    labels = [{"id": number, "common_answers": [["a", "1"]]} for number in range(2)]
    for name, rows in (("questions", questions), ("labels", labels)):
        (benchmark / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = synthesize(run_of(tmp_path, tables, f"evaluate.benchmark={benchmark}"))
    report = json.loads((data / "report.json").read_text())
    assert report["dropped"]["contamination"] >= 1
    assert report["count"] == 90
    assert long.task.question not in {expert.task.question for expert in read_experts(data)}
    shared = report["shared_headers"]["dabench"]
    assert ("kind1" in shared) == ("table1" in report["training_tables"])


def test_a_stopped_run_whose_tables_changed_is_not_gone_on_with(tmp_path: Path, tables: Path) -> None:
    mine = shutil.copytree(tables, tmp_path / "tables")
    few = ("data.num_trajectories=30", "data.num_eval_tasks=4")
    data = synthesize(run_of(tmp_path / "runs", mine, *few))
    (data / "report.json").unlink()
    trained = json.loads((data / "manifest.json").read_text())
    assert trained["complete"]
    for table in mine.glob("table*.csv"):
        table.write_text(table.read_text().replace("red", "rosy"))
    with pytest.raises(UserError, match="begun with other tables"):
        synthesize(run_of(tmp_path / "runs", mine, *few))


class Analyst:
    """A model that counts rows; on every third question its attempts differ, and now and then its server fails."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.requests, self.stop_after = 0, stop_after

    def __call__(self, body: dict[str, Any]) -> Said | str:
        self.requests += 1
        if self.requests > self.stop_after:
            return Said(status=401, body=b'{"error": "no credit"}')
        system, last = body["messages"][0]["content"], body["messages"][-1]["content"]
        if self.requests % 11 == 0:
            return Said(act=reset)
        if self.requests % 13 == 0:
            return Said(status=429, headers={"Retry-After": "0"})
        if "Are you ready" in last:
            return "yes"
        if "You write questions" in system:
            number = zlib.crc32(json.dumps(body["messages"]).encode())  # the seed differs with the server's port
            return f"<question>How many rows are there, asked as number {number}?</question>"
        if "<verdict>" in system:
            return "<critique>They count differently.</critique><verdict>inconsistent</verdict>"
        if "Rewrite them as finer steps" in system:
            return "<workflow>1. Count once.</workflow>"
        number = int(re.search(r"asked as number (\d+)", json.dumps(body["messages"]))[1])  # type: ignore[index]
        turns = sum(message["role"] == "assistant" for message in body["messages"])
        form = "agentic" if "<action_input>" in system else "datamind"
        if turns == 0:
            code = (
                "SELECT COUNT(*) FROM city" if "SQLite query" in system else self.count(body["messages"][1]["content"])
            )
            return self.code(form, code)
        if "SQLite query" in system:
            return self.answer(form, re.search(r"result_\w+\.csv", last)[0])  # type: ignore[index]
        found = re.findall(r"\d+", last)[-1]
        return self.answer(form, str(int(found) * (1 + (body["seed"] % 7 if number % 3 == 0 else 0))))

    @staticmethod
    def count(question: str) -> str:
        file = re.search(r'read_csv\("([^"]+)"\)', question)[1]  # type: ignore[index]
        return f'import pandas as pd\nprint(len(pd.read_csv("{file}")))'

    @staticmethod
    def code(form: str, code: str) -> str:
        if form == "datamind":
            return f"<think>I count.</think>\n<code>\n{code}\n</code>"
        action = f"<action>python_executor</action>\n<action_input>\n{code}\n</action_input>"
        return f"<step><thought>I count.</thought>\n{action}</step>"

    @staticmethod
    def answer(form: str, text: str) -> str:
        if form == "datamind":
            return f"<think>That is it.</think>\n<answer>{text}</answer>"
        return f"<stop_analysis><thought>That is it.</thought>\n<answer>{text}</answer></stop_analysis>"


def test_a_model_teaches_and_a_stopped_run_pays_for_nothing_twice(tmp_path: Path, tables: Path) -> None:
    settings = ["data.num_trajectories=30", "data.num_eval_tasks=4"]
    with serving(Analyst(stop_after=60)) as server:
        teacher = f"data.teacher={server.spec}"
        for _ in range(2):
            with pytest.raises(UserError, match="gives no reply"):
                synthesize(run_of(tmp_path, tables, *settings, teacher))
        server.model = Analyst()
        data = synthesize(run_of(tmp_path, tables, *settings, teacher))
        assert max(count for body, count in server.answered.items() if "Are you ready" not in body) == 1
    report, experts = json.loads((data / "report.json").read_text()), list(read_experts(data))
    assert len(experts) == report["count"] >= 30
    assert report["dropped"]["no agreement"] > 0
    assert sum(row["tasks"] for row in report["agreement"].values()) > sum(
        row["at_once"] for row in report["agreement"].values()
    )
    assert report["teacher"]["replies"] == sum(server.answered.values()) - sum(
        count for body, count in server.answered.items() if "Are you ready" in body
    )
    for expert in experts:
        if expert.task.language == "python":
            rows = len(Path(expert.task.files[0]).read_text().splitlines()) - 1
            assert expert.task.answer == str(rows) == answer_of(expert)
            assert expert.task.answer_type == "number"
        else:
            assert expert.task.answer_type == "table"
    assert {len(expert.spans) for expert in experts} == {3}
    assert len({expert.task.id for expert in experts}) == len(experts) / 3


def test_a_teacher_that_is_not_there_is_one_sentence(tmp_path: Path, tables: Path) -> None:
    with pytest.raises(UserError, match="neither MODEL@http"):
        synthesize(run_of(tmp_path, tables, "data.teacher=nobody"))
