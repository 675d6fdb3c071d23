"""What serves an operation is known, said in one line, and asked for by a known name."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from interpreter import interpreted

from groupwise.kernels import dispatch, libraries


def test_eager_serves_a_cpu() -> None:
    assert dispatch.implementation("cpu", "grouped_logprob") == "eager"
    line = dispatch.describe("cpu")
    assert "\n" not in line
    assert all(op in line for op in dispatch.OPERATIONS)


def test_triton_serves_a_gpu() -> None:
    pytest.importorskip("triton")
    for op in ("grouped_logprob", "clamped_delta_loss", "rms_norm", "rotary", "swiglu", "sample_tokens"):
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


@pytest.fixture
def choices() -> Iterator[None]:
    """Nothing is forced, nor known of what is installed, before and after."""

    def forget() -> None:
        dispatch._forced.clear()
        dispatch.available.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def all_installed(choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)


@pytest.mark.usefixtures("all_installed")
def test_what_a_library_cannot_do_falls_to_the_next() -> None:
    assert dispatch.available("cuda", "packed_attention") == (
        *("flash-attn", "varlen", "xformers", "triton", "sdpa", "exact"),
    )
    assert dispatch.available("cpu", "packed_attention") == ("sdpa", "exact")
    cases = [
        ("auto", torch.bfloat16, 128, False, "flash-attn"),
        ("auto", torch.float32, 128, False, "triton"),
        ("auto", torch.bfloat16, 128, True, "triton"),
        ("auto", torch.float16, 20, False, "triton"),
        ("auto", torch.float16, 264, False, "sdpa"),
        ("auto", torch.float64, 64, True, "sdpa"),
        ("xformers", torch.float16, 64, False, "xformers"),
        ("xformers", torch.float32, 64, False, "triton"),
        ("sdpa", torch.bfloat16, 64, True, "sdpa"),
    ]
    for name, dtype, size, shared, expected in cases:
        dispatch.force("packed_attention", name, "cuda")
        assert dispatch.packed_attention_by("cuda", dtype, size, shared) == expected


@pytest.mark.usefixtures("all_installed")
def test_what_serves_a_paged_cache() -> None:
    assert dispatch.available("cuda", "paged_attention") == ("triton", "flash-attn", "xformers", "eager")
    assert dispatch.available("cpu", "paged_attention") == ("eager",)
    cases = [
        ("auto", torch.bfloat16, 128, 16, "triton"),
        ("auto", torch.float32, 64, 256, "triton"),
        ("auto", torch.bfloat16, 264, 16, "eager"),
        ("auto", torch.bfloat16, 128, 8, "eager"),
        ("auto", torch.bfloat16, 128, 48, "eager"),
        ("auto", torch.bfloat16, 128, 768, "flash-attn"),
        ("auto", torch.float64, 64, 16, "eager"),
        ("flash-attn", torch.float16, 64, 256, "flash-attn"),
        ("flash-attn", torch.float16, 64, 16, "eager"),
        ("xformers", torch.float16, 20, 256, "eager"),
        ("xformers", torch.float32, 64, 256, "eager"),
        ("eager", torch.bfloat16, 64, 16, "eager"),
    ]
    for name, dtype, size, block_size, expected in cases:
        dispatch.force("paged_attention", name, "cuda")
        assert dispatch.paged_attention_by("cuda", dtype, size, block_size) == expected


@pytest.mark.usefixtures("all_installed")
def test_the_line_says_what_serves_the_rest() -> None:
    line = dispatch.describe("cuda")
    assert "packed_attention flash-attn," in line
    assert line.endswith("packed_attention float32 triton, packed_attention with prefixes triton")
    dispatch.force("packed_attention", "triton", "cuda")
    assert dispatch.describe("cuda").endswith("packed_attention triton, paged_attention triton")


@pytest.mark.usefixtures("all_installed")
def test_the_exact_forms_serve_for_a_while() -> None:
    usual = dispatch.implementation("cuda", "linear"), dispatch.implementation("cuda", "packed_attention")
    assert usual == ("torch", "flash-attn")
    dispatch.force("rms_norm", "eager", "cuda")
    with dispatch.exact_forms("cuda"):
        assert dispatch.implementation("cuda", "linear") == "triton"
        served = [
            dispatch.packed_attention_by("cuda", dtype, size, True)
            for dtype, size in ((torch.bfloat16, 128), (torch.float32, 20), (torch.bfloat16, 264), (torch.float64, 64))
        ]
        assert served == ["exact", "exact", "sdpa", "sdpa"]
    assert usual == (dispatch.implementation("cuda", "linear"), dispatch.implementation("cuda", "packed_attention"))
    assert dispatch.implementation("cuda", "rms_norm") == "eager"


@pytest.mark.usefixtures("choices")
def test_forced_until_auto() -> None:
    pytest.importorskip("triton")
    assert dispatch.implementation("cuda", "rms_norm") == "triton"
    dispatch.force("rms_norm", "eager", "cuda")
    assert dispatch.implementation("cuda", "rms_norm") == "eager"
    assert dispatch.implementation("cuda", "rotary") == "triton"
    dispatch.force("rms_norm", "auto", "cuda")
    assert dispatch.implementation("cuda", "rms_norm") == "triton"


@pytest.mark.usefixtures("choices")
def test_what_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: name == "sdpa")
    for name, device, message in (
        ("flash", "cuda", "'flash' is unknown; choose one of auto, sdpa"),
        ("flash-attn", "cuda", "'flash-attn' is not installed; choose one of auto, sdpa"),
        ("flash-attn", "cpu", "'flash-attn' does not run on cpu; choose one of auto, sdpa"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch.force("packed_attention", name, device)
        assert dispatch.implementation(device, "packed_attention") == "sdpa"
    with pytest.raises(ValueError, match="'attention' is unknown"):
        dispatch.force("attention", "sdpa")


def test_varlen_attn_is_told_what_it_takes() -> None:
    inspect.signature(libraries._varlen_attn()).bind(*[None] * 5, 0, 0)
