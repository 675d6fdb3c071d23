"""The clamped-delta loss against a loop over tokens that follows the published formula, in every form."""

import math
from typing import Any

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from groupwise.kernels import clamped_delta_loss, eager, implementation
from groupwise.kernels.clamped_delta import ClampedDeltaLoss

SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.04, "ref": True},
    {"beta": 0.0, "ref": True, "clip_low": 0.1, "clip_high": 0.4, "delta_max": 1.0},
]
Inputs = dict[str, Tensor]


def make_inputs(T: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Small and large steps, beyond every clip and clamp, some tokens without weight, those full of NaN."""
    generator = torch.Generator().manual_seed(T)

    def normal() -> Tensor:
        return torch.randn(T, generator=generator)

    old = -normal().abs() * 2
    far = torch.rand(T, generator=generator) < 0.3
    new = old + normal() * 0.3 + torch.where(far, normal() * 4, 0.0)
    reference = torch.where(far, new + normal() * 4, new + normal() * 1e-3)
    weight = torch.rand(T, generator=generator) * (torch.rand(T, generator=generator) < 0.8)
    tensors = {"logprob": new, "old_logprob": old, "advantage": normal(), "ref_logprob": reference}
    return {name: x.masked_fill(weight == 0, float("nan")).to(dtype) for name, x in tensors.items()} | {
        "weight": weight.to(dtype)
    }


def by_the_token(
    inputs: Inputs, ref: bool = False, clip_low: float = 0.2, clip_high: float = 0.28, beta: float = 0.0,
    delta_max: float = 4.0,
) -> tuple[float, list[float], dict[str, float]]:  # fmt: skip
    """Loss, gradient and statistics by Python floats, one token after the other."""
    loss, gradient = 0.0, []
    stats = dict.fromkeys(("clip_low", "clip_high", "clamped", "kl_sum", "tokens", "ratio_sum", "ratio_max"), 0.0)
    stats["ratio_min"] = math.inf
    for new, old, gain, reference, weight in zip(
        *(inputs[k].tolist() for k in ("logprob", "old_logprob", "advantage", "ref_logprob", "weight")), strict=True
    ):
        gradient.append(0.0)
        if weight == 0:
            continue
        r = math.exp(min(max(new - old, -delta_max), delta_max))
        clipped = min(max(r, 1 - clip_low), 1 + clip_high)
        loss -= weight * min(r * gain, clipped * gain)
        if r * gain <= clipped * gain and abs(new - old) <= delta_max:
            gradient[-1] -= weight * gain * r
        stats["clip_low"] += gain < 0 and r < 1 - clip_low
        stats["clip_high"] += gain > 0 and r > 1 + clip_high
        stats["clamped"] += abs(new - old) > delta_max
        stats["tokens"] += 1
        stats["ratio_sum"] += r
        stats["ratio_max"] = max(stats["ratio_max"], r)
        stats["ratio_min"] = min(stats["ratio_min"], r)
        if ref:
            e = min(max(reference - new, -delta_max), delta_max)
            stats["kl_sum"] += math.expm1(e) - e
            loss += weight * beta * (math.expm1(e) - e)
            if abs(reference - new) <= delta_max:
                gradient[-1] -= weight * beta * math.expm1(e)
    return loss, gradient, stats


def check_against_the_loop(
    T: int, setting: dict[str, Any], triton: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    assert (implementation(device, "clamped_delta_loss") == "triton") == triton
    inputs = make_inputs(T, dtype)
    settings = {k: v for k, v in setting.items() if k != "ref"}
    on_device = {name: x.to(device) for name, x in inputs.items() if name != "ref_logprob" or setting.get("ref")}
    on_device["logprob"].requires_grad_()
    loss, stats = clamped_delta_loss(**on_device, **settings)
    assert (type(loss.grad_fn).__name__ == "ClampedDeltaLossBackward") == triton
    (3 * loss).backward()
    true_loss, true_gradient, true_stats = by_the_token({k: x.double() for k, x in inputs.items()}, **setting)
    got = on_device["logprob"].grad.cpu().double() / 3  # type: ignore[union-attr]
    expected = torch.tensor(true_gradient, dtype=torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(true_loss, rel=1e-5, abs=1e-4)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-2)
    assert torch.equal(got == 0, expected == 0), "where a clip or clamp holds, the gradient is exactly zero"
    assert stats.keys() == true_stats.keys()
    for name, value in stats.items():
        assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float32, False)
        assert value.item() == pytest.approx(true_stats[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("T", [0, 1, 1500])
def test_eager_against_the_loop(T: int, setting: dict[str, Any]) -> None:
    check_against_the_loop(T, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_triton_against_the_loop(setting: dict[str, Any]) -> None:
    for T in (0, 1, 1024, 2500):
        interpreted(check_against_the_loop, T, setting, True)


def check_many_blocks() -> None:
    check_against_the_loop(70 * 1024 + 5, SETTINGS[1], True)  # the joining kernel takes 64 blocks at a time


def test_triton_joins_many_blocks() -> None:
    interpreted(check_many_blocks)
    interpreted(check_against_the_loop, 300, SETTINGS[1], True, torch.float16)


def test_gradient_by_finite_differences() -> None:
    inputs = {name: x.nan_to_num() for name, x in make_inputs(60, torch.float64).items()}
    logprob = inputs.pop("logprob").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: eager.clamped_delta_loss(x, **inputs, beta=0.1)[0], (logprob,))


def test_split_into_micro_batches_changes_nothing() -> None:
    inputs = make_inputs(400)
    whole_loss, whole = clamped_delta_loss(**inputs, beta=0.04)
    parts = [clamped_delta_loss(**{k: x[rows] for k, x in inputs.items()}, beta=0.04)
             for rows in (slice(0, 7), slice(7, 7), slice(7, 400))]  # fmt: skip
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole_loss.item(), rel=1e-5)
    for name in whole:
        join = {"ratio_max": max, "ratio_min": min}.get(name, sum)
        assert join(stats[name].item() for _, stats in parts) == pytest.approx(whole[name].item(), rel=1e-5)


def check_close_to_the_reference(form: Any) -> None:
    inputs = {name: torch.zeros(8) for name in ("logprob", "old_logprob", "advantage")}
    for gap in (1e-4, 1e-2, 0.0624, 0.0626, 1.0):
        ref = torch.full((8,), gap)
        _, stats = form(**inputs, weight=torch.ones(8), ref_logprob=ref)
        assert stats["kl_sum"].item() == pytest.approx(8 * (math.expm1(gap) - gap), rel=2e-3)


def test_small_kl_does_not_cancel() -> None:
    check_close_to_the_reference(eager.clamped_delta_loss)
    interpreted(check_close_to_the_reference, clamped_delta_loss)


def check_nan_shows(form: Any) -> None:
    for broken in ("logprob", "old_logprob", "advantage"):
        inputs = {name: torch.ones(3) for name in ("logprob", "old_logprob", "advantage", "weight")}
        inputs[broken][1] = float("nan")
        inputs["logprob"].requires_grad_()
        loss, _ = form(**inputs)
        loss.backward()
        assert loss.isnan()
        assert inputs["logprob"].grad.isnan().tolist() == [False, True, False]  # type: ignore[union-attr]


def test_a_nan_is_not_hidden() -> None:
    check_nan_shows(eager.clamped_delta_loss)
    interpreted(check_nan_shows, clamped_delta_loss)


def check_repeatable() -> None:
    inputs = {name: x.nan_to_num() for name, x in make_inputs(5000).items()}
    arguments = [inputs[name] for name in ("logprob", "old_logprob", "advantage", "weight", "ref_logprob")]
    first, again = (ClampedDeltaLoss.apply(*arguments, 0.2, 0.28, 0.04, 4.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_triton_repeats_to_the_bit() -> None:
    interpreted(check_repeatable)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": torch.zeros(4)}, r"advantage has shape \[4\]"),
        ({"weight": torch.zeros(3, 1)}, r"weight has shape \[3, 1\]"),
        ({"old_logprob": torch.zeros(3, dtype=torch.int64)}, "old_logprob is torch.int64"),
        ({"weight": torch.zeros(3, device="meta")}, "weight is on meta"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"delta_max": 0.0}, "delta_max is 0.0"),
        ({"beta": float("nan"), "ref_logprob": torch.zeros(3)}, "beta is nan"),
        ({"beta": 0.1}, "ref_logprob is None"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {n: torch.zeros(3) for n in ("logprob", "old_logprob", "advantage", "weight")}
    clamped_delta_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        clamped_delta_loss(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
def test_triton_on_the_gpu(setting: dict[str, Any]) -> None:
    for T in (0, 1, 1024, 32768):
        check_against_the_loop(T, setting, True, device="cuda")
