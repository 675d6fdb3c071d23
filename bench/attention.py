"""Packed attention by every implementation that the machine has, and a shared prompt beside its copies.

    python -m groupwise.bench.attention [--shapes 12x2x128] [--out FILE]

A shape is query heads x key heads x head size: those of Qwen2.5-1.5B, 7B and 14B on a GPU, bf16; small float32 ones on
a CPU, where a mask is timed too. The stream ``segments`` has segments of different lengths, 8,192 tokens on a GPU; in
``group`` a prompt stands once before its completions (``shared``) or once before each. ``speedup`` is the time of the
fastest of the others over this one's; ``tokens_saved`` is the share of the tokens that sharing drops, in all other
layers too. ``tflops`` counts the products that the mask leaves, 4D forward and 10D backward for each query head and
pair of tokens; ``share_of_limit`` is over the rate of a square matrix product in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import dispatch, eager, packed_attention

GPU_SHAPES = [(12, 2, 128), (28, 4, 128), (40, 8, 128)]
CPU_SHAPES = [(4, 2, 32), (12, 2, 64)]
GPU_LENGTHS = [3000, 1700, 1100, 900, 640, 400, 252, 130, 70]
CPU_LENGTHS = [400, 250, 190, 100, 64, 20]
# Tokens of a prompt, completions, tokens of each.
GPU_GROUP = (1024, 16, 512)
CPU_GROUP = (128, 8, 64)
PRODUCT = 8192  # rows and columns of the matrices
OP = "packed_attention"
Form = Callable[..., Any]


class Packing(NamedTuple):
    """Lengths of the segments of a stream, and which of them each sees before its own tokens."""

    lengths: list[int]
    prefix: list[int]

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        before = [self.lengths[n] if n >= 0 else 0 for n in self.prefix]
        return sum(n * (n + 1) // 2 + n * shared for n, shared in zip(self.lengths, before, strict=True))

    def shrunk(self) -> Packing:
        """An eighth of each segment, on which a mask has room."""
        return Packing([n // 8 + 1 for n in self.lengths], self.prefix)

    def arguments(self, device: str) -> tuple[Tensor, int, Tensor | None]:
        bounds = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()
        prefix = torch.tensor(self.prefix, dtype=torch.int32, device=device) if max(self.prefix) >= 0 else None
        return bounds, max(self.lengths), prefix


def plain(lengths: list[int]) -> Packing:
    return Packing(lengths, [-1] * len(lengths))


def make_inputs(shape: tuple[int, ...], packing: Packing, device: str, seed: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output."""
    query_heads, key_heads, size = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(sum(packing.lengths), heads, size, generator=generator, device=device).to(dtype)

    heads = [normal(count).requires_grad_() for count in (query_heads, key_heads, key_heads)]
    return *heads, normal(query_heads)


def served_by(name: str, packing: Packing, device: str) -> Form:
    """Attention of q, k and v by an implementation, or by the mask."""
    bounds, longest, prefix = packing.arguments(device)
    if name == "mask":
        return lambda q, k, v: eager.masked_attention(q, k, v, bounds, prefix)

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dispatch.force(OP, name, device)
        return packed_attention(q, k, v, bounds, longest, prefix)

    return form


def forward(form: Form) -> Form:
    return torch.no_grad()(lambda q, k, v, d_out: form(q, k, v))


def with_backward(form: Form) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
        out = form(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]

    return run


# How to run a form, and products of D for each query head and pair of tokens.
PASSES: dict[str, tuple[Callable[[Form], Form], int]] = {
    "forward": (forward, 4),
    "forward+backward": (with_backward, 14),
}


def check(name: str, packing: Packing, shape: tuple[int, ...], device: str) -> None:
    """Stop unless the error against float32 is at most 1.5 times that of the mask."""
    small = packing.shrunk()
    inputs = make_inputs(shape, small, device, seed=0)
    mask = with_backward(served_by("mask", small, device))
    exact = mask(*(x.detach().float().requires_grad_() for x in inputs))
    naive, ours = mask(*inputs), with_backward(served_by(name, small, device))(*inputs)
    for what, true, other, got in zip(("output", "d_q", "d_k", "d_v"), exact, naive, ours, strict=True):
        error, bound = (float((x.float() - true).norm() / true.norm()) for x in (got, other))
        if not error <= 1.5 * bound + 2e-6:
            sys.exit(f"attention: {what} of {name} is wrong by {error:.2e}; {1.5 * bound + 2e-6:.2e} is allowed")


def measure(
    title: str, contenders: dict[str, tuple[str, Packing]], shape: tuple[int, ...], args: Any
) -> list[common.Row]:
    """Rows of contenders, each an implementation and the packing that it is given."""
    for name, packing in contenders.values():
        check(name, packing, shape, args.device)
    on_gpu = args.device == "cuda"
    square = torch.randn(PRODUCT if on_gpu else 1, PRODUCT if on_gpu else 1, device=args.device)
    square = square.to(torch.bfloat16)
    inputs = [
        (square, {label: make_inputs(shape, packing, args.device, seed) for label, (_, packing) in contenders.items()})
        for seed in range(2)
    ]
    rows = []
    for kind, (as_pass, products) in PASSES.items():
        forms = {label: as_pass(served_by(name, each, args.device)) for label, (name, each) in contenders.items()}
        runs: dict[str, Form] = {
            label: lambda _, own, form=form, label=label: form(*own[label]) for label, form in forms.items()
        }
        times = common.in_turns(runs | {"product": lambda square, _: square @ square}, inputs, args.repeats)
        for label, (_, packing) in contenders.items():
            tflops = 1e-9 * products * packing.num_pairs * shape[0] * shape[2] / times[label]
            product = 2e-9 * PRODUCT**3 / times["product"]
            q, k, v, _ = inputs[0][1][label]
            moved = (2 * q.nbytes + k.nbytes + v.nbytes) * (1 if kind == "forward" else 3)  # gradients back and forth
            rows.append(
                {
                    "heads": "x".join(map(str, shape)),
                    "stream": title,
                    "by": label,
                    "tokens": sum(packing.lengths),
                    "pass": kind,
                    "time_ms": times[label],
                    "speedup": min(times[other] for other in contenders if other != label) / times[label],
                    "tflops": tflops if on_gpu else None,
                    "share_of_limit": tflops / product if on_gpu else None,
                    "flops_per_byte": products * packing.num_pairs * shape[0] * shape[2] / moved if on_gpu else None,
                }
            )
    return rows


def main() -> None:
    args = common.arguments(__doc__)
    on_gpu = args.device == "cuda"
    print(dispatch.describe(args.device))
    lengths, (prompt, count, length) = (GPU_LENGTHS, GPU_GROUP) if on_gpu else (CPU_LENGTHS, CPU_GROUP)
    names = dispatch.available(args.device, OP)
    segments = {name: (name, plain(lengths)) for name in (names if on_gpu else (*names, "mask"))}
    shared, copies = Packing([prompt, *[length] * count], [-1, *[0] * count]), plain([prompt + length] * count)
    group = {"shared": ("auto", shared)} | {f"copies by {name}": (name, copies) for name in names}
    rows = []
    for shape in common.parse_shapes(args.shapes, GPU_SHAPES if on_gpu else CPU_SHAPES):
        rows += measure("segments", segments, shape, args)
        rows += measure("group", group, shape, args)
    for row in rows:
        if row["by"] == "shared":
            row["tokens_saved"] = 1 - sum(shared.lengths) / sum(copies.lengths)
    common.report("attention", rows, args)


if __name__ == "__main__":
    main()
