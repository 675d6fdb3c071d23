"""RMSNorm of a sum, rotary embedding and SwiGLU, forward and backward, beside plain PyTorch and beside a copy.

    python -m groupwise.bench.small_kernels [--shapes 8192x1536x8960x12x2x128] [--out FILE]

A shape is tokens x hidden x intermediate x query heads x key heads x head size. ``share_of_limit`` is the time of one
copy that moves as many bytes as the operation must read and write, timed in the same run, over ours; ``speedup`` is the
time of plain PyTorch over ours. ``no_gradient`` is the forward pass of a sampler, in place where it can be; ``write``
turns queries and keys and stores keys and values in a paged cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.engine.model import Rotary
from groupwise.kernels import add_rms_norm, apply_rotary, eager, implementation, silu_mul, write_rotated

GPU_SHAPES = [(8192, 1536, 8960, 12, 2, 128), (8192, 3584, 18944, 28, 4, 128), (8192, 5120, 13824, 40, 8, 128)]
CPU_SHAPES = [(512, 256, 704, 4, 2, 64), (512, 1536, 8960, 12, 2, 128)]
EPS = 1e-6
FLOPS = {"rms_norm": 5, "rotary": 3, "swiglu": 6}  # an element of the first input, forward; about twice so many back
Form = Callable[..., Any]


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager.rms_norm(total, weight, EPS), total


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return eager.rotate(q, cos, sin), eager.rotate(k, cos, sin)


FORMS: dict[str, tuple[Form, Form]] = {
    "rms_norm": (lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), plain_norm),
    "rotary": (apply_rotary, plain_rotary),
    "swiglu": (lambda gate, up: (silu_mul(gate, up),), lambda gate, up: (torch.nn.functional.silu(gate) * up,)),
}


def make_inputs(op: str, shape: tuple[int, ...], device: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors with a gradient, tensors without)."""
    tokens, hidden, intermediate, query_heads, key_heads, size = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    sizes: dict[str, list[tuple[int, ...]]] = {
        "rms_norm": [(tokens, hidden), (tokens, hidden), (hidden,)],
        "rotary": [(tokens, query_heads, size), (tokens, key_heads, size)],
        "swiglu": [(tokens, intermediate), (tokens, intermediate)],
    }
    own = [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in sizes[op]]
    if op != "rotary":
        return own, []
    return own, list(Rotary(size, 1e6).angles(torch.arange(tokens, device=device), dtype))


def passes(form: Form, own: list[Tensor], fixed: list[Tensor]) -> tuple[dict[str, list[Tensor]], Form]:
    """Values and gradients, and the backward pass alone."""
    outputs = list(form(*own, *fixed))
    generator = torch.Generator(own[0].device).manual_seed(0)
    slopes = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, own, slopes, retain_graph=True)

    return {"value": [x.detach() for x in outputs], "gradient": list(backward())}, backward


def check(op: str, own: list[Tensor], fixed: list[Tensor]) -> None:
    """Stop unless values and gradients are about as good as plain PyTorch's, and two runs agree to the bit."""
    ours, plain = FORMS[op]
    doubles = [x.detach().double().requires_grad_() for x in own]
    true, _ = passes(plain, doubles, [x.double() for x in fixed])
    first, again, naive = (passes(form, own, fixed)[0] for form in (ours, ours, plain))
    for kind in true:
        for a, b, c, d in zip(first[kind], again[kind], naive[kind], true[kind], strict=True):
            bound = 1.5 * common.error(c, d) + 1e-6
            if not common.error(a, d) <= bound:
                sys.exit(f"{op}: the {kind} is wrong by {common.error(a, d):.2e}; {bound:.2e} is allowed")
            if not torch.equal(a, b):
                sys.exit(f"{op}: the {kind} of two runs differs")


def measure(op: str, shape: tuple[int, ...], args: Any) -> list[common.Row]:
    inputs = [make_inputs(op, shape, args.device, seed) for seed in range(2)]
    check(op, *inputs[0])
    ours, plain = FORMS[op]
    bare = [[x.detach().clone() for some in each for x in some] for each in inputs]
    own = inputs[0][0]
    once = sum(x.nbytes for x in passes(ours, *inputs[0])[0]["value"])
    # The tables of the angles count half: the other half repeats it.
    tables = sum(x.nbytes // 2 for x in inputs[0][1])
    read = sum(x.nbytes for x in inputs[0][0]) + tables
    # Backward: gradients of the outputs, what was kept, gradients of the inputs, of which a sum's terms share one.
    kept = {"rms_norm": once // 2, "rotary": tables, "swiglu": 2 * once}[op]
    written = {"rms_norm": once // 2, "rotary": once, "swiglu": 2 * once}[op]
    work: dict[str, tuple[int, Form, Form, list[Any]]] = {
        "forward": (read + once, lambda own, fixed: ours(*own, *fixed), lambda own, fixed: plain(*own, *fixed), inputs),
        "no_gradient": (read + once, lambda *x: ours(*x), lambda *x: plain(*x), bare),
        "backward": (
            once + kept + written,
            lambda ours, plain: ours(),
            lambda ours, plain: plain(),
            [tuple(passes(form, *each)[1] for form in (ours, plain)) for each in inputs],
        ),
    }
    rows = []
    for name, (moved, own_form, plain_form, arguments) in work.items():
        flops = FLOPS[op] * own[0].numel() * (2 if name == "backward" else 1)
        rows.append({"op": op, "pass": name} | timed(own_form, plain_form, arguments, moved, flops, shape, args))
    return rows


def measure_write(shape: tuple[int, ...], args: Any) -> common.Row:
    """The rotation with the write into a cache of twice the tokens, beside plain PyTorch's."""

    def plain(*x: Tensor) -> Tensor:
        q, k, v, cos, sin, k_cache, v_cache, slots = x
        k_cache.flatten(0, 1)[slots] = eager.rotate(k, cos, sin)
        v_cache.flatten(0, 1)[slots] = v
        return eager.rotate(q, cos, sin)

    inputs = []
    for seed in range(2):
        (q, k), angles = make_inputs("rotary", shape, args.device, seed)
        caches = [k.new_zeros(-(-len(k) // 8), 16, *k.shape[1:]) for _ in range(2)]
        slots = torch.randperm(2 * len(k), device=args.device)[: len(k)]
        inputs.append([q.detach(), k.detach(), k.detach().clone(), *angles, *caches, slots])
    results = []
    for form in (write_rotated, plain):
        tensors = [x.clone() for x in inputs[0]]
        results.append([form(*tensors), *tensors[5:7]])
    for got, expected in zip(*results, strict=True):
        if not common.error(got, expected) <= 2 * torch.finfo(got.dtype).eps:
            sys.exit(f"write_rotated differs from plain PyTorch by {common.error(got, expected):.2e}")
    q, k, v, cos, sin, _, _, slots = inputs[0]
    moved = 2 * (q.nbytes + k.nbytes + v.nbytes) + (cos.nbytes + sin.nbytes) // 2 + slots.nbytes
    times = timed(write_rotated, plain, inputs, moved, FLOPS["rotary"] * (q.numel() + k.numel()), shape, args)
    return {"op": "rotary", "pass": "write"} | times


def timed(
    ours: Form, plain: Form, arguments: list[Any], moved: int, flops: int, shape: tuple[int, ...], args: Any
) -> common.Row:
    """Both forms in turns with a copy that moves as many bytes."""
    spare = [torch.empty(moved // 2, dtype=torch.uint8, device=args.device) for _ in arguments]
    contenders: dict[str, Form] = {
        "ours": lambda _, *x: ours(*x),
        "copy": lambda moved, *_: moved.clone(),  # between the two, so that neither finds the other's in a cache
        "plain": lambda _, *x: plain(*x),
    }
    times = common.in_turns(contenders, [(s, *a) for s, a in zip(spare, arguments, strict=True)], args.repeats)
    return {
        "shape": "x".join(map(str, shape)),
        "ours_ms": times["ours"],
        "plain_ms": times["plain"],
        "copy_ms": times["copy"],
        "share_of_limit": times["copy"] / times["ours"],
        "speedup": times["plain"] / times["ours"],
        "flops_per_byte": flops / moved,
    }


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(", ".join(f"{op} is served by {implementation(args.device, op)}" for op in FORMS))
    rows = [row for shape in shapes for op in FORMS for row in measure(op, shape, args)]
    rows += [measure_write(shape, args) for shape in shapes]
    common.report("small_kernels", rows, args)


if __name__ == "__main__":
    main()
