import dataclasses
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.data import filters
from groupwise.data.filters import Filters, alike, content, shingles, words
from groupwise.data.trajectories import Expert
from groupwise.rollout.grammar import GRAMMARS
from groupwise.rollout.task import Task

GRAMMAR = GRAMMARS["datamind"]
QUESTION = 'What is the mean of "price" over the rows with "size" above 12?'


def expert(
    *turns: tuple[str, str, str], question: str = QUESTION, table: str = "cars", seen: tuple[str, ...] = ()
) -> Expert:
    """(kind, thought, content) of each turn; `seen` is read after those of code, "1" where there is none."""
    task = Task("1", question, (), 'read_csv("cars.csv"), 9 rows: "price" int', "4", "number", "counting", table=table)
    spans = []
    for number, (kind, thought, text) in enumerate(turns or (("answer", "It is known.", "4"),)):
        spans.append(("model", GRAMMAR.render_turn(kind, thought, text)))
        if kind == "code":
            spans.append(("environment", GRAMMAR.observation(dict(enumerate(seen)).get(number, "1"))))
    return Expert(task, tuple(spans), "success", "datamind")


def test_what_is_sound_passes_every_filter():
    sound = expert(("code", "Mean of the column.", "print(1)"), ("answer", "The output is the answer.", "4"))
    assert Filters([]).reason(sound) is None


@pytest.mark.parametrize(
    "spans",
    [
        (("model", "<think>a</think>\n<answer>4"),),
        (("model", "no tags at all"),),
        (("model", GRAMMAR.render_turn("code", "a", "print(1)")),),
        (
            ("model", GRAMMAR.render_turn("answer", "a", "4")),
            ("environment", "x"),
            ("model", GRAMMAR.render_turn("answer", "a", "4")),
        ),
    ],
)
def test_grammar(spans):
    assert Filters().reason(dataclasses.replace(expert(), spans=spans)) == "grammar"


def test_length_is_that_of_the_answer():
    assert Filters().reason(expert(("answer", "So many.", " ".join(map(str, range(1024)))))) is None
    assert Filters().reason(expert(("answer", "So many.", " ".join(map(str, range(1025)))))) == "length"


@pytest.mark.parametrize(
    "thought", ["Let us 计算平均值 now.", "Среднее of the column.", "broken \ufffd text", "a\x07bell"]
)
def test_other_scripts_and_broken_characters(thought):
    assert Filters().reason(expert(("answer", thought, "4"))) == "language"


@pytest.mark.parametrize("thought", ["The mean μ and the deviation σ, α = 0.05.", "naïve café, Ångström", "It is 4."])
def test_science_and_accents_are_no_other_script(thought):
    assert Filters().reason(expert(("answer", thought, "4"))) is None


def test_a_script_that_the_table_has_may_be_written():
    assert (
        Filters().reason(expert(("answer", "北京 is first.", "北京"), question="Which 城市 is first, 北京 or 上海?"))
        is None
    )


def test_overthinking():
    loop = "Let me check the mean again and then once more. " * 8
    assert Filters().reason(expert(("answer", loop, "4"))) == "overthinking"
    again = ("code", "Compute the mean of the price column now.", "print(1)")
    end = ("answer", "Done.", "4")
    assert Filters().reason(expert(again, again, again, again, end)) == "overthinking"
    # Before the second thought something new was read, later it was the same.
    assert Filters().reason(expert(again, again, again, end)) is None
    assert Filters().reason(expert(again, again, again, again, end, seen=("1", "2", "3", "4"))) is None


def test_duplicates_count_by_table_columns_and_values():
    kept = Filters()
    first = expert()
    assert kept.reason(first) is None
    kept.keep([first])
    assert kept.reason(expert()) == "duplicate"
    assert kept.reason(expert(question=QUESTION.replace("?", ""))) == "duplicate"
    assert kept.reason(expert(question=QUESTION.replace("mean", "median"))) is None
    for other in ('"cost"', '"weight"'):
        assert kept.reason(expert(question=QUESTION.replace('"price"', other))) is None
    assert kept.reason(expert(question=QUESTION.replace("12", "13"))) is None
    assert kept.reason(expert(table="boats")) is None


def test_contamination_is_thirteen_words_of_a_benchmark_in_a_row():
    asked = "Please tell us: what is the mean fare of all passengers of the first class who paid more than ten?"
    kept = Filters([asked])
    assert kept.reason(expert(question=f"Well. {asked.replace('Please tell us: w', 'W')}")) == "contamination"
    assert kept.reason(expert(question=asked.replace("passengers", "sailors"))) is None


@given(st.lists(st.sampled_from(['"a"', '"b"', "12", "mean", "of", "rows", "is"]), max_size=8), st.integers(0, 99))
def test_alike_is_symmetric_and_one_for_itself(items, seed):
    other = items[:]
    Random(seed).shuffle(other)
    first, second = shingles(items), shingles(other)
    assert alike(first, second) == alike(second, first)
    assert not items or alike(first, first) == 1
    assert content(items) == content(other)


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_text_is_an_exception(text, around):
    words(text)
    filters.garbled(text, around)
    filters.overthought([text, around], [around])
