import dataclasses
import json
import re
from collections import Counter
from concurrent.futures import Future

import pytest
from small_tables import InProcess, Ran, small_tables

from groupwise.data import tasks, trajectories
from groupwise.data.operations import OPERATIONS, REFLECTIONS
from groupwise.data.teachers import STRATA
from groupwise.engine.errors import UserError
from groupwise.rewards.answer import answer_correct
from groupwise.rollout.grammar import GRAMMARS

MODES = {"datamind": 0.7, "agentic": 0.2, "reflection": 0.1}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    pool = tasks.training_views(small_tables(), 60, seed=7)
    return tasks.make_problems(pool, 200, seed=7, name="t", folder=tmp_path_factory.mktemp("views"), modes=MODES)


@pytest.fixture(scope="module")
def built(problems):
    return trajectories.build_trajectories(problems, InProcess(), seed=7)


def test_shares_and_counts(problems, built):
    experts, report = built
    assert report.dropped.total() == 0
    assert dict(report.strata) == {"success": 80, "corrected": 70, "self_corrected": 30, "failure": 20}
    assert dict(report.grammars) == {"datamind": 140, "agentic": 40, "reflection": 20}
    assert report.count == len(experts) == sum(report.types.values()) == sum(report.tables.values())
    assert report.to_dict()["strata"] == dict(report.strata)
    assert [expert.task for expert in experts] == [problem.task for problem in problems]


def test_spans_parse_and_answers_match(built):
    for expert in built[0]:
        grammar = GRAMMARS[expert.grammar]
        writers = [writer for writer, _ in expert.spans]
        assert writers == ["model" if n % 2 == 0 else "environment" for n in range(len(writers))]
        turns = [grammar.parse_turn(text) for writer, text in expert.spans if writer == "model"]
        assert not any(turn.repairs for turn in turns)
        assert [turn.kind for turn in turns] == ["code"] * (len(turns) - 1) + ["answer"]
        assert answer_correct(turns[-1].content, expert.task) == (expert.stratum != "failure")
        assert bool(expert.mistakes) == (expert.stratum != "success")
        assert all(expert.spans[index][0] == "model" for index in expert.mistakes)


def test_an_expert_knows_the_wording_of_its_question(built):
    operations = {operation.name: operation for operation in (*OPERATIONS, *REFLECTIONS)}
    for expert in built[0]:
        wording = operations[expert.operation].wordings[expert.wording]
        fixed = re.split(r"\{\w+\}", wording)
        assert re.fullmatch(".+".join(map(re.escape, fixed)), expert.task.question)
    assert {expert.wording for expert in built[0]} == {0, 1, 2}


def test_observations_are_what_the_code_printed(problems):
    class Parrot(InProcess):
        def run(self, code, files=(), history=()):
            result = super().run(code, files, history)
            return Ran(result.ok, "PARROT\n" + result.output)

    experts, _ = trajectories.build_trajectories(problems[:20], Parrot(), seed=7)
    observations = [text for expert in experts for writer, text in expert.spans if writer == "environment"]
    assert observations
    assert all("PARROT" in text for text in observations)


def test_same_seed_same_trajectories_in_any_order_of_execution(problems, built):
    class Late(InProcess):
        """Holds results back and gives them out last first."""

        def __init__(self):
            super().__init__()
            self.held = []

        def submit(self, code, files=(), history=()):
            outer = self

            class Lazy(Future):
                def result(self, timeout=None):
                    for future, result in reversed(outer.held):
                        if not future.done():
                            future.set_result(result)
                    outer.held.clear()
                    return super().result(timeout)

            future = Lazy()
            self.held.append((future, self.run(code, files, history)))
            return future

    assert trajectories.build_trajectories(problems, Late(), seed=7)[0] == built[0]
    assert trajectories.build_trajectories(problems, InProcess(), seed=8)[0] != built[0]


def test_a_wrong_answer_is_dropped_and_counted(problems):
    first = problems[0]
    wrong = dataclasses.replace(first, task=dataclasses.replace(first.task, answer="31415926"))
    some = [wrong, *problems[1:10]]
    experts, report = trajectories.build_trajectories(some, InProcess(), seed=7, strata={"success": 1})
    assert len(experts) == 9
    assert report.dropped == Counter({"answer is not the known one": 1})


def test_long_and_broken_executions_are_dropped(problems):
    class Chatty(InProcess):
        def run(self, code, files=(), history=()):
            return Ran(True, "x" * 9999)

    class Broken(InProcess):
        def run(self, code, files=(), history=()):
            return Ran(False, "killed")

    some = [problem for problem in problems if problem.question.code][:5]
    for runner, reason in ((Chatty(), "long observation"), (Broken(), "right code failed")):
        experts, report = trajectories.build_trajectories(some, runner, seed=0, strata={"success": 1})
        assert experts == []
        assert report.dropped == Counter({reason: 5})


def test_only_chunks_that_succeeded_are_replayed(problems):
    seen = []

    class Watch(InProcess):
        def submit(self, code, files=(), history=()):
            seen.append(tuple(history))
            return super().submit(code, files, history)

    some = [problem for problem in problems if problem.question.code][:10]
    trajectories.build_trajectories(some, Watch(), seed=0, strata={"corrected": 1})
    assert set(seen) == {()}
    seen.clear()
    trajectories.build_trajectories(some, Watch(), seed=0, strata={"self_corrected": 1})
    assert sorted(map(len, seen)) == [0] * 10 + [1] * 10


def test_files_round_trip_and_never_stand_half_written(tmp_path, built):
    path = tmp_path / "deep" / "sft.jsonl"
    trajectories.write_experts(path, built[0])
    assert list(trajectories.read_experts(path)) == built[0]
    record = json.loads(path.read_text().splitlines()[0])
    assert set(record) == {"task", "spans", "stratum", "grammar", "operation", "wording", "mistakes"}

    def interrupted():
        yield built[0][0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        trajectories.write_experts(path, interrupted())
    assert list(trajectories.read_experts(path)) == built[0]
    assert [entry.name for entry in path.parent.iterdir()] == ["sft.jsonl"]


def test_bad_input_is_one_sentence(tmp_path, problems):
    with pytest.raises(UserError, match="unknown stratum 'sucess'"):
        trajectories.assign_strata(problems, {"sucess": 1}, 0)
    with pytest.raises(UserError, match="lower that of the reflection mode"):
        trajectories.assign_strata(problems, {"corrected": 1}, 0)
    with pytest.raises(UserError, match="does not exist"):
        next(trajectories.read_experts(tmp_path / "no.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"task": 1}\n')
    with pytest.raises(UserError, match="line 1 is not a trajectory"):
        next(trajectories.read_experts(tmp_path / "bad.jsonl"))


def test_strata_default_is_the_published_one():
    assert sum(STRATA.values()) == pytest.approx(1.0)
    assert STRATA["success"] == 0.40
