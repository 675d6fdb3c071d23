"""A step of GRPO as a capsule, and its replay: what was altered is named where it began, and nothing else is."""

import copy
import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groupwise.engine.checkpoint import save_checkpoint
from groupwise.engine.config import Config, load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.schedule import Schedule, mixing
from groupwise.engine.step import NonFiniteError
from groupwise.engine.tokenizer import Tokenizer
from groupwise.recipes.capsule import Capsule, write_capsule
from groupwise.recipes.grpo import objective, set_advantages, to_minibatches
from groupwise.recipes.policy import create_policy, load_policy, load_reference, save_policy
from groupwise.recipes.replay import Replay, configuration, replay
from groupwise.recipes.rewarding import Rewarding
from groupwise.recipes.rollouts import agent_limits, open_sandbox
from groupwise.recipes.run import Run
from groupwise.recipes.training import Training
from groupwise.rollout.agent import run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.grammar import GRAMMARS, all_tags
from groupwise.rollout.recorded import Recorded
from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import Group, Span, Trajectory, encode_spans, spans_to_example

SETTINGS = [
    "run.capture_steps=0",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.vocab_size=384",
    "rollout.max_trajectory_tokens=600",
    "rollout.max_observation_tokens=64",
    "rollout.max_turns=3",
    "optimizer.tokens_per_microbatch=1500",
    "grpo.num_minibatches=2",
    "grpo.num_iterations=2",
    "grpo.beta=0.01",
    "grpo.mu_peak=0.5",
    "grpo.mu_valley=0.5",
]
GRAMMAR = GRAMMARS["datamind"]


def code(text: str) -> str:
    return GRAMMAR.render_turn("code", "look", text)


def answer(text: str) -> str:
    return GRAMMAR.render_turn("answer", "said", text)


TURNS = [
    [code("print(sum(range(5)))"), answer("10")],
    [code("x = 3\nprint(x)"), code("print(x + y)"), answer("3")],
    [answer("10")],
    [code("print('a' * 900)"), "<think>nothing else"],
]


def sampled(task: Task, tokenizer: Tokenizer) -> Group:
    """What a policy might have written, with log-probabilities."""
    members = []
    for sample, turns in enumerate(TURNS):
        ids = [tokenizer.encode(text) for text in turns]
        spans = [Span("model", part, [-0.5 - 0.01 * place for place in range(len(part))]) for part in ids]
        members.append(Trajectory(task, sample, spans))
    return Group(task, members)


@pytest.fixture(scope="module")
def groups(model: Path) -> list[Group]:
    run, tokenizer = new_run(model), Tokenizer.from_folder(model)
    tasks = [Task(f"t{number}", f"How many are {number}?", (), "", "10", "number", "counting") for number in range(3)]
    with open_sandbox(run) as sandbox:
        return [
            run_agent(
                Recorded(sampled(task, tokenizer), tokenizer), sandbox, [task], tokenizer=tokenizer,
                num_generations=4, params=SamplingParams(), limits=agent_limits(run.config.rollout), seed=0,
            )[0]
            for task in tasks
        ]  # fmt: skip


def make(run: Run, groups: list[Group], loss: Callable[..., Any] | None = None) -> Path:
    """One step as ``recipes.grpo`` makes it, of trajectories that are given; its capsule."""
    first = Path(run.config.model.folder)
    policy, reference = load_policy(run, first), load_reference(run, first)
    tokenizer, settings = policy.tokenizer, run.config.grpo
    training = Training(run, policy, "grpo", 1, Schedule("constant", 0.01, 0.01, 1))
    groups = copy.deepcopy(groups)
    rewarding = Rewarding(run, tokenizer, [group.task for group in groups])
    imitated = [
        spans_to_example(encode_spans([("prompt", "How many?"), ("model", answer(text))], tokenizer), expert=True)
        for text in ("10", "7", "3")
    ]
    save_checkpoint(run.folder / "kept", model=policy.model, optimizer=training.optimizer, state={}, mesh=run.mesh)
    for step in training.steps():
        for number, part in enumerate((groups[:2], groups[2:])):
            rewarding.score(part, step)
            for group in part:
                set_advantages(group, run)
            training.capture.add_round(number, part)
        minibatches = to_minibatches(run, groups, imitated)
        training.capture.holds(imitated, minibatches)
        for batch in (batch for batches in minibatches for batch in batches):
            batch.old_logprob = policy.model.logprobs(batch, run.config.rollout.temperature)
            batch.ref_logprob = reference.logprobs(batch, run.config.rollout.temperature)
        loss_fn = loss or partial(objective(settings, run.config.rollout.temperature), gamma=mixing(settings)(step))
        for _ in range(settings.num_iterations):
            for batches in minibatches:
                training.update(step, batches, loss_fn)
    save_checkpoint(run.folder / "after", model=policy.model, optimizer=training.optimizer, state={}, mesh=run.mesh)
    return run.folder / "capsules" / "grpo" / "step-000000.rank0.safetensors"


def new_run(folder: Path, *overrides: str) -> Run:
    return Run(load_config(None, [*SETTINGS, f"run.folder={folder}", *overrides]), Mesh(), claim=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    run = new_run(folder)
    texts = ["".join(turns) for turns in TURNS]
    save_policy(run, create_policy(run, Tokenizer.train(texts, 384, all_tags())), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def capsule(model: Path, groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(new_run(tmp_path_factory.mktemp("run"), f"model.folder={model}"), groups)


def again(path: Path, model: Path | None = None) -> Replay:
    return Replay(Run(configuration([str(path)]), Mesh(), claim=False), Capsule(path), model)


def test_a_step_replays_with_nothing_different(capsule: Path) -> None:
    facts = Capsule(capsule).facts
    ends = [one["status"] for one in facts["rounds"][0]["groups"][0]["trajectories"]]
    assert ends == ["answered", "answered", "answered", "void"]
    assert [len(part["groups"]) for part in facts["rounds"]] == [2, 1]
    assert [update["minibatch"] for update in facts["updates"]] == [0, 1, 0, 1]
    assert all(update["grad_norm"] > 0 for update in facts["updates"])
    assert set(Capsule(capsule).tensors["expert_mask"].tolist()) == {0.0, 1.0}  # as it was before it was weighed
    kept = capsule.parents[2] / "kept"
    found = again(capsule, kept)  # which has moments
    assert found.updates_left == 0
    assert found.first_difference() == ""
    assert again(capsule).updates_left == 3


def planted(path: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """The same capsule but for a change."""
    found = Capsule(path)
    change(found.facts, found.tensors)
    file = folder / "run" / "capsules" / "grpo" / path.name
    write_capsule(file, found.facts, found.tensors)
    return file


def trajectory(facts: dict[str, Any], number: int = 1, sample: int = 1) -> dict[str, Any]:
    return facts["rounds"][0]["groups"][number]["trajectories"][sample]


def place_in(facts: dict[str, Any], sample: int, span: int) -> int:
    """Where a span of group 0 begins in the tensors of all tokens."""
    before = [s for one in facts["rounds"][0]["groups"][0]["trajectories"][:sample] for s in one["spans"]]
    return sum(size for _, size in [*before, *trajectory(facts, 0, sample)["spans"][:span]])


def token(sample: int, span: int, offset: int) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["token_ids"][place_in(facts, sample, span) + offset] += 1

    return change


def entry(name: str, place: int, by: float) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] += by

    return change


def fact(alter: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda facts, tensors: alter(facts)


PLANTS = {
    "prompt token": (
        token(1, 0, 7),
        "prompts",
        r"sample 1 of task 't0', token id 7: (\d+) in the capsule, (\d+) again",
    ),
    "sampled token": (token(1, 1, 4), "tokens", r"sample 1 of task 't0', log-probability of token \d+ \(id \d+\): -"),
    "token of an observation": (token(0, 2, 3), "tokens", r"sample 0 of task 't0', log-probability of token \d+ "),
    "part of a reward": (
        fact(lambda facts: trajectory(facts)["rewards"].update(tag=0.125)),
        "rewards",
        r"sample 1 of task 't1', rewards/tag: 0.125 in the capsule, ",
    ),
    "reward": (
        fact(lambda facts: trajectory(facts).update(reward=trajectory(facts)["reward"] + 1e-15)),
        "rewards",
        r"sample 1 of task 't1', reward: ",
    ),
    "advantage": (
        fact(lambda facts: trajectory(facts).update(advantage=-0.25)),
        "advantages",
        r"sample 1 of task 't1', advantage: -0.25 in the capsule, ",
    ),
    "sampler's log-probability": (
        lambda facts, tensors: entry("sampler_logprob", place_in(facts, 2, 1) + 2, 0.5)(facts, tensors),
        "packed batches",
        r"micro-batch 0 of mini-batch 0, rollout_logprob\[\d+\] \(sample 2 of task 't0', position \d+\): -0.519\d* in "
        r"the capsule, -0.01",
    ),
    "weight of a loss": (
        entry("batch/1/0/weight", -3, 0.5),
        "packed batches",
        r"micro-batch 0 of mini-batch 1, weight\[\d+\] \(",
    ),
    "token of a batch": (
        entry("batch/0/0/input_ids", 11, 1),
        "packed batches",
        r"micro-batch 0 of mini-batch 0, input_ids\[11\] \(expert example 0, position 11\): \d+ in",
    ),
    "old log-probability": (
        entry("batch/0/0/old_logprob", 40, 1e-6),
        "log-probabilities",
        r"micro-batch 0 of mini-batch 0, old_logprob\[40\]",
    ),
    "reference's log-probability": (
        entry("batch/1/0/ref_logprob", 9, 1e-6),
        "log-probabilities",
        r"micro-batch 0 of mini-batch 1, ref_logprob\[9\]",
    ),
    "loss": (
        fact(lambda facts: facts["updates"][0].update(loss=0.0)),
        "losses and gradient norms",
        r"update 0, loss: 0.0 in the capsule, ",
    ),
    "gradient norm": (
        fact(lambda facts: facts["updates"][0].update(grad_norm=3.0)),
        "losses and gradient norms",
        r"update 0, grad_norm: 3.0 in the capsule, ",
    ),
}


@pytest.mark.parametrize("case", PLANTS)
def test_a_planted_difference_is_named_at_its_first_place(case: str, capsule: Path, tmp_path: Path) -> None:
    change, stage, words = PLANTS[case]
    found = again(planted(capsule, tmp_path, change))
    del found.stages["observations"]  # they start a sandbox, and two tests have them
    said = found.first_difference()
    assert said.startswith(f"{stage} differ, first on rank 0: ")
    assert re.search(words, said), said


def test_altered_tool_outputs_are_named_in_their_order(capsule: Path, tmp_path: Path) -> None:
    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        trajectory(facts)["executions"][0].update(output="4\n")
        trajectory(facts)["executions"][1].update(verdict="ok")
        trajectory(facts, sample=3).update(status="turn_limit")

    assert [str(one) for one in again(planted(capsule, tmp_path, change)).stages["observations"]()] == [
        "sample 1 of task 't1', output of execution 0: '4\\n' in the capsule, '3\\n' again",
        "sample 1 of task 't1', verdict of execution 1: 'ok' in the capsule, 'error' again",
        "sample 3 of task 't1', status: 'turn_limit' in the capsule, 'void' again",
    ]


def test_one_altered_weight_is_named(capsule: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = torch.nextafter(weights[name][3, 5], torch.tensor(torch.inf))
    save_file(weights, other / "model.safetensors")
    assert again(capsule, other).first_difference().startswith(f"weights differ, first on rank 0: hash of {name}: ")


def test_on_another_layout_numbers_may_differ_a_little_and_ids_may_not(capsule: Path, tmp_path: Path) -> None:
    def elsewhere(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        facts["layout"]["threads"] += 1
        entry("batch/0/0/old_logprob", 40, 1e-5)(facts, tensors)

    found = again(planted(capsule, tmp_path, elsewhere))
    del found.stages["observations"]
    assert found.tolerance == 1e-3
    assert found.first_difference() == ""
    found = again(planted(capsule, tmp_path, lambda *parts: (elsewhere(*parts), token(1, 0, 7)(*parts))))
    assert found.first_difference().startswith("prompts differ")


def test_a_skipped_step_is_kept_though_nobody_asked_and_replays(
    model: Path, groups: list[Group], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors")
    run = new_run(tmp_path, f"model.folder={broken}", "run.capture_steps=", "grpo.beta=0")
    path = make(run, groups)
    facts = Capsule(path).facts
    assert [update["skipped"] for update in facts["updates"]] == [1] * 4
    assert math.isnan(facts["updates"][0]["loss"])
    found = again(path)
    del found.stages["observations"]
    assert found.first_difference() == ""


def test_the_step_that_ends_a_run_is_kept_before_it_does(model: Path, groups: list[Group], tmp_path: Path) -> None:
    run = new_run(tmp_path, f"model.folder={model}", "run.capture_steps=", "grpo.num_iterations=3")

    def broken(policy: Any, batch: Any, entropy: bool = True) -> Any:
        loss, stats = objective(run.config.grpo, 1.0)(policy, batch)
        return loss * math.nan, stats

    with pytest.raises(NonFiniteError, match=r"5 in a row.*it is kept in .*/capsules/grpo/step-000000.rank0"):
        make(run, groups, broken)
    facts = Capsule(run.folder / "capsules" / "grpo" / "step-000000.rank0.safetensors").facts
    assert [update["skipped"] for update in facts["updates"]] == [1] * 5


def test_a_step_that_is_neither_listed_nor_skipped_leaves_nothing_and_is_the_same(
    model: Path, groups: list[Group], capsule: Path, tmp_path: Path
) -> None:
    path = make(new_run(tmp_path, f"model.folder={model}", "run.capture_steps=1"), groups)
    assert not path.exists()
    part = "after/checkpoint-000001/part-00000-of-00001.safetensors"
    looked_at, others = (load_file(file.parents[2] / part) for file in (capsule, path))
    names = [name for name in looked_at if name.startswith(("weight/", "exp_avg"))]
    assert len(names) == 9
    assert all(torch.equal(looked_at[name], others[name]) for name in names)


def test_a_skipped_step_of_another_phase_is_kept_and_is_no_replay(model: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"model.folder={model}")
    training = Training(run, load_policy(run, model), "sft", 1, Schedule("constant", 0.01, 0.01, 1))
    ids = [1, 2, 3, 4]
    example = dataclasses.replace(spans_to_example([Span("model", ids)], expert=True), loss_mask=[0.0, 1.0, 1.0, 1.0])
    (batches,) = to_minibatches(new_run(tmp_path, "grpo.num_minibatches=1"), [], [example])

    def broken(policy: Any, batch: Any) -> Any:
        return policy.logprobs(batch).sum() * math.nan, {}

    for _ in training.steps():
        assert training.update(0, batches, broken).skipped
    path = run.folder / "capsules" / "sft" / "step-000000.rank0.safetensors"
    assert torch.equal(Capsule(path).minibatches("cpu")[0][0].input_ids, batches[0].input_ids)
    with pytest.raises(UserError, match="is of a step of sft, expected one of grpo"):
        configuration([str(path)])


def of_other_ranks(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    facts["layout"]["world_size"] = 2


def of_other_settings(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    facts["config"]["grpo"]["momentum"] = 0.5


def test_what_cannot_be_replayed_is_one_sentence(
    capsule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"there is no capsule .*nowhere; give a file"):
        configuration([str(tmp_path / "nowhere")])
    torn = tmp_path / "torn.safetensors"
    for size in (0, 100, capsule.stat().st_size - 1):
        torn.write_bytes(capsule.read_bytes()[:size])
        with pytest.raises(UserError, match=r"torn.safetensors is no whole capsule"):
            configuration([str(torn)])
    save_file({"a": torch.ones(1)}, torn)
    with pytest.raises(UserError, match=r"torn.safetensors is no whole capsule"):
        configuration([str(torn)])
    with pytest.raises(UserError, match=r"configuration of another version: unknown .* 'grpo.momentum'"):
        configuration([str(planted(capsule, tmp_path, of_other_settings))])
    with pytest.raises(UserError, match="0 arguments, expected CAPSULE"):
        configuration([])
    with pytest.raises(UserError, match=r"there is no model .*nothing; give"):
        again(capsule, tmp_path / "nothing")
    other = planted(capsule, tmp_path, of_other_ranks)
    monkeypatch.setattr(sys, "argv", ["replay", str(other)])
    with pytest.raises(UserError, match=r"is of 2 ranks and this launch has 1; start it with torchrun .* 2"):
        replay(Run(configuration([str(other)]), Mesh(), claim=False))
    later = planted(capsule, tmp_path, lambda facts, tensors: facts.update(step=7))
    with pytest.raises(UserError, match=r"there is no checkpoint of step 7 in .*/grpo/checkpoints; name a model"):
        again(later)


@pytest.mark.parametrize("text", ["1,x", "-1", "1,,2", "0.5"])
def test_steps_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"run.capture_steps is '.*' and '.*' is no step"):
        load_config(None, [f"run.capture_steps={text}"])


def test_a_capsule_holds_its_configuration_and_seeds(capsule: Path) -> None:
    facts = Capsule(capsule).facts
    assert Config().to_dict().keys() == json.loads(json.dumps(facts["config"])).keys()
    assert [part["seed"] for part in facts["rounds"]] == [0, 1]
