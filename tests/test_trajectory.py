"""Trajectories: weights and log-probabilities stand on the tokens that the model sampled, and only there."""

from hypothesis import given
from hypothesis import strategies as st

from groupwise.rollout.task import Task
from groupwise.rollout.trajectory import VOID_STATUSES, Span, Trajectory, cap_text, spans_to_example

TASK = Task("t1", "How many?", (), "", "3", "number", "counting")
WRITERS = ("prompt", "model", "environment", "forced")


class Characters:
    """A tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    spans = [Span("prompt", draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))]
    for writer in draw(st.lists(st.sampled_from(WRITERS[1:]), max_size=6)):
        ids = draw(st.lists(st.integers(0, 9), max_size=5))
        spans.append(Span(writer, ids, [-0.5 - index for index in range(len(ids))] if writer == "model" else []))
    return spans


@given(spans=span_lists())
def test_an_example_trains_what_the_model_sampled(spans: list[Span]) -> None:
    trajectory = Trajectory(TASK, 0, spans, advantage=2.0)
    example = trajectory.to_example(group=3)
    written = [(token, span.writer, index) for span in spans for index, token in enumerate(span.token_ids)]
    assert example.token_ids == trajectory.token_ids == [token for token, _, _ in written]
    assert example.loss_mask == [float(writer == "model") for _, writer, _ in written]
    assert example.old_logprobs == [-0.5 - index if writer == "model" else 0.0 for _, writer, index in written]
    assert (example.advantage, example.group) == (2.0, 3)
    assert trajectory.completion_tokens == sum(example.loss_mask)


def test_void_trajectories_leave_the_loss_only_when_asked() -> None:
    spans = [Span("prompt", [1]), Span("model", [2, 3], [-1.0, -2.0])]
    for status, void in (("answered", False), ("void", True), ("turn_limit", True), ("error_limit", False)):
        trajectory = Trajectory(TASK, 0, spans, status=status)
        assert trajectory.to_example().loss_mask == [0.0, 1.0, 1.0]
        assert trajectory.to_example(mask=VOID_STATUSES).loss_mask == [0.0, *([0.0 if void else 1.0] * 2)]


def test_expert_spans_have_no_logprobs() -> None:
    spans = [Span("prompt", [1, 2]), Span("model", [3]), Span("environment", [4])]
    example = spans_to_example(spans, prompt_weight=0.2, expert=True)
    assert example.loss_mask == [0.0, 0.2, 1.0, 0.0]
    assert example.old_logprobs is None
    assert example.expert


def test_forced_text_belongs_to_the_turn_before() -> None:
    tokenizer = Characters()
    spans = [Span("prompt", [1])]
    for writer, text in (("model", "ab"), ("forced", "c"), ("environment", "E"), ("model", "d")):
        spans.append(Span(writer, tokenizer.encode(text)))
    assert Trajectory(TASK, 0, spans).model_text(tokenizer) == ["abc", "d"]


@given(text=st.text(max_size=400), limit=st.integers(0, 200))
def test_capped_text_fits_and_keeps_head_and_tail(text: str, limit: int) -> None:
    capped = cap_text(text, Characters(), limit)
    assert len(capped) <= limit
    if len(text) <= limit:
        assert capped == text
    elif capped:
        head, _, tail = capped.partition("\n... ")
        assert text.startswith(head)
        assert text.endswith(tail.partition(" characters left out ...\n")[2])


def test_very_long_text_is_capped_quickly_and_counted() -> None:
    text = "head" + "x" * 3_000_000 + "tail"
    capped = cap_text(text, Characters(), 100)
    assert capped.startswith("head")
    assert capped.endswith("tail")
    assert len(capped) <= 100
