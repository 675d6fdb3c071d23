"""The streaming writer of safetensors files: read back by safetensors itself, one tensor alive at a time."""

import gc
import hashlib
import io
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from groupwise.engine import tensorfile
from groupwise.engine.tensorfile import write_tensors

TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "count": torch.tensor([1, 2, 3]),
    "random": torch.get_rng_state(),
}
LAYOUT = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_safetensors_reads_it(monkeypatch, tmp_path, chunk):
    monkeypatch.setattr(tensorfile, "CHUNK", chunk)
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        digest = write_tensors(file, LAYOUT, TENSORS.values(), {"format": "pt", "note": "ä\n"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä\n"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor), name


@pytest.mark.parametrize("length", range(8))
def test_values_lie_aligned_behind_any_header(length):
    file = io.BytesIO()
    write_tensors(file, {"a": (torch.float64, [2])}, [torch.ones(2)], {"note": "x" * length})
    assert int.from_bytes(file.getvalue()[:8], "little") % 8 == 0
    assert torch.equal(load(file.getvalue())["a"], torch.ones(2, dtype=torch.float64))


def test_values_are_cast_and_order_is_that_of_the_layout():
    source = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    file = io.BytesIO()
    layout = {"b": (torch.bfloat16, [4, 3]), "a": (torch.float32, [3, 4])}
    write_tensors(file, layout, [source.T, source.requires_grad_()], {})
    found = load(file.getvalue())
    assert torch.equal(found["b"], source.detach().T.bfloat16())
    assert torch.equal(found["a"], source.detach())


def test_no_tensor_stays_while_the_next_is_made():
    alive: list[weakref.ref[np.ndarray]] = []

    def tensors():
        for _ in range(4):
            assert all(reference() is None for reference in alive)
            memory = np.ones((3, 2), dtype=np.float32)
            alive.append(weakref.ref(memory))
            tensor = torch.from_numpy(memory)
            del memory
            yield tensor
            del tensor

    gc.disable()
    try:
        write_tensors(io.BytesIO(), {str(i): (torch.float32, [3, 2]) for i in range(4)}, tensors(), {})
    finally:
        gc.enable()
    assert len(alive) == 4


def test_what_does_not_fit_the_layout_is_refused():
    layout = {"a": (torch.float32, [2]), "b": (torch.float32, [3])}
    with pytest.raises(ValueError, match=r"b is \[4\], the layout of the file says \[3\]"):
        write_tensors(io.BytesIO(), layout, [torch.ones(2), torch.ones(4)], {})
    with pytest.raises(ValueError, match="b is absent"):
        write_tensors(io.BytesIO(), layout, [torch.ones(2)], {})
