"""The recipes as their users run them: end to end on small tables, stopped and resumed, and given bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launched import launched
from safetensors.torch import load_file, save_file
from small_tables import small_tables

from groupwise.data.outcomes import Outcome, summarise
from groupwise.engine.config import Config, load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.objective import policy_loss
from groupwise.engine.schedule import Schedule
from groupwise.recipes.experts import Experts
from groupwise.recipes.grpo import drawn, set_advantages, to_minibatches
from groupwise.recipes.policy import load_policy
from groupwise.recipes.rollouts import my_share, open_sandbox
from groupwise.recipes.run import Run
from groupwise.recipes.training import Training, places
from groupwise.rollout.record import read_records
from groupwise.rollout.sandbox import Limits
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Span, Trajectory

SMALL = [
    "data.num_trajectories=24",
    "data.num_eval_tasks=4",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.vocab_size=384",
    "rollout.max_tokens_per_turn=24",
    "rollout.max_trajectory_tokens=512",
    "rollout.max_observation_tokens=64",
    "rollout.kv_memory=0.05",
    "sft.steps=6",
    "sft.sequences_per_step=4",
    "grpo.steps=2",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=4",
    "grpo.warmup_steps=0",
    "run.checkpoint_every=2",
]

# All of the objective that a tiny run can use at once.
JOB = [
    "hrm.steps=2",
    "reward.overlong_buffer=64",
    "grpo.beta=0.01",
    "grpo.mu_peak=0.5",
    "grpo.loss_type=gspo",
    "grpo.entropy_coef=0.01",
    "grpo.num_iterations=2",
    "grpo.num_minibatches=2",
    "grpo.max_sampling_rounds=2",
    "run.capture_steps=0,1",
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my tables")
    for table in small_tables():
        table.frame.to_csv(folder / table.file, index=False)
    return folder


def run(
    recipe: str, *arguments: str, cwd: Path, ranks: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """One recipe in processes of its own."""
    if ranks == 1:
        done = launched(recipe, [*SMALL, *arguments], cwd)
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        done = subprocess.run(
            [*start, f"groupwise.recipes.{recipe}", *SMALL, *arguments],
            cwd=cwd, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def finished(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of the main job on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("main job")
    done = run("train", f"tables={tables}", *JOB, cwd=folder, ranks=2)
    return folder / "runs" / "train", done.stdout


def test_the_main_job_ends_with_its_line_and_its_files(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    last = json.loads(printed.splitlines()[-1])
    assert list(last) == ["job", "pass_at_1_sft", "pass_at_1_grpo", "wall_s", "peak_rss_gib"]
    assert last["job"] == "train"
    assert 0 <= last["pass_at_1_sft"] <= 1
    assert 0.2 < last["peak_rss_gib"] < 8
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: summary[key] for key in last} == last
    assert (folder / "run.png").stat().st_size > 10_000
    assert len(summary["results"]["grpo"]["examples"]) == 2
    steps = [json.loads(line) for line in (folder / "grpo.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [0, 1]
    for record in steps:
        assert {"reward", "reward_std", "frac_reward_zero_std", "timing_s/generate"} <= set(record)
        assert {"rewards/tag", "rewards/hrm", "rewards/overlong_cost", "reward/structure_weight"} <= set(record)
        assert (record["groups/asked"], record["groups/contrasted"]) == (4, 0)  # two rounds: nobody is right
        assert record["doctor/zero_reward_std"] == 0.0  # of three steps in a row
    assert "after 2 rounds 0 of 2 groups have contrast" in printed
    assert (folder / "hrm" / "model" / "config.json").exists()


def test_the_trajectories_of_all_steps_are_on_disk_with_their_rewards(finished: tuple[Path, str]) -> None:
    folder = finished[0] / "trajectories"
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    steps = [f"grpo/00000{step}{number}" for step in range(2) for number in ("", ".1")]
    sizes = {"evaluate/grpo/000000": 6, "evaluate/sft/000000": 6, **dict.fromkeys(steps, 4)}
    records = {file: list(read_records(folder / file)) for file in files}
    expected = {f"{name}.rank{rank}.jsonl": size for name, size in sizes.items() for rank in range(2)}
    assert {file: len(found) for file, found in records.items()} == expected
    steps = [json.loads(line) for line in (finished[0] / "grpo.jsonl").read_text().splitlines()]
    for number, step in enumerate(steps):
        mine = [record for file, found in records.items() if file.startswith(f"grpo/00000{number}") for record in found]
        assert sum(record["reward"] for record in mine) / len(mine) == pytest.approx(step["reward"])
        assert {"tag", "answer"} <= set(mine[0]["rewards"])
    for name in ("sft", "grpo"):
        result = json.loads((finished[0] / "evaluate" / f"{name}.json").read_text())
        runs = [record for rank in range(2) for record in records[f"evaluate/{name}/000000.rank{rank}.jsonl"]]
        assert sum(record["rewards"]["answer"] for record in runs) / len(runs) == pytest.approx(result["pass_at_1"])


def test_training_and_evaluation_tables_are_disjoint(finished: tuple[Path, str]) -> None:
    data = finished[0] / "data"
    report = json.loads((data / "report.json").read_text())
    trained = {json.loads(line)["task"]["table"] for line in (data / "experts-00000.jsonl").read_text().splitlines()}
    evaluated = {json.loads(line)["table"] for line in (data / "eval.jsonl").read_text().splitlines()}
    assert trained <= set(report["training_tables"])
    assert evaluated <= set(report["evaluation_tables"])
    assert not trained & evaluated


def test_sft_can_be_kept_to_the_first_wordings(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    overrides = [f"run.folder={folder.parent}", f"run.name={folder.name}"]
    experts = Experts(Run(load_config(None, overrides), Mesh(), claim=False))
    first = experts.in_wordings(1)
    assert first == [expert for expert in experts.all if expert.wording == 0]
    assert 0 < len(first) < len(experts.all)
    assert experts.in_wordings(0) == experts.all == experts.in_wordings(3)
    experts.all = [expert for expert in experts.all if expert.wording]
    with pytest.raises(UserError, match=r"none of \d+ trajectories is in the first 1 wordings"):
        experts.in_wordings(1)


def test_a_finished_run_is_shown_again_and_another_configuration_is_refused(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    tables = json.loads((folder / "config.json").read_text())["data"]["tables"]
    same = ["train", f"tables={tables}", *JOB]
    again = run(*same, "run.timeout_s=500", "optimizer.offload=reference", cwd=folder.parent.parent)
    assert again.stdout.splitlines()[-1] == printed.splitlines()[-1]
    other = run(*same, "grpo.beta=0.02", cwd=folder.parent.parent, check=False)
    assert other.returncode == 2
    assert "grpo.beta 0.01 -> 0.02" in other.stderr


def test_a_captured_step_replays_on_as_many_ranks(finished: tuple[Path, str], tmp_path: Path) -> None:
    names = [f"step-00000{step}.rank{rank}.safetensors" for step in range(2) for rank in range(2)]
    folder = finished[0] / "capsules" / "grpo"
    assert sorted(path.name for path in folder.iterdir()) == names
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "groupwise.recipes.replay", str(folder / names[0])],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("losses and gradient norms: as they were\nnothing differs\n")


def test_how_a_run_computes_does_not_change_its_losses(finished: tuple[Path, str], tmp_path: Path) -> None:
    options = [
        "run.shard_size=1",
        "optimizer.activation_checkpointing=block",
        "optimizer.reduce_every_microbatch=false",
        "optimizer.offload=all",
        "optimizer.tokens_per_microbatch=600",
    ]
    other = tmp_path / "runs" / "train"
    shutil.copytree(finished[0] / "data", other / "data")
    run("sft", *options, cwd=tmp_path, ranks=2)
    losses = [
        [json.loads(record)["loss"] for record in (folder / "sft.jsonl").read_text().splitlines()]
        for folder in (finished[0], other)
    ]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ctrl_c_saves_the_last_step_and_the_command_it_prints_goes_on(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["sft.steps=40", "run.checkpoint_every=1000"]
    for folder in (whole, stopped):
        shutil.copytree(finished[0] / "data", folder / "runs" / "train" / "data")
    run("sft", *arguments, cwd=whole)
    command = [sys.executable, "-m", "groupwise.recipes.sft", *SMALL, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=stopped, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    records = stopped / "runs" / "train" / "sft.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") >= 3):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "groupwise.recipes.sft" in errors.splitlines()[-1]
    done = records.read_text().count("\n")
    assert 3 <= done < 40
    resumed = run("sft", *arguments, cwd=stopped)
    assert f"resumed after step {done}" in resumed.stdout
    weights = [
        load_file(folder / "runs" / "train" / "sft" / "model" / "model.safetensors") for folder in (whole, stopped)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def prepare(case: str, folder: Path, finished: Path) -> list[str]:
    """Arguments that lead to one mistake of a user; files of it below ``folder``."""
    tables = folder / "tables"
    tables.mkdir()
    model = folder / "model"
    shutil.copytree(finished / "sft" / "model", model)
    weights = load_file(model / "model.safetensors")
    if case == "empty table":
        (tables / "a.csv").write_text("")
    elif case == "no usable column":
        (tables / "a.csv").write_text("a\n" + "x\n" * 30)
    elif case == "missing tensor":
        save_file({k: v for k, v in weights.items() if "layers.1.mlp.up_proj" not in k}, model / "model.safetensors")
    elif case == "wrong shape":
        save_file({**weights, "model.norm.weight": torch.ones(5)}, model / "model.safetensors")
    elif case == "vocabulary too large":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
        save_file(weights, model / "model.safetensors")
    return {
        "unknown key": ["synthesize", "grpo.stepss=3"],
        "wrong type": ["synthesize", "sft.steps=many"],
        "steps that do not add up": ["synthesize", "grpo.mu_peak=0.5", "grpo.mu_decay_steps=3"],
        "a warm-up that never ends": ["synthesize", "grpo.warmup_steps=3"],
        "attention of a GPU": ["synthesize", "run.attention=xformers"],
        "missing tables": ["synthesize", f"tables={folder / 'nowhere'}"],
        "no table": ["synthesize", f"tables={tables}"],
        "empty table": ["synthesize", f"tables={tables}"],
        "no usable column": ["synthesize", f"tables={tables}"],
        "no data": ["sft"],
        "missing model": ["evaluate", f"model.folder={folder / 'nowhere'}"],
        "missing tensor": ["evaluate", f"model.folder={model}"],
        "wrong shape": ["evaluate", f"model.folder={model}"],
        "vocabulary too large": ["evaluate", f"model.folder={model}"],
    }[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown key", "did you mean 'grpo.steps'?"),
        ("wrong type", 'sft.steps is "many", expected a whole number'),
        ("steps that do not add up", "3 is more than the run's 2 steps"),
        ("a warm-up that never ends", "grpo.warmup_steps is 3, more than the run's 2 steps"),
        ("attention of a GPU", "'xformers' does not run on cpu; choose one of auto, sdpa"),
        ("missing tables", "does not exist"),
        ("no table", "no .csv file"),
        ("empty table", "is empty"),
        ("no usable column", "no usable column"),
        ("no data", "run groupwise.recipes.synthesize first"),
        ("missing model", "nowhere"),
        ("missing tensor", "model.layers.1.mlp.up_proj.weight"),
        ("wrong shape", "model.norm.weight"),
        ("vocabulary too large", "vocab_size is 100"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    case: str, words: str, finished: tuple[Path, str], tmp_path: Path
) -> None:
    recipe, *arguments = prepare(case, tmp_path, finished[0])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    done = run(recipe, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert words in sentence
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and path not in before}
    assert left <= {"config.json", ".lock"}


def test_a_full_device_is_one_sentence(tmp_path: Path) -> None:
    recipe = "from groupwise.recipes.run import launch; " + (
        "launch(lambda run: print('x' * 10**6, file=open('/dev/full', 'w'), flush=True))"
    )
    done = subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no space left on the device")
    assert "Traceback" not in done.stderr


def trajectory(task: Task, sample: int, right: bool) -> Trajectory:
    return Trajectory(
        task, sample, [Span("prompt", [5, 6, 7]), Span("model", [8, 9, 10 + sample], [-1.0, -1.0, -1.0])],
        status="answered", answer="1", rewards={"answer": float(right)}, reward=float(right),
    )  # fmt: skip


@pytest.mark.parametrize("right", [0, 4, 2])
def test_equal_rewards_move_nothing_to_the_last_bit(right: int, finished: tuple[Path, str], tmp_path: Path) -> None:
    config = load_config(None, [*SMALL, f"run.folder={tmp_path}"])
    state = Run(config, Mesh())
    policy = load_policy(state, finished[0] / "sft" / "model")
    before = [shard.data.clone() for shard in policy.model.shards]
    task = Task("t", "q", (), "", "1", "number", "counting")
    group = Group(task, [trajectory(task, sample, sample < right) for sample in range(4)])
    training = Training(state, policy, "grpo", 1, Schedule("constant", 0.1, 0.1, 1))
    set_advantages(group, state)
    (batches,) = to_minibatches(state, [group], [])
    update = training.update(0, batches, policy_loss)
    training.metrics.close()
    moved = any(not torch.equal(old, shard.data) for old, shard in zip(before, policy.model.shards, strict=True))
    assert moved == (right == 2)
    assert (update.grad_norm > 0) == (right == 2)


def test_every_epoch_has_every_item_once() -> None:
    drawn = [index for step in range(10) for index in places(step, 6, 20, seed=3)]
    assert [sorted(drawn[start : start + 20]) for start in (0, 20, 40)] == [list(range(20))] * 3
    assert drawn[:20] != drawn[20:40]


def test_what_a_step_draws_is_spread_over_the_ranks_and_streams_differ() -> None:
    def run(rank: int, ranks: int) -> SimpleNamespace:
        mesh = SimpleNamespace(rank=rank, world_size=ranks)
        return SimpleNamespace(mesh=mesh, config=SimpleNamespace(run=SimpleNamespace(seed=3)))

    pool = list(range(100))
    whole = drawn(run(0, 1), pool, 7, 5)
    assert len(set(whole)) == 7
    assert drawn(run(0, 1), pool, 7, 5, stream=1) != whole
    assert drawn(run(0, 1), pool, 0, 5) == []
    shares = [my_share(run(rank, 2), whole, float) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(whole)
    assert abs(len(shares[0]) - len(shares[1])) == 1


def test_scores_are_means_over_runs_and_unions_over_tasks() -> None:
    rights = {"a": [1, 0, 0], "b": [0, 0, 0], "c": [1, 1, 1], "d": [0, 1, 1]}
    outcomes = [
        Outcome(task, "counting" if task in "ab" else "ranking", "", bool(right), "right" if right else "void", 10, 2)
        for task, runs in rights.items()
        for right in runs
    ]
    result = summarise(outcomes)
    assert result["pass_at_1"] == pytest.approx(6 / 12)
    assert (result["pass_at_k"], result["k"], result["num_tasks"]) == (3 / 4, 3, 4)
    assert result["by_type"]["counting"]["pass_at_1"] == pytest.approx(1 / 6)
    assert result["by_type"]["counting"]["num_tasks"] == 2
    assert Config().evaluate.num_samples == 3


def test_a_process_may_compute_as_long_as_its_execution_may_last() -> None:
    config = load_config(None, ["sandbox.wall_s=45.5"])
    with open_sandbox(SimpleNamespace(config=config)) as sandbox:
        assert sandbox.limits == Limits(wall_s=45.5, cpu_s=45.5)
