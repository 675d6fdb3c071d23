"""The same trajectory under other names: what columns are called does not change what the code prints.

Executing code is dear and writing text is cheap. A model that sees a trajectory several times under the same names
learns the names by heart; under new names each time it has to learn to copy them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from random import Random

from .names import NameMaker
from .trajectories import Expert

COLUMN = re.compile(r'"([^"\n]+)" (?:int|float|bool|text)\b')
FILE = re.compile(r'\Aread_csv\("([^"\n]+)"\)')
QUOTED = re.compile(r'"([^"\n]*)"')


def renamed(expert: Expert, rng: Random, avoid: Collection[str] = ()) -> Expert:
    """`expert` with new names for its columns and its file, in its description, question and spans.

    A trajectory that shows a name without its quotes (an answer, an error message about a misspelt name) is returned as
    it is, because there the name is more than a name.

    Args:
        rng: the source of chance; the same state gives the same names.
        avoid: names that must never come up, for example the headers of the evaluation tables.
    """
    task = expert.task
    columns, file = COLUMN.findall(task.description), FILE.findall(task.description)
    spans = "".join(text for _, text in expert.spans)
    if _shows_bare_names([*columns, *file], f"{task.question}\n{spans}"):
        return expert
    maker = NameMaker(rng, avoid)
    new = dict(zip([*columns, *file], [*maker.columns(len(columns)), *(maker.file() for _ in file)], strict=True))

    def rename(text: str) -> str:
        return QUOTED.sub(lambda quoted: f'"{new.get(quoted[1], quoted[1])}"', text)

    return replace(
        expert,
        task=replace(task, description=rename(task.description), question=rename(task.question)),
        spans=tuple((writer, rename(text)) for writer, text in expert.spans),
    )


def _shows_bare_names(names: list[str], text: str) -> bool:
    bare = QUOTED.sub('""', text)
    misspelt = "Error: '" in bare
    return misspelt or any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", bare) for name in names)
