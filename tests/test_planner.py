"""The planner against bytes counted by PyTorch's allocator, phase by phase, and its refusals and proposals."""

import ctypes
import gc
import inspect
import random
import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from launched import launched

from groupwise.engine.batch import Example, pack
from groupwise.engine.config import RopeScaling, load_config
from groupwise.engine.errors import UserError
from groupwise.engine.hf import save_hf
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.objective import policy_loss
from groupwise.engine.optim import AdamW
from groupwise.engine.planner import EVALUATED_TASKS, PREFILL_TOKENS, plan_memory
from groupwise.engine.proposal import check_fits, propose
from groupwise.engine.reference import Reference
from groupwise.engine.saver import Saver
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import optimise
from groupwise.recipes import evaluate
from groupwise.recipes.plan import parse_gpus
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


def unowned(tensor):
    """The same memory without a share in it."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def measure_all(mesh, configs):
    """Bytes of each configuration; gloo's threads own nothing, for what they free the counter does not see."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast"):
            collective = getattr(dist, name)
            patch.setattr(dist, name, lambda tensor, *args, f=collective, **kw: f(unowned(tensor), *args, **kw))
        return [measure(mesh, config) for config in configs]


class Words:
    """A tokenizer of as many words as the model has rows."""

    eos_id = -1

    def __init__(self, size):
        self.vocab_size = size

    def decode(self, ids):
        return "".join(f"{token} " for token in ids)


def batches_of(config, rank, count=3):
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


def measure(mesh, config):
    """Bytes that each phase really takes, on this rank."""
    mesh = Mesh(rank=mesh.rank, world_size=mesh.world_size, group=mesh.group, backend=mesh.backend,
                shard_size=config.run.shard_size)  # fmt: skip
    settings, cache = config.optimizer, config.rollout
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
        policy.fill(model.initial_weights(0))
        reference = Reference(frozen, mesh, dtype, offload=settings.offload != "none")
        reference.sharded.fill(frozen.initial_weights(0))
        return policy, reference

    def checkpoint():
        saver = Saver(folder / "checkpoints", mesh)
        saver.save(policy, optimizer, {})
        saver.wait()
        save_hf(policy, folder / "model")
        return saver

    def rollout():
        rng = random.Random(1)
        lengths = [cache.max_trajectory_tokens - 3 - i % 2 for i in range(cache.concurrency)]
        prompts = [[rng.randrange(config.model.vocab_size) for _ in range(length)] for length in lengths]
        with policy.gathered():
            sampler.generate(prompts, SamplingParams(max_tokens=3, top_p=config.evaluate.top_p))
            sampler.flush()

    def update():
        optimise(policy, optimizer, batches, partial(policy_loss, beta=0.01), mesh=mesh, lr=1e-3, max_grad_norm=1.0,
                 reduce_every_microbatch=settings.reduce_every_microbatch)  # fmt: skip

    found["load"], base, (policy, reference) = peak_bytes(load)
    optimizer = AdamW(policy.shards, lr=1e-3, betas=(0.9, 0.95), moments_dtype=DTYPES[settings.moments_dtype])
    base += sum(t.nbytes for t in [*optimizer.exp_avg, *optimizer.exp_avg_sq])
    with tempfile.TemporaryDirectory() as own:
        folder = Path(mesh.broadcast_object(own))
        most, snapshot, _ = peak_bytes(checkpoint)
    found["checkpoint"], base = base + most, base + snapshot
    sampler = Sampler(
        policy.module, Words(config.model.vocab_size), kv_memory=cache.kv_memory, concurrency=cache.concurrency
    )
    batches = batches_of(config, mesh.rank)
    found["rollout"] = base + peak_bytes(rollout)[0]
    most, _, logprob = peak_bytes(lambda: reference.logprobs(batches[0]))
    found["log-probabilities"] = base + most
    found["own log-probabilities"] = base + peak_bytes(lambda: policy.logprobs(batches[0]))[0]
    for batch in batches:
        batch.ref_logprob = logprob
    found["update"] = base + peak_bytes(update)[0]
    return found | {"lasting": base}


def planned(config, num_ranks):
    """What the planner says of the same phases."""
    plan = plan_memory(config, num_ranks, "cpu")
    found = {phase.name: plan.needs(phase) for phase in plan.phases}
    config = replace(config, grpo=replace(config.grpo, beta=0.0))  # then it is the policy's own pass that is planned
    own = plan_memory(config, num_ranks, "cpu").phases[2]
    reference = [items.get("reference", 0) for items in (plan.phases[2].device, plan.phases[2].host)]
    return found | {"own log-probabilities": own.device_bytes + own.host_bytes + sum(reference)}


def compare(config, ranks):
    """The planner's bytes with those of the rank that took most."""
    measured = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    for phase, predicted in planned(config, len(ranks)).items():
        ratio = predicted / measured[phase]
        passing = (predicted - measured["lasting"]) / (measured[phase] - measured["lasting"])
        print(f"{len(ranks)} ranks, {phase}: planned {predicted / 1e6:.1f} MB, ratio {ratio:.3f}, {passing:.3f}")
        assert 0.95 < ratio < 1.05, f"{phase}: planned {predicted}, counted {measured[phase]}"
        if phase in ("rollout", "update"):  # without what lasts, which could hide what is wrong
            assert 0.95 < passing < 1.05, f"{phase}: what passes has ratio {passing:.3f}"


def case(vocabulary, hidden, intermediate, layers, tokens, *overrides):
    sizes = {
        "model.vocab_size": vocabulary,
        "model.hidden_size": hidden,
        "model.intermediate_size": intermediate,
        "model.num_hidden_layers": layers,
        "optimizer.tokens_per_microbatch": tokens,
    }
    common = [
        "rollout.kv_memory=0.01",
        "rollout.max_trajectory_tokens=64",
        "rollout.concurrency=8",
        "evaluate.top_p=1",
        "grpo.beta=0.01",
        "grpo.prompts_per_step=1",
    ]
    return load_config(None, [*common, *(f"{key}={value}" for key, value in sizes.items()), *overrides])


def long_context(config):
    scaling = RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=1024)
    return replace(config, model=replace(config.model, rope_scaling=scaling))


BFLOAT16, BLOCK = "optimizer.compute_dtype=bfloat16", "optimizer.activation_checkpointing=block"
UNTIED = "model.tie_word_embeddings=false"
DEEP, WIDE, VOCABULARY = (1000, 192, 512, 8, 384), (1000, 640, 1792, 2, 256), (20000, 192, 512, 2, 256)
HEADS = (500, 64, 64, 3, 512, "model.num_attention_heads=16", "model.head_dim=32")
QUICK = {
    "deep": case(*DEEP),
    "bfloat16": case(1000, 256, 704, 2, 128, BFLOAT16),
    "large vocabulary, nucleus": case(*VOCABULARY, "evaluate.top_p=0.95"),
    "wide attention": case(*HEADS),
}
SLOW = {
    "wide, bfloat16": case(*WIDE, BFLOAT16),
    "deep, recomputed": case(*DEEP, BLOCK),
    "deep, bfloat16": case(*DEEP, BFLOAT16),
    "long, bfloat16, recomputed": case(1000, 192, 512, 8, 1280, BFLOAT16, BLOCK),
    "wide, untied, recomputed": case(*WIDE, UNTIED, BLOCK),
    "large vocabulary, bfloat16": case(*VOCABULARY, BFLOAT16),
    "untied, bfloat16 moments": case(*VOCABULARY, UNTIED, BFLOAT16, "optimizer.moments_dtype=bfloat16"),
    "blocks kept": case(*DEEP, BFLOAT16, "optimizer.reshard_after_forward=false"),
    "sums put off": case(*WIDE, "optimizer.reduce_every_microbatch=false"),
    "sums put off, bfloat16": case(*WIDE, BFLOAT16, "optimizer.reduce_every_microbatch=false"),
    "sums in bfloat16": case(*WIDE, BFLOAT16, "optimizer.reduce_dtype=compute", "optimizer.moments_dtype=bfloat16"),
    "bfloat16 moments, few tokens": case(1000, 640, 1792, 2, 64, "optimizer.moments_dtype=bfloat16"),
    "all in the host's memory": case(*WIDE, "optimizer.offload=all"),
    "Qwen3": case(*DEEP, "model.model_type=qwen3", "model.head_dim=64"),
    "Qwen3, bfloat16": case(*HEADS, "model.model_type=qwen3", BFLOAT16),
    "Llama": long_context(case(*DEEP, UNTIED, "model.model_type=llama")),
}


@pytest.mark.parametrize("name", QUICK)
def test_counted_bytes_of_one_rank(name):
    compare(QUICK[name], [measure(Mesh(), QUICK[name])])


def test_counted_bytes_of_two_ranks():
    config = SLOW["deep, recomputed"]
    compare(config, [found for (found,) in run_ranks(measure_all, 2, [config])])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_counted_bytes_of_every_setting(name, num_ranks):
    config = SLOW[name]
    ranks = [[measure(Mesh(), config)]] if num_ranks == 1 else run_ranks(measure_all, 2, [config])
    compare(config, [found for (found,) in ranks])


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [BFLOAT16], [BFLOAT16, BLOCK, "optimizer.reduce_dtype=compute"]])
def test_counted_bytes_of_two_copies_of_the_model_on_two_ranks_each(overrides):
    config = case(1000, 640, 1792, 3, 256, "run.shard_size=2", *overrides)
    compare(config, [found for (found,) in run_ranks(measure_all, 4, [config])])


def test_the_counter_sees_storage_that_is_resized():
    def action():
        buffer = torch.empty(1000, dtype=torch.float32)
        buffer.untyped_storage().resize_(0)
        buffer.untyped_storage().resize_(4000)
        return buffer.clone()

    assert peak_bytes(action)[:2] == (8000, 4000)


def test_sizes_of_later_layers_are_theirs():
    """Imports run one way, so the planner repeats two numbers of what is built on it."""
    assert inspect.signature(Sampler).parameters["prefill_tokens"].default == PREFILL_TOKENS
    assert evaluate.CHUNK == EVALUATED_TASKS


def test_what_lasts_is_counted_from_the_parameters():
    config = load_config("datarus")
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
        assert rollout.device["KV blocks"] == 40 * 2**30
        assert "KV blocks" not in update.device | checkpoint.device


def test_copies_of_the_model_hold_more_and_save_in_turns():
    config = load_config("datarus", ["run.shard_size=4"])
    one, two = plan_memory(load_config("datarus"), 8, "cuda").phases[4], plan_memory(config, 8, "cuda").phases[4]
    assert two.device["weights"] == pytest.approx(2 * one.device["weights"], rel=1e-3)
    assert two.host["snapshot"] == pytest.approx(one.host["snapshot"], rel=0.15)


def test_a_recipe_without_a_phase_does_not_hold_its_items():
    load, update = plan_memory(load_config("datarus"), 8, "cuda", ("load", "update")).phases
    assert not {"reference", "KV blocks", "snapshot"} & {*load.device, *update.device, *load.host, *update.host}


@pytest.mark.parametrize(("gpus", "memory"), [(2, 80e9), (4, 80e9), (8, 80e9), (8, 40e9)])
def test_what_does_not_fit_is_refused_and_the_proposal_fits(gpus, memory):
    config = load_config("datarus")
    plan = plan_memory(config, gpus, "cuda")
    with pytest.raises(UserError, match="it fits") as refused:
        check_fits(config, plan, memory)
    proposal = propose(config, gpus, "cuda", memory)
    assert all(override in str(refused.value) for override in proposal.overrides)
    changed = load_config("datarus", proposal.overrides)
    check_fits(changed, plan_memory(changed, proposal.num_ranks, "cuda"), memory)
    for left_out in range(len(proposal.overrides)):  # none of its changes is idle
        fewer = [each for i, each in enumerate(proposal.overrides) if i != left_out]
        with pytest.raises(UserError):
            check_fits(config, plan_memory(load_config("datarus", fewer), proposal.num_ranks, "cuda"), memory)


def test_settings_are_proposed_before_more_ranks_and_the_impossible_is_said():
    config = load_config("datarus", ["activation_checkpointing=none"])
    assert propose(config, 8, "cuda", 141e9).overrides == ("optimizer.activation_checkpointing=block",)
    assert propose(load_config("datarus"), 1, "cuda", 80e9).num_ranks > 1
    with pytest.raises(UserError, match="take a smaller model"):  # whole in bfloat16 it is larger than the GPU
        check_fits(config, plan_memory(config, 8, "cuda"), 24e9)


def test_the_command_prints_a_table_and_a_refusal_ends_with_status_2(tmp_path):
    fits = launched("plan", ["datarus", "--gpus", "8x141GB"], tmp_path)
    assert fits.returncode == 0, fits.stderr
    assert "KV blocks" in fits.stdout
    assert fits.stdout.splitlines()[-1].startswith("fits: phase rollout needs 102.4 GB")
    refused = launched("plan", ["datarus", "rollout.kv_memory=20", "--gpus=2x80GB"], tmp_path)
    assert refused.returncode == 2
    assert "log-probabilities" in refused.stdout
    assert re.fullmatch(r"error: phase \w+ needs .* it fits with .*\n", refused.stderr)
    with pytest.raises(UserError, match="such as 8x141GB"):
        parse_gpus("8")
