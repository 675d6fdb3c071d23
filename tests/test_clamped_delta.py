"""The clamped-delta loss against a loop over tokens that follows the published formula, in every form."""

import math
from typing import Any

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from groupwise.kernels import clamped_delta, clamped_delta_loss, eager, implementation

SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.04, "ref": True},
    {"beta": 0.0, "ref": True, "clip_low": 0.1, "clip_high": 0.4, "delta_max": 1.0},
    {"dual_clip": 3.0, "importance": True},
    {"beta": 0.3, "ref": True, "importance": True, "dual_clip": 1.5, "delta_max": 2.0},
]
NAMES = ("logprob", "old_logprob", "advantage", "weight", "ref_logprob", "importance_weight")
OPTIONAL = {"ref_logprob": "ref", "importance_weight": "importance"}
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
    importance = (2 * torch.rand(T, generator=generator) - 0.2).clamp(min=0.0)
    tensors = (new, old, normal(), weight, reference, importance)
    return {
        name: (x if name == "weight" else x.masked_fill(weight == 0, math.nan)).to(dtype)
        for name, x in zip(NAMES, tensors, strict=True)
    }


def spoil(inputs: Inputs) -> Inputs:
    """The same with a NaN or an infinity in one input of every 29th token."""
    spoilt = {name: x.clone() for name, x in inputs.items()}
    for number, at in enumerate(range(17, len(inputs["weight"]), 29)):
        spoilt[NAMES[number % len(NAMES)]][at] = (math.nan, math.inf, -math.inf)[number % 7 % 3]
    return spoilt


def by_the_token(
    inputs: Inputs, ref: bool = False, importance: bool = False, clip_low: float = 0.2, clip_high: float = 0.28,
    dual_clip: float = math.inf, beta: float = 0.0, delta_max: float = 4.0,
) -> tuple[float, list[float], dict[str, float]]:  # fmt: skip
    """Loss, gradient and statistics by Python floats, one token after the other."""
    loss, gradient = 0.0, []
    sums = ("clip_low", "clip_high", "dual_clip", "clamped", "kl_sum", "tokens", "ratio_sum", "ratio_max", "nonfinite")
    stats = dict.fromkeys(sums, 0.0) | {"ratio_min": math.inf, "nonfinite_min": math.inf}
    for at, values in enumerate(zip(*(inputs[name].tolist() for name in NAMES), strict=True)):
        new, old, gain, weight, reference, factor = values
        gradient.append(0.0)
        if weight == 0:
            continue
        used = (new, old, gain, weight, *([reference] if ref else []), *([factor] if importance else []))
        if not all(map(math.isfinite, used)):
            stats["nonfinite"] += 1
            stats["nonfinite_min"] = min(stats["nonfinite_min"], at)
            continue
        r = math.exp(min(max(new - old, -delta_max), delta_max))
        clipped = min(max(r, 1 - clip_low), 1 + clip_high)
        surrogate = min(r * gain, clipped * gain)
        if gain < 0:
            surrogate = max(surrogate, dual_clip * gain)
        policy_weight = weight * (factor if importance else 1.0)
        loss -= policy_weight * surrogate
        if surrogate == r * gain and abs(new - old) <= delta_max:
            gradient[-1] -= policy_weight * gain * r
        stats["clip_low"] += gain < 0 and r < 1 - clip_low
        stats["clip_high"] += gain > 0 and r > 1 + clip_high
        stats["dual_clip"] += gain < 0 and r > dual_clip
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
    inputs = spoil(make_inputs(T, dtype))
    settings = {k: v for k, v in setting.items() if k not in OPTIONAL.values()}
    on_device = {k: x.to(device) for k, x in inputs.items() if k not in OPTIONAL or setting.get(OPTIONAL[k])}
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
    for T in (0, 1, 512, 2500):
        interpreted(check_against_the_loop, T, setting, True)


def check_many_blocks() -> None:
    """More rows of partial results than the last block joins at once, and then fewer: the count is 0 in between."""
    for T in ((clamped_delta.CONSTANTS["ROWS"] + 3) * clamped_delta.TOKENS + 5, 300):
        check_against_the_loop(T, SETTINGS[1], True)
        assert clamped_delta._counter(torch.device("cpu")).eq(0).all()


def test_triton_joins_many_blocks() -> None:
    interpreted(check_many_blocks)
    interpreted(check_against_the_loop, 300, SETTINGS[1], True, torch.float16)


def test_gradient_by_finite_differences() -> None:
    inputs = {name: x.nan_to_num() for name, x in make_inputs(60, torch.float64).items()}
    logprob = inputs.pop("logprob").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return eager.clamped_delta_loss(x, **inputs, beta=0.1, dual_clip=2.0)[0]

    assert torch.autograd.gradcheck(loss, (logprob,))


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


def check_ties(form: Any) -> None:
    """A ratio on a bound is not held by it, and the next number beyond is: one token each, in the form's own exp."""

    def token(step: float, advantage: float, **settings: Any) -> tuple[float, dict[str, float]]:
        logprob = torch.tensor([step], requires_grad=True)
        loss, stats = form(logprob, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **settings)
        return torch.autograd.grad(loss, logprob)[0].item(), {name: x.item() for name, x in stats.items()}

    def below(x: float) -> float:
        return torch.tensor(x).nextafter(torch.tensor(0.0)).item()

    above_one = token(0.5, 1.0)[1]["ratio_max"]
    below_one = token(-0.1, 1.0)[1]["ratio_max"]
    for step, advantage, name, on, beyond, ratio in (
        (0.5, 1.0, "clip_high", above_one - 1, below(above_one) - 1, above_one),
        (-0.1, -1.0, "clip_low", 1 - below_one, 1 - (2 * below_one - below(below_one)), below_one),
        (0.5, -1.0, "dual_clip", above_one, below(above_one), above_one),
        (0.5, -1.0, "delta_max", 0.5, below(0.5), above_one),
    ):
        count = "clamped" if name == "delta_max" else name
        slope, stats = token(step, advantage, **{name: on})
        assert (slope, stats[count]) == (pytest.approx(-ratio * advantage, rel=1e-6), 0), name
        slope, stats = token(step, advantage, **{name: beyond})
        assert (slope, stats[count]) == (0, 1), name
    for bound, slope in ((0.5, -math.expm1(0.5)), (below(0.5), 0.0)):
        setting = {"ref_logprob": torch.ones(1), "beta": 1.0, "delta_max": bound}
        assert token(0.5, 0.0, **setting)[0] == pytest.approx(slope, rel=1e-6)


def test_a_ratio_on_a_bound_is_free() -> None:
    check_ties(eager.clamped_delta_loss)
    interpreted(check_ties, clamped_delta_loss)


def check_nonfinite(form: Any) -> None:
    """Tokens with a NaN or an infinity count as little as those of weight 0, and are reported by their index."""
    clean = {name: x.nan_to_num() for name, x in make_inputs(900).items()}
    places = torch.tensor([3, 5, 800])
    clean["weight"][places] = torch.tensor([1.0, 0.0, 1.0])  # the one without weight is not reported
    without = clean | {"weight": clean["weight"].index_fill(0, places, 0.0)}

    def run(inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, float]]:
        logprob = inputs["logprob"].clone().requires_grad_()
        loss, stats = form(**(inputs | {"logprob": logprob}), beta=0.1, dual_clip=2.0)
        return loss.detach(), torch.autograd.grad(loss, logprob)[0], {name: x.item() for name, x in stats.items()}

    loss, gradient, stats = run(without)
    assert (stats["nonfinite"], stats["nonfinite_min"]) == (0, math.inf)
    for name in NAMES:
        for value in (math.nan, math.inf, -math.inf):
            at = places[::2] if name == "weight" else places
            got = run(clean | {name: clean[name].index_fill(0, at, value)})
            assert torch.equal(got[0], loss)
            assert torch.equal(got[1], gradient)
            assert got[2] == stats | {"nonfinite": 2, "nonfinite_min": 3}, (name, value)


def test_what_is_not_finite_is_reported_and_not_spread() -> None:
    check_nonfinite(eager.clamped_delta_loss)
    interpreted(check_nonfinite, clamped_delta_loss)


def check_importance(form: Any) -> None:
    """A weight of the policy term alone: 0 leaves the KL term, and c is c times the policy term."""
    inputs = {name: x.nan_to_num() for name, x in make_inputs(300).items()}
    del inputs["importance_weight"]
    policy_term = {name: x for name, x in inputs.items() if name != "ref_logprob"}
    both, policy = form(**inputs, beta=0.1)[0], form(**policy_term)[0]
    for c in (0.0, 0.5, 2.0):
        weighed, stats = form(**inputs, beta=0.1, importance_weight=torch.full((300,), c))
        assert weighed.item() == pytest.approx((both + (c - 1) * policy).item(), rel=1e-5)
        assert stats["clip_high"] == form(**inputs)[1]["clip_high"]


def test_importance_weighs_the_policy_term_alone() -> None:
    check_importance(eager.clamped_delta_loss)
    interpreted(check_importance, clamped_delta_loss)


def check_repeatable() -> None:
    inputs = {name: x.nan_to_num() for name, x in make_inputs(5000).items()}
    (first, stats), (again, others) = (clamped_delta_loss(**inputs, beta=0.04) for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(stats[name], others[name]) for name in stats)


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
        ({"dual_clip": 1.28}, "dual_clip is 1.28; expected None or a number above 1 \\+ clip_high, 1.28"),
        ({"dual_clip": float("nan")}, "dual_clip is nan"),
        ({"importance_weight": torch.zeros(2)}, r"importance_weight has shape \[2\]"),
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
    for T in (0, 1, 1024, 32768, 200_001):
        check_against_the_loop(T, setting, True, device="cuda")


@pytest.mark.gpu
def test_launches_repeat_to_the_bit_and_keep_apart_on_streams_and_in_graphs() -> None:
    inputs = {name: x.nan_to_num().cuda() for name, x in make_inputs(40_000).items()}

    def run() -> Tensor:
        loss, stats = clamped_delta_loss(**inputs, beta=0.04, dual_clip=2.0)
        return torch.stack([loss, *stats.values()])

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run() for _ in range(4)]
    replaying, *others = (torch.cuda.Stream() for _ in range(3))
    results = []
    for _ in range(50):
        with torch.cuda.stream(replaying):
            graph.replay()
        for stream in others:
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in (*captured, *results))
