"""What is wrong with an expert trajectory, by one filter after another; a set of them keeps the counts.

grammar: a turn is not well formed. length: the answer has over `MAX_ANSWER_TOKENS`. language: letters of a script that
nothing around it uses, or what no language has. overthinking: the same words over and over, or thoughts that come back
without a new observation between them. duplicate: the same columns and values of the same table in nearly the words
of another question. contamination: nearly the question of a benchmark. Sources: DataMind, arXiv 2509.25084; the numbers
are this project's.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ..rollout.grammar import GRAMMARS
from ..rollout.task import Task
from .trajectories import Expert

MAX_ANSWER_TOKENS = 1024  # DataMind; words and marks are counted, which no tokenizer makes fewer
MAX_STRAY_LETTERS = 2
NGRAM, MAX_REPEATED = 6, 0.5  # a text is over half repetition if so large a share of its n-grams was there before
MIN_NGRAMS = 20
SAME_THOUGHT, MAX_THOUGHTS = 0.8, 3
SAME_QUESTION = 0.9
LIFTED = 13  # words in a row that stand in a benchmark's question: GPT-3, arXiv 2005.14165, appendix C

WORD = re.compile(r'"[^"]*"|[^\W_]+(?:[.,]\d+)*|\S')
Shingles = frozenset[tuple[str, ...]]
Subject = tuple[str, frozenset[str]]


class Filters:
    """Judges trajectories one after another; what is kept counts for those that follow.

    Args:
        benchmark: questions that must not be trained on.
    """

    def __init__(self, benchmark: Iterable[str] = ()) -> None:
        self._kept: dict[Subject, list[Shingles]] = defaultdict(list)
        self._benchmark = {gram for question in benchmark for gram in ngrams(words(question), LIFTED)}

    def reason(self, expert: Expert) -> str | None:
        """The first filter that a trajectory does not pass, or None."""
        turns = [text for writer, text in expert.spans if writer == "model"]
        parsed = [GRAMMARS[expert.grammar].parse_turn(text) for text in turns]
        if any(turn.kind == "void" or turn.repairs for turn in parsed):
            return "grammar"
        if [turn.kind for turn in parsed] != ["code"] * (len(parsed) - 1) + ["answer"]:
            return "grammar"
        answer, thoughts = parsed[-1].content, [turn.thought for turn in parsed]
        if len(words(answer)) > MAX_ANSWER_TOKENS:
            return "length"
        read = "".join(text for writer, text in expert.spans if writer != "model")
        if garbled(" ".join([*thoughts, answer]), f"{expert.task.description} {expert.task.question} {read}"):
            return "language"
        if overthought(thoughts, [text for writer, text in expert.spans if writer != "model"]):
            return "overthinking"
        question = words(expert.task.question)
        if self._benchmark.intersection(ngrams(question, LIFTED)):
            return "contamination"
        mine = shingles(question)
        if any(alike(other, mine) >= SAME_QUESTION for other in self._kept.get(_subject(expert.task), ())):
            return "duplicate"
        return None

    def keep(self, experts: Iterable[Expert]) -> None:
        """Trajectories that are kept; several of one task are no duplicates of each other."""
        for task in {expert.task.id: expert.task for expert in experts}.values():
            self._kept[_subject(task)].append(shingles(words(task.question)))


def _subject(task: Task) -> Subject:
    """What a question is about: columns and values of a table, or, where it names none, a table as described."""
    return task.table, content(words(task.question)) or frozenset([task.description])


def words(text: str) -> list[str]:
    """The words, marks and quoted texts of a text, in lower case."""
    return WORD.findall(text.lower())


def ngrams(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` items."""
    return [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]


def shingles(items: Sequence[str]) -> Shingles:
    """The words and the pairs of neighbours of a text: two texts are as alike as these sets (Jaccard)."""
    return frozenset([*ngrams(items, 1), *ngrams(items, 2)])


def content(items: Sequence[str]) -> frozenset[str]:
    """The quoted texts and the numbers of a text: two that name other columns or values ask something else."""
    return frozenset(item for item in items if item[0] == '"' or item[0].isdigit())


def alike(first: Shingles, second: Shingles) -> float:
    """Jaccard's index, in [0, 1]."""
    return len(first & second) / max(len(first | second), 1)


def garbled(text: str, around: str) -> bool:
    """Whether a text holds letters of a script that `around` lacks, beside those of another, or broken characters."""
    if any(
        mark == "\ufffd" or unicodedata.category(mark) in ("Cc", "Co", "Cn") for mark in text if mark not in "\n\t\r"
    ):
        return True
    found = _scripts(text)
    if not found:
        return False
    own, known = found.most_common(1)[0][0], _scripts(around)
    return sum(count for script, count in found.items() if script != own and script not in known) > MAX_STRAY_LETTERS


def _scripts(text: str) -> Counter[str]:
    """Letters by script, the first word of a letter's name: LATIN, CYRILLIC, CJK."""
    if text.isascii():
        return Counter(LATIN=sum(map(str.isalpha, text)))
    # Science writes single Greek letters and signs in any language.
    names = Counter(unicodedata.name(mark, "?").partition(" ")[0] for mark in text if mark.isalpha())
    return Counter({name: count for name, count in names.items() if name not in ("GREEK", "MICRO", "MATHEMATICAL")})


def overthought(thoughts: Sequence[str], observations: Sequence[str]) -> bool:
    """Whether thoughts repeat themselves, each one in itself or several without a new observation between.

    Args:
        thoughts: of the turns, in order.
        observations: what was read after each turn but the last.
    """
    if any(_repeats(words(thought)) for thought in thoughts):
        return True
    run: list[Shingles] = []
    for number, thought in enumerate(thoughts):
        if number and observations[number - 1] not in observations[: number - 1]:
            run = []
        run.append(shingles(words(thought)))
        if sum(alike(other, run[-1]) >= SAME_THOUGHT for other in run) >= MAX_THOUGHTS:
            return True
    return False


def _repeats(items: Sequence[str]) -> bool:
    grams = ngrams(items, NGRAM)
    return len(grams) >= MIN_NGRAMS and 1 - len(set(grams)) / len(grams) > MAX_REPEATED
