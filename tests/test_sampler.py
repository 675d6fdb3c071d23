"""The sampler against transformers, against a full forward pass, and in what it promises of memory and errors."""

import random
from dataclasses import replace

import pytest
import torch
from sampled import CONFIG, Letters, drain, full_logprobs, prompts, random_model, sampler, tokens
from torch.multiprocessing.reductions import StorageWeakRef

from groupwise.engine.errors import UserError
from groupwise.engine.flops import Peak
from groupwise.engine.metrics import free_memory
from groupwise.engine.model import Model
from groupwise.rollout.cache import KVCache
from groupwise.rollout.sampler import Sampler, SamplingParams


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


def test_greedy_equals_transformers(model, tmp_path):
    from transformers import Qwen2ForCausalLM

    from groupwise.engine.hf import save_hf

    save_hf(model, tmp_path / "model")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    many = prompts(*random.Random(1).sample(range(1, 60), 8), 300, 1)
    ours = sampler(model).generate(many, SamplingParams(temperature=0, max_tokens=20))
    for prompt, completion in zip(many, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=7, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == 7 else "length")


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_are_the_trainers(model, temperature):
    many = prompts(1, 3, 17, 17, 60) * 3  # equal prompts share their blocks
    params = SamplingParams(temperature=temperature, top_k=20, top_p=0.9, max_tokens=25)
    for prompt, completion in zip(many, sampler(model).generate(many, params), strict=True):
        expected = full_logprobs(model, prompt, completion.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_a_group_prompt_is_prefilled_once(model):
    one, other = prompts(21, 16)
    for concurrency in (0, 1, 3):
        engine = sampler(model, concurrency=concurrency)
        engine.generate([one] * 6 + [other] * 2, SamplingParams(max_tokens=5))
        assert engine.stats["prefill_tokens"] == 21 + 16
        assert engine.stats["prefix_hit_tokens"] == 5 * 21 + 16
        if concurrency == 1:
            assert engine.stats["peak_blocks"] <= 6 + 4 + 4


def test_blocks_are_shared_until_written(model):
    engine = sampler(model)
    params = SamplingParams(max_tokens=8)
    for i in range(5):
        engine.submit(prompts(18)[0], params, stream=(i, 0, 0))
    engine.poll()
    # 4 full blocks of the prompt for all; for each its own copy of the fifth.
    assert engine.stats["used_blocks"] == 4 + 5
    assert engine.stats["copied_blocks"] == 4


def test_extend_prefills_only_what_is_new(model):
    engine = sampler(model)
    params = SamplingParams(max_tokens=9, seed=1)
    (prompt,), (seen,) = prompts(22), prompts(13, seed=5)
    request_id = engine.submit(prompt, params, stream=(4, 2, 0))
    first = drain(engine)[request_id]
    before = engine.stats["prefill_tokens"]
    engine.extend(request_id, seen, params)
    second = drain(engine)[request_id]
    assert engine.stats["prefill_tokens"] - before == len(seen) + 1  # and the last sampled token
    whole = prompt + first.token_ids + seen
    expected = full_logprobs(model, whole, second.token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(second.logprobs), expected, atol=1e-5, rtol=0)
    fresh = sampler(model)
    again = fresh.submit(whole, params, stream=(4, 2, 1))
    assert drain(fresh)[again].token_ids == second.token_ids


def test_after_a_flush_nothing_old_is_read(model):
    other = Model(CONFIG)
    engine = sampler(model)
    params = SamplingParams(max_tokens=12)
    many = prompts(10, 19)
    ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i, prompt in enumerate(many)]
    running = engine.submit(many[0], SamplingParams(max_tokens=40, seed=2), stream=(9, 0, 0))
    first = {}
    while len(first) < 2:
        first.update((each.request_id, each) for each in engine.poll())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_state_dict(other.state_dict())
        engine.flush()
        assert engine.stats["used_blocks"] == 0
        engine._cache.keys.fill_(50.0)
        for request_id in ids:
            engine.extend(request_id, [30, 31], params)
        later = drain(engine)
        assert len(later[running].token_ids) == 40
        for request_id, prompt in zip(ids, many, strict=True):
            whole = [*prompt, *first[request_id].token_ids, 30, 31]
            expected = full_logprobs(model, whole, later[request_id].token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(later[request_id].logprobs), expected, atol=1e-5, rtol=0)
    finally:
        model.load_state_dict(weights)


def test_a_flush_gives_the_memory_of_the_cache_back_until_the_next_step(model):
    engine = sampler(model)
    params = SamplingParams(max_tokens=6)
    before = engine.generate(prompts(13), params)
    pools = [StorageWeakRef(pool.untyped_storage()) for pool in (engine._cache.keys, engine._cache.values)]
    assert not any(pool.expired() for pool in pools)
    engine.flush()
    assert all(pool.expired() for pool in pools)
    assert tokens(engine.generate(prompts(13), params)) == tokens(before)


def test_a_flush_voids_the_prompt_of_those_that_wait(model):
    engine = sampler(model, concurrency=1)
    params = SamplingParams(max_tokens=6)
    (prompt,) = prompts(13)
    ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i in range(3)]
    engine.poll()
    engine.cancel(ids[0])
    engine.flush()
    done = drain(engine)
    expected = sampler(model).generate([prompt] * 3, params)
    assert [done[request_id].token_ids for request_id in ids[1:]] == tokens(expected)[1:]
    assert engine.stats["prefill_tokens"] == 2 * 13


class Scripted(Sampler):
    """Takes the tokens from a script instead of the model."""

    script: tuple[int, ...] = ()

    def _append(self, request, token, *logprobs):
        return super()._append(request, self.script[len(request.logprobs)], *logprobs)


@pytest.mark.parametrize(
    ("script", "end", "text"),
    [
        ((0, 2, 4, 6, 1), 4, "a</code>"),
        ((0, 2, 3, 5, 1), 4, "a</code>"),
        ((3, 8, 1), 2, "cod</code>"),
        ((2, 10, 3, 10, 9, 1), 5, "</codxe>y"),
        ((2, 10, 4, 10, 6, 1), 5, "</code>"),
        ((6, 5, 11, 0, 1), 3, ">e>é"),
        ((0, 12, 13, 0, 1), 3, "aé"),
        ((0, 7, 1), 2, "a<end>"),
        ((0, 1, 0, 1, 0, 1), 6, "ababab"),
    ],
)
def test_stop_strings_in_any_spelling(model, script, end, text):
    engine = Scripted(model, Letters(), kv_memory=0.01)
    engine.script = script
    # The prompt ends with most of a stop string, which does not count.
    (done,) = engine.generate([[2, 4]], SamplingParams(max_tokens=6, stop=("</code>", "xe>", "é")))
    assert (len(done.token_ids), done.text) == (end, text)
    assert done.finish_reason == ("length" if end == 6 else "stop")


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ([], {"max_tokens": 3}, "empty"),
        ([3, 89], {"max_tokens": 3}, "89"),
        ([3, -1], {"max_tokens": 3}, "-1"),
        ([3] * 100, {"max_tokens": 100}, "kv_memory"),
        ([3] * 500, {"max_tokens": 100}, "max_position_embeddings"),
    ],
)
def test_bad_requests_are_refused(model, prompt, params, word):
    engine = sampler(model, blocks=40)
    with pytest.raises(UserError, match=word):
        engine.generate([prompt], SamplingParams(**params))
    assert not engine.has_work
    request_id = engine.submit([5], SamplingParams(max_tokens=2), stream=(0, 0, 0))
    with pytest.raises(ValueError, match="waiting"):
        engine.extend(request_id, [4], SamplingParams())
    drain(engine)
    if prompt:
        with pytest.raises(UserError, match=word):
            engine.extend(request_id, prompt, SamplingParams(**params))
    engine.cancel(request_id)
    with pytest.raises(ValueError, match="unknown"):
        engine.cancel(request_id)


def test_bad_settings_are_refused(model):
    for settings in (
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": "ab"},
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            SamplingParams(**settings)
    for settings in (
        {"kv_memory": 1e-9},
        {"kv_memory": 1.0, "concurrency": -1},
        {"kv_memory": 1.0, "preemption": "swap"},
    ):
        with pytest.raises(UserError, match=list(settings)[-1]):
            Sampler(model, Letters(), **settings)


def test_a_request_without_finite_numbers_fails_alone():
    model, broken = (random_model(replace(CONFIG, tie_word_embeddings=False)) for _ in range(2))
    with torch.no_grad():
        broken.model.embed_tokens.weight[77] = torch.nan
    params = SamplingParams(max_tokens=12, stop_ids=(77,), seed=1)
    many = [[30 + i, 31, *([77] if i == 1 else [32]), 33, 34] for i in range(4)]
    engine = sampler(broken, blocks=12, concurrency=3)  # short: what is freed is used again
    done = engine.generate(many, params)
    assert [each.finish_reason == "error" for each in done] == [False, True, False, False]
    assert done[1].error.startswith("request 1 got no finite log-probability at token 5")
    assert done[1].token_ids == []
    assert tokens([done[0], done[2], done[3]]) == [
        tokens(sampler(model).generate(many[: i + 1], params))[i] for i in (0, 2, 3)
    ]
    # Nor does another find what the failed one stored.
    assert engine.generate([many[0]], params)[0].token_ids == done[0].token_ids


def test_stop_ids_and_turns_end(model):
    free = sampler(model).generate(prompts(9), SamplingParams(max_tokens=30, seed=2))[0]
    stop = free.token_ids[11]
    (done,) = sampler(model).generate(prompts(9), SamplingParams(max_tokens=30, seed=2, stop_ids=(stop, 88)))
    assert done.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (free.finish_reason, done.finish_reason) == ("length", "stop")
    with pytest.raises(UserError, match="stop id 89"):
        sampler(model).generate(prompts(9), SamplingParams(stop_ids=(89,)))


@pytest.mark.parametrize(
    "limits", [{}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.8}]
)
def test_frequencies_and_both_log_probabilities_are_the_distributions(model, limits):
    draws, prompt = 4000, prompts(12)[0]
    params = SamplingParams(max_tokens=1, seed=5, **limits)
    done = sampler(model).generate([prompt] * draws, params)
    temperature = limits.get("temperature", 1.0)
    scores = torch.stack([full_logprobs(model, prompt, [token], temperature)[0] for token in range(89)]).double()
    kept = kept_tokens(scores.exp(), limits)
    exact = torch.where(kept, scores.exp(), 0.0) / scores.exp()[kept].sum()
    counts = torch.bincount(torch.tensor([each.token_ids[0] for each in done]), minlength=89).double()
    assert not counts[~kept].any()
    usual = exact * draws > 5
    rest = 1 - exact[usual].sum()
    expected = torch.cat((exact[usual], rest[None])) * draws + 1e-9
    seen = torch.cat((counts[usual], counts[~usual].sum()[None]))
    chi_square, freedom = ((seen - expected) ** 2 / expected.clamp(min=1)).sum(), len(seen) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    for each in done[:50]:
        token = each.token_ids[0]
        assert abs(each.logprobs[0] - scores[token]) < 1e-5
        assert abs(each.sampling_logprobs[0] - exact[token].log()) < 1e-5


def kept_tokens(chances: torch.Tensor, limits: dict) -> torch.Tensor:
    """By sorting, as transformers does."""
    order = chances.argsort(descending=True)[: limits.get("top_k")]
    mass = chances[order].cumsum(0) / chances[order].sum()
    order = order[torch.cat((torch.zeros(1, dtype=torch.float64), mass[:-1])) < limits.get("top_p", 1.0) + 1e-12]
    kept = torch.zeros(len(chances), dtype=torch.bool)
    kept[order] = True
    return kept & (chances >= limits.get("min_p", 0.0) * chances.max())


def test_metrics_are_of_the_time_since_they_were_asked(model):
    engine = sampler(model)
    engine.generate([prompts(18)[0]] * 4, SamplingParams(max_tokens=5, seed=1))
    found = engine.metrics()
    assert found["sampling/prefix_hit_rate"] == 3 / 4
    assert found["sampling/kv_peak_share"] == engine.stats["peak_blocks"] / engine.stats["num_blocks"]
    assert found["sampling/tokens_per_s"] > 0
    assert engine.metrics()["sampling/tokens_per_s"] == 0


def test_the_share_of_the_bandwidth_is_what_decoding_must_read_over_its_time(model, monkeypatch):
    assert "perf/mbu" not in sampler(model).metrics()  # a CPU has no known bandwidth
    monkeypatch.setattr("groupwise.rollout.sampler.peak_of", lambda *_: Peak(1.0, 1e6))
    engine, lengths = sampler(model), (18, 5)
    done = engine.generate([prompt for prompt in prompts(*lengths) for _ in range(2)], SamplingParams(max_tokens=5))
    drawn = [len(completion.token_ids) for completion in done]
    # A prefill draws the first token; each later one is drawn by a step that sees all before it.
    seen = [length + k for length, n in zip((18, 18, 5, 5), drawn, strict=True) for k in range(1, n)]
    assert engine.stats["attended_tokens"] == sum(seen)
    keys = 2 * 3 * 2 * 12 * 4  # of a token and its values: 3 layers, 2 heads of 12, float32
    weights = 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the embedding is the head
    read = engine.stats["decode_steps"] * weights + sum(seen) * keys
    assert engine.metrics()["perf/mbu"] == pytest.approx(read / engine._seconds / 1e6)
    assert engine.metrics()["perf/mbu"] == 0


def test_memory_may_be_a_share_of_the_device(model):
    engine = Sampler(model, Letters(), kv_memory="0.05%")
    gib = free_memory(torch.device("cpu")) / 2**30
    block = KVCache.block_bytes(CONFIG, 16, torch.float32)
    assert 0.8 < engine.stats["num_blocks"] * block / (0.0005 * gib * 2**30) < 1.25
    for wrong in ("half", "0%", "120%", -1.0, "nan"):
        with pytest.raises(UserError, match="kv_memory"):
            Sampler(model, Letters(), kv_memory=wrong)
