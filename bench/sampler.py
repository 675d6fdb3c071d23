"""Our sampler beside transformers' three ways to generate, on the same random weights, prompts and numbers of tokens.

    python -m groupwise.bench.sampler [--shapes 8x384x1024x6x2x8192x64x1x32x128x128] [--out FILE]

A shape is layers x hidden x intermediate x query heads x key heads x vocabulary x prompts x samples of each x tokens of
the shortest prompt x tokens of the longest x new tokens of each. Lengths of prompts are spread evenly between the two.
All draw from the whole vocabulary at temperature 1, and none ends early; float32 on a CPU, bfloat16 on a GPU.
Transformers' ``generate`` pads prompts on the left; a prompt with several samples is given several times.

``over_dynamic``, ``over_static`` and ``over_continuous`` are the times of ``generate`` with a growing cache, with a
preallocated one (compiled by transformers on a GPU), and of continuous batching (``generate_batch``, which is warm and
keeps its memory) over ours; ``speedup`` is that of the fastest of them. ``share_of_limit`` is the least time that the
device allows over ours: prompts and drawn tokens take the arithmetic of all products and of attention at the rate of
the fastest large product of the same run, and on a GPU a decoding step takes at least the bytes of weights, keys and
values at the bandwidth of a copy in the same run. Each prompt counts once, however many samples it has; its keys count
for each sample. ``tokens_a_second`` are new ones.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.bench.train import PRODUCT, model_config
from groupwise.engine.config import ModelConfig
from groupwise.engine.model import Model
from groupwise.rollout.sampler import Sampler, SamplingParams

MODELS = [(28, 1536, 8960, 12, 2, 151936), (28, 3584, 18944, 28, 4, 152064)]
GPU_SHAPES = [
    (*model, prompts, samples, 1024, 1024, 1024)
    for model in MODELS
    for prompts, samples in ((1, 1), (16, 1), (64, 1), (256, 1), (32, 8))
]
CPU_SHAPES = [(8, 384, 1024, 6, 2, 8192, prompts, samples, 32, 128, 128) for prompts, samples in ((64, 1), (8, 8))]
BLOCK_SIZE = 16
COPY_BYTES = 1 << 30  # read and written
# Greedy tokens may first differ where the two are as likely as each other, as far as the dtype tells, nats.
TIES = {"cpu": 1e-4, "cuda": 0.1}

Prompts = list[list[int]]
Generate = Callable[[Prompts, int, bool], Prompts]  # prompts, new tokens, whether to draw -> new tokens of each


class NoText:
    """A tokenizer of ids without text; no id is the end."""

    eos_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        return ""


@lru_cache(maxsize=1)  # weights of a large model take a minute to draw, and several shapes have the same
def random_model(sizes: tuple[int, ...], positions: int, device: str) -> Model:
    """Random weights. Head and embedding are two matrices: decoding reads as much as if they were one."""
    config = replace(model_config((*sizes, positions)), tie_word_embeddings=False)
    with torch.device("meta"):
        model = Model(config)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).to_empty(device=device)
    model.init_weights(0)
    return model.requires_grad_(False)


def prompt_lengths(shape: tuple[int, ...]) -> list[int]:
    prompts, _, shortest, longest, _ = shape[6:]
    return torch.linspace(longest, shortest, prompts).round().int().tolist()


def random_prompts(shape: tuple[int, ...], seed: int) -> Prompts:
    """The prompts of a shape, each as often as it has samples."""
    generator = torch.Generator().manual_seed(seed)
    lengths = prompt_lengths(shape)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    prompts = [torch.randint(shape[5], (lengths[i],), generator=generator).tolist() for i in order]
    return [prompt for prompt in prompts for _ in range(shape[7])]


def make_sampler(model: Model, shape: tuple[int, ...], concurrency: int = 0) -> Sampler:
    """A sampler with memory for the whole work at once."""
    samples, new = shape[7], shape[10]
    blocks = sum(samples * (-(-(length + new) // BLOCK_SIZE) + 1) for length in prompt_lengths(shape))
    kv_memory_gib = (blocks + 1) * block_bytes(model) / 2**30
    return Sampler(model, NoText(shape[5]), kv_memory=kv_memory_gib, block_size=BLOCK_SIZE, concurrency=concurrency)


def block_bytes(model: Model) -> int:
    return BLOCK_SIZE * kv_bytes(model.config, model.output_weight.dtype)


def kv_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * dtype.itemsize


def ours(sampler: Sampler) -> Generate:
    def generate(prompts: Prompts, new: int, draw: bool) -> Prompts:
        params = SamplingParams(temperature=float(draw), max_tokens=new)
        return [completion.token_ids for completion in sampler.generate(prompts, params)]

    return generate


def theirs(model: Model, shape: tuple[int, ...]) -> tuple[dict[str, Generate], Any]:
    """The three ways of transformers by name, and its model, which shares our weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    config = model.config
    names = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"}
    names |= {"vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings"}
    with torch.device(model.output_weight.device):
        hf: Any = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**{name: getattr(config, name) for name in names}, dtype=model.output_weight.dtype)
        )
    hf.load_state_dict(model.state_dict(), assign=True)
    hf.eval()
    blocks = sum(-(-(length + shape[10]) // 256) + 1 for length in prompt_lengths(shape)) * shape[7]

    def settings(new: int, draw: bool, cache: str | None = None) -> Any:
        return transformers.GenerationConfig(
            do_sample=draw, top_k=0, max_new_tokens=new, eos_token_id=None, pad_token_id=0, cache_implementation=cache
        )

    def padded(cache: str | None) -> Generate:
        def generate(prompts: Prompts, new: int, draw: bool) -> Prompts:
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=hf.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=hf.device)
            out = hf.generate(ids, attention_mask=mask, generation_config=settings(new, draw, cache))
            return out[:, longest:].tolist()

        return generate

    def continuous(prompts: Prompts, new: int, draw: bool) -> Prompts:
        done = hf.generate_batch(
            prompts,
            generation_config=settings(new, draw),
            continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=blocks),
            persistent_manager=draw,  # a manager that is kept keeps its settings too
        )
        return [each.generated_tokens for each in done.values()]

    return {"dynamic": padded(None), "static": padded("static"), "continuous": continuous}, hf


def check(generate: Generate, reference: Generate, hf: Any, shape: tuple[int, ...], tie: float) -> None:
    """Stop unless greedy tokens are those of transformers, up to a tie."""
    prompts, new = random_prompts(shape, 99)[:: shape[7]][:4], min(16, shape[10])
    for prompt, got, true in zip(prompts, generate(prompts, new, False), reference(prompts, new, False), strict=True):
        place = next((i for i, pair in enumerate(zip(got, true, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + true[:place]], device=hf.device)).logits[0, -1].float()
        gap = (logits[true[place]] - logits[got[place]]).abs().item()
        if not gap <= tie:
            sys.exit(f"sampler: token {place} of a prompt of {len(prompt)} is {got[place]}, that of transformers "
                     f"{true[place]}, which is likelier by {gap} nats")  # fmt: skip


def whole(generate: Generate) -> Callable[[Tensor, Prompts, int], None]:
    """One timed run, which must give all the tokens that are asked for."""

    def run(_: Tensor, prompts: Prompts, new: int) -> None:
        lengths = {len(ids) for ids in generate(prompts, new, True)}
        if lengths != {new}:
            raise RuntimeError(f"completions of {sorted(lengths)} tokens, expected {new} each")

    return run


def products(device: str) -> dict[str, Callable[..., Any]]:
    """Large products, whose fastest is the rate of the limit, and the copy of its bandwidth."""
    size = PRODUCT[device]
    factor = torch.randn(size, size, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    own: dict[str, Callable[..., Any]] = {"mm": lambda *_: factor @ factor}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        own["onednn"] = lambda *_: torch.ops.mkldnn._linear_pointwise(factor, factor, None, "none", [], "")
    if device == "cuda":
        source = torch.ones(COPY_BYTES // 2, dtype=torch.uint8, device=device)
        own["copy"] = lambda *_: source.clone()
    return own


def limit_ms(shape: tuple[int, ...], model: Model, times: common.Row, device: str) -> float:
    """The least time of the whole work, by the rates that were measured beside it."""
    config, samples, new = model.config, shape[7], shape[10]
    head = config.vocab_size * config.hidden_size
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2) - 2 * head
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_size  # of a query and a key
    lengths = torch.tensor(prompt_lengths(shape), dtype=torch.float64)
    rows = samples * len(lengths)
    flops_a_ms = 2 * PRODUCT[device] ** 3 / min(times[name] for name in ("mm", "onednn") if name in times)
    prefill = (2 * matrices * lengths + pair * lengths * (lengths + 1) / 2).sum() + 2 * head * len(lengths)
    steps = torch.arange(1, new, dtype=torch.float64)  # the first token comes from the prefill
    contexts = samples * (lengths.sum() + len(lengths) * steps)  # keys that each step reads
    decode = (2 * (matrices + head) * rows + pair * contexts) / flops_a_ms
    if "copy" in times:
        dtype = model.output_weight.dtype
        read = (matrices + head) * dtype.itemsize + kv_bytes(config, dtype) * contexts
        decode = torch.maximum(decode, read / (COPY_BYTES / times["copy"]))
    return (prefill / flops_a_ms + decode.sum()).item()


def measure(shape: tuple[int, ...], args: Any) -> common.Row:
    model = random_model(shape[:6], shape[9] + shape[10], args.device)
    sampler = make_sampler(model, shape)
    references, hf = theirs(model, shape)
    check(ours(sampler), references["dynamic"], hf, shape, TIES[args.device])
    generates = {"ours": ours(sampler), **references}
    forms: dict[str, Callable[..., Any]] = {name: whole(generate) for name, generate in generates.items()}
    mark = torch.zeros(0, device=args.device)
    # No prompt comes twice: what one run leaves behind must not serve the next.
    inputs = [(mark, random_prompts(shape, seed), shape[10]) for seed in range(args.repeats)]
    forms = common.able(forms, (mark, random_prompts(shape, 100), shape[10]))
    times = common.in_turns(forms, inputs, args.repeats, warm=0)
    times |= common.in_turns(products(args.device), [(mark,)], 9)
    hf.destroy_cached_continuous_batching_manager()
    sampler.flush()
    over = {name: times[name] / times["ours"] for name in references if name in times}
    prompts, samples, shortest, longest, new = shape[6:]
    return {
        "layers x H x I x Hq x Hkv x V": "x".join(map(str, shape[:6])),
        "prompts x samples": f"{prompts}x{samples}",
        "prompt + new": f"{shortest}-{longest} + {new}",
        **{f"{name}_ms": time for name, time in times.items()},
        "tokens_a_second": prompts * samples * new / times["ours"] * 1e3 if args.device == "cuda" else None,
        **{f"over_{name}": ratio for name, ratio in over.items()},
        "speedup": min(over.values(), default=None),
        "share_of_limit": limit_ms(shape, model, times, args.device) / times["ours"],
    }


def main() -> None:
    args = common.arguments(__doc__, repeats=(1, 3))
    rows = []
    for shape in common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES):
        rows.append(measure(shape, args))
        gc.collect()  # models and caches of one shape must not stay beside the next
    common.report("sampler", rows, args)


if __name__ == "__main__":
    main()
