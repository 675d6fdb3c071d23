"""Trajectories on disk: every one that ended is there, whatever ends the run, and rewards come in one step."""

import json
import os
import signal
from pathlib import Path

import pytest
from scripted import LIMITS, Characters, ScriptedSampler, ScriptedSandbox, answer, code, task

from groupwise.engine.errors import UserError
from groupwise.rollout.agent import run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.record import Recorder, read_records, write_records
from groupwise.rollout.trajectory import Group, Trajectory


def rollout(file: Path, generations: int = 3) -> list[Group]:
    script = {(sample, 0): code("bad" if sample else "a") for sample in range(generations)}
    script |= {(sample, 1): answer(str(sample)) for sample in range(generations)}
    with Recorder(file, Characters()) as recorder:
        return run_agent(
            ScriptedSampler(script), ScriptedSandbox(), [task(), task(1)], tokenizer=Characters(),
            num_generations=generations, params=SamplingParams(), limits=LIMITS, seed=0, progress=recorder.add,
        )  # fmt: skip


def test_each_trajectory_is_a_line_in_words(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "grpo" / "000000.jsonl"
    groups = rollout(file)
    records = list(read_records(file))
    assert sorted((record["task"]["id"], record["sample"]) for record in records) == [
        (name, sample) for name in ("t0", "t1") for sample in range(3)
    ]
    for record in records:
        found = groups[record["task"]["id"] == "t1"].trajectories[record["sample"]]
        assert record == json.loads(json.dumps(found.to_record(Characters())))
        assert record["status"] == "answered"
        assert record["answer"] == str(record["sample"])
        assert "".join(span["text"] for span in record["spans"]) == Characters().decode(found.token_ids)
        assert [done["verdict"] for done in record["executions"]] == ["error" if record["sample"] else "ok"]
        assert (record["turns"], record["completion_tokens"]) == (2, sum(found.to_example().loss_mask))


def test_rewards_come_with_all_trajectories_in_order_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "000000.jsonl"
    groups = rollout(file)
    streamed = file.read_text()
    for group in groups:
        for found in group.trajectories:
            found.rewards, found.reward, found.advantage = {"answer": 1.0}, 1.0, float(found.sample)

    class Full(Characters):
        """There is no space left after a few trajectories."""

        decoded = 0

        def decode(self, ids):
            self.decoded += 1
            if self.decoded > 9:
                raise OSError(28, "No space left on device")
            return super().decode(ids)

    with pytest.raises(OSError, match="No space"):
        write_records(file, groups, Full())
    assert file.read_text() == streamed
    write_records(file, groups, Characters())
    records = list(read_records(file))
    assert [(record["task"]["id"], record["sample"]) for record in records] == [
        (name, sample) for name in ("t0", "t1") for sample in range(3)
    ]
    assert [record["advantage"] for record in records] == [0.0, 1.0, 2.0] * 2
    assert {(record["reward"], record["rewards"]["answer"]) for record in records} == {(1.0, 1.0)}
    assert os.listdir(tmp_path) == ["000000.jsonl"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_run_keeps_what_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, ended = Recorder.add, []

    def add_and_die(self: Recorder, trajectory: Trajectory) -> None:
        add(self, trajectory)
        ended.append(trajectory)
        if len(ended) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Recorder, "add", add_and_die)
    file = tmp_path / "000000.jsonl"
    child = os.fork()
    if not child:
        try:
            rollout(file)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(read_records(file))) == 4


def test_a_line_that_was_cut_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "000000.jsonl"
    rollout(file)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, whole.index(b"\n", first), 7):
        file.write_bytes(whole[:size])
        assert len(list(read_records(file))) == 1
    file.write_bytes('{"é'.encode()[:-1])
    assert list(read_records(file)) == []
    file.write_bytes(whole[:first] + b"{\n" + whole[first:])
    with pytest.raises(UserError, match=r"000000.jsonl, line 2 is no trajectory"):
        list(read_records(file))
    with pytest.raises(UserError, match=r"gone.jsonl cannot be read"):
        list(read_records(tmp_path / "gone.jsonl"))


def test_any_text_survives(tmp_path: Path) -> None:
    file, odd = tmp_path / "000000.jsonl", "é \ud800 \u2028 \x00 \r\n </code> \ufffd"
    groups = rollout(file, generations=1)
    groups[0].trajectories[0].answer = odd
    write_records(file, groups, Characters())
    records = list(read_records(file))
    assert len(records) == 2
    assert records[0]["answer"] == odd
    assert "é" in file.read_text(encoding="utf-8")
