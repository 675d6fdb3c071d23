"""Every Triton kernel compiled ahead of time: it still compiles, spills nothing, and uses the matrix units."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.kernels import clamped_delta, logprob, norm, rotary, swiglu

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers to the inputs' dtype; every other pointer is to float32, save those to integers.
ELEMENTS = {
    *("hidden", "weight", "d_logits"),
    *("x", "residual", "y", "total", "d_y", "d_total", "d_x"),
    *("q", "k", "cos", "sin", "q_out", "k_out"),
    *("gate", "up", "out", "d_out", "d_gate", "d_up"),
}
INTEGERS = re.compile("num_.*|column_.*|.*_stride")
UNALIGNED = {"num_tokens", "num_blocks", "num_slices", "num_rows", "num_query_heads", "num_key_heads"}


def compiled(kernel: Any, element: str, constants: dict[str, Any], architecture: str, **options: int) -> Any:
    """The kernel for aligned tensors whose sizes are multiples of 16, as a model's are."""
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[Any]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif INTEGERS.fullmatch(name):
            signature[name] = "i32"
        elif name in ("scale", "low_bound", "high_bound", "dual_bound", "beta", "delta_max", "eps"):
            signature[name] = "fp32"
        else:
            integers = {"targets": "*i64", "counter": "*i32"}
            signature[name] = integers.get(name, "*" + (element if name in ELEMENTS else "fp32"))
        if signature[name] not in ("constexpr", "fp32") and name not in UNALIGNED:
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def check_no_spill(binary: Any, architecture: str, folder: Path) -> str:
    """Fail on a spilled register; return the instructions."""
    if architecture == "hip":
        assembly = binary.asm["amdgcn"]
        for field in (".private_segment_fixed_size", ".sgpr_spill_count", ".vgpr_spill_count"):
            assert re.findall(rf"{re.escape(field)}:\s*(\d+)", assembly) == ["0"], field
        return assembly
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", sass)
    return sass


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "gradient"])
def test_logprob(kernel: str, entropy: bool, architecture: str, tmp_path: Path) -> None:
    for dtype, name in NAMES.items():
        tile = logprob.tiles(kernel, dtype, architecture)
        constants: dict[str, Any] = {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "ENTROPY": entropy,
        }
        if kernel == "forward":
            constants["SLICE"] = logprob.SLICE_COLUMNS
        fn = logprob._forward_kernel if kernel == "forward" else logprob._logit_gradient_kernel
        binary = compiled(fn, name, constants, architecture, num_warps=tile.num_warps, num_stages=tile.num_stages)
        code = check_no_spill(binary, architecture, tmp_path)
        if dtype != torch.float32:
            matrix_unit = {"sm_80": "HMMA", "sm_90": "HGMMA", "hip": "v_mfma"}[architecture]
            assert matrix_unit in code


@pytest.mark.parametrize("architecture", TARGETS)
def test_small_kernels(architecture: str, tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (logprob._join_kernel, {"ENTROPY": True, "ROWS": 128}),
        (logprob._join_kernel, {"ENTROPY": False, "ROWS": 128}),
    ]
    for kernel, constants in cases:
        check_no_spill(compiled(kernel, "fp32", constants, architecture, num_warps=4), architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("given", [False, True])
def test_clamped_delta(given: bool, architecture: str, tmp_path: Path) -> None:
    num_warps = clamped_delta.NUM_WARPS[TARGETS[architecture].backend]
    constants = clamped_delta.CONSTANTS | {"HAS_REF": given, "HAS_IMPORTANCE": given, "WARPS": num_warps}
    binary = compiled(clamped_delta._loss_kernel, "fp32", constants, architecture, num_warps=num_warps)
    check_no_spill(binary, architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    ("residual", "num_hidden", "dtype"), [(False, 128, "bf16"), (True, 5120, "bf16"), (True, 5120, "fp32")]
)
def test_norm(residual: bool, num_hidden: int, dtype: str, architecture: str, tmp_path: Path) -> None:
    kernels = {norm._forward_kernel: norm.FORWARD_ELEMENTS, norm._backward_kernel: norm.BACKWARD_ELEMENTS}
    for kernel, elements in kernels.items():
        rows, width, num_warps = norm.tile(elements, num_hidden)
        constants = {"HAS_RESIDUAL": residual, "ROWS": rows, "WIDTH": width}
        binary = compiled(kernel, dtype, constants, architecture, num_warps=num_warps)
        check_no_spill(binary, architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(("size", "back", "dtype"), [(96, False, "bf16"), (128, True, "bf16"), (128, False, "fp32")])
def test_rotary(size: int, back: bool, dtype: str, architecture: str, tmp_path: Path) -> None:
    constants = {"BACK": back, "SIZE": size, "WIDTH": 64, "QUERY_HEADS": 64, "KEY_HEADS": 8}
    binary = compiled(rotary._rotary_kernel, dtype, constants, architecture, num_warps=4)
    check_no_spill(binary, architecture, tmp_path)


@pytest.mark.parametrize("architecture", TARGETS)
def test_swiglu(architecture: str, tmp_path: Path) -> None:
    for kernel in (swiglu._forward_kernel, swiglu._backward_kernel):
        for dtype in NAMES.values():
            binary = compiled(kernel, dtype, {"BLOCK": swiglu.BLOCK}, architecture, num_warps=4)
            check_no_spill(binary, architecture, tmp_path)
