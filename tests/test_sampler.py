"""The sampler against transformers, against a full forward pass, and against itself under other loads."""

import random

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from groupwise.engine.config import ModelConfig
from groupwise.engine.errors import UserError
from groupwise.engine.model import Model, PackedAttention
from groupwise.rollout.cache import KVCache
from groupwise.rollout.draw import choose, stream_key, uniforms
from groupwise.rollout.sampler import Completion, Sampler, SamplingParams

CONFIG = ModelConfig(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
BLOCK = 4


class Letters:
    """A vocabulary in which one text has many spellings, and id 7 is the end."""

    vocab_size = 89
    eos_id = 7
    pieces = tuple(map(str.encode, ("a", "b", "</", "cod", "code", "e>", ">", "<end>", "</code>", "xe>y", "", "é")))
    pieces += (b"\xc3", b"\xa9")

    def decode(self, ids):
        parts = (self.pieces[i] if i < len(self.pieces) else f"[{i}]".encode() for i in ids)
        return b"".join(parts).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.2 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    return model


def sampler(model: Model, blocks: int = 4000, **settings: int) -> Sampler:
    gib = (blocks + 0.5) * KVCache.block_bytes(CONFIG, BLOCK, torch.float32) / 2**30
    return Sampler(model, Letters(), kv_memory_gib=gib, block_size=BLOCK, **settings)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(14, 89) for _ in range(length)] for length in lengths]


def full_logprobs(model: Model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    ids = torch.tensor(prompt + completion)
    bounds = torch.tensor([0, len(ids) - 1], dtype=torch.int32)
    attention = PackedAttention(bounds, len(ids) - 1)
    with torch.no_grad():
        logprob, _ = model(ids[:-1], torch.arange(len(ids) - 1), attention, targets=ids[1:], temperature=temperature)
    return logprob[len(prompt) - 1 :]


def drain(engine: Sampler) -> dict[int, Completion]:
    done = {}
    while engine.has_work:
        done.update((each.request_id, each) for each in engine.step())
    return done


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [each.token_ids for each in completions]


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


def test_tokens_do_not_depend_on_the_load(model):
    many = [prompt for prompt in prompts(5, 9, 30, 12) for _ in range(3)]
    params = SamplingParams(max_tokens=25, seed=3)
    engine = sampler(model)
    expected = tokens(engine.generate(many, params))
    assert len({tuple(ids) for ids in expected}) > len(many) // 2
    for settings in ({"concurrency": 1}, {"concurrency": 3}, {"prefill_tokens": 8}):
        assert tokens(sampler(model, **settings).generate(many, params)) == expected, settings
    assert engine.stats["preemptions"] == 0
    short = sampler(model, blocks=20)
    assert tokens(short.generate(many, params)) == expected
    assert short.stats["preemptions"] > 3
    assert short.stats["recomputed_tokens"] > 0
    assert short.stats["peak_blocks"] <= 20
    assert short.stats["used_blocks"] == engine.stats["used_blocks"] == 0
    other = tokens(engine.generate(many, SamplingParams(max_tokens=25, seed=4)))
    assert all(a != b for a, b in zip(expected, other, strict=True))


def test_cancelling_others_changes_nothing(model):
    many = [prompt for prompt in prompts(6, 15) for _ in range(5)]
    params = SamplingParams(max_tokens=30)
    expected = tokens(sampler(model).generate(many, params))
    engine = sampler(model, blocks=40, concurrency=6)
    ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i, prompt in enumerate(many)]
    done = {}
    rng = random.Random(0)
    cancelled = rng.sample(ids, 5)
    for request_id in cancelled:  # some run, some wait, some have finished
        for _ in range(7):
            done.update((each.request_id, each) for each in engine.step())
        engine.release(request_id)
    done.update(drain(engine))
    for request_id, ids_expected in zip(ids, expected, strict=True):
        if request_id not in cancelled:
            assert done[request_id].token_ids == ids_expected
            engine.release(request_id)
    assert engine.stats["used_blocks"] == 0


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
    engine.step()
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


def test_idle_requests_give_way_and_come_back(model):
    def two_turns(engine: Sampler) -> list[list[int]]:
        params = SamplingParams(max_tokens=10)
        ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i, prompt in enumerate(prompts(20, 25, 30, 20))]
        turns = drain(engine)
        for request_id in ids:
            engine.extend(request_id, [20, 21, 22], params)
        turns = [*turns.values(), *drain(engine).values()]
        return [each.token_ids for each in sorted(turns, key=lambda each: each.request_id)]

    short = sampler(model, blocks=17)
    assert two_turns(short) == two_turns(sampler(model))
    assert short.stats["evictions"] > 0


def test_after_a_flush_nothing_old_is_read(model):
    other = Model(CONFIG)
    engine = sampler(model)
    params = SamplingParams(max_tokens=12)
    many = prompts(10, 19)
    ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i, prompt in enumerate(many)]
    running = engine.submit(many[0], SamplingParams(max_tokens=40), stream=(9, 0, 0))
    first = {}
    while len(first) < 2:
        first.update((each.request_id, each) for each in engine.step())
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
    engine.step()
    engine.release(ids[0])
    engine.flush()
    done = drain(engine)
    expected = sampler(model).generate([prompt] * 3, params)
    assert [done[request_id].token_ids for request_id in ids[1:]] == tokens(expected)[1:]
    assert engine.stats["prefill_tokens"] == 2 * 13


class Scripted(Sampler):
    """Takes the tokens from a script instead of the model."""

    script: tuple[int, ...] = ()

    def _record(self, requests, tokens, logprobs):
        return super()._record(requests, [self.script[len(request.logprobs)] for request in requests], logprobs)


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
    engine = Scripted(model, Letters(), kv_memory_gib=0.01)
    engine.script = script
    # The prompt ends with most of a stop string, which does not count.
    (done,) = engine.generate([[2, 4]], SamplingParams(max_tokens=6, stop=("</code>", "xe>", "é")))
    assert (len(done.token_ids), done.text) == (end, text)
    assert done.finish_reason == ("length" if end == 6 else "stop")


def test_frequencies_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, generator=generator) * 1.5
    draws = 40000
    keys = np.full(draws, stream_key(11, (5, 1, 0)), np.uint64)
    uniform = torch.from_numpy(uniforms(keys, np.arange(draws, dtype=np.uint64)))
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 7, 1.0), (1.3, 0, 0.6), (1.0, 12, 0.8)):
        chosen, logprobs = choose(logits.expand(draws, -1), uniform, temperature, top_k, top_p)
        chances = torch.softmax(logits[0].double() / temperature, 0)
        torch.testing.assert_close(logprobs.double(), chances.log()[chosen], atol=1e-5, rtol=0)
        kept = expected_support(chances, top_k, top_p)
        chances = torch.where(kept, chances, 0.0)
        expected = (chances / chances.sum() * draws).numpy()
        counts = np.bincount(chosen.numpy(), minlength=50)
        assert counts[~kept.numpy()].sum() == 0
        usual = expected > 5
        chi_square = ((counts - expected)[usual] ** 2 / expected[usual]).sum()
        freedom = usual.sum() - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (temperature, top_k, top_p)


def test_what_is_impossible_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-40], dtype=torch.float64)
    assert choose(logits, uniform)[0].tolist() == [1, 3, 3]


def expected_support(chances: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    order = sorted(range(len(chances)), key=lambda i: -chances[i])[: top_k or None]
    total, reached, kept = sum(chances[i] for i in order), 0.0, torch.zeros(len(chances), dtype=torch.bool)
    for i in order:
        kept[i] = reached < top_p * total
        reached += chances[i]
    return kept


def test_random_numbers_are_a_counter():
    keys = [stream_key(seed, (a, b, c)) for seed in range(3) for a in range(5) for b in range(5) for c in range(5)]
    assert len(set(keys)) == len(keys)
    assert stream_key(0, (1, 2, 3)) != stream_key(0, (3, 2, 1))
    places = np.arange(200, dtype=np.uint64)
    table = np.stack([uniforms(np.full(200, key, np.uint64), places) for key in keys])
    assert table.min() >= 0
    assert table.max() < 1
    assert abs(table.mean() - 0.5) < 0.005
    assert abs(table.std() - 12**-0.5) < 0.005
    assert np.abs(np.corrcoef(table)[np.triu_indices(len(keys), 1)]).max() < 0.4
    assert uniforms(np.array([keys[9]], np.uint64), np.array([17], np.uint64))[0] == table[9, 17]


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ([], {"max_tokens": 3}, "empty"),
        ([3, 89], {"max_tokens": 3}, "89"),
        ([3, -1], {"max_tokens": 3}, "-1"),
        ([3] * 100, {"max_tokens": 100}, "kv_memory_gib"),
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
    engine.release(request_id)
    with pytest.raises(ValueError, match="unknown"):
        engine.release(request_id)


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
    for settings in ({"kv_memory_gib": 1e-9}, {"kv_memory_gib": 1.0, "concurrency": -1}):
        with pytest.raises(UserError, match=list(settings)[-1]):
            Sampler(model, Letters(), **settings)


def test_logits_that_are_not_finite_name_the_request(model):
    broken = Model(CONFIG)
    with torch.no_grad():
        broken.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="request 0"):
        sampler(broken).generate(prompts(4), SamplingParams(max_tokens=3))
