"""The exact mode in Triton: the same bits however a row is computed, and the values and gradients of the usual forms.

The interpreter multiplies matrices by a library, which sums a few rows in another order than many. Here it sums in
order, so what is tested is that the kernels' own order does not depend on a row's company; that a device's matrix units
keep it is tried by ``engine/exact.py`` on the device, and by the tests for a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from interpreter import interpreted
from packings import bounds_of, check_accuracy, check_definition
from sampled import CONFIG, random_model
from test_exact_sampler import TURNS, differences, sample
from torch import Tensor

from groupwise.engine.errors import UserError
from groupwise.engine.exact import check_exact
from groupwise.engine.model import Model
from groupwise.kernels import dispatch, linear
from groupwise.kernels.exact_attention import ExactDecode, exact_packed_attention, exact_paged_attention
from groupwise.kernels.product import FEW_ROWS


def _dot(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
    left, right, total = a.data.astype(np.float32), b.data.astype(np.float32), acc.data
    for i in range(left.shape[1]):
        total = total + left[:, i, None] * right[i]
    return type(acc)(total, acc.dtype.scalar)


def in_order() -> Any:
    """Products in the interpreter are summed in the order of the kernel."""
    from triton.runtime.interpreter import InterpreterBuilder

    return mock.patch.object(InterpreterBuilder, "create_dot", _dot)


@contextmanager
def exact_forms(device: str = "cpu") -> Iterator[None]:
    with in_order(), dispatch.exact_forms(device):
        yield


def check_rows_of_a_linear_map(device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((40, 70), (37, 131)):  # by descriptors and by pointers
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in ((FEW_ROWS + 44, inputs), (outputs, inputs), (outputs,))
        )
        with exact_forms(device):
            whole = linear(x, weight, bias)
            for first, count in ((0, 1), (9, 3), (44, FEW_ROWS), (200, 64), (40, FEW_ROWS + 4)):
                rows = slice(first, first + count)
                assert torch.equal(linear(x[rows], weight, bias), whole[rows])
            other = x.clone()
            other[::2] = float("nan")
            assert torch.equal(linear(other, weight, bias)[1::2], whole[1::2])


def check_a_linear_map_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 40), (70, 40), (70,), (5, 70))
    *inputs, d_out = (torch.randn(shape, generator=generator) for shape in shapes)
    for dtype in (torch.float32, torch.float16):
        rounded = [x.to(dtype).requires_grad_() for x in inputs]
        doubles = [x.detach().double().requires_grad_() for x in rounded]
        with exact_forms():
            out = linear(*rounded)
            found = [out, *torch.autograd.grad(out, rounded, d_out.to(dtype))]
        true = doubles[0] @ doubles[1].t() + doubles[2]
        expected = [true, *torch.autograd.grad(true, doubles, d_out.to(dtype).double())]
        for got, each in zip(found, expected, strict=True):
            bound = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), each, rtol=bound, atol=bound * each.abs().max().item())


# Query and key heads, head size, tokens in a block.
SHAPES = [((6, 2), 8, 16), ((7, 1), 20, 4)]
PROMPT, OWN = 33, (38, 3, 16)


def check_bits_of_attention(device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """A group with a shared prompt, packed, beside its sequences in a paged cache in every manner of steps."""
    for heads, size, block in SHAPES:
        generator = torch.Generator().manual_seed(size)
        lengths = [19, PROMPT, *OWN]
        tensors = [
            torch.randn(sum(lengths), count, size, generator=generator).to(device, dtype)
            for count in (heads[0], heads[1], heads[1])
        ]
        starts, prefix = bounds_of(lengths, device), torch.tensor([-1, -1, 1, 1, 1], dtype=torch.int32, device=device)
        rows = [
            torch.cat((torch.arange(19, 19 + PROMPT), torch.arange(start, start + own)))
            for start, own in zip(starts[2:].tolist(), OWN, strict=False)
        ]
        with exact_forms(device):
            packed = exact_packed_attention(*tensors, starts, max(lengths), prefix)
            tables, caches = paged(tensors[1:], rows, block)
            for steps in (
                [(0, 50, 51)],  # a token alone
                [(0, 0, 64), (1, 0, 36), (2, 31, 49)],  # beginnings, and a chunk
                [(0, 70, 71), (1, 32, 33), (2, 48, 49)],  # a step of decoding
            ):
                check_step(tensors[0], packed, rows, steps, tables, caches)


def paged(tensors: list[Tensor], rows: list[Tensor], block: int) -> tuple[Tensor, list[Tensor]]:
    """Tables of the sequences made of these rows, and caches in which their blocks lie in no order."""
    width = max(-(-len(each) // block) for each in rows)
    tables = torch.randperm(len(rows) * width, generator=torch.Generator().manual_seed(0)).view(len(rows), width)
    caches = [x.new_full((len(rows) * width, block, *x.shape[1:]), 3.0) for x in tensors]
    for n, each in enumerate(rows):
        position = torch.arange(len(each))
        place = tables[n, position // block] * block + position % block
        for cache, x in zip(caches, tensors, strict=True):
            cache.flatten(0, 1)[place.to(x.device)] = x[each.to(x.device)]
    return tables.int().to(tensors[0].device), caches


def check_step(
    q: Tensor, packed: Tensor, rows: list[Tensor], steps: list[tuple[int, int, int]], tables: Tensor,
    caches: list[Tensor],
) -> None:  # fmt: skip
    """Each step is a sequence and the positions that are new; behind them stand rows that fill the batch up."""
    numbers = [n for n, *_ in steps]
    new = torch.cat([rows[n][start:stop] for n, start, stop in steps]).to(q.device)
    lengths, contexts = [stop - start for _, start, stop in steps], [stop for *_, stop in steps]
    queries = torch.cat((q[new], q[:5]))
    out = exact_paged_attention(
        queries, *caches, tables[numbers], torch.tensor(contexts, dtype=torch.int32, device=q.device),
        bounds_of(lengths, q.device.type), max(lengths),
    )  # fmt: skip
    assert torch.equal(out[:-5], packed[new])
    assert (out[-5:] == 0).all()
    if max(lengths) == 1:
        plan = ExactDecode(len(steps) + 1, tables.shape[1] + 1, caches[0].shape[1], q.device)
        storage = plan.block_tables.data_ptr()
        plan.set(tables[numbers].flip(0).cpu().numpy(), np.ones(len(steps), np.int64))
        assert not torch.equal(plan(queries, *caches), out)
        plan.update(tables[numbers].cpu().numpy(), np.array(contexts))
        assert torch.equal(plan(queries, *caches), out)
        assert plan.block_tables.data_ptr() == storage


def check_attention_by_its_definition() -> None:
    with exact_forms():
        check_definition("exact", [19, 5, 0, 17, 4], [-1, 0, 0, 0, -1], (3, 1), 8)
        check_definition("exact", [3, 0, 20], None, (1, 1), 20)
        check_accuracy("exact", [19, 5, 20], [-1, 0, 0], (2, 1), 16, torch.float16)


def exact_model(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> Model:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 89,
    }
    return random_model(replace(CONFIG, **(config | sizes))).to(device, dtype)


@contextmanager
def few_rows() -> Iterator[None]:
    """Rows are filled up to multiples of 8: 64 of them take the interpreter long."""
    with ExitStack() as stack:
        for module in ("groupwise.engine.exact", "groupwise.rollout.forward", "test_exact_sampler"):
            stack.enter_context(mock.patch(f"{module}.ROWS", 8))
        stack.enter_context(mock.patch("groupwise.engine.exact.TRIED_ROWS", 40))
        yield


def check_sampler_and_trainer() -> None:
    model = exact_model()
    with in_order(), few_rows():
        examples, _ = sample(model, (3, 12), 2, tokens=2, seen_tokens=4)
        gap = differences(model, examples)
        assert len(gap) >= 2 * 2 * TURNS
        assert gap.abs().max() == 0.0


def check_what_breaks_it() -> None:
    model = exact_model()
    with in_order(), few_rows():
        with mock.patch("groupwise.engine.exact.linear", lambda x, weight, bias: x @ weight.t() * len(x)):
            refusal(model, "a linear map from 48 to 8 gives a row other bits among 8 rows")
        with mock.patch("groupwise.engine.exact.exact_paged_attention", lambda q, *others: q):
            refusal(model, "attention of 3 heads of 8 gives a token other bits alone")
    refusal(
        exact_model(dtype=torch.bfloat16), "with heads of at most 256 on CUDA with Triton, and the model is torch.bf"
    )


def refusal(model: Model, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_exact(model)


CHECKS = (
    check_rows_of_a_linear_map,
    check_a_linear_map_and_its_gradients,
    check_bits_of_attention,
    check_attention_by_its_definition,
    pytest.param(check_sampler_and_trainer, marks=pytest.mark.slow),
    check_what_breaks_it,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_the_interpreter(check: Any) -> None:
    interpreted(check)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_on_a_gpu(dtype: torch.dtype) -> None:
    check_rows_of_a_linear_map("cuda", dtype)
    check_bits_of_attention("cuda", dtype)
    with exact_forms("cuda"):
        check_accuracy("exact", [190, 50, 370], [-1, 0, 0], (6, 2), 64, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"concurrency": 3, "prefill_tokens": 33}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sampler_and_trainer_on_a_gpu(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "vocab_size": 5000}
    model = exact_model("cuda", dtype, num_attention_heads=6, num_key_value_heads=2, **sizes)
    examples, tokens = sample(model, **settings)
    gap = differences(model, examples)
    assert len(gap) > 12 * TURNS * 5
    assert gap.abs().max() == 0.0
    assert tokens == sample(model)[1]
