"""The recipe of the hierarchical reward model, end to end on small tables."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_tables import small_tables

from groupwise.data.trajectories import Expert, read_experts
from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.tokenizer import Tokenizer
from groupwise.recipes import hrm as recipe
from groupwise.recipes.hrm import expert_outcomes, expert_sequence, hrm
from groupwise.recipes.policy import load_hierarchical_reward
from groupwise.recipes.run import Run
from groupwise.recipes.sft import sft
from groupwise.recipes.synthesize import synthesize
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.record import read_records
from groupwise.rollout.sandbox import Execution
from groupwise.rollout.trajectory import Trajectory, encode_spans

SMALL = [
    "data.num_trajectories=24",
    "data.num_eval_tasks=8",
    "data.strata=40/20/20/20",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.vocab_size=384",
    "rollout.max_tokens_per_turn=24",
    "rollout.max_trajectory_tokens=512",
    "rollout.max_observation_tokens=64",
    "rollout.kv_memory=0.05",
    "sft.steps=2",
    "sft.sequences_per_step=4",
    "run.checkpoint_every=2",
    "hrm.steps=6",
    "hrm.search_tasks=2",
    "hrm.lr=0.01",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of so small a model wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run after synthesis, SFT and the reward model; its views lie below the folder of the tables."""
    folder = tmp_path_factory.mktemp("hrm")
    for table in small_tables():
        table.frame.to_csv(folder / table.file, index=False)
    run = Run(load_config(None, [*SMALL, f"data.tables={folder}", f"run.folder={folder / 'runs'}"]), Mesh())
    synthesize(run)
    sft(run)
    assert hrm(run) == run.folder / "hrm" / "model"
    return run


def report(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "hrm" / "report.json").read_text())


def test_it_is_measured_on_all_strata_of_tables_never_trained_on(finished: Run) -> None:
    judged = list(read_experts(finished.folder / "hrm" / "judged.jsonl"))
    held_out = json.loads((finished.folder / "data" / "report.json").read_text())["evaluation_tables"]
    assert {expert.task.table for expert in judged} <= set(held_out)
    found = report(finished)
    assert found["all"]["count"] == len(judged)
    assert found["all"]["steps"]["count"] == sum(len(expert_outcomes(expert)) for expert in judged)
    for name in ("success", "corrected", "self_corrected", "failure"):
        assert found[name]["count"] == sum(expert.stratum == name for expert in judged)
        assert 0 <= found[name]["steps"]["ece"] <= 1
    assert found["success"]["steps"]["share_true"] == 1
    assert found["failure"]["steps"]["share_true"] == 0
    assert found["failure"]["reward"] <= -0.1
    assert found["corrected"]["reward"] >= 0.1
    # The rules know which errors were corrected; slips that ran are left to the model.
    assert 0 <= found["auc_model_score"] <= found["auc_reward"] <= 1


def test_a_step_moves_the_weights_and_is_on_record(finished: Run) -> None:
    before, after = (load_file(finished.folder / name / "model" / "model.safetensors") for name in ("sft", "hrm"))
    assert after.keys() - before.keys() == {"score.weight"}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    records = [json.loads(line) for line in (finished.folder / "hrm.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(6))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert all(0 <= record["accuracy"] <= 1 for record in records)


def test_trees_were_grown_from_what_the_policy_wrote(finished: Run) -> None:
    lines = (finished.folder / "hrm" / "search.jsonl").read_text().splitlines()
    records = [list(read_records(file)) for file in sorted((finished.folder / "trajectories/hrm").iterdir())]
    assert [len(found) % 4 for found in records] == [0, 0, 0]
    assert len(records[0]) == 8
    sequences = [json.loads(line) for line in lines]
    assert len(sequences) <= sum(map(len, records))
    assert all(len(found["ends"]) == len(found["step_labels"]) == len(found["pair_labels"]) for found in sequences)


def test_a_stopped_run_ends_as_one_that_never_stopped(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.folder / "data", tmp_path / "train" / "data")
    shutil.copytree(finished.folder / "sft", tmp_path / "train" / "sft")
    (tmp_path / "train" / "hrm").mkdir()
    for name in ("search", "judged"):
        shutil.copy(finished.folder / "hrm" / f"{name}.jsonl", tmp_path / "train" / "hrm")
    config = load_config(None, [*SMALL, f"data.tables={finished.config.data.tables}", f"run.folder={tmp_path}"])
    run, pack_steps, calls = Run(config, Mesh()), recipe.pack_steps, []

    def stopping(*arguments: Any, ask: Any = run.on_signal) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            ask(signal.SIGTERM, None)
        return pack_steps(*arguments)

    monkeypatch.setattr(recipe, "pack_steps", stopping)
    with pytest.raises(KeyboardInterrupt):
        hrm(run)
    assert len(calls) == 3
    monkeypatch.undo()
    del run, stopping
    hrm(resumed := Run(config, Mesh()))
    whole, again = (load_file(each.folder / "hrm/model/model.safetensors") for each in (finished, resumed))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert report(resumed) == report(finished)


def rollout(expert: Expert, tokenizer: Tokenizer) -> Trajectory:
    """The expert's trajectory as if a policy had written it."""
    spans = [("prompt", GRAMMARS[expert.grammar].prompt(expert.task, tokenizer)), *expert.spans]
    executions = [Execution(ok, "", "ok", 0.0) for ok in expert_outcomes(expert) if ok is not None]
    return Trajectory(expert.task, 0, encode_spans(spans, tokenizer), "answered", executions=executions)


def test_rollouts_are_rewarded_as_they_were_measured(finished: Run) -> None:
    folder = finished.folder / "hrm" / "model"
    reward = load_hierarchical_reward(finished, folder)
    judged = list(read_experts(finished.folder / "hrm" / "judged.jsonl"))
    found = reward([rollout(expert, Tokenizer.from_folder(folder)) for expert in judged])
    assert sum(found) / len(found) == pytest.approx(report(finished)["all"]["reward"], abs=1e-5)


def test_outcomes_and_labels_of_experts(finished: Run) -> None:
    tokenizer = Tokenizer.from_folder(finished.folder / "hrm" / "model")
    judged = {expert.stratum: expert for expert in read_experts(finished.folder / "hrm" / "judged.jsonl")}
    expected = {
        "success": ([True, None], [1, 1]),
        "corrected": ([False, True, None], [0, 1, 1]),
        "self_corrected": ([True, True, None], [0, 1, 1]),
    }
    for stratum, (outcomes, labels) in expected.items():
        assert expert_outcomes(judged[stratum]) == outcomes
        sequence = expert_sequence(judged[stratum], tokenizer, "graded")
        assert (sequence.step_labels, sequence.pair_labels) == (labels, [None, *labels[1:]])
    failed = expert_sequence(judged["failure"], tokenizer, "graded")
    assert set(failed.step_labels) == {0.0}
    assert True not in expert_outcomes(judged["failure"])


def test_settings_that_train_nothing_are_refused(finished: Run, tmp_path: Path) -> None:
    def new(*overrides: str) -> Run:
        return Run(load_config(None, [f"run.folder={tmp_path}", *overrides]), Mesh(), claim=False)

    with pytest.raises(UserError, match=r"hrm\.steps is 0"):
        hrm(new())
    with pytest.raises(UserError, match=r"data\.modes is '0/0/100'"):
        hrm(new("hrm.steps=1", "data.modes=0/0/100"))
    assert hrm(new("hrm.folder=there")) == Path("there")
