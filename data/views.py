"""Views: the same real table under many names, as small .csv files.

A training view takes some rows and columns of a table and renames everything in it, for a model that begins with
nothing; an evaluation view keeps the real names and all rows and only leaves columns out, so that its description stays
short; a whole view is the table itself, for models that read long descriptions. What a view holds is what code
reads back from its .csv text, so answers computed on `View.frame` are answers about the file.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd

from .metadata import describe_fully
from .names import NameMaker
from .tables import Roles, Table, describe, kind, roles

MAX_HEADER_CHARS = 60
VIEW_ROWS = (20, 60)
VIEW_COLUMNS = (2, 6)
WHOLE_COLUMNS = 40
# Names of added columns until they are renamed; no cleaned header holds a line break.
GROUPS, LABELS, TIMES = "\ngroups", "\nlabels", "\ntimes"


@dataclass(frozen=True)
class View:
    """Some columns of a table in a .csv file.

    `table` names the table that it comes from, `file` is the base name of the file, `csv` its text. `budget` is the
    length in characters that its description may have; 0 stands for names and types alone.
    """

    table: str
    file: str
    csv: str
    budget: int = 0

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table as `pandas.read_csv` reads it."""
        return pd.read_csv(io.StringIO(self.csv))

    @cached_property
    def roles(self) -> Roles:
        """What each column can be asked for."""
        return roles(self.frame)

    @cached_property
    def description(self) -> str:
        """The metadata text that stands before a question."""
        if self.budget:
            return describe_fully(self.file, self.frame, self.budget)
        return describe(self.file, self.frame)

    def write(self, folder: str | Path) -> Path:
        """Write the file into `folder` (made if need be) and return its absolute path."""
        path = Path(folder).absolute() / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.csv, encoding="utf-8")
        return path


def _pick_columns(table: Table, rng: Random, count: int) -> list[str]:
    """`count` columns, a numeric one among them and, mostly, one that names or groups rows; in the table's order."""
    found = table.roles
    chosen = {rng.choice(found.numeric)}
    special = [name for name in (*found.labels, *found.times, *found.groups) if name not in chosen]
    if special and rng.random() < 0.75:
        chosen.add(rng.choice(special))
    # Numbers carry most questions: columns that can be asked nothing come last.
    numeric = set(found.numeric)
    others = sorted(set(table.frame.columns) - chosen)
    rng.shuffle(others)
    others.sort(key=lambda name: name not in numeric)
    chosen.update(others[: max(0, count - len(chosen))])
    return [name for name in table.frame.columns if name in chosen]


def _augment(columns: dict[str, pd.Series], known: Roles, rng: Random) -> dict[str, pd.Series]:
    """Add groups, labels, years or gaps now and then, so that no question type hangs on the few tables with them."""
    rows = len(next(iter(columns.values())))
    numeric = [name for name in columns if name in known.numeric]
    gappy = rng.choice(numeric)
    added: dict[str, pd.Series] = {}
    if not set(columns) & set(known.groups) and rng.random() < 0.4:
        values = columns[rng.choice(numeric)].to_numpy(dtype=float)
        edges = np.nanquantile(values, np.linspace(0, 1, rng.choice((2, 3, 4)) + 1)[1:-1])
        codes = pd.Series(np.searchsorted(edges, values))
        added[GROUPS] = codes.sample(frac=0.7, random_state=rng.randrange(2**31)).reindex(codes.index, fill_value=0)
    if not set(columns) & set(known.labels) and rng.random() < 0.3:
        added[LABELS] = pd.Series([f"row {number}" for number in range(rows)])
    if not set(columns) & set(known.times) and rng.random() < 0.3:
        start = rng.randint(1800, 2020 - rows)
        added[TIMES] = pd.Series(range(start, start + rows))
    result = dict(columns)
    if rng.random() < 0.3:
        gaps = rng.sample(range(rows), rng.randint(1, max(1, rows // 8)))
        result[gappy] = columns[gappy].astype("float64").where(~columns[gappy].index.isin(gaps))
    if not added:
        return result
    order = [*result, *added]
    rng.shuffle(order)
    return {name: added[name] if name in added else result[name] for name in order}


def _rename(columns: dict[str, pd.Series], known: Roles, maker: NameMaker, rng: Random) -> pd.DataFrame:
    """New names for all columns and for all values of text columns; some small whole-number codes become words."""
    result: dict[str, pd.Series] = {}
    for (name, column), new in zip(columns.items(), maker.columns(len(columns)), strict=True):
        coded = name in known.groups or name == GROUPS
        if kind(column) == "text" or (coded and rng.random() < 0.6):
            old = list(dict.fromkeys(column.dropna()))
            column = column.map(dict(zip(old, NameMaker(rng).values(len(old)), strict=True)))
        result[new] = column
    return pd.DataFrame(result)


def training_view(table: Table, rng: Random, avoid: Collection[str] = ()) -> View:
    """A small renamed part of a table.

    Args:
        table: a training table.
        rng: the source of chance; the same state gives the same view.
        avoid: column names that must not come up (the headers of the evaluation tables).
    """
    rows = min(len(table.frame), rng.randint(*VIEW_ROWS))
    picked = table.frame[_pick_columns(table, rng, rng.randint(*VIEW_COLUMNS))]
    picked = picked.iloc[sorted(rng.sample(range(len(picked)), rows))].reset_index(drop=True)
    columns = _augment({name: picked[name] for name in picked.columns}, table.roles, rng)
    maker = NameMaker(rng, avoid)
    frame = _rename(columns, table.roles, maker, rng)
    view = View(table.name, maker.file(), frame.to_csv(index=False))
    # A few rows of a sparse column can be all alike; other rows are not.
    return view if view.roles.numeric else training_view(table, rng, avoid)


def evaluation_view(table: Table, rng: Random) -> View:
    """Some columns of a table under their real names, all rows; the header stays within MAX_HEADER_CHARS."""
    names = _pick_columns(table, rng, rng.randint(3, 6))
    numeric = next(name for name in names if name in table.roles.numeric)
    while len(names) > 1 and sum(map(len, names)) > MAX_HEADER_CHARS:
        names.remove(max((name for name in names if name != numeric), key=len))
    return View(table.name, table.file, table.frame[names].to_csv(index=False))


def whole_view(table: Table, budget: int) -> View:
    """All rows of a table under its real names, with the full description; of very many columns the first ones.

    Args:
        table: a table, to train or to evaluate on.
        budget: the length in characters that the description may have.
    """
    names = list(table.frame.columns)[:WHOLE_COLUMNS]
    if not set(names) & set(table.roles.numeric):
        names[-1] = table.roles.numeric[0]
    return View(table.name, table.file, table.frame[names].to_csv(index=False), budget)
