"""What a request gets does not depend on what else runs, on memory, on the rank, or on how tokens come to the host."""

import random

import pytest
import torch
from distributed import run_ranks
from sampled import drain, full_logprobs, prompts, random_model, sampler, tokens

from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.shard import ShardedModel
from groupwise.rollout.sampler import Sampler, SamplingParams
from groupwise.rollout.spread import spread


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


LOADS = {
    "one": {"concurrency": 1},
    "three": {"concurrency": 3},
    "sixteen": {"concurrency": 16},
    "chunks of 7": {"prefill_tokens": 7},
    "short": {"blocks": 20},
    "short, kept": {"blocks": 20, "preemption": "keep"},
    "short, chunks": {"blocks": 24, "prefill_tokens": 5},
}


@pytest.fixture(scope="module")
def episodes(model: Model) -> list[list[list[int]]]:
    return three_turns(sampler(model))


def three_turns(engine: Sampler, cancelled: int = 0) -> list[list[list[int]]]:
    """Each request's three turns, with an observation of another length behind each."""
    groups = [prompt for prompt in prompts(5, 9, 30, 12, 21) for _ in range(3)]
    params = [SamplingParams(max_tokens=6 + i % 9, seed=3, temperature=0.5 + i % 3 / 2) for i in range(len(groups))]
    ids = {
        engine.submit(prompt, p, stream=(i, 7, 0)): i for i, (prompt, p) in enumerate(zip(groups, params, strict=True))
    }
    found: list[list[list[int]]] = [[] for _ in groups]
    polls = 0
    while engine.has_work:
        polls += 1
        for completion in engine.poll():
            i = ids[completion.request_id]
            assert completion.token_ids
            found[i].append(completion.token_ids)
            if len(found[i]) < 3:
                observation = prompts(i % 5, seed=i)[0] if i % 5 else []
                engine.extend(completion.request_id, observation, params[i])
            else:
                engine.cancel(completion.request_id)
                del ids[completion.request_id]
        if polls % 3 == 0 and cancelled:
            cancelled -= 1
            engine.cancel(request_id := max(ids))
            found[ids.pop(request_id)] = []
    assert engine.stats["used_blocks"] == 0
    return found


@pytest.mark.parametrize(
    ("load", "is_behind"),
    [
        *((load, False) for load in LOADS),
        *((load, True) for load in ("three", "short, kept", "short, chunks")),
        *(pytest.param(load, True, marks=pytest.mark.slow) for load in ("one", "sixteen", "chunks of 7", "short")),
    ],
)
def test_tokens_do_not_depend_on_the_load(model, episodes, load, is_behind):
    engine = sampler(model, **LOADS[load])
    engine._is_behind = is_behind
    assert three_turns(engine) == episodes
    if "blocks" in LOADS[load]:
        assert engine.stats["preemptions"] + engine.stats["evictions"] > 3
        kept = LOADS[load].get("preemption") == "keep"
        if not kept:
            assert engine.stats["recomputed_tokens"] > 0
        elif not is_behind:  # where the host is behind, a token that was on its way is drawn again
            assert engine.stats["recomputed_tokens"] == 0


def test_the_draw_differs_with_the_seed(model):
    one, other = (sampler(model).generate(prompts(9, 12), SamplingParams(max_tokens=20, seed=seed)) for seed in (3, 4))
    assert all(a != b for a, b in zip(tokens(one), tokens(other), strict=True))


@pytest.mark.parametrize("is_behind", [False, True])
def test_cancelling_others_changes_nothing(model, episodes, is_behind):
    engine = sampler(model, blocks=40, concurrency=6)
    engine._is_behind = is_behind
    found = three_turns(engine, cancelled=7)
    assert sum(not turns for turns in found) == 7
    assert all(turns in ([], expected) for turns, expected in zip(found, episodes, strict=True))


def sample_on_rank(mesh: Mesh) -> dict[int, list[int]]:
    policy = ShardedModel(random_model(), mesh)
    many = prompts(5, 9, 30, 12, 3, 17)
    mine = spread([len(prompt) for prompt in many], mesh.world_size)[mesh.rank]
    with policy.gathered():
        engine = sampler(policy.module)
        ids = {engine.submit(many[i], SamplingParams(max_tokens=12), stream=(i, 0, 0)): i for i in mine}
        return {ids[number]: done.token_ids for number, done in drain(engine).items()}


def test_two_ranks_sample_what_one_does():
    (alone,), (first, second) = (run_ranks(sample_on_rank, ranks) for ranks in (1, 2))
    assert first | second == alone
    assert len(first) == len(second) == 3


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


def test_blocks_are_found_by_their_content(model):
    engine = sampler(model)
    common, (one, other) = prompts(18)[0], prompts(7, 9, seed=4)
    params = SamplingParams(max_tokens=5)
    engine.generate([common + one], params)
    before = engine.stats["prefill_tokens"]
    (found,) = engine.generate([common + other], params)
    assert engine.stats["prefix_hit_tokens"] == 16  # four full blocks of 4
    assert engine.stats["prefill_tokens"] - before == 18 + 9 - 16
    expected = full_logprobs(model, common + other, found.token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=1e-5, rtol=0)
    # The memory did not grow for what was kept: the second one took what the first had left.
    assert engine.stats["peak_blocks"] == -(-(18 + 9 + 5 - 1) // 4)
    engine.flush()
    engine.generate([common + one], params)
    assert engine.stats["prefix_hit_tokens"] == 16


def test_a_long_prompt_does_not_stop_those_that_decode(model):
    engine = sampler(model, prefill_tokens=10)
    short = engine.submit(prompts(4)[0], SamplingParams(max_tokens=60, seed=2), stream=(0, 0, 0))
    engine.poll()
    engine.submit(prompts(95)[0], SamplingParams(max_tokens=2), stream=(1, 0, 0))
    request = engine._requests[short]
    for poll in range(9):
        before = len(request.logprobs), engine.stats["prefill_tokens"]
        assert not engine.poll()
        assert (len(request.logprobs), engine.stats["prefill_tokens"]) == (before[0] + 1, before[1] + 10), poll


def test_groups_start_in_the_order_in_which_they_came(model):
    engine = sampler(model, concurrency=3)
    groups = [prompt for prompt in prompts(9, 5, 7) for _ in range(3)]
    ids = [engine.submit(p, SamplingParams(max_tokens=3 + i % 2), stream=(i, 0, 0)) for i, p in enumerate(groups)]
    started: list[int] = []
    while engine.has_work:
        engine.poll()
        started += sorted(r.number for r in engine._scheduler.running if r.number not in started)
    assert started == sorted(started)
    assert set(started) <= set(ids)


def random_work(model: Model, seed: int, polls: int) -> None:
    """Submits, extends, cancels and flushes at random, beside a short memory, and accounts for every request."""
    rng = random.Random(seed)
    engine = sampler(
        model,
        blocks=rng.choice([30, 45, 400]),
        concurrency=rng.choice([0, 1, 3, 8]),
        prefill_tokens=rng.choice([6, 25, 4096]),
        preemption=rng.choice(["recompute", "keep"]),
    )
    engine._is_behind = rng.random() < 0.5
    pool = prompts(1, 4, 9, 16, 17, 33, seed=seed)
    running: dict[int, int] = {}  # requests under way, and the tokens that they had
    idle: dict[int, int] = {}
    submitted = finished = cancelled = 0
    for _ in range(polls):
        action = rng.random()
        params = SamplingParams(
            max_tokens=rng.randint(1, 25), temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([0.8, 1.0]),
            stop_ids=(rng.randrange(89),), seed=seed,
        )  # fmt: skip
        if action < 0.25 and len(running) + len(idle) < 12:
            prompt = rng.choice(pool)
            running[engine.submit(prompt, params, stream=(submitted, 0, 0))] = len(prompt)
            submitted += 1
        elif action < 0.4 and idle:
            number = rng.choice(list(idle))
            observation = prompts(rng.randint(0, 9), seed=rng.random())[0]
            if idle[number] + len(observation) + params.max_tokens <= 30 * 4:
                engine.extend(number, observation, params)
                running[number] = idle.pop(number) + len(observation)
        elif action < 0.5 and running | idle:
            number = rng.choice(list(running | idle))
            engine.cancel(number)
            running.pop(number, None)
            idle.pop(number, None)
            cancelled += 1
        elif action < 0.52:
            engine.flush()
        for done in engine.poll():
            assert 1 <= len(done.token_ids) == len(done.logprobs)
            idle[done.request_id] = running.pop(done.request_id) + len(done.token_ids)
            finished += 1
        assert engine.has_work == bool(running)
    for done in drain(engine).values():
        idle[done.request_id] = running.pop(done.request_id)
        finished += 1
    assert not running
    assert finished
    assert submitted == cancelled + len(idle)
    for number in idle:
        engine.cancel(number)
    assert engine.stats["used_blocks"] == 0
    assert not engine._tables.references.any()


@pytest.mark.parametrize("seed", range(4))
def test_random_work_loses_nothing(model, seed):
    random_work(model, seed, 120)


@pytest.mark.slow
def test_random_work_of_a_minute_loses_nothing(model):
    for seed in range(100, 160):
        random_work(model, seed, 400)


@pytest.mark.parametrize(("blocks", "second"), [(40, 1), (5, 0)])
def test_turns_take_their_turn_but_the_oldest_goes_first_while_memory_is_short(
    model: Model, blocks: int, second: int
) -> None:
    engine, params = sampler(model, blocks=blocks, concurrency=1), SamplingParams(max_tokens=2)
    ids = [engine.submit(prompt, params, stream=(i, 0, 0)) for i, prompt in enumerate(prompts(8, 8))]
    ended: list[int] = []
    while engine.has_work:
        for done in engine.poll():
            ended.append(ids.index(done.request_id))
            if len(ended) == 1:
                engine.extend(done.request_id, [20, 21], params)
    assert ended == [0, second, 1 - second]
