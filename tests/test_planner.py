"""The planner against bytes counted by PyTorch's allocator, phase by phase, and its refusals and proposals."""

import gc
import random
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from distributed import run_ranks

from groupwise.engine.batch import Example, pack
from groupwise.engine.config import load_config
from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.objective import policy_loss
from groupwise.engine.optim import AdamW
from groupwise.engine.planner import plan_memory
from groupwise.engine.proposal import check_fits, propose
from groupwise.engine.reference import Reference
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import optimise
from groupwise.rollout.sampler import Sampler, SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak_bytes(action):
    """(most bytes allocated at once beyond those at the start, bytes left at the end, result) of ``action``."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, held, result


class Words:
    """A tokenizer of as many words as the model has rows."""

    eos_id = -1

    def __init__(self, size):
        self.vocab_size = size

    def decode(self, ids):
        return "".join(f"{token} " for token in ids)


def batches_of(config, rank, count=2):
    """Full micro-batches of sequences of several lengths."""
    rng, tokens = random.Random(rank), config.optimizer.tokens_per_microbatch
    batches = []
    for _ in range(count):
        lengths = [tokens // 2, tokens // 4, tokens // 8, tokens - tokens // 2 - tokens // 4 - tokens // 8]
        examples = [
            Example([rng.randrange(config.model.vocab_size) for _ in range(n)], [0.0] + [1 / tokens] * (n - 1), 1.0)
            for n in lengths
        ]
        batches += pack(examples, tokens)
    return batches


def random_weights(model):
    """Whole tensors, one after another, as a file gives them."""
    return ((slot.name, torch.empty(slot.shape).normal_(0, 0.02)) for shard in model.shards for slot in shard.slots)


def measure(mesh, overrides):
    """Bytes that each phase really takes, on this rank."""
    config = load_config(None, overrides)
    settings = config.optimizer
    dtype = DTYPES["float32" if settings.compute_dtype == "auto" else settings.compute_dtype]
    found = {}

    def load():
        with torch.device("meta"):
            model, frozen = Model(config.model), Model(config.model)
        policy = ShardedModel(
            model,
            mesh,
            compute_dtype=dtype,
            reduce_dtype=torch.float32 if settings.reduce_dtype == "float32" else dtype,
            reshard_after_forward=settings.reshard_after_forward,
            activation_checkpointing=settings.activation_checkpointing == "block",
            offload=settings.offload == "all",
        )
        policy.fill(random_weights(policy))
        reference = Reference(frozen, mesh, dtype, offload=settings.offload != "none")
        reference.sharded.fill(random_weights(reference.sharded))
        return policy, reference

    found["load"], base, (policy, reference) = peak_bytes(load)
    optimizer = AdamW(policy.shards, lr=1e-3, betas=(0.9, 0.95), moments_dtype=DTYPES[settings.moments_dtype])
    cache = config.rollout
    sampler = Sampler(
        policy.module, Words(config.model.vocab_size), kv_memory_gib=cache.kv_memory_gib, concurrency=cache.concurrency
    )
    base += sum(t.nbytes for t in [*optimizer.exp_avg, *optimizer.exp_avg_sq])
    base += sampler._cache.keys.nbytes * 2
    batches = batches_of(config, mesh.rank)

    def rollout():
        rng = random.Random(1)
        length = cache.max_trajectory_tokens - 3
        prompts = [[rng.randrange(config.model.vocab_size) for _ in range(length)] for _ in range(cache.concurrency)]
        with policy.gathered():
            sampler.generate(prompts, SamplingParams(max_tokens=3))

    def update():
        optimise(policy, optimizer, batches, partial(policy_loss, beta=0.01), mesh=mesh, lr=1e-3, max_grad_norm=1.0,
                 reduce_every_microbatch=settings.reduce_every_microbatch)  # fmt: skip

    found["lasting"] = base
    found["rollout"] = base + peak_bytes(rollout)[0]
    most, _, batches[0].ref_logprob = peak_bytes(lambda: reference.logprobs(batches[0]))
    found["log-probabilities"] = base + most
    most, _, batches[1].ref_logprob = peak_bytes(lambda: policy.logprobs(batches[1]))
    found["own log-probabilities"] = base + most
    found["update"] = base + peak_bytes(update)[0]
    return found


def measure_all(mesh, cases):
    return [measure(mesh, overrides) for overrides in cases]


def planned(overrides, num_ranks):
    """What the planner says of the same phases; the measured run writes no checkpoint."""
    phases = ("load", "rollout", "log-probabilities", "update")
    plan = plan_memory(load_config(None, overrides), num_ranks, "cpu", phases)
    found = {phase.name: plan.needs(phase) for phase in plan.phases}
    config = load_config(None, [*overrides, "grpo.beta=0"])  # then it is the policy's own pass that is planned
    own = plan_memory(config, num_ranks, "cpu", phases).phases[2]
    reference = [items.get("reference", 0) for items in (plan.phases[2].device, plan.phases[2].host)]
    return found | {"own log-probabilities": own.device_bytes + own.host_bytes + sum(reference)}


def compare(overrides, num_ranks, measured):
    for phase, predicted in planned(overrides, num_ranks).items():
        ratio = predicted / measured[phase]
        print(f"{num_ranks} ranks, {phase}: planned {predicted / 1e6:.1f} MB, ratio {ratio:.3f}")
        assert 0.9 < ratio < 1.1, f"{phase}: planned {predicted}, counted {measured[phase]}"
        if phase == "update":  # also without weights, moments, reference and cache, which could hide what is wrong
            passing = (predicted - measured["lasting"]) / (measured[phase] - measured["lasting"])
            assert 0.87 < passing < 1.13, f"gradients, buffers and activations: ratio {passing:.3f}"


COMMON = [
    "model.max_position_embeddings=4096",
    "rollout.kv_memory_gib=0.01",
    "rollout.max_trajectory_tokens=64",
    "rollout.concurrency=8",
    "grpo.beta=0.01",
    "grpo.prompts_per_step=1",
]
BFLOAT16 = ["optimizer.compute_dtype=bfloat16"]
BLOCK = ["optimizer.activation_checkpointing=block"]


def shape(vocabulary, hidden, intermediate, layers, tokens, *, tied=True):
    return [
        *COMMON,
        f"model.vocab_size={vocabulary}",
        f"model.hidden_size={hidden}",
        f"model.intermediate_size={intermediate}",
        f"model.num_hidden_layers={layers}",
        f"model.tie_word_embeddings={str(tied).lower()}",
        f"optimizer.tokens_per_microbatch={tokens}",
    ]


DEEP = shape(1000, 192, 512, 8, 384)
WIDE = shape(1000, 640, 1792, 2, 256)
VOCABULARY = shape(20000, 192, 512, 2, 256)
QUICK = {
    "deep": DEEP,
    "deep, recomputed": [*DEEP, *BLOCK],
    "wide, bfloat16": WIDE + BFLOAT16,
    "large vocabulary": VOCABULARY,
}
SLOW = {
    "deep, bfloat16": DEEP + BFLOAT16,
    "long, bfloat16, recomputed": [*shape(1000, 192, 512, 8, 1200), *BFLOAT16, *BLOCK],
    "wide, untied, recomputed": [*shape(1000, 640, 1792, 2, 256, tied=False), *BLOCK],
    "large vocabulary, bfloat16": VOCABULARY + BFLOAT16,
    "untied, bfloat16 moments": [*shape(20000, 192, 512, 2, 256, tied=False), *BFLOAT16, "moments_dtype=bfloat16"],
    "blocks kept": [*DEEP, *BFLOAT16, "reshard_after_forward=false"],
    "sums put off": [*WIDE, "reduce_every_microbatch=false"],
    "sums put off, bfloat16": [*WIDE, *BFLOAT16, "reduce_every_microbatch=false"],
    "sums in bfloat16": [*WIDE, *BFLOAT16, "reduce_dtype=compute", "moments_dtype=bfloat16"],
    "all in the host's memory": [*WIDE, "offload=all"],
}


@pytest.mark.parametrize("name", QUICK)
def test_counted_bytes_of_one_rank(name):
    compare(QUICK[name], 1, measure(Mesh(), QUICK[name]))


def test_counted_bytes_of_two_ranks():
    cases = [QUICK[name] for name in ("deep, recomputed", "wide, bfloat16", "large vocabulary")]
    for ranks in run_ranks(measure_all, 2, cases):
        for overrides, measured in zip(cases, ranks, strict=True):
            compare(overrides, 2, measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_counted_bytes_of_every_setting(name, num_ranks):
    overrides = SLOW[name]
    measured = [measure(Mesh(), overrides)] if num_ranks == 1 else run_ranks(measure, 2, overrides)
    for each in measured:
        compare(overrides, num_ranks, each)


def test_the_counter_sees_storage_that_is_resized():
    def action():
        buffer = torch.empty(1000, dtype=torch.float32)
        buffer.untyped_storage().resize_(0)
        buffer.untyped_storage().resize_(4000)
        return buffer.clone()

    assert peak_bytes(action)[:2] == (8000, 4000)


def test_what_lasts_is_counted_from_the_parameters():
    config = load_config("datarus_14b")
    with torch.device("meta"):
        elements = sum(parameter.numel() for parameter in Model(config.model).parameters())
    for ranks in (1, 8, 24):
        load, rollout, _, update, checkpoint = plan_memory(config, ranks, "cuda").phases
        for item, size in (("weights", 4), ("moments", 8), ("gradients", 4), ("reference", 2)):
            assert update.device[item] == pytest.approx(size * elements / ranks, rel=1e-3)
        assert checkpoint.host["snapshot"] == update.device["weights"] + update.device["moments"]
        assert rollout.device["gather buffers"] == pytest.approx(2 * elements, rel=1e-3)
        assert "moments" not in load.device
        assert "gradients" not in rollout.device


def test_copies_of_the_model_hold_more_and_save_in_turns():
    config = load_config("datarus_14b", ["run.shard_size=4"])
    one, two = plan_memory(load_config("datarus_14b"), 8, "cuda").phases[4], plan_memory(config, 8, "cuda").phases[4]
    assert two.device["weights"] == pytest.approx(2 * one.device["weights"], rel=1e-3)
    assert two.host["snapshot"] == pytest.approx(one.host["snapshot"], rel=0.15)


def test_a_recipe_without_a_phase_does_not_hold_its_items():
    load, update = plan_memory(load_config("datarus_14b"), 8, "cuda", ("load", "update")).phases
    assert not {"reference", "KV blocks", "snapshot"} & {*load.device, *update.device, *load.host, *update.host}


@pytest.mark.parametrize(("gpus", "memory"), [(2, 80e9), (4, 80e9), (8, 80e9), (8, 40e9)])
def test_what_does_not_fit_is_refused_and_the_proposal_fits(gpus, memory):
    config = load_config("datarus_14b")
    plan = plan_memory(config, gpus, "cuda")
    with pytest.raises(UserError, match="it fits") as refused:
        check_fits(config, plan, memory)
    proposal = propose(config, gpus, "cuda", memory)
    assert all(override in str(refused.value) for override in proposal.overrides)
    changed = load_config("datarus_14b", proposal.overrides)
    check_fits(changed, plan_memory(changed, proposal.num_ranks, "cuda"), memory)
    for left_out in range(len(proposal.overrides)):  # none of its changes is idle
        fewer = [each for i, each in enumerate(proposal.overrides) if i != left_out]
        with pytest.raises(UserError):
            check_fits(config, plan_memory(load_config("datarus_14b", fewer), proposal.num_ranks, "cuda"), memory)


def test_settings_are_proposed_before_more_ranks_and_the_impossible_is_said():
    config = load_config("datarus_14b", ["activation_checkpointing=none"])
    assert propose(config, 8, "cuda", 141e9).overrides == ("optimizer.activation_checkpointing=block",)
    assert propose(load_config("datarus_14b"), 1, "cuda", 80e9).num_ranks > 1
    with pytest.raises(UserError, match="take a smaller model"):  # whole in bfloat16 it is larger than the GPU
        check_fits(config, plan_memory(config, 8, "cuda"), 24e9)


def run_plan(*arguments):
    command = [sys.executable, "-m", "groupwise.recipes.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table_and_a_refusal_ends_with_status_2():
    fits = run_plan("datarus_14b", "--gpus", "8x141GB")
    assert fits.returncode == 0, fits.stderr
    assert "KV blocks" in fits.stdout
    assert fits.stdout.splitlines()[-1].startswith("fits: phase rollout needs 100.0 GB")
    refused = run_plan("datarus_14b", "rollout.kv_memory_gib=20", "--gpus=2x80GB")
    assert refused.returncode == 2
    assert "log-probabilities" in refused.stdout
    assert re.fullmatch(r"error: phase \w+ needs .* it fits with .*\n", refused.stderr)
    assert "such as 8x141GB" in run_plan("datarus_14b", "--gpus", "8").stderr
