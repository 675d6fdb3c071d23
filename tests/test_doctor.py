"""The doctor: each disease is found, what only resembles it is not, and a healthy run is left in peace."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from groupwise.engine.config import Config
from groupwise.engine.doctor import DIAGNOSES, QUIET, Doctor, diagnose
from groupwise.engine.metrics import Metrics, read_records

RANK_0, RANK_1 = SimpleNamespace(rank=0), SimpleNamespace(rank=1)
NAMES = [diagnosis.name for diagnosis in DIAGNOSES]


def healthy(steps: int, seed: int = 0) -> list[dict[str, float | None]]:
    """A run that learns: reward and answers rise, entropy and length fall a little, all of it with noise."""
    rng = random.Random(seed)
    records: list[dict[str, float | None]] = []
    for step in range(steps):
        done = step / max(steps, 1)
        answer = min(max(0.4 + 0.3 * done + rng.gauss(0, 0.06), 0), 1)
        records.append(
            {
                "step": step,
                "reward": answer + rng.gauss(0, 0.02),
                "reward_std": 0.3,
                "frac_reward_zero_std": rng.choice([0.0, 0.25, 0.5, 0.9375]),
                "completions/mean_length": 200 - 20 * done + rng.gauss(0, 15),
                "completions/clipped_ratio": rng.uniform(0, 0.4),
                "rewards/tag": 0.9 + rng.gauss(0, 0.03),
                "rewards/hrm": 0.1 + 0.3 * done + rng.gauss(0, 0.1),
                "rewards/answer": answer,
                "rewards/unjudged": rng.choice([0.0, 0.0, 0.02]),
                "entropy": 0.5 * (1 - 0.6 * done) * rng.uniform(0.8, 1.2),
                "kl": 0.02 * done * rng.uniform(0.5, 2),
                "ratio/max": rng.uniform(1, 4),
                "clip_ratio/low_mean": rng.uniform(0, 0.05),
                "clip_ratio/high_mean": rng.uniform(0, 0.05),
                "sampling/logp_difference_max": rng.uniform(0, 0.5),
                "sampling/logp_difference_mean": rng.uniform(0, 0.02),
                "sampling/ess": rng.uniform(0.97, 1),
                "tokens/policy": 4000.0,
                "skipped_steps": 0.0,
            }
        )
    return records


def with_series(**series: Callable[[float], float | None]) -> list[dict[str, float | None]]:
    """A healthy run of 30 steps with other values, by the share of it that is done, from 0 to 1."""
    records = healthy(30)
    for record in records:
        done = (record["step"] or 0.0) / 29
        record |= {name.replace("__", "/"): value(done) for name, value in series.items()}
    return records


def last(values: int, ill: float, well: float) -> Callable[[float], float]:
    """``ill`` in the last so many of 30 steps."""
    return lambda done: ill if round(done * 29) >= 30 - values else well


RISE, FALL, FLAT = (lambda x: 0.2 + 0.5 * x), (lambda x: 0.9 - 0.5 * x), (lambda x: 0.5)
ILL = {
    "zero_reward_std": [{"frac_reward_zero_std": last(3, 1.0, 0.5)}],
    "all_truncated": [{"completions__clipped_ratio": last(3, 0.98, 0.2)}],
    "no_policy_tokens": [{"tokens__policy": last(3, 0.0, 9.0)}, {"tokens__policy": lambda x: None}],
    "format_collapse": [
        {"rewards__tag": FALL, "rewards__hrm": RISE},
        {"rewards__tag": lambda x: None, "rewards__format": FALL, "rewards__answer": RISE},
    ],
    "entropy_collapse": [
        {"entropy": lambda x: 0.5 * math.exp(-2.5 * x)},
        {"entropy": last(3, 0.009, 0.04)},
    ],
    "kl_spike": [{"kl": last(1, 0.6, 0.02)}],
    "ratio_spike": [{"ratio__max": last(1, 30.0, 1.5)}, {"clip_ratio__low_mean": last(1, 0.3, 0.01)}],
    "sampler_mismatch": [
        {"sampling__logp_difference_max": last(3, 1.5, 0.1)},
        {"sampling__logp_difference_mean": last(3, 0.08, 0.01)},
        {"sampling__ess": last(3, 0.7, 0.99)},
    ],
    "length_hacking": [{"reward": RISE, "completions__mean_length": lambda x: 100 + 150 * x, "rewards__answer": FLAT}],
    "judge_failing": [{"rewards__unjudged": last(3, 0.4, 0.0)}],
    "nonfinite_gradient": [{"skipped_steps": last(1, 1.0, 0.0)}],
}
WELL = {
    "zero_reward_std": [{"frac_reward_zero_std": last(2, 1.0, 0.5)}, {"frac_reward_zero_std": lambda x: 0.95}],
    "all_truncated": [{"completions__clipped_ratio": last(2, 1.0, 0.2)}, {"completions__clipped_ratio": lambda x: 0.9}],
    "no_policy_tokens": [
        {"tokens__policy": last(2, 0.0, 9.0)},
        {"tokens__policy": last(3, 0.0, 9.0), "frac_reward_zero_std": last(3, 1.0, 0.5)},  # nothing to compare
    ],
    "format_collapse": [
        {"rewards__tag": FALL, "rewards__hrm": FLAT, "rewards__answer": FLAT},  # the model fails in all it does
        {"rewards__tag": lambda x: 0.9 - 0.1 * x, "rewards__hrm": RISE},
    ],
    "entropy_collapse": [{"entropy": lambda x: 0.5 * math.exp(-1.2 * x)}, {"entropy": last(2, 0.0, 0.5)}],
    "kl_spike": [
        {"kl": lambda x: 0.6 * x},  # it drifts
        {"kl": last(1, 0.09, 0.001)},
        {"kl": last(12, 0.6, 0.02)},  # no spike any more
    ],
    "ratio_spike": [{"ratio__max": last(1, 9.0, 1.5), "clip_ratio__low_mean": lambda x: 0.1}],
    "sampler_mismatch": [
        {"sampling__logp_difference_max": last(2, 1.5, 0.1), "sampling__ess": last(2, 0.5, 1.0)},
        {"sampling__logp_difference_mean": lambda x: 0.04},
    ],
    "length_hacking": [
        {"reward": RISE, "completions__mean_length": lambda x: 100 + 150 * x, "rewards__answer": RISE},
        {"reward": RISE, "completions__mean_length": lambda x: 100 + 40 * x, "rewards__answer": FLAT},
        {"reward": FLAT, "completions__mean_length": lambda x: 100 + 150 * x, "rewards__answer": FLAT},
    ],
    "judge_failing": [{"rewards__unjudged": last(2, 1.0, 0.0)}, {"rewards__unjudged": lambda x: 0.08}],
    "nonfinite_gradient": [{"skipped_steps": lambda x: float(x == 0.5)}, {"loss": lambda x: None}],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_disease_is_found_and_what_resembles_it_is_not(name: str) -> None:
    for series in ILL[name]:
        found = diagnose(with_series(**series))
        assert [finding.name for finding in found] == [name]
        assert re.search(r"\d", found[0].evidence)
        assert found[0].evidence.endswith(".")
        assert "nan" not in found[0].evidence
    for series in WELL[name]:
        assert name not in [finding.name for finding in diagnose(with_series(**series))]


@pytest.mark.parametrize("seed", range(40))
def test_a_healthy_run_has_nothing(seed: int) -> None:
    records = healthy(60, seed)
    assert [diagnose(records[: step + 1]) for step in range(60)] == [[]] * 60


def test_values_that_are_not_there_say_nothing() -> None:
    for steps in (0, 1, 3, 40):
        assert diagnose([{}] * steps) == []
        assert diagnose([dict.fromkeys(healthy(1)[0])] * steps) == []
        assert diagnose([dict.fromkeys(healthy(1)[0], math.nan)] * steps) == []
    for name, cases in ILL.items():  # one missing value beside them changes nothing
        for series in cases:
            records = with_series(**series)
            for record in records:
                del record["reward_std"]
            records[12] = {}
            assert [finding.name for finding in diagnose(records)] == [name]


def test_remedies_name_settings_that_exist() -> None:
    sections = {section.name: getattr(Config(), section.name) for section in fields(Config)}
    for diagnosis in DIAGNOSES:
        for section, key in re.findall(r"\b([a-z]+)\.([a-z_]+)", diagnosis.remedy):
            assert hasattr(sections[section], key), f"{diagnosis.name}: {section}.{key}"


def run(folder: Path, records: list[dict[str, float | None]], start: int = 0) -> None:
    """As the recipe does it: metrics first open what a former run left."""
    with Metrics(folder, RANK_0, phase="grpo", start_step=start, console_every=0) as metrics:
        doctor = Doctor(folder / "grpo/doctor.jsonl", RANK_0, read_records(metrics.path), start)
        for step in range(start, len(records)):
            known = {name: value for name, value in records[step].items() if value is not None and name != "step"}
            metrics.log(step, known | doctor.examine(step, known))


def test_a_finding_is_said_and_written_when_it_appears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = healthy(40)
    for step in (4, 5, 7, 7 + QUIET, 8 + 2 * QUIET):  # the last is QUIET + 1 steps after the one before
        records[step]["skipped_steps"] = 1.0
    run(tmp_path, records)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["doctor, step 5", " nonfinite_gradient"],
        ["doctor, step 29", " nonfinite_gradient"],
    ]
    written = read_records(tmp_path / "grpo/doctor.jsonl")
    assert [(line["step"], line["name"]) for line in written] == [(4, "nonfinite_gradient"), (28, "nonfinite_gradient")]
    assert set(written[0]) == {"step", "name", "evidence", "remedy"}
    logged = read_records(tmp_path / "grpo.jsonl")
    assert all(set(record) >= {f"doctor/{name}" for name in NAMES} for record in logged)
    ill = [record["step"] for record in logged if record["doctor/nonfinite_gradient"]]
    assert ill == [4, 5, 7, 17, 28]


def test_a_resumed_run_writes_what_an_unbroken_one_does(tmp_path: Path) -> None:
    records = with_series(**ILL["entropy_collapse"][0], **ILL["kl_spike"][0])
    records[12]["skipped_steps"] = records[25]["skipped_steps"] = 1.0
    run(tmp_path / "whole", records)
    run(tmp_path / "broken", records[:29])
    with open(tmp_path / "broken/grpo/doctor.jsonl", "a") as file:
        file.write('{"step": 29, "na')  # cut off by a crash
    run(tmp_path / "broken", records, start=20)
    whole = (tmp_path / "whole/grpo/doctor.jsonl").read_text()
    assert (tmp_path / "broken/grpo/doctor.jsonl").read_text() == whole
    assert {json.loads(line)["name"] for line in whole.splitlines()} == {
        "entropy_collapse", "kl_spike", "nonfinite_gradient",
    }  # fmt: skip


def test_memory_does_not_grow_and_nothing_is_forgotten(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path / "doctor.jsonl", RANK_0)
    for step, record in enumerate(healthy(200)):
        doctor.examine(step, record | {"entropy": 2.0 if step < 100 else 0.5})
    assert len(doctor._records) < 40
    for step in range(200, 203):
        metrics = doctor.examine(step, {"entropy": 0.3})  # the window's own start was 0.5
    assert metrics["doctor/entropy_collapse"] == 1.0


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor = Doctor(tmp_path / "grpo/doctor.jsonl", RANK_1)
    assert doctor.examine(0, {"skipped_steps": 1.0}) == {}
    assert not (tmp_path / "grpo").exists()
    assert capsys.readouterr().out == ""
