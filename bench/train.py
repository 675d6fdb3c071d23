"""A whole training step, forward, backward and update, beside transformers with torch.compile on the same weights.

    python -m groupwise.bench.train [--shapes 28x1536x8960x12x2x151936x8192] [--out FILE]

A shape is layers x hidden x intermediate x query heads x key heads x vocabulary x tokens. ``packed``: segments of
different lengths fill the tokens. Both clip and update with AdamW: float32 on a CPU; on a GPU bfloat16 products with
float32 master weights, and from 4 billion parameters on what lets them fit, ours with bfloat16 moments and recomputed
blocks, theirs with bfloat16 weights. ``speedup`` is the time of transformers over ours, ``memory_ratio`` our peak over
theirs, model and optimiser included. ``mfu`` is the model's arithmetic (no recomputation, attention as causal) by the
device's dense bfloat16 peak, ``share_of_limit`` by the rate of a large product in the same run.

``group``: one prompt with several completions behind it, laid once; ``speedup`` is the time of the same examples each
with its own copy of the prompt over ours, ``tokens_ratio`` the tokens of ours over theirs.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupwise.bench import common
from groupwise.engine import AdamW, Mesh, Model, ShardedModel
from groupwise.engine.batch import Batch, Example, pack
from groupwise.engine.config import ModelConfig
from groupwise.engine.flops import forward_flops, peak_of, work_of
from groupwise.engine.objective import count, sft_loss, weigh
from groupwise.engine.step import optimise
from groupwise.kernels import linear

GPU_SHAPES = [(28, 1536, 8960, 12, 2, 151936, 8192), (28, 3584, 18944, 28, 4, 152064, 8192)]
CPU_SHAPES = [(4, 256, 704, 4, 2, 8192, 1024)]
LARGE = 4e9  # parameters
# A group: the prompt takes this share of the tokens of the shape, so many completions the rest.
PROMPT_SHARE, COMPLETIONS = 0.25, 8
LR, MAX_NORM, BETAS = 1e-5, 1.0, (0.9, 0.95)
PRODUCT = {"cuda": 8192, "cpu": 2048}  # size of the square product that stands for the limit

Step = Callable[[list[Batch]], float]  # micro-batches -> loss


def model_config(shape: tuple[int, ...]) -> ModelConfig:
    layers, hidden, intermediate, query_heads, key_heads, vocab, tokens = shape
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=tokens,
        tie_word_embeddings=hidden < 2048,  # as Qwen2.5 does
    )


def packed_batch(shape: tuple[int, ...], device: torch.device, seed: int) -> list[Batch]:
    """Segments of different lengths that fill the tokens."""
    *_, vocab, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    examples, left = [], tokens
    while left:
        length = min(left, int(torch.randint(tokens // 16, tokens // 3, (), generator=generator)))
        examples.append(Example(random_ids(length, vocab, generator), [0.0] + [1.0] * (length - 1)))
        left -= length
    weigh(examples, count(examples))
    return pack(examples, tokens, device)


def group_batches(shape: tuple[int, ...], device: torch.device, seed: int) -> tuple[list[Batch], list[Batch]]:
    """A group that, its prompt laid once, fills the tokens; and the same examples without sharing."""
    *_, vocab, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    prompt = random_ids(int(tokens * PROMPT_SHARE), vocab, generator)
    length = (tokens - len(prompt)) // COMPLETIONS
    weights = [0.0] * len(prompt) + [1.0] * (length - 1)
    examples = [Example([*prompt, *random_ids(length - 1, vocab, generator)], weights) for _ in range(COMPLETIONS)]
    weigh(examples, count(examples))
    alone = pack(examples, tokens, device)
    for example in examples:
        example.group = 0
    return pack(examples, tokens, device), alone


def random_ids(length: int, vocab: int, generator: torch.Generator) -> list[int]:
    return torch.randint(vocab, (length,), generator=generator).tolist()


def ours(model: Model, mesh: Mesh, large: bool) -> Step:
    policy = ShardedModel(model, mesh, compute_dtype=compute_dtype(mesh), activation_checkpointing=large)
    optimizer = AdamW(policy.shards, lr=LR, betas=BETAS, moments_dtype=torch.bfloat16 if large else torch.float32)

    def step(batches: list[Batch]) -> float:
        return optimise(policy, optimizer, batches, sft_loss, mesh=mesh, lr=LR, max_grad_norm=MAX_NORM).loss

    return step


def theirs(model: Model, mesh: Mesh, large: bool) -> Step:
    import transformers

    names = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"}
    names |= {"vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
    config = transformers.Qwen2Config(**{name: getattr(model.config, name) for name in names}, use_cache=False)
    hf: Any = transformers.Qwen2ForCausalLM(config)
    hf.load_state_dict(model.state_dict(), strict=not model.config.tie_word_embeddings)
    hf = hf.to(mesh.device, torch.bfloat16 if large else torch.float32)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)

    @torch.compile
    def loss_of(ids: Tensor, positions: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(mesh.device.type, torch.bfloat16, enabled=mesh.device.type == "cuda"):
            logits = hf(input_ids=ids[None], position_ids=positions[None]).logits[0]
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weight).sum()

    def step(batches: list[Batch]) -> float:
        (batch,) = batches
        optimizer.zero_grad()
        loss = loss_of(batch.input_ids, batch.positions, batch.targets, batch.weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return step


def check(steps: dict[str, Step], inputs: list[list[Batch]], tolerance: float) -> None:
    """Stop unless both have the same losses, step after step."""
    for number, batches in enumerate(inputs):
        first, second = (step(batches) for step in steps.values())
        if not abs(first - second) <= tolerance * abs(second):
            sys.exit(f"train: the loss of step {number} is {first}, that of transformers {second}")


def packed(shape: tuple[int, ...], mesh: Mesh, args: Any) -> common.Row:
    """Our step beside that of transformers on the same packed batches."""
    large = sum(p.numel() for p in meta_model(shape).parameters()) > LARGE
    inputs = [packed_batch(shape, mesh.device, seed) for seed in range(3)]
    forms = {form.__name__: form for form in (ours, theirs)}

    def train(form: Callable[..., Step]) -> None:
        step = form(make_model(shape, mesh), mesh, large)
        for _ in range(2):
            step(inputs[0])

    memory = {}
    for name, form in forms.items():
        memory[name] = common.peak_extra_mib(train, (form,), mesh.device)
        gc.collect()  # what is left of one must not be freed while the other is counted
    steps = {name: form(make_model(shape, mesh), mesh, large) for name, form in forms.items()}
    check(steps, inputs, 1e-4 if mesh.device.type == "cpu" else 2e-2)
    contenders = {name: lambda _, batches, step=step: step(batches) for name, step in steps.items()}
    size = PRODUCT[mesh.device.type]
    factor = torch.randn(size, size, device=mesh.device, dtype=compute_dtype(mesh))
    times = common.in_turns(
        contenders | {"product": lambda *_: linear(factor, factor)}, [(b[0].input_ids, b) for b in inputs], args.repeats
    )
    flops = 3 * sum(forward_flops(model_config(shape), work_of(batches)) for batches in inputs) / len(inputs)
    peak = peak_of(mesh.device, compute_dtype(mesh))
    on_gpu = mesh.device.type == "cuda"
    return {
        "batch": "packed",
        "layers x H x I x Hq x Hkv x V x T": "x".join(map(str, shape)),
        **{f"{name}_ms": time for name, time in times.items()},
        "tokens_a_second": shape[-1] / times["ours"] * 1e3 if on_gpu else None,
        "mfu": flops / times["ours"] * 1e3 / peak.flops if peak else None,
        "share_of_limit": flops / (2 * size**3) * times["product"] / times["ours"],
        "speedup": times["theirs"] / times["ours"],
        **{f"{name}_peak_mib": peak for name, peak in memory.items()},
        "memory_ratio": memory["ours"] / memory["theirs"],
    }


def group(shape: tuple[int, ...], mesh: Mesh, args: Any) -> common.Row:
    """Our step on a group whose prompt is laid once beside the same group without sharing."""
    large = sum(p.numel() for p in meta_model(shape).parameters()) > LARGE
    step = ours(make_model(shape, mesh), mesh, large)
    inputs = [(torch.zeros(0, device=mesh.device), *group_batches(shape, mesh.device, seed)) for seed in range(2)]
    contenders = {"ours": lambda _, shared, alone: step(shared), "alone": lambda _, shared, alone: step(alone)}
    times = common.in_turns(contenders, inputs, args.repeats)
    shared, alone = (sum(batch.num_tokens for batch in batches) for batches in inputs[0][1:])
    return {
        "batch": "group",
        "layers x H x I x Hq x Hkv x V x T": "x".join(map(str, shape)),
        "ours_ms": times["ours"],
        "alone_ms": times["alone"],
        "speedup": times["alone"] / times["ours"],
        "tokens_ratio": shared / alone,
    }


def meta_model(shape: tuple[int, ...]) -> Model:
    with torch.device("meta"):
        return Model(model_config(shape))


def make_model(shape: tuple[int, ...], mesh: Mesh) -> Model:
    return Model(model_config(shape)).to(mesh.device)


def compute_dtype(mesh: Mesh) -> torch.dtype:
    return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32


def main() -> None:
    args = common.arguments(__doc__)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with Mesh.create() as mesh:
        shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
        rows = [measure(shape, mesh, args) for shape in shapes for measure in (packed, group)]
    common.report("train", rows, args)


if __name__ == "__main__":
    main()
