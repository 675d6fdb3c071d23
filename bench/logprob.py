"""Grouped log-probability beside plain PyTorch's [T,V] form, its compiled form, and the kernels of others.

    python -m groupwise.bench.logprob [--shapes 8192x3584x152064] [--out FILE]

Shapes are T x H x V: the heads of Qwen2.5-1.5B, 7B and 14B on a GPU, bf16; small float32 ones on a CPU. Passes:
``forward``; ``both``, forward and backward; ``live``, both where two rows of five have a gradient. ``share_of_limit``
is the time of the products alone (one for forward, four for both with recomputation, and of the three of the backward
pass the rows that have a gradient), timed in the same run, over ours; ``NAME_ratio`` is the time of another over ours;
``repeatable`` are those of whom two runs agree to the bit.
``extra_mib`` is the peak memory beside inputs, results and gradients; on a CPU it is also told for T 8,192 and V
151,936, where the [T,V] form takes gigabytes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import grouped_logprob, implementation, linear

GPU_SHAPES = [(8192, 1536, 151936), (8192, 3584, 152064), (8192, 5120, 152064), (32768, 5120, 152064)]
CPU_SHAPES = [(8192, 128, 512), (1024, 256, 8192), (1024, 64, 151936), (512, 256, 151936)]
CPU_MEMORY_SHAPE = (8192, 64, 151936)
# Plain PyTorch holds several [T,V] tensors; beyond this many elements it is left out.
PLAIN_ELEMENTS = 1 << 31
CHECKED_ROWS = 256
LIVE = 0.4

Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> log-probability of each, or their sum


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The unfused form."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return grouped_logprob(hidden, weight, targets)[0]


def product(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear(hidden.detach(), weight.detach())


def copy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return weight.detach().clone()


def others(device: str) -> dict[str, Form]:
    """Who else computes it here."""
    forms: dict[str, Form] = {"plain": plain, "compiled": torch.compile(plain, dynamic=False)}
    if device == "cuda":
        forms |= {"cut-cross-entropy": _cut_cross_entropy, "liger-kernel": _liger}
    able = common.able(
        {name: run_both(form, 1.0) for name, form in forms.items()},
        make_inputs((64, 64, 512), compute_dtype(device), device, 0),
    )
    return {name: forms[name] for name in able}


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -importlib.import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight, targets, reduction="none")


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.functional")
    return -module.liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def run_both(form: Form, live: float) -> Callable[..., tuple[Tensor, ...]]:
    """Value and gradients of the sum over the first ``live`` of the rows."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logprob = form(hidden, weight, targets)
        total = logprob[: int(live * len(targets))].sum() if logprob.dim() else logprob
        return logprob.detach(), *torch.autograd.grad(total, (hidden, weight))

    return run


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    T, H, V = shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, device=device).to(dtype)
    weight = (torch.randn(V, H, generator=generator, device=device) * H**-0.5).to(dtype)
    targets = torch.randint(0, V, (T,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def check(inputs: tuple[Tensor, Tensor, Tensor], peers: dict[str, Form]) -> None:
    """Stop unless our error against wider numbers is at most 1.5 times plain PyTorch's, and two runs agree to the bit.

    Of a peer the sum of the values is looked at: it must be the same computation.
    """
    hidden, weight, targets = inputs
    some = (hidden[:CHECKED_ROWS].detach().requires_grad_(), weight, targets[:CHECKED_ROWS])
    wide = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    exact = run_both(plain, 1.0)(some[0].to(wide), some[1].to(wide), some[2])
    naive, first, again = (run_both(form, 1.0)(*some) for form in (plain, ours, ours))
    for name, true, other, got, repeated in zip(
        ("logprob", "d_hidden", "d_weight"), exact, naive, first, again, strict=True
    ):
        error, bound = common.error(got, true), 1.5 * common.error(other, true) + 1e-6
        if not error <= bound:
            sys.exit(f"logprob: {name} is wrong by {error:.2e}, plain PyTorch's bound is {bound:.2e}")
        if not torch.equal(got, repeated):
            sys.exit(f"logprob: {name} of two runs differs")
    for name, form in peers.items():
        if not common.error(run_both(form, 1.0)(*some)[0].sum(), exact[0].sum()) <= 1e-2:
            sys.exit(f"logprob: {name} computes something else")


def repeatable(run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether values and gradients of two runs agree to the bit."""
    return all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True))


def extra_mib(run: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor], with_gradients: bool) -> float:
    hidden, weight, targets = inputs
    results = 4 * len(targets) + (hidden.nbytes + weight.nbytes if with_gradients else 0)
    return common.peak_extra_mib(run, inputs, hidden.device) - results / 2**20


def measure(shape: tuple[int, ...], args: Any, peers: dict[str, Form]) -> list[common.Row]:
    T, H, V = shape
    dtype = compute_dtype(args.device)
    inputs = [make_inputs(shape, dtype, args.device, seed) for seed in range(2)]
    if T * V > PLAIN_ELEMENTS:
        peers = {name: form for name, form in peers.items() if name not in ("plain", "compiled")}
    torch.compiler.reset()  # one shape after another would else become one kernel of dynamic shape
    check(inputs[0], peers)
    rows = []
    # The rows of the live pass are few of all, so a product of all rows is the clock for each of them.
    for name, products in (("forward", 1.0), ("both", 4.0), ("live", 1.0 + 3.0 * LIVE)):
        live = LIVE if name == "live" else 1.0
        forms = {"ours": ours, **peers}
        if name != "both":
            forms.pop("liger-kernel", None)  # it makes the gradients with the value, of the sum over all rows
        runs: dict[str, Callable[..., Any]] = {
            k: torch.no_grad()(f) if name == "forward" else run_both(f, live) for k, f in forms.items()
        }
        times = common.in_turns(runs | {"product": product, "copy": copy}, inputs, args.repeats)
        moved = (1 if name == "forward" else 2) * (T + V) * H * dtype.itemsize
        rows.append(
            {
                "T x H x V": "x".join(map(str, shape)),
                "pass": name,
                **{f"{peer}_ms": time for peer, time in times.items()},
                "share_of_limit": products * times["product"] / times["ours"],
                **{f"{peer}_ratio": times[peer] / times["ours"] for peer in runs if peer != "ours"},
                "copy_tb_s": 2e-9 * inputs[0][1].nbytes / times["copy"] if args.device == "cuda" else None,
                "product_tflops": 2e-9 * T * H * V / times["product"] if args.device == "cuda" else None,
                "extra_mib": extra_mib(runs["ours"], inputs[0], name != "forward"),
                "repeatable": " ".join(k for k, run in runs.items() if repeatable(run, inputs[0]))
                if name == "both"
                else None,
                "flops_per_byte": products * 2 * T * H * V / moved,
            }
        )
    return rows


def memory(dtype: torch.dtype) -> common.Row:
    inputs = make_inputs(CPU_MEMORY_SHAPE, dtype, "cpu", 0)
    return {
        "T x H x V": "x".join(map(str, CPU_MEMORY_SHAPE)),
        "pass": f"both, {str(dtype).removeprefix('torch.')}",
        "extra_mib": extra_mib(run_both(ours, 1.0), inputs, True),
    }


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(f"grouped_logprob is served by {implementation(args.device, 'grouped_logprob')}")
    peers = others(args.device)
    rows = [row for shape in shapes for row in measure(shape, args, peers)]
    if args.device == "cpu":
        rows += [memory(dtype) for dtype in (torch.float32, torch.bfloat16)]
    common.report("logprob", rows, args)


if __name__ == "__main__":
    main()
