import dataclasses
import json
import re
import shutil

import pytest
from small_tables import InProcess, ran, small_tables, taught

from groupwise.data import tasks, trajectories
from groupwise.data.asking.operations import OPERATIONS, REFLECTIONS
from groupwise.data.teachers import STRATA
from groupwise.data.teaching import attempts
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
    return taught(problems, InProcess(), seed=7)[0]


def test_spans_parse_and_answers_match(built):
    for expert in built:
        grammar = GRAMMARS[expert.grammar]
        writers = [writer for writer, _ in expert.spans]
        assert writers == ["model" if n % 2 == 0 else "environment" for n in range(len(writers))]
        turns = [grammar.parse_turn(text) for writer, text in expert.spans if writer == "model"]
        assert not any(turn.repairs for turn in turns)
        assert [turn.kind for turn in turns] == ["code"] * (len(turns) - 1) + ["answer"]
        assert answer_correct(turns[-1].content, expert.task) == (expert.stratum != "failure")
        assert bool(expert.mistakes) == (expert.stratum != "success")
        assert all(expert.spans[index][0] == "model" for index in expert.mistakes)
        errors = [n for n, (writer, text) in enumerate(expert.spans) if writer == "environment" and "Error: " in text]
        assert [index + 1 for index in expert.failed] == errors


def test_an_expert_knows_the_wording_of_its_question(built):
    operations = {operation.name: operation for operation in (*OPERATIONS, *REFLECTIONS)}
    for expert in built:
        wording = operations[expert.operation].wordings[expert.wording]
        fixed = re.split(r"\{\w+\}", wording)
        assert re.fullmatch(".+".join(map(re.escape, fixed)), expert.task.question)
    assert {expert.wording for expert in built} == {0, 1, 2}


def test_observations_are_what_the_code_printed(problems):
    class Parrot(InProcess):
        def run(self, code, files=(), history=()):
            result = super().run(code, files, history)
            return ran(result.ok, "PARROT\n" + result.output)

    experts, _ = taught(problems[:20], Parrot(), seed=7)
    observations = [text for expert in experts for writer, text in expert.spans if writer == "environment"]
    assert observations
    assert all("PARROT" in text for text in observations)


def test_a_long_observation_is_cut_in_its_middle(problems):
    class Chatty(InProcess):
        def run(self, code, files=(), history=()):
            result = super().run(code, files, history)
            return ran(result.ok, "x" * 30_000 + "\n" + result.output)

    [expert] = taught(problems[:1], Chatty(), seed=7, strata={"success": 1})[0]
    observation = expert.spans[1][1]
    assert len(observation) < attempts.MAX_OBSERVATION_CHARS + 200
    assert "characters left out" in observation
    assert expert.task.answer[:4] in observation[-60:]


def test_a_wrong_answer_and_broken_executions_are_dropped(problems):
    first = problems[0]
    wrong = dataclasses.replace(first, task=dataclasses.replace(first.task, answer="31415926"))
    experts, reasons = taught([wrong, *problems[1:10]], InProcess(), seed=7, strata={"success": 1})
    assert len(experts) == 9
    assert reasons == ["answer is not the known one"]

    class Broken(InProcess):
        def run(self, code, files=(), history=()):
            return ran(False, "killed")

    some = [problem for problem in problems if problem.question.code][:5]
    assert taught(some, Broken(), seed=0, strata={"success": 1}) == ([], ["right code failed"] * 5)


def test_only_chunks_that_succeeded_are_replayed(problems):
    seen = []

    class Watch(InProcess):
        def submit(self, code, files=(), history=()):
            seen.append(tuple(history))
            return super().submit(code, files, history)

    some = [problem for problem in problems if problem.question.code][:10]
    taught(some, Watch(), seed=0, strata={"corrected": 1})
    assert set(seen) == {()}
    seen.clear()
    taught(some, Watch(), seed=0, strata={"self_corrected": 1})
    assert sorted(map(len, seen)) == [0] * 10 + [1] * 10


def test_sessions_are_closed_when_code_is_not_run_to_its_end(problems):
    sessions = []

    class Falls(InProcess):
        def open(self, files, language):
            sessions.append(super().open(files, language))
            return sessions[-1]

        def run(self, code, files=(), history=()):
            raise RuntimeError("the sandbox is gone")

    with pytest.raises(RuntimeError, match="gone"):
        taught(problems[:3], Falls(), seed=0, strata={"success": 1})
    assert sessions
    assert all(session.closed for session in sessions)


def test_lists_round_trip_move_with_their_files_and_never_stand_half_written(tmp_path, problems, built):
    path = tmp_path / "deep" / "sft.jsonl"
    trajectories.write_experts(path, built)
    assert list(trajectories.read_experts(path)) == built

    def interrupted():
        yield built[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        trajectories.write_experts(path, interrupted())
    assert list(trajectories.read_experts(path)) == built
    assert [entry.name for entry in path.parent.iterdir()] == ["sft.jsonl"]

    inside = tmp_path / "a" / "tables" / "t.csv"
    inside.parent.mkdir(parents=True)
    inside.write_text("x\n1\n")
    expert = dataclasses.replace(built[0], task=dataclasses.replace(built[0].task, files=(str(inside),)))
    trajectories.write_experts(tmp_path / "a" / "experts-00000.jsonl", [expert])
    assert json.loads((tmp_path / "a" / "experts-00000.jsonl").read_text())["task"]["files"] == ["tables/t.csv"]
    shutil.move(tmp_path / "a", tmp_path / "b")
    [moved] = trajectories.read_experts(tmp_path / "b")
    assert moved.task.files == (str(tmp_path / "b" / "tables" / "t.csv"),)


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no trajectories"):
        next(trajectories.read_experts(tmp_path / "no.jsonl"))
    with pytest.raises(UserError, match="holds no trajectories"):
        next(trajectories.read_experts(tmp_path))
    (tmp_path / "bad.jsonl").write_text('{"task": 1}\n')
    with pytest.raises(UserError, match="line 1 is not a trajectory"):
        next(trajectories.read_experts(tmp_path / "bad.jsonl"))


def test_strata_default_is_the_published_one():
    assert sum(STRATA.values()) == pytest.approx(1.0)
    assert STRATA["success"] == 0.40
