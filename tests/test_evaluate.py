"""The recipe of evaluation: on a benchmark, from the policy's text to the files of the result; stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import Characters, ScriptedSampler
from test_benchmarks import aime, dabench, lines, tablebench

from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.tokenizer import Tokenizer
from groupwise.recipes import evaluate as recipe
from groupwise.recipes.evaluate import evaluate
from groupwise.recipes.policy import Policy, create_policy
from groupwise.recipes.rollouts import Rollouts
from groupwise.recipes.run import Run
from groupwise.rollout.generation import Completion
from groupwise.rollout.grammar import GRAMMARS, all_tags
from groupwise.rollout.record import Recorder
from groupwise.rollout.trajectory import Trajectory

SMALL = [
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_hidden_layers=1",
    "model.vocab_size=384",
    "rollout.max_tokens_per_turn=6",
    "rollout.max_trajectory_tokens=1000",
    "rollout.kv_memory=0.05",
    "evaluate.num_samples=2",
]


def open_run(folder: Path, *overrides: str) -> Run:
    return Run(load_config(None, [*SMALL, f"run.folder={folder}", *overrides]), Mesh(), claim=False)


def small_policy(run: Run) -> Policy:
    return create_policy(run, Tokenizer.train(["What is the mean?"], 384, all_tags()))


class Answering(ScriptedSampler):
    """Answers each prompt that holds a key with the key's texts, one for each sample."""

    def __init__(self, mode: str, answers: dict[str, Sequence[str]]) -> None:
        super().__init__({})
        self.mode, self.answers = mode, answers

    def flush(self) -> None:
        """It has no cache."""

    def poll(self) -> list[Completion]:
        if self.queue:
            number, _ = self.queue[0]
            prompt = "".join(map(chr, self.contexts[number]))
            said = next(texts for key, texts in self.answers.items() if key in prompt)
            sample = self.streams[number][1]
            self.script = {(sample, 0): GRAMMARS[self.mode].render_turn("answer", "t", said[sample])}
            self.queue, rest = self.queue[:1], self.queue[1:]
            done = super().poll()
            self.queue += rest
            return done
        return []


def evaluated(folder: Path, source: Path, mode: str, answers: dict[str, Sequence[str]]) -> dict:
    run = open_run(folder, f"evaluate.benchmark={source}", "rollout.max_tokens_per_turn=400")
    policy = small_policy(run)
    with Rollouts(run, replace(policy, tokenizer=Characters())) as rollouts:
        rollouts.sampler = Answering(mode, answers)
        return evaluate(run, policy, rollouts, "scripted")


def test_dabench_from_text_to_the_published_measures(tmp_path: Path) -> None:
    source = tmp_path / "DABench"
    source.mkdir()
    dabench(source)
    answers = {
        "q0": ("@x[2.33]", "@x[2.35]"),
        "q1": ("@x[1] @y[b]", "@x[1] @y[c]"),
        "q2": ("@x[1]", "no"),
    }
    found = evaluated(tmp_path / "runs", source, "datamind", answers)
    assert found["benchmark"] == "dabench"
    assert found["pass_at_1"] == pytest.approx(2 / 6)
    assert (found["pass_at_k"], found["k"]) == (pytest.approx(2 / 3), 2)
    assert found["measures"]["accuracy_by_question"] == pytest.approx(2 / 6)
    assert found["measures"]["proportional_accuracy_by_question"] == pytest.approx((1 + 0 + 1 + 1 / 2 + 1 / 3) / 6)
    assert found["measures"]["accuracy_by_sub_question"] == pytest.approx((1 + 2 + 1 + 1) / 12)
    assert found["endings"] == {"right": 2, "wrong_value": 2, "wrong_format": 2}
    assert {level: row["pass_at_1"] for level, row in found["by_level"].items()} == {
        "easy": 0.5, "medium": 0.5, "hard": 0.0
    }  # fmt: skip
    assert found["dropped"] == {"no field 'id'": 1, "no label": 1, ".csv file not found": 1, "file name is a path": 1}
    assert [example["correct"] for example in found["examples"]] == [True, True, False]
    for ending in ("json", "md", "png"):
        assert (tmp_path / "runs" / "train" / "evaluate" / f"scripted.{ending}").stat().st_size > 500
    text = (tmp_path / "runs" / "train" / "evaluate" / "scripted.md").read_text()
    assert "| accuracy_by_question | 0.3333 |" in text


def test_free_text_without_a_judge_is_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "TableBench"
    source.mkdir()
    tablebench(source)
    answers = {f"q{number}": ("Yes", "No, the cat sat") for number in range(5)}
    found = evaluated(tmp_path / "runs", source, "datamind", answers)
    assert (found["num_runs"], found["not_judged"]) == (10, 2)
    assert found["pass_at_1"] == pytest.approx(1 / 8)
    assert "CausalAnalysis" not in found["by_type"]
    # "No, the cat sat on a mat": "no cat sat" are three of its five words.
    assert found["measures"]["rouge_l"] == pytest.approx((0 + 2 * 3 / 8) / 2)
    assert found["measures"]["tablebench_score"] == pytest.approx((1 + 3 / 4) / 10)


def test_a_result_of_another_evaluation_is_not_taken_for_this_one(tmp_path: Path) -> None:
    source = tmp_path / "AIME"
    source.mkdir()
    aime(source)
    answers = {"p": ("25", "73")}
    first = evaluated(tmp_path / "runs", source, "reflection", answers)
    assert first["pass_at_1"] == 0.5
    again = evaluated(tmp_path / "runs", source, "reflection", {})  # nothing is asked
    assert again == json.loads(json.dumps(first))
    (source / "aime.jsonl").write_text(lines([{"problem": "p", "answer": 73}]))
    with pytest.raises(UserError, match=r"is of another evaluation .*tasks"):
        evaluated(tmp_path / "runs", source, "reflection", answers)


# ---- stopped and resumed ---------------------------------------------------------------------------------------------

TASKS = 5
KILLED = """
import sys
from pathlib import Path
from test_evaluate import interrupted
interrupted(Path(sys.argv[1]), int(sys.argv[2]))
"""


def write_tasks(folder: Path) -> None:
    (folder / "benchmark").mkdir(parents=True)
    rows = [{"problem": f"p{number}", "answer": number} for number in range(TASKS)]
    (folder / "benchmark" / "aime.jsonl").write_text(lines(rows))


def sampled(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[dict, list[str]]:
    """The result of an evaluation with the tiny policy itself, and the chunks that were sampled for it."""
    run = open_run(folder / "runs", f"evaluate.benchmark={folder / 'benchmark'}", *overrides)
    policy = small_policy(run)
    asked: list[str] = []
    monkeypatch.setattr(recipe, "CHUNK", 1)
    with Rollouts(run, policy) as rollouts:
        sample = rollouts.sample
        monkeypatch.setattr(rollouts, "sample", lambda *a, **k: (asked.append(k["record"][-6:]), sample(*a, **k))[1])
        return evaluate(run, policy, rollouts, "x"), asked


def interrupted(folder: Path, chunk: int) -> None:
    """Kills this process when the first of a chunk's two trajectories is on disk."""
    recipe.CHUNK = 1
    run = open_run(folder / "runs", f"evaluate.benchmark={folder / 'benchmark'}")
    policy = small_policy(run)
    with Rollouts(run, policy) as rollouts:
        place = rollouts.file(f"evaluate/x/{chunk:06d}")
        add = Recorder.add

        def add_and_die(recorder: Recorder, trajectory: Trajectory) -> None:
            add(recorder, trajectory)
            if place.exists():
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder.add = add_and_die
        evaluate(run, policy, rollouts, "x")


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_gives_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_tasks(folder)
    expected, asked = sampled(whole, monkeypatch)
    assert asked == [f"{index:06d}" for index in range(TASKS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed), "2"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (killed / "runs" / "train" / "evaluate" / "x.json").exists()
    records = "runs/train/trajectories/evaluate/x"
    assert len((killed / records / "000002.rank0.jsonl").read_text().splitlines()) == 1
    complete = killed / records / "000001.rank0.jsonl"
    complete.write_text(complete.read_text().splitlines()[0] + "\n")  # and one that lost a line
    found, asked = sampled(killed, monkeypatch)
    assert asked == ["000001", "000002", "000003", "000004"]
    for result in (expected, found):
        del result["asked"]["benchmark"]  # its folder
    assert found == expected
    for index in range(TASKS):
        one, other = ((folder / records / f"{index:06d}.rank0.jsonl").read_text() for folder in (whole, killed))
        assert one == other
    # Of other settings nothing is taken over.
    (killed / "runs" / "train" / "evaluate" / "x.json").unlink()
    assert len(sampled(killed, monkeypatch, "evaluate.temperature=1.0")[1]) == TASKS
