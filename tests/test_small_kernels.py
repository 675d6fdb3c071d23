"""RMSNorm, rotary embedding and SwiGLU in Triton against their eager forms in float64, values and gradients."""

from typing import Any

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from groupwise.engine.model import Rotary
from groupwise.kernels import add_rms_norm, apply_rotary, eager, implementation, norm, rms_norm, silu_mul, write_rotated

EPS = 1e-6
DTYPES = [torch.float32, torch.float16]  # what the interpreter can do
OPERATIONS = {"norm": rms_norm, "sum and norm": add_rms_norm, "rotary": apply_rotary, "swiglu": silu_mul}
# Rows and columns of a norm, a SwiGLU; tokens, query heads, key heads and head size of a rotation.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "norm": [(0, 64), (1, 5120), (127, 64), (5, 1536), (3, 7, 96), (2, 1)],
    "sum and norm": [(0, 64), (1, 5120), (127, 100), (5, 1536)],
    "rotary": [(0, 2, 1, 64), (1, 12, 2, 128), (31, 4, 2, 64), (9, 5, 5, 96), (3, 40, 8, 128)],
    "swiglu": [(0, 64), (1, 1), (127, 100), (5, 1536)],
}
CASES = [(op, shape) for op, shapes in SHAPES.items() for shape in shapes]


def make_inputs(op: str, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors with a gradient, tensors without), float64."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64) * 2

    if op == "rotary":
        tokens, query_heads, key_heads, size = shape
        positions = torch.randint(0, 4096, (tokens,), generator=generator)
        angles = Rotary(size, 10000.0).angles(positions, torch.float64)
        return [normal(tokens, query_heads, size), normal(tokens, key_heads, size)], list(angles)
    if op == "swiglu":
        return [normal(*shape) * 4, normal(*shape)], []
    own = [normal(*shape) for _ in range(1 if op == "norm" else 2)]
    return [*own, normal(shape[-1])], []


def oracle(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    if op == "rotary":
        return tuple(eager.rotate(x, *tensors[2:]) for x in tensors[:2])
    if op == "swiglu":
        return (eager.silu_mul(*tensors),)
    total = tensors[0] if op == "norm" else tensors[0] + tensors[1]
    y = eager.rms_norm(total, tensors[-1], EPS)
    return (y,) if op == "norm" else (y, total)


def kernel(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    result = OPERATIONS[op](*tensors, *([EPS] if "norm" in op else []))
    return result if isinstance(result, tuple) else (result,)


def results(fn: Any, op: str, inputs: tuple[list[Tensor], list[Tensor]], dtype: torch.dtype, device: str) -> Any:
    """Outputs and gradients, as they come."""
    own = [x.to(device, dtype).requires_grad_() for x in inputs[0]]
    outputs = fn(op, *own, *(x.to(device, dtype) for x in inputs[1]))
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=generator).to(device, dtype) for x in outputs]
    return [x.detach() for x in outputs], torch.autograd.grad(outputs, own, slopes)


def check(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """At most 1.5 times the error of the eager form in the same dtype; the same without a gradient, and to the bit."""
    name = {"norm": "rms_norm", "sum and norm": "rms_norm"}.get(op, op)
    assert implementation(device, name) == "triton"
    rounded = tuple([x.to(dtype).double() for x in some] for some in make_inputs(op, shape))
    exact, naive = (results(oracle, op, rounded, as_dtype, "cpu") for as_dtype in (torch.float64, dtype))
    ours, again = (results(kernel, op, rounded, dtype, device) for _ in range(2))
    for kind, got, repeated, plain, true in zip(("value", "gradient"), ours, again, naive, exact, strict=True):
        for i, (a, b, c, d) in enumerate(zip(got, repeated, plain, true, strict=True)):
            assert (a.dtype, a.shape) == (dtype, d.shape)
            assert torch.equal(a, b), f"{kind} {i} of two runs"
            if a.numel():
                bound = 1.5 * (c - d).abs().max() + 4 * torch.finfo(torch.float32).eps * (d.abs().max() + 1)
                assert (a.cpu() - d).abs().max() <= bound, f"{kind} {i}"
    without = kernel(op, *(x.to(device, dtype) for some in rounded for x in some))
    assert all(torch.equal(a, b) for a, b in zip(without, ours[0], strict=True)), "without a gradient"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_triton_against_the_oracle(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(check, op, shape, dtype)


def check_few_programs() -> None:
    usual, norm.NUM_PROGRAMS = norm.NUM_PROGRAMS, 3
    try:
        check("sum and norm", (59, 500), torch.float32)  # eight tiles of rows
    finally:
        norm.NUM_PROGRAMS = usual


def test_weight_gradient_of_more_tiles_than_programs() -> None:
    interpreted(check_few_programs)


def check_in_place(in_place: bool) -> None:
    for needs_gradient in (False, True):
        inputs = make_inputs("rotary", (5, 4, 2, 64))
        q, k, cos, sin = (x.float() for some in inputs for x in some)
        version = q.requires_grad_(needs_gradient)._version
        q_out, k_out = apply_rotary(q, k, cos, sin)
        overwritten = q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr()
        assert overwritten == (in_place and not needs_gradient)
        assert (q._version > version) == overwritten, "autograd must see that a tensor has changed"
        gate, up = (x.float() for x in make_inputs("swiglu", (5, 9))[0])
        version = gate.requires_grad_(needs_gradient)._version
        assert (silu_mul(gate, up).data_ptr() == gate.data_ptr()) == (not needs_gradient)
        assert (gate._version > version) == (not needs_gradient)


def test_in_place_where_no_gradient_is_needed() -> None:
    check_in_place(in_place=False)
    interpreted(check_in_place, True)


def check_strides() -> None:
    for op, shape in (("norm", (6, 10)), ("sum and norm", (6, 10)), ("rotary", (6, 4, 4, 64)), ("swiglu", (6, 10))):
        whole = [x.float() for some in make_inputs(op, shape) for x in some]
        apart = [torch.stack((x, x), -1)[..., 0] for x in whole]
        assert not any(x.is_contiguous() for x in apart)
        for a, b in zip(kernel(op, *whole), kernel(op, *apart), strict=True):
            assert torch.equal(a, b), op


def test_strides_change_nothing() -> None:
    interpreted(check_strides)


def check_what_is_kept() -> None:
    """Of one row of 64 channels in float16, bytes by operation; views of one tensor count once."""
    expected = {"norm": 128 + 128 + 4, "sum and norm": 128 + 128 + 4, "rotary": 128 + 128, "swiglu": 128 + 128}
    for op, size in expected.items():
        own, fixed = make_inputs(op, (1, 1, 1, 64) if op == "rotary" else (1, 64))
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        tensors = [x.half().requires_grad_() for x in own] + [x.half() for x in fixed]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = kernel(op, *tensors)
        assert sum(kept.values()) == size, (op, outputs)


def test_what_autograd_keeps() -> None:
    interpreted(check_what_is_kept)


def check_write(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Queries, keys and values as the oracle has them, each in its slot; what no token names stays as it was."""
    served = implementation(device, "rotary")
    own, angles = make_inputs("rotary", shape)
    tokens, _, key_heads, size = shape
    generator = torch.Generator().manual_seed(2)
    v, *caches = (
        torch.randn(*s, key_heads, size, generator=generator, dtype=torch.float64) for s in [(tokens,), *[(9, 16)] * 2]
    )
    slots = torch.randperm(9 * 16, generator=generator)[:tokens]
    if served == "triton":
        slots[1::3] = -1
    rounded = [x.to(device, dtype) for x in (*own, v, *angles, *caches)]
    q, k, v, cos, sin, *expected = (x.cpu().double() for x in rounded)
    stored = slots >= 0
    for cache, x in zip(expected, (eager.rotate(k, cos, sin), v), strict=True):
        cache.flatten(0, 1)[slots[stored]] = x[stored]
    out = write_rotated(*rounded, slots.to(device))
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out.cpu().double(), eager.rotate(q, cos, sin), **tolerance)
    torch.testing.assert_close(rounded[5].cpu().double(), expected[0], **tolerance)
    assert torch.equal(rounded[6].cpu().double(), expected[1])
    untouched = torch.ones(9 * 16, dtype=torch.bool).index_fill(0, slots[stored], False)
    for cache, before in zip(rounded[5:], expected, strict=True):
        assert torch.equal(cache.cpu().double().flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES["rotary"])
def test_write_into_a_paged_cache(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_write(shape, dtype)
    interpreted(check_write, shape, dtype)


def check_write_in_place() -> None:
    """A tensor that is overwritten says so to autograd; the sampler's, made for inference, need not."""
    own, angles = make_inputs("rotary", (5, 4, 2, 64))
    q, k, cos, sin = (x.float() for some in (own, angles) for x in some)
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensors = [q.clone(), k, torch.zeros_like(k), cos, sin, *(torch.zeros(2, 16, 2, 64) for _ in range(2))]
            written = (tensors[0], *tensors[5:])
            before = [0 if inference else x._version for x in written]
            out = write_rotated(*tensors, torch.arange(5))
            assert out.data_ptr() == tensors[0].data_ptr()
            assert inference or all(x._version > b for x, b in zip(written, before, strict=True))


def test_write_counts_as_a_change() -> None:
    interpreted(check_write_in_place)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.ones(3, 1, 8)}, ValueError, r"k, v, k_cache and v_cache have shapes \[3, 2, 8\], \[3, 1, 8\]"),
        ({"q": torch.ones(3, 4, 6)}, ValueError, "write_rotated: q, k, cos and sin have shapes"),
        ({"k_cache": torch.ones(2, 4, 2, 8).half()}, ValueError, "k_cache is torch.float16 and k torch.float32"),
        ({"v_cache": torch.ones(4, 2, 2, 8).transpose(0, 1)}, ValueError, "not contiguous"),
        ({"slots": torch.arange(3).int()}, ValueError, r"slots is a torch.int32 tensor of shape \[3\]"),
        ({"slots": torch.arange(4)}, ValueError, r"expected int64 of shape \[3\]"),
        ({"slots": torch.tensor([0, -1, 2])}, IndexError, "out of"),
        ({"slots": torch.tensor([0, 8, 2])}, IndexError, "out of"),
    ],
)
def test_write_errors(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    sizes = {"q": (3, 4, 8), "k": (3, 2, 8), "v": (3, 2, 8), "cos": (3, 1, 8), "sin": (3, 1, 8)}
    tensors = {
        name: torch.ones(size) for name, size in (sizes | dict.fromkeys(("k_cache", "v_cache"), (2, 4, 2, 8))).items()
    }
    with pytest.raises(error, match=message):
        write_rotated(**(tensors | {"slots": torch.arange(3)} | change))


@pytest.mark.parametrize(("op", "shape"), [("norm", (3, 5)), ("sum and norm", (3, 5)), ("swiglu", (3, 5))])
def test_eager_gradients_by_finite_differences(op: str, shape: tuple[int, ...]) -> None:
    own = [x.requires_grad_() for x in make_inputs(op, shape)[0]]
    assert torch.autograd.gradcheck(lambda *x: kernel(op, *x), own)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(3, 4), torch.ones(5), EPS), r"shapes \[3, 4\] and \[5\]"),
        (lambda: rms_norm(torch.ones(3, 4), torch.ones(4).half(), EPS), "weight is torch.float16 and x torch.float32"),
        (lambda: rms_norm(torch.ones(3, 4).int(), torch.ones(4), EPS), "x is torch.int32"),
        (lambda: add_rms_norm(torch.ones(3, 4), torch.ones(4), torch.ones(4), EPS), r"residual has shape \[4\]"),
        (lambda: add_rms_norm(*(torch.ones(4, device=d) for d in ("cpu", "meta", "cpu")), EPS), "residual is on meta"),
        (lambda: silu_mul(torch.ones(3), torch.ones(4)), r"shapes \[3\] and \[4\]"),
        (lambda: silu_mul(torch.ones(3), torch.ones(3, device="meta")), "up is on meta and gate on cpu"),
        (lambda: apply_rotary(*[torch.ones(2, 4, 6)] * 2, *[torch.ones(2, 6)] * 2), r"\[2, 6\]; expected \[T,Hq,D\]"),
        (lambda: apply_rotary(*[torch.ones(2, 4, 7)] * 2, *[torch.ones(2, 1, 7)] * 2), "D even"),
        (lambda: apply_rotary(torch.ones(2, 4, 6), torch.ones(3, 4, 6), *[torch.ones(2, 1, 6)] * 2), "have shapes"),
        (lambda: apply_rotary(*[torch.ones(2, 4, 6)] * 2, *[torch.ones(2, 1, 6).half()] * 2), "cos is torch.float16"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "shape"), [*CASES, ("sum and norm", (8193, 5120)), ("rotary", (8193, 12, 2, 128))])
def test_triton_on_the_gpu(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(op, shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES["rotary"])
def test_write_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_write(shape, dtype, "cuda")
