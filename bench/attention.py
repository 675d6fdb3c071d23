"""Attention of training over packed segments: every implementation of the machine side by side, and shared prompts.

    python -m groupwise.bench.attention [--shapes 28x4x128x8192] [--out FILE]

A shape is query heads x key heads x head size x tokens; bf16 on a GPU, float32 on a CPU. ``packed``: segments of
different lengths; ``shared``: one prompt of an eighth of the tokens and 14 completions behind it, beside the same with
the prompt repeated before each completion (``repeated``; attention alone saves little by it, the rest of a model more:
``bench/train.py``). ``share_of_limit`` is the time in which a large matrix product of the same run does as many
operations (of the pairs that are seen, 4 D a pair and head forward, 2.5 times that backward), over ours;
``NAME_ratio`` is another's time over ours, ours being what serves by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import dispatch, eager, packed_attention

GPU_SHAPES = [(12, 2, 128, 8192), (28, 4, 128, 8192), (40, 8, 128, 8192)]
CPU_SHAPES = [(4, 2, 32, 4096), (12, 2, 128, 1024)]
COMPLETIONS = 14
PRODUCT = {"cuda": 8192, "cpu": 2048}

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def segment_lengths(tokens: int) -> list[int]:
    """Lengths that fill the tokens, from a sixteenth to a third of them."""
    generator = torch.Generator().manual_seed(tokens)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(tokens // 16, tokens // 3, (), generator=generator))))
    return lengths


def bounds_of(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def make_inputs(shape: tuple[int, ...], device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    query_heads, key_heads, size, tokens = shape
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = [(tokens, heads, size) for heads in (query_heads, key_heads, key_heads)]
    q, k, v = (torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in sizes)
    return q, k, v


def served_by(name: str, bounds: Tensor, longest: int, prefix: Tensor | None = None) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dispatch.force("packed_attention", name, q.device.type)
        return packed_attention(q, k, v, bounds, longest, prefix)

    return run


def both(form: Form) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = form(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())

    return run


def check(name: str, form: Form, oracle: Form, inputs: tuple[Tensor, ...]) -> None:
    """Stop unless the error against float32 is at most 1.5 times that of the masked form in the same dtype."""
    q, k, v = inputs
    true = both(oracle)(*(x.detach().float().requires_grad_() for x in inputs))
    got, plain = both(form)(q, k, v), both(oracle)(q, k, v)
    for what, a, b, c in zip(("value", "d_q", "d_k", "d_v"), got, plain, true, strict=True):
        bound = 1.5 * common.error(b, c) + 1e-5
        if not common.error(a, c) <= bound:
            sys.exit(f"attention: the {what} of {name} is wrong by {common.error(a, c):.2e}; {bound:.2e} is allowed")


def measure(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    tokens, device = shape[3], args.device
    lengths = segment_lengths(tokens)
    bounds, longest = bounds_of(lengths, device), max(lengths)
    inputs = [make_inputs(shape, device, seed) for seed in range(2)]
    names = dispatch.available(device, "packed_attention")
    forms = {name: served_by(name, bounds, longest) for name in names}
    for name in common.able({name: both(form) for name, form in forms.items()}, inputs[0]):
        check(name, forms[name], lambda q, k, v: eager.masked_attention(q, k, v, bounds), inputs[0])
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    rows = [row(shape, "packed", name, forms, inputs, pairs, args) for name in ("forward", "both")]

    prompt = tokens // 8
    completion = (tokens - prompt) // COMPLETIONS
    shared_lengths = [prompt] + [completion] * COMPLETIONS
    used = sum(shared_lengths)
    prefix = torch.tensor([-1] + [0] * COMPLETIONS, dtype=torch.int32, device=device)
    shared_bounds = bounds_of(shared_lengths, device)
    repeated_bounds = bounds_of([prompt + completion] * COMPLETIONS, device)
    source = torch.cat(
        [torch.cat([torch.arange(prompt), torch.arange(start, start + completion)]) for start in shared_bounds[1:-1]]
    ).to(device)
    shorter: list[Any] = [tuple(x.detach()[:used].requires_grad_() for x in each) for each in inputs]
    repeated = served_by("auto", repeated_bounds, prompt + completion)
    forms = {
        "ours": served_by("auto", shared_bounds, max(prompt, completion), prefix),
        "repeated": lambda q, k, v: repeated(q[source], k[source], v[source]),
    }
    check("shared", forms["ours"], lambda q, k, v: eager.masked_attention(q, k, v, shared_bounds, prefix), shorter[0])
    pairs = prompt * (prompt + 1) / 2 + COMPLETIONS * (completion * prompt + completion * (completion + 1) / 2)
    rows += [row(shape, "shared", name, forms, shorter, pairs, args) for name in ("forward", "both")]
    return rows


def row(
    shape: tuple[int, ...], kind: str, name: str, forms: dict[str, Form], inputs: list[Any], pairs: float, args: Any
) -> common.Row:
    query_heads, _, size, _ = shape
    runs = {who: torch.no_grad()(form) if name == "forward" else both(form) for who, form in forms.items()}
    ours, *others = runs
    factor = torch.randn(PRODUCT[args.device], PRODUCT[args.device], device=args.device, dtype=inputs[0][0].dtype)
    times = common.in_turns(runs | {"product": lambda *_: factor @ factor}, inputs, args.repeats)
    flops = 4 * query_heads * size * pairs * (1 if name == "forward" else 3.5)
    moved = sum(x.nbytes for x in inputs[0]) + inputs[0][0].nbytes
    return {
        "Hq x Hkv x D x T": "x".join(map(str, shape)),
        "segments": kind,
        "pass": name,
        "ours": ours if kind == "packed" else dispatch.packed_attention_by(args.device, factor.dtype, size, True),
        **{f"{who}_ms": time for who, time in times.items()},
        "tflops": flops / times[ours] * 1e-9 if args.device == "cuda" else None,
        "share_of_limit": flops / (2 * len(factor) ** 3) * times["product"] / times[ours],
        **{f"{who}_ratio": times[who] / times[ours] for who in others},
        "flops_per_byte": flops / (moved * (1 if name == "forward" else 2.5)),
    }


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(dispatch.describe(args.device))
    common.report("attention", [row for shape in shapes for row in measure(shape, args)], args)


if __name__ == "__main__":
    main()
