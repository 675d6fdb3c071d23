import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from small_tables import InProcess, small_tables, taught

from groupwise.data import production
from groupwise.data.filters import Filters
from groupwise.data.production import MANIFEST, Production, Work, assign_strata, made, scripted_works
from groupwise.data.report import markdown, plot
from groupwise.data.tasks import make_problems, training_views
from groupwise.data.teaching.script import Abandoned
from groupwise.data.trajectories import read_experts
from groupwise.engine.errors import UserError

MODES = {"datamind": 0.7, "agentic": 0.2, "reflection": 0.1}
SHARES = {"success": 0.40, "corrected": 0.35, "self_corrected": 0.15, "failure": 0.10}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    views = training_views(small_tables(), 60, seed=7)
    return make_problems(views, 200, seed=7, name="t", folder=tmp_path_factory.mktemp("views"), modes=MODES)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(production, "SHARD", 30)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def produce(folder, problems, runner=None):
    found = Production(folder, Filters(), inputs="same", threads=3)
    strata = assign_strata(problems, SHARES, 7)
    empty = found.run(scripted_works(problems, strata, runner or InProcess(), 7))
    found.finish()
    return found, empty


def test_shares_and_counts(tmp_path, problems):
    found, empty = produce(tmp_path, problems)
    experts, report = list(read_experts(tmp_path)), found.report
    assert empty == []
    assert dict(report.strata) == {"success": 80, "corrected": 70, "self_corrected": 30, "failure": 20}
    assert dict(report.grammars) == {"datamind": 140, "agentic": 40, "reflection": 20}
    assert [expert.task for expert in experts] == [problem.task for problem in problems]
    for name, counts in (
        ("types", Counter(expert.task.task_type for expert in experts)),
        ("tables", Counter(expert.task.table for expert in experts)),
        ("turns", Counter(sum(writer == "model" for writer, _ in expert.spans) for expert in experts)),
    ):
        assert getattr(report, name) == counts
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["complete"] is True
    assert manifest["experts"] == 200 == sum(shard["experts"] for shard in manifest["shards"])
    page = markdown(report.to_dict())
    assert "| corrected | 70 | 35.0% |" in page
    plot(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_the_order_of_execution_changes_nothing(tmp_path, problems):
    class Uneven(InProcess):
        """What was asked for first takes longest."""

        def run(self, code, files=(), history=()):
            time.sleep(0.003 * (len(self.programs) % 5))
            return super().run(code, files, history)

    produce(tmp_path / "a", problems[:60])
    produce(tmp_path / "b", problems[:60], Uneven())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert taught(problems[:60], InProcess(), seed=8, strata=SHARES)[0] != list(read_experts(tmp_path / "a"))


def test_works_ahead_are_bounded(problems):
    begun, taken = [], 0
    lock = threading.Lock()

    def work(number):
        with lock:
            begun.append(number)
        return []

    for _ in made((Work("success", lambda n=n: work(n)) for n in range(100)), threads=2):
        taken += 1
        with lock:
            assert len(begun) <= taken + production.AHEAD * 2
    assert taken == 100


def test_a_work_that_fails_ends_the_production_and_one_that_is_abandoned_does_not():
    def give_up():
        raise Abandoned("too hard")

    [first] = made([Work("failure", give_up)], 1)
    assert (first.stratum, first.experts, first.reason) == ("failure", (), "too hard")

    def fall():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(made([Work("success", fall), *[Work("success", list)] * 50], 2))


def test_what_is_dropped_is_counted_and_can_be_made_up_for(tmp_path, problems, small_shards):
    twice = [*problems[:40], *problems[:5]]
    found = Production(tmp_path, Filters(), inputs="", threads=2)
    empty = found.run(scripted_works(twice, ["success"] * 45, InProcess(), 7))
    assert empty == ["success"] * 5
    assert found.report.dropped == {"duplicate": 5}
    assert found.run(scripted_works(problems[40:45], empty, InProcess(), 7)) == []
    found.finish()
    assert found.report.count == 45
    assert [shard["experts"] for shard in json.loads((tmp_path / MANIFEST).read_text())["shards"]] == [30, 10, 5]


def test_a_production_that_was_stopped_makes_only_what_is_missing(tmp_path, problems, small_shards):
    produce(tmp_path / "whole", problems)

    class Stops(InProcess):
        def run(self, code, files=(), history=()):
            if len(self.programs) > 120:
                raise KeyboardInterrupt
            return super().run(code, files, history)

    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "cut", problems, Stops())
    shards = json.loads((tmp_path / "cut" / MANIFEST).read_text())["shards"]
    assert 0 < len(shards) < 7
    again = InProcess()
    found, _ = produce(tmp_path / "cut", problems, again)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(again.programs) < 320 - 30 * len(shards)
    assert found.report == produce(tmp_path / "other", problems)[0].report


def test_a_damaged_shard_is_made_again(tmp_path, problems, small_shards):
    produce(tmp_path / "whole", problems[:90])
    produce(tmp_path / "hurt", problems[:90])
    file = tmp_path / "hurt" / "experts-00001.jsonl"
    file.write_text(file.read_text().replace("mean", "moan", 1))
    produce(tmp_path / "hurt", problems[:90])
    assert contents(tmp_path / "hurt") == contents(tmp_path / "whole")


def test_other_tables_than_before_are_an_error(tmp_path, problems):
    produce(tmp_path, problems[:3])
    with pytest.raises(UserError, match="begun with other tables"):
        Production(tmp_path, Filters(), inputs="other", threads=1)


def test_strata_that_cannot_be(problems):
    with pytest.raises(UserError, match="unknown stratum 'sucess'"):
        assign_strata(problems, {"sucess": 1}, 0)
    with pytest.raises(UserError, match="lower that of the reflection mode"):
        assign_strata(problems, {"corrected": 1}, 0)


COMMAND = ["-m", "groupwise.recipes.synthesize", "train", "data.num_trajectories=1000", "data.num_eval_tasks=20"]


@pytest.mark.slow
def test_ten_kills_change_no_byte_of_the_data(tmp_path):
    """Also where a kill hits the writing of a shard, the views' files, or the list of evaluation tasks."""
    for name in ("whole", "killed"):
        command = [sys.executable, *COMMAND, f"run.folder={tmp_path}", f"run.name={name}"]
        kills = 10 if name == "killed" else 0
        rng = random.Random(1)
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                process.wait(rng.uniform(3, 15) if kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills -= 1
                continue
            assert process.returncode == 0, process.stderr.read()
            break
    files = {
        name: {
            str(file.relative_to(tmp_path / name / "data")): file.read_bytes()
            for file in (tmp_path / name / "data").rglob("*")
            if file.is_file() and file.suffix != ".png"
        }
        for name in ("whole", "killed")
    }
    assert files["whole"].keys() == files["killed"].keys()
    assert files["whole"] == files["killed"]
