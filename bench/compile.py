"""Every Triton kernel of the package compiled ahead of time, with the settings that serve: what one program takes.

    python -m groupwise.bench.compile [--out FILE]

Needs no GPU. ``stack`` is bytes a thread and ``shared`` bytes a program; ``spills`` counts loads and stores of spilled
registers, ``matrix`` instructions of the matrix units (HMMA, HGMMA on sm_90, MFMA on gfx942), and ``bulk_loads`` those
that bring a whole tile by a tensor descriptor (UTMALDG on sm_90).
``tests/test_triton_aot.py`` compiles the same cases.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from groupwise.bench import common
from groupwise.kernels import (
    clamped_delta,
    decode,
    exact_attention,
    logprob,
    norm,
    pages,
    prefill,
    product,
    rotary,
    sampling,
    segments,
    swiglu,
)
from groupwise.kernels.tiles import tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Pointers to the inputs' dtype, and to integers; every other pointer is to float32.
ELEMENTS = {
    *("hidden", "weight", "d_logits"),
    *("x", "residual", "y", "total", "d_y", "d_total", "d_x"),
    *("q", "k", "cos", "sin", "q_out", "k_out", "k_cache", "v_cache"),
    *("gate", "up", "out", "d_out", "d_gate", "d_up"),
    *("v", "d_q", "d_k", "d_v"),
    *("logits", "bias"),
}
INDICES = {
    **dict.fromkeys(("targets", "slots", "keys", "positions", "tokens"), "i64"),
    **dict.fromkeys(("counter", "bounds", "prefix", "top_k", "part_token"), "i32"),
    **dict.fromkeys(("block_tables", "context_lens", "work_count", "items", "pieces"), "i32"),
}
INTEGERS = re.compile("num_.*|max_.*|column_.*|.*_stride|block_size")
FLOATS = {"scale", "low_bound", "high_bound", "dual_bound", "beta", "delta_max", "eps"}
UNALIGNED = {
    *("num_tokens", "num_row_tiles", "num_column_tiles", "num_slices", "num_group_tiles"),
    *("num_blocks", "num_rows", "num_query_heads", "num_key_heads"),
    *("max_blocks", "max_pieces", "context_lens", "work_count", "items", "pieces"),
    *("num_prefixes", "block_size"),
}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched: what it is specialised for, and with how many warps and stages.

    Attributes:
        blocks: arguments that are tensor descriptors, each with the shape that one load brings.
    """

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    options: dict[str, int]
    on_matrix_units: bool = False
    blocks: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.settings}"

    @property
    def settings(self) -> str:
        return " ".join(f"{name}={int(value)}" for name, value in (self.constants | self.options).items())


class Usage(NamedTuple):
    """What a compiled kernel takes; the head of this file says in what units."""

    registers: int
    stack: int
    shared: int
    spills: int
    matrix: int
    bulk_loads: int


def cases(target: str) -> Iterator[Case]:
    """Every kernel of the package with what serves on ``target``, an entry of TARGETS."""
    yield from _logprob(target)
    yield from _clamped_delta(target)
    yield from _norm()
    yield from _rotary()
    yield from _swiglu()
    yield from _segments(target)
    yield from _pages(target)
    yield from _exact(target)
    yield from _sampling()


def _logprob(target: str) -> Iterator[Case]:
    kernels = {
        ("forward", False): logprob._forward_kernel,
        ("forward", True): logprob._forward_kernel,
        ("gradient", False): logprob._logit_gradient_kernel,
        ("entropy gradient", True): logprob._logit_gradient_kernel,
    }
    for dtype, architecture in _ways(target):
        for (kind, entropy), kernel in kernels.items():
            tile = tiles(kind, DTYPES[dtype], architecture)
            descriptors = architecture == "sm_90"
            constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "ENTROPY": entropy}
            constants["DESCRIPTORS"] = descriptors
            if kind == "forward":
                constants |= {"SLICE": logprob.SLICE_COLUMNS, "IGNORED": logprob.IGNORE}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            blocks = {"hidden": [tile.rows, tile.depth], "weight": [tile.columns, tile.depth]} if descriptors else {}
            yield Case(f"logprob {kind}", kernel, dtype, constants, options, dtype == "bf16", blocks)
    for entropy in (False, True):
        yield Case("logprob join", logprob._join_kernel, "fp32", {"ENTROPY": entropy, "ROWS": 128}, {"num_warps": 4})


def _ways(target: str) -> list[tuple[str, str]]:
    """Dtypes of products, and whose tiles they take.

    On sm_90 by descriptors; what those cannot load, and all float32, with the settings of sm_80.
    """
    if target == "sm_90":
        return [("bf16", "sm_80"), ("fp32", "sm_80"), ("bf16", "sm_90")]
    return [("bf16", target), ("fp32", target)]


def _clamped_delta(target: str) -> Iterator[Case]:
    num_warps = clamped_delta.NUM_WARPS[TARGETS[target].backend]
    for given in (False, True):
        constants = clamped_delta.CONSTANTS | {"HAS_REF": given, "HAS_IMPORTANCE": given, "WARPS": num_warps}
        yield Case("clamped_delta", clamped_delta._loss_kernel, "fp32", constants, {"num_warps": num_warps})


def _norm() -> Iterator[Case]:
    kernels = {
        "norm forward": (norm._forward_kernel, norm.FORWARD_ELEMENTS),
        "norm backward": (norm._backward_kernel, norm.BACKWARD_ELEMENTS),
    }
    for residual, num_hidden, dtype in ((False, 128, "bf16"), (True, 5120, "bf16"), (True, 5120, "fp32")):
        for name, (kernel, elements) in kernels.items():
            rows, width, num_warps = norm.tile(elements, num_hidden)
            constants = {"HAS_RESIDUAL": residual, "ROWS": rows, "WIDTH": width}
            yield Case(name, kernel, dtype, constants, {"num_warps": num_warps})


def _rotary() -> Iterator[Case]:
    for size, back, dtype in ((96, False, "bf16"), (128, True, "bf16"), (128, False, "fp32")):
        constants = {"SIZE": size, "WIDTH": 64, "QUERY_HEADS": 64, "KEY_HEADS": 8}
        yield Case("rotary", rotary._rotary_kernel, dtype, {"BACK": back, **constants}, {"num_warps": 4})
        if not back:
            yield Case("rotary write", rotary._write_kernel, dtype, constants, {"num_warps": 4})


def _swiglu() -> Iterator[Case]:
    kernels = {"swiglu forward": swiglu._forward_kernel, "swiglu backward": swiglu._backward_kernel}
    for dtype in ("bf16", "fp32"):
        for name, kernel in kernels.items():
            yield Case(name, kernel, dtype, {"BLOCK": swiglu.BLOCK}, {"num_warps": 4})


def _segments(target: str) -> Iterator[Case]:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    ways = [("bf16", 64, True), ("bf16", 128, True), ("bf16", 128, False), ("bf16", 256, True), ("fp32", 64, True)]
    for dtype, size, shared in ways:
        for name, kernel in segments.KERNELS.items():
            tile = segments.tiles(name, dtypes[dtype], size, target)
            constants = {"SHARED": shared, "SIZE": size, "WIDTH": size, "ROWS": tile.rows, "COLUMNS": tile.columns}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            # At 256 the tiles are too small for the instructions of sm_90.
            yield Case(f"attention {name}", kernel, dtype, constants, options, dtype == "bf16" and size <= 128)


def _pages(target: str) -> Iterator[Case]:
    """Head sizes with queries a key head, of Qwen2.5 0.5B, 1.5B, 7B and 14B, Llama 3, and without groups."""
    ways = [("bf16", 64, 7), *(("bf16", 128, group) for group in (1, 4, 5, 6, 7)), ("bf16", 256, 4), ("fp32", 64, 7)]
    for dtype, size, group in ways:
        # At 256 the tiles are too small for the instructions of sm_90.
        matrix = dtype == "bf16" and size <= 128
        shape = {"BLOCK": 16, "GROUP": group, "SIZE": size, "WIDTH": size}
        for name in ("prefill", "decode"):
            tile = pages.tiles(name, DTYPES[dtype], size, target)
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            if name == "prefill":
                constants = shape | {"ROWS": tile.rows, "COLUMNS": tile.columns}
                yield Case("paged prefill", prefill.prefill_kernel, dtype, constants, options, matrix)
            else:
                constants = shape | decode.heights(tile, group) | {"COLUMNS": tile.columns, "FIELDS": decode.FIELDS}
                yield Case("paged decode", decode.items_kernel, dtype, constants, options, matrix)
    for dtype, size in (("bf16", 128), ("bf16", 256), ("fp32", 96)):
        constants = {"SIZE": size, "WIDTH": triton.next_power_of_2(size), "PIECES": decode.JOINED_PIECES}
        yield Case("paged join", decode.join_kernel, dtype, constants, {"num_warps": 4})


def _exact(target: str) -> Iterator[Case]:
    """The linear map with its two tiles, and attention of the heads of common models."""
    for dtype, architecture in _ways(target):
        for rows in ("few rows", "many rows"):
            tile = tiles(rows, DTYPES[dtype], architecture)
            descriptors = architecture == "sm_90"
            constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "HAS_BIAS": True}
            constants["DESCRIPTORS"] = descriptors
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            blocks = {"x": [tile.rows, tile.depth], "weight": [tile.columns, tile.depth]} if descriptors else {}
            yield Case(
                f"exact product {rows}", product.product_kernel, dtype, constants, options, dtype == "bf16", blocks
            )
    for dtype, size, group in (("bf16", 64, 7), ("bf16", 128, 6), ("bf16", 128, 7), ("bf16", 256, 4), ("fp32", 64, 7)):
        form = exact_attention.tiles(DTYPES[dtype], size, target)
        constants = {"GROUP": group, "SIZE": size, "WIDTH": size, "ROWS": form.rows, "CHUNK": form.columns}
        options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
        yield Case("exact attention", exact_attention.exact_kernel, dtype, constants, options, dtype == "bf16")


def _sampling() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        slices = {"SLICE": sampling.SLICE}
        yield Case("sampling slice", sampling._slice_kernel, dtype, slices, {"num_warps": sampling.SLICE_WARPS})
        rows = {"SLICES": 64, "BLOCK": sampling.BLOCK}
        yield Case("sampling join", sampling._join_kernel, dtype, rows, {"num_warps": sampling.BLOCK_WARPS})


def compiled(case: Case, target: str) -> Any:
    """The kernel for aligned tensors whose sizes are multiples of 16, as a model's are."""
    names = case.kernel.arg_names
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[Any]] = {}
    for i, name in enumerate(names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif INTEGERS.fullmatch(name):
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in case.blocks:
            signature[name] = f"tensordesc<{case.dtype}{case.blocks[name]}>"
        else:
            signature[name] = "*" + INDICES.get(name, case.dtype if name in ELEMENTS else "fp32")
        if signature[name][0] in "*i" and name not in UNALIGNED:
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=case.options)


def measure(case: Case, target: str) -> Usage:
    """Compile ``case`` for ``target`` and read from the binary what it takes."""
    binary = compiled(case, target)
    assembly = assembly_of(binary)
    if target == "gfx942":
        fields = (".vgpr_count", ".private_segment_fixed_size", ".sgpr_spill_count", ".vgpr_spill_count")
        registers, stack, *spilled = (int(re.findall(rf"{re.escape(f)}:\s*(\d+)", assembly)[0]) for f in fields)
        spills = sum(spilled)
    else:
        registers, stack = (int(re.findall(rf"{field}:(\d+)", assembly)[0]) for field in ("REG", "STACK"))
        spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    matrix, bulk_loads = (len(re.findall(rf"\b{name}", assembly)) for name in (MATRIX[target], "UTMALDG"))
    return Usage(registers, stack, binary.metadata.shared, spills, matrix, bulk_loads)


def assembly_of(binary: Any) -> str:
    """What a compiled kernel takes and its instructions; of NVIDIA's as Triton's own copy of their tool tells it."""
    if "amdgcn" in binary.asm:
        return binary.asm["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    args = common.parser(__doc__).parse_args()
    rows = []
    for target in TARGETS:
        for case in cases(target):
            first = {"kernel": case.name, "dtype": case.dtype, "target": target, "settings": case.settings}
            rows.append(first | measure(case, target)._asdict())
    common.report("compile", rows, args)


if __name__ == "__main__":
    main()
