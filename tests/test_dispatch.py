"""What serves an operation is known, said in one line, and asked for by a known name."""

import pytest
import torch
from interpreter import interpreted

from groupwise.kernels import dispatch


def test_eager_serves_a_cpu() -> None:
    assert dispatch.implementation("cpu", "grouped_logprob") == "eager"
    line = dispatch.describe("cpu")
    assert "\n" not in line
    assert all(op in line for op in dispatch.OPERATIONS)


def test_triton_serves_a_gpu() -> None:
    pytest.importorskip("triton")
    for op in ("grouped_logprob", "clamped_delta_loss", "rms_norm", "rotary", "swiglu"):
        assert dispatch.implementation("cuda", op) == "triton"


def check_what_the_interpreter_cannot_do() -> None:
    served = {dtype: dispatch.triton_serves("grouped_logprob", torch.zeros(1, dtype=dtype)) for dtype in
              (torch.float16, torch.float32, torch.bfloat16, torch.float64)}  # fmt: skip
    assert list(served.values()) == [True, True, False, False]


def test_the_interpreter_gets_no_bf16() -> None:
    interpreted(check_what_the_interpreter_cannot_do)


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match="'attention' is unknown; expected one of grouped_logprob"):
        dispatch.implementation("cpu", "attention")
