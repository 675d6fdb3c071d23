"""Packed segments, attention by its definition, and what every form of packed attention is checked for."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from groupwise.kernels import dispatch, eager, packed_attention

# Lengths of the segments, and which segment each sees before its own tokens.
PLAIN: list[tuple[list[int], list[int] | None]] = [
    ([1], None),
    ([5, 5, 5], None),
    ([40, 1, 7, 3, 23, 8, 2], None),
    ([3, 0, 60, 0], None),
]
SHARED: list[tuple[list[int], list[int] | None]] = [
    ([19, 5, 0, 37, 11, 9, 34, 4, 20, 2], [-1, 0, 0, 0, -1, -1, 5, -1, 7, 7]),  # a plain one, groups of 3, 1 and 2
    ([4, 4, 4], [-1, 0, 0]),
    ([0, 5, 3, 6, 0], [-1, 0, 0, -1, 3]),  # an empty prefix, an empty segment behind one
    ([6, 9, 2], [-1, -1, -1]),
]


def make_packing(
    lengths: list[int], heads: tuple[int, int], size: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k and v."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), count, size) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).mul(1.5).to(device, dtype).requires_grad_() for shape in shapes]


def bounds_of(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def as_index(numbers: list[int] | None, device: str = "cpu") -> Tensor | None:
    return None if numbers is None else torch.tensor(numbers, dtype=torch.int32, device=device)


def by_the_query(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], prefix: list[int] | None = None) -> Tensor:
    """Each query's softmax over its prefix and its own segment up to itself, one head after the other."""
    rows = []
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        shared = prefix[n] if prefix else -1
        before = list(range(starts[shared], starts[shared] + lengths[shared])) if shared >= 0 else []
        for i in range(start, start + length):
            seen = [*before, *range(start, i + 1)]
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                rows.append((k[seen, kv_head] @ q[i, head] / q.shape[2] ** 0.5).softmax(0) @ v[seen, kv_head])
    return torch.stack(rows).view_as(q)


def unshared(lengths: list[int], prefix: list[int]) -> tuple[Tensor, list[int]]:
    """The packing in which each segment repeats its prefix: the row of the shared one behind each row, its lengths."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    rows, new_lengths = [], []
    for n, length in enumerate(lengths):
        if n in prefix:
            continue
        before = [prefix[n]] if prefix[n] >= 0 else []
        rows += [row for m in (*before, n) for row in range(starts[m], starts[m] + lengths[m])]
        new_lengths.append(sum(lengths[m] for m in before) + length)
    return torch.tensor(rows), new_lengths


def passes(attention: Callable[..., Tensor], tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    out = attention(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]


def served(by: str, lengths: list[int], prefix: list[int] | None, tensors: list[Tensor]) -> Callable[..., Tensor]:
    """``packed_attention`` of q, k and v in that packing, which the named implementation must serve."""
    q = tensors[0]
    assert dispatch.packed_attention_by(q.device.type, q.dtype, q.shape[2], prefix is not None) == by
    bounds, numbers = bounds_of(lengths, q.device.type), as_index(prefix, q.device.type)
    return partial(packed_attention, cu_seqlens=bounds, max_seqlen=max(lengths, default=0), prefix=numbers)


def slopes(q: Tensor) -> Tensor:
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.device, q.dtype)


def check_definition(by: str, lengths: list[int], prefix: list[int] | None, heads: tuple[int, int], size: int) -> None:
    tensors = make_packing(lengths, heads, size)
    expected = passes(partial(by_the_query, lengths=lengths, prefix=prefix), tensors, slopes(tensors[0]))
    got = passes(served(by, lengths, prefix, tensors), tensors, slopes(tensors[0]))
    for each, true in zip(got, expected, strict=True):
        torch.testing.assert_close(each, true, rtol=1e-4, atol=1e-5)


def check_accuracy(
    by: str, lengths: list[int], prefix: list[int] | None, heads: tuple[int, int], size: int, dtype: torch.dtype,
    device: str = "cpu", repeatable: bool = True,
) -> None:  # fmt: skip
    """Root mean square error of output and gradients: at most 1.5 times that of the mask in the same dtype."""
    tensors = make_packing(lengths, heads, size, device, dtype)
    mask = partial(eager.masked_attention, cu_seqlens=bounds_of(lengths, device), prefix=as_index(prefix, device))
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    exact = passes(mask, doubles, slopes(tensors[0]).double())
    plain = passes(mask, tensors, slopes(tensors[0]))
    ours, again = (passes(served(by, lengths, prefix, tensors), tensors, slopes(tensors[0])) for _ in range(2))
    for name, got, repeated, other, true in zip(("out", "d_q", "d_k", "d_v"), ours, again, plain, exact, strict=True):
        assert (got.dtype, got.shape) == (dtype, true.shape)
        bound = 1.5 * (other - true).norm() + 4 * torch.finfo(torch.float32).eps * true.norm()
        assert (got - true).norm() <= bound, name
        assert not repeatable or torch.equal(got, repeated), f"{name} of two runs"


def check_copies(
    by: str, lengths: list[int], prefix: list[int], heads: tuple[int, int], size: int, device: str = "cpu"
) -> None:
    """Values are those of the packing that repeats its prefixes; gradients are the sums over the copies of a row."""
    tensors = make_packing(lengths, heads, size, device)
    rows, new_lengths = unshared(lengths, prefix)
    rows = rows.to(device)
    copies = [x.detach()[rows].requires_grad_() for x in tensors]
    out, *gradients = passes(served(by, new_lengths, None, copies), copies, slopes(copies[0]))
    d_out = torch.zeros_like(tensors[0]).index_add_(0, rows, slopes(copies[0]))
    got, *summed = passes(served(by, lengths, prefix, tensors), tensors, d_out)
    torch.testing.assert_close(got[rows], out, rtol=1e-5, atol=1e-5)
    for each, copied in zip(summed, gradients, strict=True):
        torch.testing.assert_close(each, torch.zeros_like(each).index_add_(0, rows, copied), rtol=1e-4, atol=2e-5)


def check_isolation(by: str, lengths: list[int], prefix: list[int] | None, size: int, device: str = "cpu") -> None:
    """What a segment does not see may be NaN: neither its output nor the gradient of its queries changes by a bit."""
    tensors = make_packing(lengths, (2, 1), size, device)
    attention = served(by, lengths, prefix, tensors)
    usual = passes(attention, tensors, slopes(tensors[0]))[:2]
    starts = bounds_of(lengths).tolist()
    for hidden in range(len(lengths)):
        changed = [x.detach().clone() for x in tensors]
        for x in changed:
            x[starts[hidden] : starts[hidden + 1]] = float("nan")
        after = passes(attention, [x.requires_grad_() for x in changed], slopes(tensors[0]))[:2]
        for n in range(len(lengths)):
            if hidden not in (n, prefix[n] if prefix else n):
                rows = slice(starts[n], starts[n + 1])
                assert all(torch.equal(x[rows], y[rows]) for x, y in zip(usual, after, strict=True))
