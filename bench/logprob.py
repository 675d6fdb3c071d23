"""Grouped log-probability beside plain PyTorch's [T,V] form and beside the bare matrix product.

    python -m groupwise.bench.logprob [--shapes 8192x3584x152064] [--out FILE]

``share_of_limit`` is the time of the products alone (one forward; four for forward and backward with recompute), timed
in the same run, over ours; ``speedup`` is plain PyTorch's time over ours. Shapes are T x H x V: the heads of
Qwen2.5-1.5B, 7B and 14B on a GPU, bf16; small float32 ones on a CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import grouped_logprob, implementation

GPU_SHAPES = [(8192, 1536, 151936), (8192, 3584, 152064), (8192, 5120, 152064), (32768, 5120, 152064)]
CPU_SHAPES = [(4096, 128, 512), (1024, 256, 8192), (256, 256, 50000)]
# Plain PyTorch holds several [T,V] tensors; beyond this many elements it is left out.
PLAIN_ELEMENTS = 1 << 31
CHECKED_ROWS = 256


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The unfused form."""
    return torch.log_softmax((hidden @ weight.t()).float(), dim=1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return grouped_logprob(hidden, weight, targets)[0]


def product(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return hidden.detach() @ weight.detach().t()


def with_backward(form: Any) -> Any:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logprob = form(hidden, weight, targets)
        return logprob.detach(), *torch.autograd.grad(logprob.sum(), (hidden, weight))

    return run


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    T, H, V = shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, device=device, dtype=dtype) * H**-0.5
    targets = torch.randint(0, V, (T,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def check(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Stop unless our error against float32 is at most 1.5 times plain PyTorch's, and two runs agree to the bit."""
    hidden, weight, targets = inputs
    some = (hidden[:CHECKED_ROWS].detach().requires_grad_(), weight, targets[:CHECKED_ROWS])
    exact = with_backward(plain)(some[0].float(), some[1].float(), some[2])
    naive, first, again = (with_backward(form)(*some) for form in (plain, ours, ours))
    for name, true, other, got, repeated in zip(
        ("logprob", "d_hidden", "d_weight"), exact, naive, first, again, strict=True
    ):
        error, bound = common.error(got, true), 1.5 * common.error(other, true) + 1e-6
        if not error <= bound:
            sys.exit(f"logprob: {name} is wrong by {error:.2e}, plain PyTorch's bound is {bound:.2e}")
        if not torch.equal(got, repeated):
            sys.exit(f"logprob: {name} of two runs differs")


def measure(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    inputs = [make_inputs(shape, dtype, args.device, seed) for seed in range(2)]
    check(inputs[0])
    rows = []
    for name, products in (("forward", 1), ("forward+backward", 4)):
        forms = {"ours": ours, "plain": plain}
        if shape[0] * shape[2] > PLAIN_ELEMENTS:
            del forms["plain"]
        contenders = {k: torch.no_grad()(f) if products == 1 else with_backward(f) for k, f in forms.items()}
        times = common.in_turns(contenders | {"product": product}, inputs, args.repeats)
        rows.append(
            {
                "T x H x V": "x".join(map(str, shape)),
                "pass": name,
                "ours_ms": times["ours"],
                "plain_ms": times.get("plain"),
                "product_ms": times["product"],
                "share_of_limit": products * times["product"] / times["ours"],
                "speedup": times["plain"] / times["ours"] if "plain" in times else None,
                "product_tflops": 2e-9 * shape[0] * shape[1] * shape[2] / times["product"]
                if args.device == "cuda"
                else None,
                "peak_extra_mib": common.peak_extra_mib(contenders["ours"], inputs[0], inputs[0][0].device),
            }
        )
    return rows


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(f"grouped_logprob is served by {implementation(args.device, 'grouped_logprob')}")
    common.report("logprob", [row for shape in shapes for row in measure(shape, args)], args)


if __name__ == "__main__":
    main()
