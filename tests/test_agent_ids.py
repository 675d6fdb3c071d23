"""What the many-turn loop trains is what was sampled, token by token, whatever is written and whenever code ends."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import zip_longest
from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import BROKEN, DATAMIND, LIMITS, Characters, ScriptedSampler, ScriptedSandbox, answer, code, rollout, task

from groupwise.engine.config import ModelConfig
from groupwise.engine.model import Model, PackedAttention
from groupwise.engine.tokenizer import Tokenizer
from groupwise.rollout.agent import AgentLimits, run_agent
from groupwise.rollout.draw import SamplingParams
from groupwise.rollout.grammar import GRAMMARS, Grammar, Step, all_tags
from groupwise.rollout.sampler import Completion, Sampler
from groupwise.rollout.sandbox import Execution, Sandbox
from groupwise.rollout.trajectory import VOID_STATUSES, Status, Trajectory, cap_text


class Pieces:
    """A tokenizer in which a text has many spellings, so that ids which were encoded anew would show."""

    def __init__(self) -> None:
        tags = [*all_tags(), "<|im_end|>"]
        pairs = {text[i : i + size] for text in (*tags, "print", "bad", "ran ") for size in (2, 3) for i in range(9)}
        self.pieces = [*map(chr, range(128)), *tags, *sorted(piece for piece in pairs if len(piece) > 1)]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    def spell(self, text: str, choose: Callable[[list[str]], str]) -> list[int]:
        ids = []
        while text:
            fits = [text[:size] for size in range(len(text[:20]), 0, -1) if text[:size] in self.ids]
            ids.append(self.ids[piece := choose(fits)])
            text = text[len(piece) :]
        return ids

    def encode(self, text: str) -> list[int]:
        return self.spell(text, lambda fits: fits[0])

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[number] for number in ids)

    def chat_prompt(self, system: str, user: str) -> str:
        return f"[{system}][{user}]"


def random_turn(rng: random.Random, grammar: Grammar, careful: bool) -> str:
    """What a model may write in a turn: sometimes in need of mending, sometimes void, if it is not careful."""
    if careful:
        kind = "code" if grammar.code and rng.random() < 0.6 else "answer"
        return grammar.render_turn(kind, "look", rng.choice(["print(1)", "bad", "x = 1\nif x:\n    print(x)"]))
    program = rng.choice(["print(1)", "bad", "x = 1\nif x:\n    print(x)", "print('</code>')", "y" * 90, ""])
    thought, draw = rng.choice(["look", "so", ""]), rng.random()
    wrong = ["no tags", "", f"<{grammar.thought}>", BROKEN, "<answer>1</answer><code>2</code>", "z" * 250]
    if draw < 0.1:
        return rng.choice(wrong)
    if draw < 0.35 or grammar.code is None:
        text = grammar.render_turn("answer", thought, rng.choice(["3", "four", ""]))
    else:
        text = grammar.render_turn("code", thought, rng.choice([program, f"```python\n{program}\n```"]))
    draw = rng.random()
    if draw < 0.1:
        return text[: -rng.randrange(1, 30)]
    return text.upper() if draw < 0.15 else f"{text}<|im_end|>" if draw < 0.2 else text


class LoggingSampler(ScriptedSampler):
    """Writes random turns in random spellings, and keeps a log of its own of who gave it which ids."""

    def __init__(self, tokenizer: Pieces) -> None:
        super().__init__({})
        self.tokenizer = tokenizer
        self.logs: dict[tuple[int, int], list[tuple[str, list[int], list[float]]]] = {}

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        self.logs[stream[:2]] = [("given", list(prompt_ids), [])]
        return super().submit(prompt_ids, params, stream=stream)

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        self.logs[self.streams[request_id][:2]].append(("given", list(token_ids), []))
        super().extend(request_id, token_ids, params)

    def poll(self) -> list[Completion]:
        self.steps += 1
        number, params = self.queue.pop(random.Random(self.steps).randrange(len(self.queue)))
        rng = random.Random(str(self.streams[number]))
        prompt = self.tokenizer.decode(self.contexts[number])
        grammar = next(grammar for grammar in GRAMMARS.values() if prompt.startswith(f"[{grammar.system}]"))
        text = random_turn(rng, grammar, careful=self.streams[number][1] % 2 == 0)
        whole = self.tokenizer.spell(text, rng.choice)
        ids = whole[: params.max_tokens]
        reason = "error" if text == BROKEN else "stop" if ids == whole else "length"
        logprobs = [-rng.random() for _ in ids]
        self.contexts[number] += ids
        self.logs[self.streams[number][:2]].append(("sampled", ids, logprobs))
        return [Completion(number, ids, logprobs, logprobs, reason, self.tokenizer.decode(ids), "")]


def test_a_thousand_random_trajectories_train_exactly_what_was_sampled() -> None:
    tokenizer = Pieces()
    sampler, sandbox = LoggingSampler(tokenizer), ScriptedSandbox()
    tasks = [
        task(number, ("datamind", "datamind", "agentic", "agentic", "reflection")[number % 5]) for number in range(125)
    ]
    groups = run_agent(
        sampler, sandbox, tasks, tokenizer=tokenizer, num_generations=8, params=SamplingParams(), limits=LIMITS, seed=0
    )  # fmt: skip
    trajectories = [found for group in groups for found in group.trajectories]
    assert len(trajectories) == len(sampler.logs) == 1000
    assert all(session.closed for session in sandbox.sessions)
    rendered = respelled = 0
    for found, log in zip(trajectories, sampler.logs.values(), strict=True):
        # The log begins in the order of the trajectories; what it lacks is what nobody wrote after.
        ids = [token for _, part, _ in log for token in part]
        weights = [float(who == "sampled") for who, part, _ in log for _ in part]
        logprobs = [x for who, part, values in log for x in (values if who == "sampled" else [0.0] * len(part))]
        unread = len(found.token_ids) - len(ids)
        assert unread >= 0
        example = found.to_example()
        assert example.token_ids == found.token_ids == ids + found.token_ids[len(ids) :]
        failed = found.status == "failed"
        assert example.loss_mask == [0.0 if failed else weight for weight in weights] + [0.0] * unread
        assert example.old_logprobs == logprobs + [0.0] * unread
        assert any(found.to_example(mask=VOID_STATUSES).loss_mask) == (not found.is_void)
        assert found.is_void == (found.status not in ("answered", "error_limit"))
        assert len(found.token_ids) <= LIMITS.max_trajectory_tokens
        sampled = [part for who, part, _ in log if who == "sampled"]
        respelled += sum(part != tokenizer.encode(tokenizer.decode(part)) for part in sampled)
        rendered += is_rendered_again(found, tokenizer, [tokenizer.decode(part) for part in sampled])
    assert {found.status for found in trajectories} == {*get_args(Status)} - {"time_limit"}
    assert rendered > 400
    assert respelled > 1000


def is_rendered_again(found: Trajectory, tokenizer: Pieces, texts: list[str]) -> bool:
    """Compares a trajectory's text with what the grammar renders of its parts, where nothing had to be mended."""
    grammar = GRAMMARS[found.task.mode]
    turns = [grammar.parse_turn(text) for text in texts]
    if found.status in ("token_limit", "failed") or any(turn.repairs or turn.kind == "void" for turn in turns):
        return False
    outputs = [cap_text(done.output, tokenizer, LIMITS.max_observation_tokens) for done in found.executions]
    steps = [
        Step(turn.kind, turn.thought, turn.content, output)  # type: ignore[arg-type]
        for turn, output in zip_longest(turns, outputs, fillvalue="")
    ]
    spans = grammar.spans(found.task, steps, tokenizer)  # type: ignore[arg-type]
    if len(outputs) < len(turns) and turns[-1].kind == "code":
        spans.pop()  # it was not executed
    ends = ["<|im_end|>" if text.endswith("<|im_end|>") else "" for text in texts]
    spans = [(who, text + ends.pop(0) if who == "model" else text) for who, text in spans]
    assert [span.writer for span in found.spans] == [who for who, _ in spans]
    assert tokenizer.decode(found.token_ids) == "".join(text for _, text in spans)
    return True


@settings(max_examples=60, deadline=None)
@given(foreign=st.lists(st.sampled_from([*all_tags(), "\n", "1", "<|im_end|>", "<", "</", "code>"]), max_size=8))
def test_tags_from_outside_change_nothing_that_is_parsed(foreign: list[str]) -> None:
    class Parrot(ScriptedSandbox):
        def execute(self, text: str) -> Future[Execution]:
            super().execute(text)
            future: Future[Execution] = Future()
            future.set_result(Execution(True, "".join(foreign), "ok", 0.0))
            return future

    for name in ("datamind", "agentic"):
        grammar = GRAMMARS[name]
        script = [grammar.render_turn("code", "t", "a"), grammar.render_turn("code", "t", "b")]
        script.append(grammar.render_turn("answer", "t", "3"))
        asked = replace(task(mode=name), question="".join(foreign), description="".join(foreign))
        groups, _, sandbox = rollout(script, tasks=[asked], sandbox=Parrot())
        found = groups[0].trajectories[0]
        assert (found.status, found.answer, found.turns) == ("answered", "3", 3)
        assert sandbox.calls == [("a", ()), ("b", ("a",))]
        outside = "".join(Characters().decode(span.token_ids) for span in found.spans if span.writer != "model")
        assert [tag for tag in grammar.tags if tag in outside] == [f"<{grammar.result}>", f"</{grammar.result}>"]


def test_order_of_events_changes_nothing() -> None:
    script = {(sample, turn): code(f"{sample}{turn}") for sample in range(6) for turn in range(3)}
    script |= {(sample, 3): answer(str(sample)) for sample in range(6)}
    first = rollout(script, generations=6, seed=1)[0]
    second = rollout(script, generations=6, seed=2, sandbox=ScriptedSandbox(delay_s=0.002))[0]
    assert [found.token_ids for found in first[0].trajectories] == [found.token_ids for found in second[0].trajectories]
    assert [found.answer for found in first[0].trajectories] == list("012345")


def test_real_rooms_fit_together() -> None:
    """A random model, the real sampler and the real sandbox: the same trajectories at any concurrency."""
    torch.manual_seed(0)
    texts = [code("print(1)"), answer("3"), "How many?", DATAMIND.system]
    tokenizer = Tokenizer.train(texts * 3, 340, all_tags())
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    model = Model(config)
    model.init_weights(1)
    limits = AgentLimits(max_tokens_per_turn=24, max_trajectory_tokens=200)
    tasks = [task(0), task(1, "agentic"), task(2, "reflection")]
    found = []
    with Sandbox(workers=1) as sandbox:
        for concurrency in (0, 1):
            sampler = Sampler(model, tokenizer, kv_memory=0.01, concurrency=concurrency)
            found.append(
                run_agent(
                    sampler, sandbox, tasks, tokenizer=tokenizer, num_generations=4,
                    params=SamplingParams(temperature=0.8), limits=limits, seed=5,
                )
            )  # fmt: skip
            assert sampler.stats["used_blocks"] == 0
    together, alone = ([each.token_ids for group in groups for each in group.trajectories] for groups in found)
    assert together == alone
    assert len({tuple(ids) for ids in together}) == len(together)
    for group in found[0]:
        for trajectory in group.trajectories:
            example = trajectory.to_example()
            assert example.old_logprobs is not None
            ids = torch.tensor(example.token_ids)
            attention = PackedAttention(torch.tensor([0, len(ids) - 1], dtype=torch.int32), len(ids) - 1)
            with torch.no_grad():
                logprobs, _ = model(ids[:-1], torch.arange(len(ids) - 1), attention, ids[1:], temperature=0.8)
            mask = torch.tensor(example.loss_mask[1:]) > 0
            assert torch.allclose(logprobs[mask], torch.tensor(example.old_logprobs[1:])[mask], atol=1e-4)
