"""The exact mode: whether sampler and trainer agree to the bit, and what that costs.

    python -m groupwise.bench.exact [--shapes 8x384x1024x6x2x8192] [--out FILE]

Groups of 8 trajectories with 4 turns each, and observations between, are sampled at each concurrency and scored by the
trainer's forward pass: ``differ`` counts tokens whose two log-probabilities are not the same to the bit, ``largest`` is
the largest difference; 100,000 tokens in all, by a model of 4 layers of hidden size 128, and on a GPU 50,000 more by
each shape. Float32 on a CPU, bfloat16 on a GPU.

A shape is layers x hidden x intermediate x query heads x key heads x vocabulary. Its rows are the time of the exact
mode over that of the usual one, in one run: sampling 64 sequences, and a training step (forward and backward).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.bench.sampler import NoText, random_model
from groupwise.engine.batch import Batch, Example, pack
from groupwise.engine.exact import ROWS
from groupwise.engine.model import Model, PackedAttention
from groupwise.kernels import dispatch
from groupwise.rollout.generation import Completion
from groupwise.rollout.sampler import Sampler, SamplingParams

SMALL = (4, 128, 384, 4, 2, 2048)
SHAPES = [(8, 384, 1024, 6, 2, 8192)]
GPU_SHAPES = [(28, 1536, 8960, 12, 2, 151936)]
# Groups by concurrency, 0 for all at once: few at a time take long.
GROUPS = {1: 1, 3: 2, 16: 13, 0: 16}
COST_GROUPS, MEMBERS, TURNS, NEW, OBSERVED = 8, 8, 4, 100, 40
POSITIONS, TOKENS = 1024, 4096
TEMPERATURE = 0.8


def make_sampler(model: Model, exact: bool, concurrency: int = 0) -> Sampler:
    return Sampler(model, NoText(model.config.vocab_size), kv_memory=2.0, concurrency=concurrency, exact=exact)


def sample(sampler: Sampler, vocab: int, seed: int, groups: int = COST_GROUPS) -> list[Example]:
    """Trajectories of several turns, as the trainer gets them."""
    generator = torch.Generator().manual_seed(seed)

    def random_ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(vocab, (length,), generator=generator).tolist()

    params = SamplingParams(temperature=TEMPERATURE, max_tokens=NEW, seed=seed)
    examples: dict[int, Example] = {}
    for group in range(groups):
        prompt = random_ids(200)
        for member in range(MEMBERS):
            number = sampler.submit(prompt, params, stream=(group, member, 0))
            zeros = [0.0] * len(prompt)
            examples[number] = Example(list(prompt), zeros, advantage=1.0, old_logprobs=list(zeros), group=group)
    for turn in range(TURNS):
        finished: dict[int, Completion] = {}
        while sampler.has_work:
            finished.update((done.request_id, done) for done in sampler.poll())
        for number in sorted(finished):
            example, done = examples[number], finished[number]
            seen = random_ids(OBSERVED) if turn < TURNS - 1 else []
            example.token_ids += done.token_ids + seen
            example.loss_mask += [1.0] * len(done.token_ids) + [0.0] * len(seen)
            assert example.old_logprobs is not None
            example.old_logprobs += done.logprobs + [0.0] * len(seen)
            if seen:
                sampler.extend(number, seen, params)
    for number in examples:
        sampler.cancel(number)
    return list(examples.values())


def forms(model: Model, exact: bool) -> AbstractContextManager[None]:
    return dispatch.exact_forms(model.output_weight.device.type) if exact else nullcontext()


def score(model: Model, batch: Batch) -> Tensor:
    packed = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    found = model(batch.input_ids, batch.positions, packed, targets=batch.targets, temperature=TEMPERATURE)
    assert not isinstance(found, Tensor)
    return found[0]


def agreement(shape: tuple[int, ...], concurrency: int, device: str) -> common.Row:
    model = random_model(shape, POSITIONS, device).requires_grad_(True)
    examples = sample(make_sampler(model, True, concurrency), shape[5], concurrency, GROUPS[concurrency])
    gaps = []
    with forms(model, True):
        for batch in pack(examples, TOKENS, device, multiple=ROWS):
            gaps.append((score(model, batch).detach() - batch.rollout_logprob)[batch.weight > 0])
    gap = torch.cat(gaps)
    return {
        "layers x H x I x Hq x Hkv x V": "x".join(map(str, shape)),
        "what": "log-probabilities",
        "concurrency": concurrency or "all",
        "compared": len(gap),
        "differ": int((gap != 0).sum()),
        "largest": gap.abs().max().item(),
    }


def cost(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    """Times of the exact mode over those of the usual one."""
    model = random_model(shape, POSITIONS, args.device).requires_grad_(False)
    mark = torch.zeros(0, device=args.device)
    samplers = {name: make_sampler(model, name == "exact") for name in ("exact", "usual")}
    seeds = [(mark, seed) for seed in range(3)]
    sampling = {
        name: lambda _, seed, sampler=sampler: sample(sampler, shape[5], seed) for name, sampler in samplers.items()
    }
    times = {"sampling": common.in_turns(sampling, seeds, args.repeats, warm=1)}
    examples = sample(samplers["usual"], shape[5], 0)
    batches = {name: pack(examples, TOKENS, args.device, ROWS if name == "exact" else 1) for name in samplers}
    model.requires_grad_(True)

    def train(name: str) -> None:
        with forms(model, name == "exact"):
            for batch in batches[name][:2]:
                score(model, batch).sum().backward()
        model.zero_grad()

    training = {name: lambda _, __, name=name: train(name) for name in batches}
    times["training step"] = common.in_turns(training, seeds, args.repeats, warm=1)
    return [
        {
            "layers x H x I x Hq x Hkv x V": "x".join(map(str, shape)),
            "what": what,
            "exact_over_usual": time["exact"] / time["usual"],
        }
        for what, time in times.items()
    ]


def main() -> None:
    args = common.arguments(__doc__, repeats=(3, 3))
    rows = [agreement(SMALL, concurrency, args.device) for concurrency in GROUPS]
    for shape in common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else SHAPES):
        if args.device == "cuda":
            rows.append(agreement(shape, 0, args.device))
        rows += cost(shape, args)
    common.report("exact", rows, args)


if __name__ == "__main__":
    main()
