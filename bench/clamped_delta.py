"""Clamped-delta loss, value and gradient, beside its plain PyTorch form and beside a copy of the bytes it must move.

    python -m groupwise.bench.clamped_delta [--shapes 32768] [--out FILE]

``share_of_limit`` is the time of one copy that moves as many bytes as the loss reads and writes (24 a token with a
reference), timed in the same run, over ours; ``speedup`` is the time of the formula written in PyTorch, without
statistics, over ours, and ``speedup_compiled`` that of the same under torch.compile.

``launch_us``, on a GPU, is the time of our launch (value, gradient and statistics) in a CUDA graph, where the host's
part of a launch does not count: one replay over the launches in it. ``compiled_us`` is that of the compiled formula and
its gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import clamped_delta_loss, eager, implementation

GPU_SHAPES = [(8192,), (32768,), (1 << 20,)]
CPU_SHAPES = [(4096,), (32768,), (1 << 18,)]
BETA = 0.04
BYTES_A_TOKEN = 24  # five inputs and one gradient, float32
FLOPS_A_TOKEN = 30  # two exponentials, the clips, both gradients: about so many, far from what could bound it
LAUNCHES = 100  # in a CUDA graph


def plain(
    logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, ref_logprob: Tensor, beta: float
) -> tuple[Tensor, None]:
    """The formula with the default clips, no statistics."""
    ratio = (logprob - old).clamp(-4.0, 4.0).exp()
    gap = (ref_logprob - logprob).clamp(-4.0, 4.0)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    return ((beta * (gap.exp() - gap - 1.0) - surrogate) * weight).sum(), None


def value_and_gradient(form: Any) -> Any:
    def run(logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, reference: Tensor, _: Tensor) -> Any:
        loss, stats = form(logprob, old, advantage, weight, ref_logprob=reference, beta=BETA)
        return loss.detach(), torch.autograd.grad(loss, logprob)[0], stats

    return run


def launch(logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, reference: Tensor, _: Tensor) -> None:
    clamped_delta_loss(logprob, old, advantage, weight, ref_logprob=reference, beta=BETA)


def in_graph(run: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]) -> Callable[..., None]:
    """LAUNCHES runs in one CUDA graph, over inputs that rotate: what replays it."""
    run(*inputs[0])  # so that nothing is compiled while it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            run(*inputs[i % len(inputs)])
    return lambda *_: graph.replay()


def copy(*inputs: Tensor) -> Tensor:
    return inputs[-1].clone()  # reads and writes BYTES_A_TOKEN / 2 a token


def make_inputs(num_tokens: int, device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    old, step, advantage, weight, drift = torch.randn(5, num_tokens, generator=generator, device=device)
    weight = (weight > -1.0).float() / num_tokens
    moved = torch.empty(num_tokens * BYTES_A_TOKEN // 2, dtype=torch.uint8, device=device)
    return (old + step).requires_grad_(), old, advantage, weight, old + step + 0.1 * drift, moved


def check(inputs: tuple[Tensor, ...]) -> None:
    """Stop unless loss, gradient and statistics agree with the plain form, and two runs agree to the bit."""
    doubles = (x.detach().double().requires_grad_() for x in inputs[:-1])
    exact = value_and_gradient(eager.clamped_delta_loss)(*doubles, inputs[-1])
    first, again = (value_and_gradient(clamped_delta_loss)(*inputs) for _ in range(2))
    for name, got, true, repeated in zip(("loss", "gradient"), first, exact, again, strict=False):
        if not common.error(got, true) <= 1e-5:
            sys.exit(f"clamped_delta: the {name} is wrong by {common.error(got, true):.2e}; 1e-5 is allowed")
        if not torch.equal(got, repeated):
            sys.exit(f"clamped_delta: the {name} of two runs differs")
    for name, value in first[2].items():
        if value.item() != exact[2][name].item() and not common.error(value, exact[2][name]) <= 1e-4:
            sys.exit(f"clamped_delta: {name} is {value.item()}; expected {exact[2][name].item()}")


def measure(shape: tuple[int, ...], args: Any) -> common.Row:
    inputs = [make_inputs(shape[0], args.device, seed) for seed in range(4)]
    check(inputs[0])
    contenders = {
        "ours": value_and_gradient(clamped_delta_loss),
        "plain": value_and_gradient(plain),
        "copy": copy,
    }
    compiled = value_and_gradient(torch.compile(plain, dynamic=False))
    contenders |= common.able({"compiled": compiled}, inputs[0])
    if args.device == "cuda":
        captured = {"launch": launch} | {name: run for name, run in contenders.items() if name == "compiled"}
        contenders |= {f"{name} in a graph": in_graph(run, inputs) for name, run in captured.items()}
    times = common.in_turns(contenders, inputs, args.repeats)
    in_graphs = {name: times.get(f"{name} in a graph") for name in ("launch", "compiled")}
    return {
        "T": shape[0],
        "ours_ms": times["ours"],
        "plain_ms": times["plain"],
        "compiled_ms": times.get("compiled"),
        "copy_ms": times["copy"],
        "share_of_limit": times["copy"] / times["ours"],
        "speedup": times["plain"] / times["ours"],
        "speedup_compiled": times["compiled"] / times["ours"] if "compiled" in times else None,
        "flops_per_byte": FLOPS_A_TOKEN / BYTES_A_TOKEN,
        **{f"{name}_us": time and time * 1e3 / LAUNCHES for name, time in in_graphs.items()},
    }


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(f"clamped_delta_loss is served by {implementation(args.device, 'clamped_delta_loss')}")
    common.report("clamped_delta", [measure(shape, args) for shape in shapes], args)


if __name__ == "__main__":
    main()
