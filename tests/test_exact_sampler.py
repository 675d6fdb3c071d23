"""The exact mode: the log-probabilities that the sampler reports are the trainer's, to the last bit."""

import random
from dataclasses import replace

import pytest
import torch
from sampled import CONFIG, drain, prompts, random_model, sampler

from groupwise.engine.batch import Example, pack
from groupwise.engine.errors import UserError
from groupwise.engine.exact import ROWS
from groupwise.engine.model import Model, PackedAttention
from groupwise.kernels import dispatch
from groupwise.rollout.sampler import SamplingParams

TURNS = 3
TEMPERATURE = 0.85  # 1/0.85 in float32 is not 1/t of t = 0.85 in float32


@pytest.fixture(scope="module")
def model() -> Model:
    if dispatch.implementation("cpu", "linear") != "onednn":
        pytest.skip("PyTorch has no oneDNN here")
    return random_model(replace(CONFIG, num_attention_heads=6, num_key_value_heads=2, head_dim=8, vocab_size=700))


@pytest.fixture(scope="module")
def usual(model: Model) -> list[list[int]]:
    return sample(model)[1]


def sample(
    model: Model, lengths: tuple[int, ...] = (5, 40, 150), members: int = 4, tokens: int = 25, seen_tokens: int = 90,
    **settings: object,
) -> tuple[list[Example], list[list[int]]]:  # fmt: skip
    """Groups with a common prompt, three turns each, with observations between; as examples, and their tokens."""
    engine = sampler(model, exact=True, **settings)
    groups = [prompt for prompt in prompts(*lengths) for _ in range(members)]
    params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, seed=1)
    examples = {}
    for i, prompt in enumerate(groups):
        number = engine.submit(prompt, params, stream=(i, 0, 0))
        examples[number] = Example(
            list(prompt), [0.0] * len(prompt), old_logprobs=[0.0] * len(prompt), advantage=1.0, group=i // members
        )
    for turn in range(TURNS):
        for number, done in drain(engine).items():
            example = examples[number]
            example.token_ids += done.token_ids
            example.loss_mask += [1.0] * len(done.token_ids)
            example.old_logprobs += done.logprobs
            if turn < TURNS - 1:
                seen = prompts(random.Random(number + turn).randint(1, seen_tokens), seed=number)[0]
                engine.extend(number, seen, params)
                example.token_ids += seen
                example.loss_mask += [0.0] * len(seen)
                example.old_logprobs += [0.0] * len(seen)
    return list(examples.values()), [example.token_ids for example in examples.values()]


def differences(model: Model, examples: list[Example]) -> torch.Tensor:
    """The trainer's log-probability less the sampler's, of every sampled token."""
    device = model.output_weight.device
    found = []
    with dispatch.exact_forms(device.type):
        for batch in pack(examples, 1500, device, multiple=ROWS):
            attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
            logprob, _ = model(
                batch.input_ids, batch.positions, attention, targets=batch.targets, temperature=TEMPERATURE
            )
            assert logprob.requires_grad
            found.append((logprob.detach() - batch.rollout_logprob)[batch.weight > 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"concurrency": 1}, marks=pytest.mark.slow),
        {"concurrency": 3, "prefill_tokens": 33},
        {"blocks": 150, "preemption": "keep"},
        pytest.param({"blocks": 150}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sampler_and_trainer_agree_to_the_bit(model, usual, settings):
    examples, tokens = sample(model, **settings)
    gap = differences(model, examples)
    assert len(gap) > 12 * TURNS * 5
    assert gap.abs().max() == 0.0
    assert tokens == usual


def test_the_usual_mode_does_not_agree_to_the_bit(model):
    """So the test above can fail."""
    engine = sampler(model)
    (prompt,) = prompts(150)
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=200, temperature=TEMPERATURE, seed=1))
    count = len(done.token_ids)
    example = Example(
        prompt + done.token_ids, [0.0] * 150 + [1.0] * count, old_logprobs=[0.0] * 150 + done.logprobs, advantage=1.0
    )
    assert 0 < differences(model, [example]).abs().max() < 1e-4


def test_the_exact_mode_is_for_float32_on_a_cpu(model):
    with pytest.raises(UserError, match="the exact mode is for float32 on a CPU"):
        sampler(random_model().to(torch.bfloat16), exact=True)
