"""Tasks from views: balanced over types and modes, each with its program, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from ..engine.errors import UserError
from ..rollout.grammar import GRAMMARS
from ..rollout.task import Language, Task
from .asking.questions import Question
from .asking.sql_operations import SQL_OPERATIONS
from .databases import Database
from .tables import Table
from .taxonomy import Detail, task_types
from .views import View, evaluation_view, training_view

MODE_SHARES: Mapping[str, float] = {"datamind": 0.8, "agentic": 0.1, "reflection": 0.1}
ATTEMPTS = 40


@dataclass(frozen=True)
class Problem:
    """A task and what its teacher knows: the question with its program, and the view that it is about."""

    task: Task
    question: Question
    view: View | Database

    @property
    def sheet(self) -> View:
        """The view of a question that Python answers."""
        assert isinstance(self.view, View)
        return self.view


def training_views(
    tables: Sequence[Table], count: int, *, seed: int, stream: str = "sft", avoid: Collection[str] = ()
) -> list[View]:
    """`count` renamed views over all `tables` in turn.

    Args:
        tables: the training tables.
        count: number of views.
        seed, stream: another stream (say "grpo") gives other views of the same tables.
        avoid: column names that must not come up; see `headers`.
    """
    views = []
    for index in range(count):
        rng = Random(f"{seed}:{stream}:view:{index}")
        views.append(training_view(tables[index % len(tables)], rng, avoid))
    return views


def evaluation_views(tables: Sequence[Table], count: int, *, seed: int) -> list[View]:
    """`count` views over all evaluation `tables` in turn, with their real names."""
    chosen = (tables[index % len(tables)] for index in range(count))
    return [evaluation_view(table, Random(f"{seed}:evaluation:view:{index}")) for index, table in enumerate(chosen)]


def headers(tables: Sequence[Table]) -> frozenset[str]:
    """All column names of `tables`."""
    return frozenset(str(name) for table in tables for name in table.frame.columns)


def shares_to_counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Divide `total` by `shares` (any positive scale), exactly, the largest remainders rounded up.

    Raises:
        UserError: a share is negative or all are 0.
    """
    whole = sum(shares.values())
    if min(shares.values(), default=0) < 0 or whole <= 0:
        raise UserError(f"the shares {dict(shares)} must be 0 or more and not all 0.")
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def make_problems(
    views: Sequence[View],
    count: int,
    *,
    seed: int,
    name: str,
    folder: str | Path,
    modes: Mapping[str, float] = MODE_SHARES,
    types: Collection[str] | None = None,
    detail: Detail = "short",
) -> list[Problem]:
    """`count` different problems about `views`, as evenly over the task types as the views allow.

    Args:
        views: what to ask about; the files of those that are used are written.
        count: number of problems.
        seed: the same seed gives the same problems.
        name: beginning of the task ids and of the files' folder.
        folder: where the files go, as `folder/name/NUMBER/FILE`.
        modes: shares of the modes "datamind", "agentic", "reflection".
        types: names of the task types to ask for; None for all.
        detail: "short" asks with the basic set of operations alone and takes two wordings for two questions; "full"
            with all, composed questions too, and asks nothing twice of a view in other words.

    Raises:
        UserError: an unknown type, or views that allow no further question.
    """
    known = task_types(detail)
    if unknown := set(types or ()) - set(known):
        raise UserError(f"unknown task type {min(unknown)!r}; expected some of {', '.join(known)}.")
    chosen = [known[name] for name in (known if types is None else types)]

    def deck(mode: str, rng: Random) -> _Deck:
        return _Deck({t.name: t.reflections if mode == "reflection" else t.operations for t in chosen}, rng)

    return _pose(views, deck, count, seed=seed, name=name, folder=folder, modes=modes, by_text=detail == "short")


def make_sql_problems(
    databases: Sequence[Database],
    count: int,
    *,
    seed: int,
    name: str,
    folder: str | Path,
    modes: Mapping[str, float] = MODE_SHARES,
) -> list[Problem]:
    """As `make_problems`, about databases and answered by SQL; without the modes that run no code.

    Raises:
        UserError: databases that allow no further question, or no mode runs code.
    """
    with_code = {mode: share for mode, share in modes.items() if share and GRAMMARS[mode].code}
    types = dict.fromkeys(operation.task_type for operation in SQL_OPERATIONS)
    operations = {t: tuple(operation for operation in SQL_OPERATIONS if operation.task_type == t) for t in types}

    def deck(_: str, rng: Random) -> _Deck:
        return _Deck(operations, rng)

    return _pose(databases, deck, count, seed=seed, name=name, folder=folder, modes=with_code, language="sql")


def _pose(
    views: Sequence[View] | Sequence[Database],
    deck: Callable[[str, Random], _Deck],
    count: int,
    *,
    seed: int,
    name: str,
    folder: str | Path,
    modes: Mapping[str, float],
    language: Language = "python",
    by_text: bool = False,
) -> list[Problem]:
    """Problems of what the decks of the modes draw; `by_text` takes two wordings of a question for two."""
    rng = Random(f"{seed}:{name}:problems")
    order = [mode for mode, share in shares_to_counts(modes, count).items() for _ in range(share)]
    rng.shuffle(order)
    written: dict[int, str] = {}
    asked: set[tuple[int, str, str]] = set()
    problems: list[Problem] = []
    decks = {mode: deck(mode, rng) for mode in sorted(set(order))}
    for index, mode in enumerate(order):
        number, question = _draw(views, decks[mode], asked, rng, by_text)
        view = views[number]
        if number not in written:
            written[number] = str(view.write(Path(folder) / name / str(number)))
        task = Task(
            id=f"{name}-{index:05d}",
            question=question.text,
            files=(written[number],),
            description=view.description,
            answer=question.answer,
            answer_type=question.answer_type,
            task_type=question.task_type,
            mode=mode,
            table=view.table,
            language=language,
        )
        problems.append(Problem(task, question, view))
    return problems


class Asks(Protocol):
    """Something to ask: an `Operation`, a `Composition`, or an `SqlOperation`, which asks of a database."""

    def ask(self, view: Any, rng: Random) -> Question | None: ...


class _Deck:
    """Task types like cards: each comes up once before any comes up again; in a type, each operation likewise."""

    def __init__(self, operations: Mapping[str, Sequence[Asks]], rng: Random) -> None:
        self.rng = rng
        self.operations = {name: found for name, found in operations.items() if found}
        if not self.operations:
            raise UserError("none of the chosen task types has a question for the reflection mode; give it share 0.")
        self.types: list[str] = []
        self.cards: dict[str, list[Asks]] = {name: [] for name in self.operations}

    def next(self) -> Asks:
        if not self.types:
            self.types = list(self.operations)
            self.rng.shuffle(self.types)
        cards = self.cards[name := self.types.pop()]
        if not cards:
            cards.extend(self.operations[name])
            self.rng.shuffle(cards)
        return cards.pop()


def _draw(
    views: Sequence[View] | Sequence[Database],
    deck: _Deck,
    asked: set[tuple[int, str, str]],
    rng: Random,
    by_text: bool,
) -> tuple[int, Question]:
    """The number of a view and a question about it that was not asked before."""
    for _ in range(len(deck.operations) * 4):
        operation = deck.next()
        for _ in range(ATTEMPTS):
            number = rng.randrange(len(views))
            question = operation.ask(views[number], rng)
            if question is None:
                continue
            key = (number, "", question.text)
            if question.asked and not by_text:
                key = (number, question.operation, question.asked)
            if key not in asked:
                asked.add(key)
                return number, question
    raise UserError(f"{len(views)} views allow only {len(asked)} different questions; use more views or ask for fewer.")
