"""The arithmetic of a run in words, and dry runs."""

import json
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.recipes.arithmetic import STAGES, in_words
from groupwise.recipes.run import Run


def words(*overrides: str, ranks: int = 2, stages: tuple[str, ...] = ("grpo",), folder: Path = Path("nowhere")) -> str:
    return in_words(load_config("train", overrides), ranks, folder, stages, None)


def test_the_main_job_in_words() -> None:
    assert words(stages=tuple(STAGES)) == (
        "synthesize: 3,000 expert trajectories, and 240 tasks for evaluation. "
        "sft: a step: 16 expert trajectories over 2 ranks, 8 each; in micro-batches of 8,192 packed tokens; "
        "1 optimiser step; 500 steps = 8,000 trajectories. "
        "grpo: a step: 16 prompts x 8 trajectories = 128 trajectories over 2 ranks, 64 each; at most 512 tokens each = "
        "65,536 tokens, in micro-batches of 8,192 packed tokens, about 4 on a rank when full; 1 optimiser step; "
        "46 steps = 5,888 trajectories; experts: those of the step's prompts and 24 more. "
        "evaluate: 240 tasks x 3 = 720 trajectories."
    )


def test_what_does_not_divide_and_what_is_done_several_times_is_said() -> None:
    said = words("grpo.prompts_per_step=5", "grpo.num_iterations=2", "grpo.num_minibatches=3", "grpo.mu_peak=0",
                 "grpo.mu_valley=0", "grpo.max_sampling_rounds=3")  # fmt: skip
    assert "= 40 trajectories over 2 ranks, at most 24 each; prompts without contrast replaced in up to 2 more" in said
    assert "; 6 optimiser steps (2 x 3 mini-batches); " in said
    assert "experts" not in said
    assert " on 1 rank; " in words(ranks=1)
    assert "hrm: a step" in words("hrm.steps=5", stages=("hrm",))


def test_a_step_that_was_timed_before_gives_an_estimate(tmp_path: Path) -> None:
    def record(name: str, seconds: float, *overrides: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(load_config("train", overrides).to_dict()))
        lines = [json.dumps({"step": step, "time": 1000 + seconds * step}) for step in (0, 1, 2, 4)]
        (tmp_path / name / "grpo.jsonl").write_text("\n".join(lines) + "\n")

    record("slower", 100.0, "model.hidden_size=256")  # another model's steps say nothing
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "grpo.jsonl").write_text("{}\n{")
    assert "time" not in words(folder=tmp_path / "mine")
    record("other", 3.0, "grpo.steps=7", "run.seed=4")
    said = words(folder=tmp_path / "mine")
    assert f"time: a step of grpo took 3 s in {tmp_path / 'other' / 'grpo.jsonl'}, so 46 may take 2.3 min." in said
    record("mine", 5.0)
    assert f"took 5 s in {tmp_path / 'mine' / 'grpo.jsonl'}, so 46 may take 3.8 min." in words(folder=tmp_path / "mine")


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(monkeypatch: pytest.MonkeyPatch, recipe: str, *arguments: str) -> None:
    """As ``python -m`` does, in this process."""
    monkeypatch.setattr(sys, "argv", [recipe, *arguments])
    monkeypatch.delitem(sys.modules, f"groupwise.recipes.{recipe}", raising=False)
    runpy.run_module(f"groupwise.recipes.{recipe}", run_name="__main__")


@pytest.mark.parametrize("recipe", ["synthesize", "sft", "hrm", "grpo", "evaluate", "train"])
def test_a_dry_run_says_the_arithmetic_and_writes_nothing(
    recipe: str, dry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, recipe, "train", "--dry-run", "hrm.steps=3")
    said = capsys.readouterr().out
    assert f"{recipe}: " in said or recipe == "train"
    assert ("memory: " in said) == (recipe != "synthesize")
    assert said.endswith("dry run: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("chat", ["How many?", "--model", "nowhere", "--file", "none.csv"]),
        ("show", ["none.jsonl"]),
        ("evaluate", ["--compare", "a.json", "b.json"]),
    ],
)
def test_a_dry_run_of_a_command_does_nothing(
    recipe: str, arguments: list[str], dry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, recipe, *arguments, "--dry-run")
    assert not ended.value.code
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_a_dry_run(dry: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    start(monkeypatch, "plan", "train", "--dry-run", "--gpus", "1x80GB")
    assert "fits: phase" in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    first, other = (load_config("train", [f"run.folder={tmp_path}", f"grpo.lr={lr}"]) for lr in (1, 2))
    Run(first, Mesh())
    with pytest.raises(UserError, match=r"of another configuration \(grpo.lr 1.0 -> 2.0\)"):
        Run(other, Mesh(), claim=False).check_configuration()
