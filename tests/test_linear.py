"""A linear map and its gradients against float64, by oneDNN and by PyTorch; a row's result in any company."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groupwise.kernels import dispatch, grouped_logprob, linear
from groupwise.kernels.dispatch import onednn_serves

SHAPES = [(1, 1, 1), (1, 40, 9), (3, 7, 13), (64, 24, 40), (50, 96, 32), (0, 8, 4)]  # T, K, N


@pytest.fixture(params=["onednn", "torch"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in dispatch.available("cpu", "linear"):
        pytest.skip("PyTorch has no oneDNN here")
    dispatch.force("linear", request.param, "cpu")
    yield request.param
    dispatch.force("linear", "auto", "cpu")


def make_inputs(T: int, K: int, N: int, unaligned: bool = False) -> list[Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(T + K + N)
    flat = [torch.randn(size + unaligned, generator=generator)[unaligned:] for size in (T * K, N * K, N)]
    return [x.view(shape) for x, shape in zip(flat, ((T, K), (N, K), (N,)), strict=True)]


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int], bias: bool) -> None:
    inputs = make_inputs(*shape, unaligned=True)[: 3 if bias else 2]
    d_out = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = [x.to(dtype).requires_grad_() for x in inputs]
        out = linear(*tensors)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, tensors, d_out.to(dtype))])
    doubles = [x.double() for x in inputs]
    true = [doubles[0] @ doubles[1].t() + (doubles[2] if bias else 0)]
    true += [d_out.double() @ doubles[1], d_out.double().t() @ doubles[0], d_out.double().sum(0)][: len(inputs)]
    for got in results:
        for each, expected in zip(got, true, strict=True):
            torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5 + 1e-5)


@pytest.mark.usefixtures("served_by")
def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight, bias = make_inputs(6, 5, 4)
    linear(x, weight, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 6.0))  # type: ignore[arg-type]
    assert x.grad is None
    assert weight.grad is None
    with torch.inference_mode():
        assert not linear(x, weight, bias).requires_grad


def test_a_row_is_the_same_in_any_company(served_by: str) -> None:
    if served_by != "onednn":
        pytest.skip("MKL sums a few rows in another order")
    for K, N in ((24, 40), (13, 7), (128, 512), (520, 96)):
        x, weight, bias = make_inputs(300, K, N)
        whole = linear(x, weight, bias)
        for count in (1, 2, 3, 5, 16, 63, 64, 65, 129):
            for start in (0, 7, 300 - count):
                rows = slice(start, start + count)
                assert torch.equal(linear(x[rows], weight, bias), whole[rows])


class Products(TorchDispatchMode):
    """Notes the shapes of what oneDNN multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.shapes.add(tuple(x.shape for x in args[:2]))
        return func(*args, **(kwargs or {}))


def test_few_shapes_for_any_number_of_rows(served_by: str) -> None:
    """OneDNN keeps code for each shape, so a run of days, which meets every number of rows, would grow."""
    if served_by != "onednn":
        pytest.skip("nothing is kept there")
    linears, logprobs = Products(), Products()
    for T in range(1, 1000):
        x, weight, _ = (tensor.requires_grad_() for tensor in make_inputs(T, 13, 25))
        with linears:
            linear(x, weight).sum().backward()
        with logprobs:
            grouped_logprob(x, weight, torch.arange(T) % 25)[0].sum().backward()
    # 8 to 64 rows by eights, to 512 by 64, to 1,024 by 256; each in the product and in its two gradients.
    assert len(linears.shapes) == len(logprobs.shapes) == 3 * (8 + 7 + 2)


def test_what_onednn_serves() -> None:
    if "onednn" not in dispatch.available("cpu", "linear"):
        pytest.skip("PyTorch has no oneDNN here")
    served = [onednn_serves(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert served == [True, False, False]
    assert not onednn_serves(torch.zeros(1, device="meta"))


def test_meta_tensors_have_shapes() -> None:
    with torch.device("meta"):
        assert linear(torch.empty(3, 5), torch.empty(4, 5), torch.empty(4)).shape == (3, 4)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((3, 5), (4, 6), None), ((3, 5), (4, 5), (3,)), ((2, 3, 5), (4, 5), None)],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"expected \[T,K\], \[N,K\] and \[N\]"):
        linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_one_dtype() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16 and x torch\.float32"):
        linear(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16))
