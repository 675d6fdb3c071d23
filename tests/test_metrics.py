"""The record of a run: what is written can be read, a resumed run leaves no doubles, and pictures need nothing."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from groupwise.engine import metrics as metrics_module
from groupwise.engine.errors import UserError
from groupwise.engine.metrics import (
    Metrics,
    ProgressBar,
    Timer,
    peak_memory_gib,
    progress,
    read_records,
    tree_rss_gib,
)
from groupwise.engine.plots import plot_run

RANK_0, RANK_1 = SimpleNamespace(rank=0), SimpleNamespace(rank=1)


def test_records_reach_the_disk_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path / "run", RANK_0, phase="grpo", total_steps=2) as metrics:
        metrics.log(0, {"reward": 0.25, "lr": torch.tensor(0.5), "kl": math.nan})
        (record,) = read_records(metrics.path)  # before it is closed
        assert record.pop("time") <= time.time() + 1
        assert record == {"step": 0, "reward": 0.25, "lr": 0.5, "kl": None}
        metrics.log(1, {"reward": 0.5})
    json.loads(metrics.path.read_text().splitlines()[0], parse_constant=lambda text: pytest.fail(text))
    assert "grpo 1/2 | reward 0.250 | kl nan | lr 5.00e-01" in capsys.readouterr().out
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "grpo"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(0, 0.25), (1, 0.5)]


def test_resuming_drops_later_records(tmp_path: Path) -> None:
    with Metrics(tmp_path, RANK_0, phase="sft", console_every=0) as metrics:
        for step in range(5):
            metrics.log(step, {"loss": float(step)})
    with open(metrics.path, "a") as file:
        file.write('{"step": 5, "lo')  # cut off by a crash
    with Metrics(tmp_path, RANK_0, phase="sft", start_step=3, console_every=0) as metrics:
        metrics.log(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_records(metrics.path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    with Metrics(tmp_path, RANK_0, phase="sft"):
        assert read_records(metrics.path) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path / "run", RANK_1) as metrics:
        metrics.log(0, {"reward": 1.0})
    assert list(progress([1, 2], "stage", rank=1)) == [1, 2]
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_console_line_every_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, RANK_0, phase="sft", total_steps=10, console_every=4) as metrics:
        for step in range(10):
            metrics.log(step, {"loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == ["sft 1/10", "sft 5/10", "sft 9/10", "sft 10/10"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="metrics cannot be written to"):
        Metrics(tmp_path / "file" / "run", RANK_0)
    (tmp_path / "bad.jsonl").write_text('oops\n{"step": 1}\n')
    with pytest.raises(UserError, match="line 1 is no record"):
        read_records(tmp_path / "bad.jsonl")


def test_timer_adds_up_also_when_a_phase_fails() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("generate"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError), timer("update"):
        raise RuntimeError
    assert set(timer.seconds) == {"generate", "update"}
    assert timer.seconds["generate"] >= 0.02
    assert sum(timer.seconds.values()) <= timer.elapsed_s()


def test_progress_without_a_terminal_is_an_occasional_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress(range(100), "tables")) == list(range(100))
    assert capsys.readouterr().out.splitlines() == ["tables: 100/100, 0 s"]
    monkeypatch.setattr(metrics_module, "LINE_EVERY_S", 0.0)
    with ProgressBar(3, "tasks") as bar, ProgressBar(1, "inner", rank=1) as inner:
        bar.advance()
        inner.advance()
        bar.advance(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tasks: 1/3, 0 s, about 0 s left")
    assert lines[1] == "tasks: 3/3, 0 s"
    with pytest.raises(TypeError, match="give total"):
        list(progress(iter([1]), "endless"))


def test_memory_of_the_family() -> None:
    code = "import time; held = b'x' * (96 << 20); print(len(held), flush=True); time.sleep(60)"
    before = tree_rss_gib()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = tree_rss_gib()
        child.kill()
    assert during - before > 0.09
    assert before > 0.01
    assert peak_memory_gib(torch.device("cpu")) > 0.01


def test_pictures_of_nothing_little_and_much(tmp_path: Path) -> None:
    png = tmp_path / "plots.png"
    sizes = []
    for steps in (0, 1, 60):
        with Metrics(tmp_path, RANK_0, phase="grpo", console_every=0) as metrics:
            for step in range(steps):
                phases = {f"timing_s/{name}": 0.1 for name in "abcdefghijk"}
                metrics.log(step, {"reward": 0.1 * step, "reward_std": 0.1, "kl": math.nan, "entropy": 1.0, **phases})
        if steps:
            (tmp_path / "summary.json").write_text(json.dumps({"pass_at_1_sft": 0.4, "pass_at_1_grpo": None}))
        plot_run(tmp_path, png)
        assert png.read_bytes().startswith(b"\x89PNG")
        sizes.append(png.stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]
    assert not list(tmp_path.glob("*.tmp"))
