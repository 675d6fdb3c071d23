"""Grouped log-probability against log_softmax of the whole logits in float64, values and gradients, every form."""

from typing import Any
from unittest import mock

import pytest
import torch
from interpreter import interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groupwise.kernels import eager, eager_logprob, grouped_logprob, implementation, product
from groupwise.kernels import logprob as logprob_kernel
from groupwise.kernels.logprob import GroupedLogprob

SHAPES = [(1, 1, 1), (1, 16, 5000), (127, 64, 131), (33, 7, 257), (64, 48, 512), (3, 5120, 70)]  # T, H, V
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(T: int, H: int, V: int, dtype: torch.dtype = torch.float32, wide: float = 1.0) -> Inputs:
    """hidden, weight, targets (some ignored, some repeated) and incoming gradients (some zero)."""
    generator = torch.Generator().manual_seed(T + 10 * H + 100 * V)
    hidden = (torch.randn(T, H, generator=generator) * wide).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * wide * 2 / H**0.5).to(dtype)
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[1::5] = eager.IGNORE
    targets[2::7] = V - 1
    gradients = torch.randn(2, T, generator=generator)
    gradients[:, 3::4] = 0
    return hidden, weight, targets, *gradients


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once, in the dtype of the inputs up to the log_softmax."""
    logits = (hidden @ weight.t() / temperature).to(torch.promote_types(hidden.dtype, torch.float32))
    logprobs = logits.log_softmax(1)
    live = targets != eager.IGNORE
    chosen = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropies = -torch.where(logprobs.exp() == 0, 0.0, logprobs.exp() * logprobs).sum(1)
    return chosen.where(live, 0.0), entropies.where(live, 0.0)


def results(fn: Any, inputs: Inputs, dtype: torch.dtype, temperature: float, entropy: bool) -> list[Tensor]:
    """Log-probability, entropy, and gradients of hidden and weight, in float64."""
    hidden, weight = (x.detach().to(dtype).clone().requires_grad_() for x in inputs[:2])
    logprob, entropies = fn(hidden, weight, inputs[2], temperature, entropy)
    total = (logprob * inputs[3]).sum()
    if entropy:
        total = total + (entropies * inputs[4]).sum()
    total.backward()
    outputs = [logprob, entropies if entropy else logprob, hidden.grad, weight.grad]
    return [x.detach().double() for x in outputs]  # type: ignore[union-attr]


def as_accurate_as_plain(fn: Any, inputs: Inputs, temperature: float, entropy: bool, largest: float = 4.0) -> None:
    """At most 1.5 times the error of plain PyTorch in the same dtype, each measured from the float64 definition.

    ``largest``: of the logits; a backward pass that makes them again may round them otherwise.
    """

    def by_definition(*args: Any) -> tuple[Tensor, Tensor]:
        return plain(*args[:4])

    dtype = inputs[0].dtype
    exact = results(by_definition, inputs, torch.float64, temperature, entropy)
    naive = results(by_definition, inputs, dtype, temperature, entropy)
    ours = results(fn, inputs, dtype, temperature, entropy)
    names = ("logprob", "entropy", "d_hidden", "d_weight")
    for name, got, other, true in zip(names, ours, naive, exact, strict=True):
        if true.numel():
            scale = true.abs().max().item() + 1.0
            bound = 1.5 * (other - true).abs().max().item() + largest * torch.finfo(torch.float32).eps * scale
            assert (got - true).abs().max().item() <= bound, name


def eager_form(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Any:
    return eager.grouped_logprob(hidden, weight, targets, temperature=temperature, entropy=entropy)


def triton_form(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Any:
    return GroupedLogprob.apply(hidden, weight, targets, temperature, entropy, None)


def check_triton(shape: tuple[int, int, int], dtype: torch.dtype, temperature: float, entropy: bool) -> None:
    assert implementation("cpu", "grouped_logprob") == "triton"
    as_accurate_as_plain(triton_form, make_inputs(*shape, dtype), temperature, entropy)


# Constants of kernels/eager_logprob.py that send small inputs through each of its forms.
EAGER_FORMS = {
    "whole, kept": {},
    "whole, made again": {"KEPT_ELEMENTS": 0, "TILE_ELEMENTS": 6000},
    "slices, kept": {"SLICE_COLUMNS": 100, "TILE_ELEMENTS": 1600},
    "slices, some kept": {"SLICE_COLUMNS": 100, "TILE_ELEMENTS": 1600, "KEPT_ELEMENTS": 8000},
    "slices, made again": {"SLICE_COLUMNS": 100, "TILE_ELEMENTS": 1600, "KEPT_ELEMENTS": 0},
}


@pytest.fixture(params=EAGER_FORMS)
def each_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in EAGER_FORMS[request.param].items():
        monkeypatch.setattr(eager_logprob, name, value)
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("temperature", "entropy"), [(1.0, False), (0.7, True)])
def test_eager_values_and_gradients(shape: Any, temperature: float, entropy: bool, each_form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        as_accurate_as_plain(eager_form, make_inputs(*shape, dtype), temperature, entropy)


def test_eager_with_many_rows() -> None:
    as_accurate_as_plain(eager_form, make_inputs(8193, 16, 3001), 0.9, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_values_and_gradients(shape: Any, dtype: torch.dtype) -> None:
    interpreted(check_triton, shape, dtype, 1.0, False)
    interpreted(check_triton, shape, dtype, 1.3, True)


def check_several_slices() -> None:
    check_triton((40, 24, 8200), torch.float32, 0.9, True)  # three slices and three chunks of the vocabulary


def test_triton_joins_slices_of_the_vocabulary() -> None:
    interpreted(check_several_slices)


def check_extremes(form: Any) -> None:
    inputs = make_inputs(20, 8, 300, wide=60.0)  # logits up to about ±1e4
    largest = (inputs[0] @ inputs[1].t()).abs().max().item()
    assert largest > 1e4
    as_accurate_as_plain(form, inputs, 1.0, True, largest)


def test_extreme_logits(each_form: str) -> None:
    check_extremes(eager_form)


def check_extremes_in_triton() -> None:
    check_extremes(triton_form)


def test_extreme_logits_in_triton() -> None:
    interpreted(check_extremes_in_triton)


def check_nothing_to_do(form: Any) -> None:
    for inputs in (make_inputs(0, 8, 9), make_inputs(6, 8, 9)):
        hidden = inputs[0].clone().fill_(float("nan")).requires_grad_()  # an ignored row may hold anything
        weight = inputs[1].clone().requires_grad_()
        logprob, entropies = form(hidden, weight, torch.full_like(inputs[2], eager.IGNORE), 1.0, True)
        (logprob.sum() + entropies.sum()).backward()
        for x in (logprob, entropies, hidden.grad, weight.grad):
            assert torch.equal(x, torch.zeros_like(x))


def test_all_ignored_and_no_tokens(each_form: str) -> None:
    check_nothing_to_do(eager_form)


def check_nothing_to_do_in_triton() -> None:
    check_nothing_to_do(triton_form)


def test_all_ignored_and_no_tokens_in_triton() -> None:
    interpreted(check_nothing_to_do_in_triton)


def test_gradients_by_finite_differences(each_form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slices" in each_form:
        monkeypatch.setattr(eager_logprob, "SLICE_COLUMNS", 4)
    hidden, weight, targets, *_ = make_inputs(6, 5, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: eager.grouped_logprob(h, w, targets, temperature=1.4, entropy=True),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def check_main_grad(form: Any, dtype: torch.dtype) -> None:
    """Two micro-batches add their gradients of the weight, unrounded; the weight itself gets none."""
    main_grad = torch.zeros(257, 8)
    expected = torch.zeros(257, 8, dtype=torch.float64)
    for tokens in (33, 8):
        inputs = make_inputs(tokens, 8, 257, dtype)
        hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
        logprob, _ = form(hidden, weight, inputs[2], main_grad=main_grad)
        (logprob * inputs[3]).sum().backward()
        assert weight.grad is None
        assert hidden.grad is not None
        expected += results(eager_form, inputs, torch.float64, 1.0, False)[3]
    tolerance = 1e-5 if dtype != torch.float16 else 1e-2  # the chunk of logit gradients has the inputs' dtype
    torch.testing.assert_close(main_grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_main_grad(each_form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_main_grad(eager.grouped_logprob, dtype)


def check_main_grad_in_triton() -> None:
    for dtype in (torch.float32, torch.float16):
        check_main_grad(grouped_logprob, dtype)


def test_main_grad_in_triton() -> None:
    interpreted(check_main_grad_in_triton)


def check_descriptors_and_pointers() -> None:
    inputs = make_inputs(70, 64, 5000)
    assert product.by_descriptors(inputs[0], inputs[1], "cpu")
    by_descriptors = results(triton_form, inputs, torch.float32, 1.1, True)
    with mock.patch.object(product, "by_descriptors", return_value=False):
        by_pointers = results(triton_form, inputs, torch.float32, 1.1, True)
    for a, b in zip(by_descriptors, by_pointers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_triton_loads_the_same_by_descriptors_and_pointers() -> None:
    interpreted(check_descriptors_and_pointers)


def check_dropped_rows() -> None:
    """The products of the backward pass see the rows with a gradient and a target, and no others."""
    hidden, weight, targets, d_logprob, _ = make_inputs(70, 16, 300)
    seen = []

    def backward(rows: Tensor, *arguments: Any) -> None:
        seen.append(len(rows))
        true_backward(rows, *arguments)

    true_backward = logprob_kernel._backward
    with mock.patch.object(logprob_kernel, "_backward", backward):
        logprob, _ = triton_form(hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, False)
        logprob.backward(d_logprob)
    assert seen == [int(((targets != eager.IGNORE) & (d_logprob != 0)).sum())]


def test_rows_without_a_gradient_are_dropped_before_the_products() -> None:
    interpreted(check_dropped_rows)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in EAGER_FORMS["slices, made again"].items():
        monkeypatch.setattr(eager_logprob, name, value)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets, *_ = make_inputs(128, 4, 2000, dtype)
        with LargestTensor() as largest:
            logprob, entropies = eager_form(hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, True)
            (logprob.sum() + entropies.sum()).backward()
        assert largest.numel == 2000 * 4, "nothing is larger than the weight, in any dtype"


def check_repeatable() -> None:
    hidden, weight, targets, *_ = make_inputs(70, 24, 5000)
    targets[:] = targets.clamp(min=0)
    whole, repeated = (triton_form(hidden, weight, targets, 1.0, False)[0] for _ in range(2))
    assert torch.equal(whole, repeated)
    # How the work is cut depends on V alone: a row's result is that of the row on its own.
    for rows in (slice(0, 1), slice(5, 40)):
        part, _ = triton_form(hidden[rows], weight, targets[rows], 1.0, False)
        assert torch.equal(part, whole[rows])


def test_triton_repeats_to_the_bit() -> None:
    interpreted(check_repeatable)


def check_public_is_triton() -> None:
    hidden, weight, targets, *_ = make_inputs(9, 8, 50)
    logprob, _ = grouped_logprob(hidden.t().contiguous().t().requires_grad_(), weight, targets)
    assert type(logprob.grad_fn).__name__ == "GroupedLogprobBackward"
    assert torch.allclose(logprob, plain(hidden, weight, targets, 1.0)[0], atol=1e-5)


def test_public_function_dispatches() -> None:
    interpreted(check_public_is_triton)
    hidden, weight, targets, *_ = make_inputs(9, 8, 50)
    assert torch.allclose(
        grouped_logprob(hidden, weight, targets)[0], plain(hidden, weight, targets, 1.0)[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 1)}, "shapes"),
        ({"hidden": torch.zeros(3, 5)}, "same H"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float16)}, "float dtype"),
        ({"targets": torch.tensor([0, 1])}, "shapes"),
        ({"targets": torch.zeros(3)}, "int64"),
        ({"targets": torch.tensor([0, 7, 1])}, "target 7 of row 1"),
        ({"targets": torch.tensor([0, -1, 1])}, "target -1 of row 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"hidden": torch.zeros(3, 4, device="meta")}, "one device"),
        ({"main_grad": torch.zeros(4, 7)}, r"main_grad is torch.float32 \[4, 7\]"),
        ({"main_grad": torch.zeros(7, 4, dtype=torch.bfloat16)}, "main_grad is torch.bfloat16"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 6, -100])}
    grouped_logprob(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        grouped_logprob(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 131), (127, 64, 5000), (513, 1536, 9001), (8193, 5120, 3001)])
def test_triton_on_the_gpu(shape: Any, dtype: torch.dtype) -> None:
    inputs: Any = tuple(x.cuda() for x in make_inputs(*shape, dtype))
    as_accurate_as_plain(triton_form, inputs, 0.9, True)
    first, again = (results(triton_form, inputs, dtype, 0.9, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
