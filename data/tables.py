"""Real tables: found, cleaned, described, and divided into training and evaluation tables.

Without a folder the tables are those that scikit-learn and statsmodels carry. A table that cannot serve is dropped with
a reason; only a request that leaves nothing to work with is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd

from ..engine.errors import UserError
from .reading import SUFFIXES, Dropped, find_files, read_frames

MIN_ROWS = 20
MAX_ROWS = 10_000
MAX_NAME = 30
LEVELS = range(2, 9)
UNQUOTABLE = frozenset("\"'\\\n\r\t{}")


@dataclass(frozen=True)
class Roles:
    """What the columns of a frame can be asked for.

    `numeric`: finite numbers with at least three values; `groups`: two to eight values, each at least twice;
    `labels`: a different text in each row; `times`: a different year in each row.
    """

    numeric: tuple[str, ...]
    groups: tuple[str, ...]
    labels: tuple[str, ...]
    times: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A cleaned table: `name` is unique in a collection, `frame` holds only columns that a question can name.

    `omitted` says which columns of the source are not in it, and why.
    """

    name: str
    frame: pd.DataFrame
    omitted: tuple[Dropped, ...] = ()

    @property
    def file(self) -> str:
        """The base name under which the code of a trajectory opens the table."""
        return f"{self.name}.csv"

    @cached_property
    def roles(self) -> Roles:
        """What each column can be asked for."""
        return roles(self.frame)


def quotable(text: object, limit: int = MAX_NAME) -> bool:
    """Whether a value is a text that can stand between double quotes in a question and in code as it is."""
    if not isinstance(text, str):
        return False
    return 0 < len(text) <= limit and text == text.strip() and text.isprintable() and not UNQUOTABLE & set(text)


def kind(column: pd.Series) -> str:
    """The word for a column's type in a description: int, float, bool or text."""
    if pd.api.types.is_bool_dtype(column):
        return "bool"
    if pd.api.types.is_integer_dtype(column):
        return "int"
    return "float" if pd.api.types.is_float_dtype(column) else "text"


def roles(frame: pd.DataFrame) -> Roles:
    """Sort the columns of `frame` by what can be asked about them; a column may have several roles, or none."""
    numeric, groups, labels, times = [], [], [], []
    for name in frame.columns:
        column = frame[name]
        values = column.dropna()
        sort, levels = kind(column), values.nunique()
        if sort in ("int", "float"):
            magnitude = float(values.abs().max()) if len(values) else math.inf
            if len(values) >= MIN_ROWS // 2 and levels >= 3 and np.isfinite(magnitude) and magnitude < 1e9:
                numeric.append(name)
        if sort in ("int", "text") and levels in LEVELS:
            sizes = Counter(values)
            if min(sizes.values()) >= 2 and all(sort == "int" or quotable(value, 20) for value in sizes):
                groups.append(name)
        complete = len(values) == len(frame) == levels
        if sort == "text" and complete and all(quotable(value, 20) for value in values):
            labels.append(name)
        if sort == "int" and complete and values.min() >= 1500 and values.max() <= 2100:
            times.append(name)
    # Nobody averages years, unless there is nothing else.
    numeric = [name for name in numeric if name not in times] or numeric
    return Roles(tuple(numeric), tuple(groups), tuple(labels), tuple(times))


def describe(file: str, frame: pd.DataFrame) -> str:
    """The metadata text of a table: file name, number of rows, and each column's quoted name with its type."""
    columns = ", ".join(f'"{name}" {kind(frame[name])}' for name in frame.columns)
    return f'read_csv("{file}"), {len(frame)} rows: {columns}'


def clean(frame: pd.DataFrame, max_name: int = MAX_NAME) -> tuple[pd.DataFrame, list[Dropped]]:
    """The columns that can be named and asked about, under stripped names, and those left out, each with the reason."""
    frame = frame.rename(columns=lambda name: str(name).strip().strip("'\"").strip())
    frame = frame.replace([np.inf, -np.inf], np.nan)
    kept: dict[str, pd.Series] = {}
    omitted: list[Dropped] = []
    taken: set[str] = set()
    for place, name in enumerate(frame.columns):
        if name.startswith("Unnamed:") or not name:
            omitted.append(Dropped(f"column {place + 1}", "no name"))
        elif not quotable(name, max_name):
            omitted.append(
                Dropped(name, f"its name is over {max_name} characters, or has quotes, braces or line breaks")
            )
        elif name.lower() in taken:
            omitted.append(Dropped(name, "another column has its name"))
        else:
            taken.add(name.lower())
            column = _numbers(frame.iloc[:, place])
            if column.nunique() >= 2:
                kept[name] = column
            else:
                omitted.append(Dropped(name, "fewer than two different values"))
    return pd.DataFrame(kept).reset_index(drop=True), omitted


def _numbers(column: pd.Series) -> pd.Series:
    """A text column without spaces around its values, or as numbers if over nine tenths of it are."""
    if kind(column) != "text":
        return column
    column = column.map(lambda value: value.strip() if isinstance(value, str) else value)
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if numbers.notna().sum() > 0.9 * len(column) else column


def accept(
    name: str, frame: pd.DataFrame, *, min_rows: int = MIN_ROWS, max_rows: int = MAX_ROWS, max_name: int = MAX_NAME
) -> Table | Dropped:
    """Clean `frame` and make it a Table, or say why it cannot be one."""
    frame = frame.dropna(how="all")
    if len(frame) < min_rows:
        return Dropped(name, f"under {min_rows} rows")
    if len(frame) > max_rows:
        return Dropped(name, f"over {max_rows} rows")
    frame, omitted = clean(frame, max_name)
    if frame.empty:
        return Dropped(name, "no usable column: none can be named and has two values")
    if not roles(frame).numeric:
        return Dropped(name, "no usable column: none holds numbers")
    return Table(name, frame, tuple(omitted))


def _sklearn_frames() -> Iterable[tuple[str, pd.DataFrame]]:
    from sklearn import datasets  # optional, and slow to import

    for name in ("iris", "wine", "breast_cancer", "diabetes", "linnerud"):
        options = {"scaled": False} if name == "diabetes" else {}
        bunch = getattr(datasets, f"load_{name}")(as_frame=True, **options)
        frame = bunch.frame
        if name in ("iris", "wine", "breast_cancer"):
            header = {"iris": "species", "wine": "cultivar", "breast_cancer": "diagnosis"}[name]
            words = [str(word) for word in bunch.target_names]
            frame = frame.drop(columns="target").assign(**{header: [words[code] for code in frame["target"]]})
        yield name, frame


def bundled(
    *, min_rows: int = MIN_ROWS, max_rows: int = MAX_ROWS, max_name: int = MAX_NAME
) -> tuple[list[Table], list[Dropped]]:
    """The tables that the installed scikit-learn and statsmodels carry.

    Raises:
        UserError: neither package is installed.
    """
    tables: list[Table] = []
    dropped: list[Dropped] = []
    if importlib.util.find_spec("sklearn"):
        for name, frame in _sklearn_frames():
            _sort(accept(name, frame, min_rows=min_rows, max_rows=max_rows, max_name=max_name), tables, dropped)
    spec = importlib.util.find_spec("statsmodels")
    if spec and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0]) / "datasets"
        _read_all(
            sorted(root.glob("*/*.csv")), root, tables, dropped, min_rows=min_rows, max_rows=max_rows, max_name=max_name
        )
    if not tables:
        raise UserError("no bundled table was found; install groupwise[data] or name a folder of them, tables=DIR.")
    return tables, dropped


def find_tables(
    folder: str | Path | None = None,
    *,
    min_rows: int = MIN_ROWS,
    max_rows: int = MAX_ROWS,
    suffixes: Sequence[str] = SUFFIXES,
    max_name: int = MAX_NAME,
) -> tuple[list[Table], list[Dropped]]:
    """The usable tables of `folder` (.csv, .tsv, .xlsx and SQLite files under it) or the bundled ones, and the dropped.

    Each sheet of a workbook and each table of a database is a table of its own, named after both.

    Args:
        folder: a folder of tables; None for the bundled ones.
        min_rows, max_rows: limits in rows, both inclusive.
        suffixes: of the files that are read.
        max_name: the most characters of a column's name; columns with longer ones are left out, since a small model
            copies short names only.

    Raises:
        UserError: the folder is missing or holds no such file, or no table can be used.
    """
    if folder is None:
        return bundled(min_rows=min_rows, max_rows=max_rows, max_name=max_name)
    paths, dropped = find_files(folder, suffixes)
    if not paths:
        raise UserError(
            f"the folder of tables {folder} holds no .csv file, workbook or database; put two tables there."
        )
    tables: list[Table] = []
    _read_all(paths, Path(folder), tables, dropped, min_rows=min_rows, max_rows=max_rows, max_name=max_name)
    if not tables:
        reasons = "; ".join(f"{drop.source}: {drop.reason}" for drop in dropped[:3])
        raise UserError(f"none of the {len(paths)} files in {folder} can be used ({reasons}); add numeric tables.")
    return tables, dropped


def _read_all(
    paths: list[Path],
    root: Path,
    tables: list[Table],
    dropped: list[Dropped],
    *,
    min_rows: int,
    max_rows: int,
    max_name: int,
) -> None:
    for path in paths:
        source = path.relative_to(root).as_posix()
        stem = identifier(path.stem if path.stem.lower() != "data" else path.parent.name)
        try:
            for part, frame in read_frames(path, max_rows):
                where = f"{source}, {part}" if part else source
                if isinstance(frame, str):
                    dropped.append(Dropped(where, frame))
                    continue
                name = free_name(f"{stem}_{identifier(part)}" if part else stem, {table.name for table in tables})
                result = accept(name, frame, min_rows=min_rows, max_rows=max_rows, max_name=max_name)
                _sort(replace(result, source=where) if isinstance(result, Dropped) else result, tables, dropped)
        except UserError as error:
            dropped.append(Dropped(source, str(error).replace(str(path), path.name)))


def identifier(text: str) -> str:
    """A name of at most 24 letters, digits and underscores made from `text`."""
    marks = "".join(mark if mark.isalnum() and mark.isascii() else "_" for mark in text)
    return marks.strip("_")[:24] or "table"


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, with a number behind it if it is taken."""
    return next(new for new in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if new not in taken)


def _sort(result: Table | Dropped, tables: list[Table], dropped: list[Dropped]) -> None:
    if isinstance(result, Table):
        tables.append(result)
    else:
        dropped.append(result)


class Named(Protocol):
    """A `Table` or a `Database`."""

    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)


def split_tables(
    tables: Sequence[Item], *, evaluation_share: float = 1 / 3, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Divide tables, or databases, into those to train and those to evaluate on, by a hash of (seed, name): disjoint,
    and the same on every machine.

    Raises:
        UserError: fewer than two.
    """
    if len(tables) < 2:
        raise UserError(f"{len(tables)} usable table is too few to train and to evaluate on; give at least two.")

    def order(table: Item) -> str:
        return hashlib.sha256(f"{seed}:{table.name}".encode()).hexdigest()

    held_out = max(1, round(len(tables) * evaluation_share))
    names = {table.name for table in sorted(tables, key=order)[:held_out]}
    return [table for table in tables if table.name not in names], [table for table in tables if table.name in names]


def shared_headers(training: Iterable[str], evaluation: Iterable[str]) -> list[str]:
    """Column names that stand on both sides, whatever their case; in lower case and sorted."""
    return sorted({name.lower() for name in training} & {name.lower() for name in evaluation})
