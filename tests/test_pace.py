"""Where time goes: phases and their shares, the arithmetic they are measured by, and traces of steps."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import LIMITS, Characters, ScriptedSampler, ScriptedSandbox, answer, code, task
from test_training import new_training
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toys import CONFIG, small_batches, small_loss

from groupwise.engine.batch import Example, empty_batch, pack
from groupwise.engine.config import ModelConfig, load_config
from groupwise.engine.errors import UserError
from groupwise.engine.flops import Peak, decode_weights, forward_flops, peak_of, work_of
from groupwise.engine.mesh import Mesh
from groupwise.engine.metrics import Timer, cost_line, read_records
from groupwise.engine.model import Model
from groupwise.recipes.pace import Pace
from groupwise.recipes.run import Run
from groupwise.rollout.agent import run_agent
from groupwise.rollout.draw import SamplingParams

# ---- arithmetic ------------------------------------------------------------------------------------------------------


class PairByPair:
    """Attention as products of each query with the keys that it sees, of which there are no others."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))  # [Hq,T,D]
        rows = []
        for t in range(len(q)):
            scores = torch.bmm(q[t, :, None], k[:, : t + 1].transpose(1, 2))
            rows.append(torch.bmm(scores.softmax(-1), v[:, : t + 1])[:, 0])
        return torch.stack(rows)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_flops_are_those_that_pytorch_counts(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.engine.model.linear", torch.nn.functional.linear)
    config = ModelConfig(model_type=family, vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=10)  # fmt: skip
    model, length = Model(config), 13
    (batch,) = pack([Example(list(range(length)), [0.0] * 4 + [1.0] * (length - 4))], 64)
    with FlopCounterMode(display=False) as forward:
        hidden = model(batch.input_ids, batch.positions, PairByPair(4))
        loss = (hidden[batch.weight != 0] @ model.output_weight.T).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = forward_flops(config, work_of([batch]))
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert decode_weights(config) == matrices + 40 * 24


def test_work_is_that_of_the_mask_without_padding_and_without_empty_batches() -> None:
    shared, alone = [1, 2, 3, 4], [5, 6]
    examples = [Example([*shared, *[7 + n] * n], [0.0] * 4 + [1.0] * n, group=0) for n in (2, 3)]
    examples.append(Example([*alone, 9, 9, 9], [0.0] * 2 + [0.5] * 3))
    batches = [*pack(examples, 64, multiple=32), empty_batch()]
    sees: dict[tuple[int, ...], int] = {}  # each prefix is computed once, and its last token sees all of it
    for example in examples:
        home = tuple(shared) if example.group == 0 else None
        for end in range(1, len(example) + 1):
            prefix = tuple(example.token_ids[:end])
            # The last shared token predicts the first of each completion, so it is laid with each of them.
            sees[prefix if home and end < len(home) else (*prefix, -example.token_ids[-1])] = end
    work = work_of(batches)
    assert (work.tokens, work.scored, work.pairs) == (len(sees), 8, sum(sees.values()))


def test_only_whole_devices_that_are_known_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H200": True, "NVIDIA H200 MIG 1g.18gb": False, "NVIDIA H20": False}
    for name, known in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert (peak_of(torch.device("cuda"), torch.bfloat16) is not None) == known
        assert peak_of(torch.device("cuda"), torch.float32) is None
        assert peak_of(torch.device("cpu"), torch.bfloat16) is None


# ---- phases ----------------------------------------------------------------------------------------------------------


def test_a_step_has_its_phases_their_speed_and_their_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("groupwise.recipes.pace.peak_of", lambda *_: Peak(1e9, 1e9))
    training = new_training(tmp_path, stop=12)
    for step in training.steps():
        with training.pace("generate"):
            time.sleep(0.002)
        training.pace.add_tokens("generate", 30)
        batches = small_batches(step)
        for _ in range(2):
            training.update(step, batches, small_loss)
        training.log(step, {"loss": 1.0})
        record = read_records(training.metrics.path)[-1]
        seconds = {name: record[f"timing_s/{name}"] for name in ("generate", "update", "step")}
        assert seconds["generate"] + seconds["update"] <= seconds["step"]
        assert record["perf/tokens_per_s/generate"] == pytest.approx(30 / seconds["generate"])
        work = work_of(batches)
        assert record["perf/tokens_per_s/update"] == pytest.approx(2 * work.tokens / seconds["update"])
        flops = 2 * 3 * forward_flops(CONFIG, work)
        assert record["perf/mfu"] == pytest.approx(flops / seconds["update"] / 1e9)
        assert record["perf/mfu_step"] == pytest.approx(flops / seconds["step"] / 1e9)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft: time of ")]
    assert [line.split()[3] for line in said] == ["10", "2"]  # after the first ten steps, and at the end


def test_no_peak_is_invented(tmp_path: Path) -> None:
    pace = Pace(Run(load_config(None, [f"run.folder={tmp_path}"]), Mesh()), CONFIG)
    with pace("update", small_batches(0)):
        pass
    assert set(pace.metrics()) == {"timing_s/update", "timing_s/step", "perf/tokens_per_s/update"}
    pace.begin()
    assert set(pace.metrics()) == {"timing_s/step"}


def test_the_largest_cost_comes_first() -> None:
    record = {"timing_s/update": 2.0, "timing_s/generate": 6.0, "timing_s/reward": 0.001, "timing_s/step": 10.0}
    assert cost_line([record | {"tools/wait_s": 1.5}, record | {"tools/wait_s": 1.5}]) == (
        "time of 2 steps, 10 s each: generate 60% (25% of it waiting for tools), update 20%, other 20%"
    )
    assert cost_line([record]) == "time of 1 steps, 10 s each: generate 60%, update 20%, other 20%"
    assert cost_line([{"loss": 1.0}]) == cost_line([]) == ""


@pytest.mark.gpu
def test_phases_on_a_gpu_are_read_once_and_add_up_to_the_step() -> None:
    device = torch.device("cuda")
    factor = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        factor @ factor
    torch.cuda.synchronize()
    begin = time.perf_counter()
    timer = Timer(device)
    with timer("busy"):
        for _ in range(100):
            factor @ factor
    asked = time.perf_counter() - begin
    with timer("beside"):
        time.sleep(0.01)  # while the device is busy
    with timer("idle"):
        torch.cuda.synchronize()
        time.sleep(0.1)
    seconds = timer.seconds
    whole = time.perf_counter() - begin
    assert asked < 0.5 * seconds["busy"]  # nobody waited at the end of the phase
    assert seconds["beside"] < 0.005
    assert 0.1 <= seconds["idle"] < 0.15
    assert sum(seconds.values()) <= timer.elapsed_s() * 1.001
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.1)


# ---- tools -----------------------------------------------------------------------------------------------------------


def waited(script: list[str], delay_s: float = 0.0) -> float:
    found: list[float] = []
    run_agent(
        ScriptedSampler(script), ScriptedSandbox(delay_s), [task(0), task(1)], tokenizer=Characters(),
        num_generations=2, params=SamplingParams(), limits=LIMITS, seed=0, waited=found.append,
    )  # fmt: skip
    return sum(found)


def test_rollouts_wait_for_tools_as_long_as_nobody_decodes() -> None:
    assert waited([answer("3")]) == 0
    begin = time.perf_counter()
    found = waited([code("x"), code("y"), answer("3")], delay_s=0.1)
    assert 0.15 < found <= time.perf_counter() - begin  # twice, less what others took to decode


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_exactly_the_steps_asked_for_leave_a_trace_with_their_phases(tmp_path: Path) -> None:
    training = new_training(tmp_path, 4, ["run.profile_steps=1,3"])
    for step in training.steps():
        with training.pace("generate"):
            torch.ones(3) + 1
        training.update(step, small_batches(step), small_loss)
    folder = training.folder / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        "step-000001-rank-0.json.gz", "step-000003-rank-0.json.gz"
    ]  # fmt: skip
    for file in folder.iterdir():
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
        assert {"generate", "update"} <= set(spans)
        products = [e for e in events if e.get("name") in ("aten::mm", "mkldnn::_linear_pointwise")]
        begin, end = spans["update"]
        assert products
        assert all(begin <= e["ts"] <= end for e in products)


def test_a_trace_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    training = new_training(tmp_path, overrides=["run.profile_steps=0"])
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / "profile").write_text("")
    with pytest.raises(UserError, match=r"the trace .*step-000000-rank-0.json.gz cannot be written: .*File exists"):
        for _ in training.steps():
            pass
    with pytest.raises(UserError, match=r"run.profile_steps is 'all' and 'all' is no step"):
        load_config(None, ["run.profile_steps=all"])
