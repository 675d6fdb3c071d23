"""Safetensors files written as their tensors come: header first, then one tensor after another, in one pass.

Shapes are known before the values are, so a sharded model is written without ever being whole; ``safetensors``' own
writer takes all tensors at once. Reading is left to ``safetensors.safe_open``.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # name -> dtype and shape in the file

CHUNK = 1 << 22  # elements that are cast, moved to the host and hashed at a time

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: BinaryIO, layout: Layout, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> str:
    """Writes one safetensors file; of each tensor no more than a chunk is copied.

    Args:
        file: open for writing, at its beginning.
        layout: what the file holds, in this order.
        tensors: as many as ``layout`` has, in its order, on any device; each is cast to the layout's dtype. None is
            kept while the next is made.
        metadata: strings for the header.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor has another shape than the layout says, or there are fewer.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(layout, iter(tensors), metadata):
        digest.update(chunk)
        file.write(chunk)
        del chunk  # it may be a view of a whole tensor
    return digest.hexdigest()


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * dtype.itemsize


def _chunks(layout: Layout, tensors: Iterator[Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    yield _header(layout, metadata)
    for name, (dtype, shape) in layout.items():
        tensor = next(tensors, None)
        if tensor is None or tensor.shape != tuple(shape):
            found = "absent" if tensor is None else list(tensor.shape)
            raise ValueError(f"tensor {name} is {found}, the layout of the file says {list(shape)}")
        for piece in tensor.detach().reshape(-1).split(CHUNK):
            yield piece.to("cpu", dtype).view(torch.uint8).numpy().data
            del piece
        del tensor  # while the next one is made, this one must not stay


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + num_bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin on a multiple of 8, as vectorised readers like it
    return struct.pack("<Q", len(text)) + text
