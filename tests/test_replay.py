"""Decoding in fixed buffers by Triton's kernels: the tokens of the plain path, at any size of the batch."""

from dataclasses import replace

import pytest
import torch
from interpreter import interpreted
from sampled import CONFIG, Letters, full_logprobs, prompts, random_model

from groupwise.rollout.replay import _rounded
from groupwise.rollout.sampler import Sampler, SamplingParams


def sample_in_turns() -> tuple[bool, list[list[int]], list[list[float]]]:
    """Two groups and a lone prompt, that end at different times; one of them goes on for another turn."""
    model = random_model(replace(CONFIG, num_hidden_layers=2))
    engine = Sampler(model, Letters(), kv_memory=0.01, block_size=16)
    engine._is_behind = True
    many = [*prompts(20, 35) * 2, *prompts(3)]
    ids = [
        engine.submit(prompt, SamplingParams(max_tokens=2 + i, seed=5), stream=(i, 0, 0))
        for i, prompt in enumerate(many)
    ]
    found: dict[int, list] = {number: [] for number in ids}
    while engine.has_work:
        for done in engine.poll():
            found[done.request_id].append(done)
            if done.request_id == ids[1] and len(found[ids[1]]) == 1:
                engine.extend(ids[1], [20, 21, 22], SamplingParams(max_tokens=4, seed=5))
    turns = [done for number in ids for done in found[number]]
    return engine._forward._form == "triton", [done.token_ids for done in turns], [done.logprobs for done in turns]


@pytest.mark.gpu
def test_graphs_sample_what_the_model_scores() -> None:
    model = random_model(CONFIG).to("cuda", torch.bfloat16)
    engine = Sampler(model, Letters(), kv_memory=0.05)
    many = prompts(20, 35, 300) * 5
    done = engine.generate(many, SamplingParams(max_tokens=30, temperature=0.8))
    for prompt, completion in zip(many, done, strict=True):
        expected = full_logprobs(model, prompt, completion.token_ids, 0.8).cpu()
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.1, rtol=0)


def test_fixed_buffers_give_the_tokens_of_the_plain_path() -> None:
    plain, expected, expected_logprobs = sample_in_turns()
    replays, tokens, logprobs = interpreted(sample_in_turns)
    assert (plain, replays) == (False, True)
    assert tokens == expected
    for ours, theirs in zip(logprobs, expected_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_sizes_of_batches_waste_at_most_a_third() -> None:
    for count in range(1, 600):
        assert count <= _rounded(count) <= max(count * 1.5, count + 1)
    assert len({_rounded(count) for count in range(1, 513)}) <= 18
