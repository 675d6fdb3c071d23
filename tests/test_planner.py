"""The planner against bytes counted by PyTorch's allocator, phase by phase, and its refusals and proposals."""

import gc
import random
from functools import partial

import torch

from groupwise.engine.batch import Example, pack
from groupwise.engine.config import load_config
from groupwise.engine.model import Model
from groupwise.engine.objective import policy_loss
from groupwise.engine.optim import AdamW
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
    kept = {}

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

    found["base"] = base
    found["rollout"] = peak_bytes(rollout)[0] + base
    kept["reference"], _, batches[0].ref_logprob = peak_bytes(lambda: reference.logprobs(batches[0]))
    kept["policy"], _, batches[1].ref_logprob = peak_bytes(lambda: policy.logprobs(batches[1]))
    found["log-probabilities"] = kept["reference"] + base
    found["policy"] = kept["policy"] + base
    found["update"] = peak_bytes(update)[0] + base
    return found
