"""SQLite databases: found, read within limits, described as their schema, and written where a task's files stand."""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..engine.errors import UserError
from ..rollout.sandbox.sql import DATABASES
from .metadata import csv_lines, richest
from .reading import MAX_COLUMNS, Dropped, find_files, open_database, quoted, table_names
from .tables import MIN_ROWS, free_name, identifier, quotable

MAX_ROWS = 100_000
MAX_TABLES = 200
MIN_ASKED_ROWS = 5
DESCRIPTION_CHARS = 4000
SAMPLE_ROWS = (3, 1, 0)
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DAY = re.compile(r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?")


@dataclass(frozen=True)
class ForeignKey:
    """`columns` of a table hold values of `targets`, columns of `table`."""

    columns: tuple[str, ...]
    table: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ColumnRoles:
    """What the columns of a stored table can be asked for; keys are for joins and have no other role.

    `numbers`: finite numbers; `groups`: 2 to 30 texts or 2 to 12 whole numbers, at most half as many as rows, none
    missing; `labels`: a different text in each row; `dates`: days as ISO text; `gaps`: some are missing; `repeated`:
    several values, not all different (keys too).
    """

    numbers: tuple[str, ...]
    groups: tuple[str, ...]
    labels: tuple[str, ...]
    dates: tuple[str, ...]
    gaps: tuple[str, ...]
    repeated: tuple[str, ...]


@dataclass(frozen=True)
class StoredTable:
    """One table of a database.

    Args:
        name: as the database has it.
        frame: the first rows, at most the limit they were read under, values as SQLite gives them (dtype object).
        rows: the number of rows in the database.
        types: the declared type of each column, "" where there is none.
        primary_key, foreign_keys: as declared.
    """

    name: str
    frame: pd.DataFrame
    rows: int
    types: tuple[str, ...]
    primary_key: tuple[str, ...]
    foreign_keys: tuple[ForeignKey, ...]

    @property
    def complete(self) -> bool:
        """Whether `frame` holds all rows, so that answers computed on it are answers about the database."""
        return len(self.frame) == self.rows

    def column(self, name: str) -> list[Any]:
        """The values of a column: int, float, str, bytes or None."""
        return self.frame[name].tolist()

    @cached_property
    def roles(self) -> ColumnRoles:
        """What each column can be asked for."""
        return _roles(self)


@dataclass(frozen=True)
class Database:
    """A database that queries can be asked of; it stands where a `View` of a table stands.

    Args:
        name: unique in a collection.
        path: the file it was read from.
        tables: its tables by name.
        budget: the length in characters that its description may have.
    """

    name: str
    path: Path
    tables: tuple[StoredTable, ...]
    budget: int = DESCRIPTION_CHARS

    @property
    def table(self) -> str:
        """The name by which training and evaluation are kept apart."""
        return self.name

    @property
    def file(self) -> str:
        """The base name under which a task has the database."""
        return f"{self.name}.sqlite"

    @cached_property
    def description(self) -> str:
        """The metadata text that stands before a question."""
        return describe_database(self, self.budget)

    @cached_property
    def usable(self) -> list[StoredTable]:
        """The tables that were read whole and that a question can name."""
        return [
            table for table in self.tables if table.complete and table.rows >= MIN_ASKED_ROWS and quotable(table.name)
        ]

    @cached_property
    def links(self) -> list[tuple[StoredTable, StoredTable, ForeignKey]]:
        """Foreign keys of one column whose values all stand, once each, in another table: child, parent, key."""
        tables = {table.name.lower(): table for table in self.usable}
        found = []
        for child in self.usable:
            for key in child.foreign_keys:
                parent = tables.get(key.table.lower())
                if parent is not None and parent is not child and _leads(child, parent, key):
                    found.append((child, parent, key))
        return found

    def write(self, folder: str | Path) -> Path:
        """Write a copy into `folder` (made if need be) and return its absolute path; one that is there is kept.

        Raises:
            UserError: the database cannot be read any more.
        """
        path = Path(folder).absolute() / self.file
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        with open_database(self.path) as source, closing(sqlite3.connect(unfinished)) as copy:
            source.backup(copy)  # what a log beside the file holds comes along
        unfinished.rename(path)
        return path


def find_databases(
    folder: str | Path, *, max_rows: int = MAX_ROWS, budget: int = DESCRIPTION_CHARS
) -> tuple[list[Database], list[Dropped]]:
    """The SQLite databases under `folder` and what was dropped.

    Args:
        folder: the folder; one without databases gives none.
        max_rows: the most rows of a table that are read.
        budget: the length in characters that a description may have.

    Raises:
        UserError: the folder is missing.
    """
    paths, dropped = find_files(folder, DATABASES)
    databases: list[Database] = []
    for path in paths:
        try:
            tables = _read(path, max_rows)
        except UserError as error:
            dropped.append(Dropped(path.relative_to(folder).as_posix(), str(error).replace(str(path), path.name)))
            continue
        name = free_name(identifier(path.stem), {database.name for database in databases})
        databases.append(Database(name, path.absolute(), tables, budget))
    return databases, dropped


def _read(path: Path, max_rows: int) -> tuple[StoredTable, ...]:
    with open_database(path) as connection:
        names = table_names(connection)
        if len(names) > MAX_TABLES:
            raise UserError(f"{path} has {len(names)} tables, over {MAX_TABLES}.")
        tables = tuple(_read_table(connection, name, max_rows) for name in names)
    if wide := next((table.name for table in tables if len(table.types) > MAX_COLUMNS), None):
        raise UserError(f"the table {wide!r} of {path} has over {MAX_COLUMNS} columns.")
    if all(table.rows < MIN_ROWS for table in tables):
        raise UserError(f"{path} has no table of at least {MIN_ROWS} rows.")
    return tables


def _read_table(connection: sqlite3.Connection, name: str, max_rows: int) -> StoredTable:
    columns = connection.execute(f"PRAGMA main.table_info({quoted(name)})").fetchall()
    names = [column[1] for column in columns]
    listed = ", ".join(map(quoted, names))
    rows = connection.execute(f"SELECT {listed} FROM {quoted(name)} LIMIT ?", (max_rows,)).fetchall()
    count = connection.execute(f"SELECT count(*) FROM {quoted(name)}").fetchone()[0]
    keys = sorted((column[5], column[1]) for column in columns if column[5])
    return StoredTable(
        name=name,
        frame=pd.DataFrame(rows, columns=names, dtype=object),
        rows=count,
        types=tuple(str(column[2]) for column in columns),
        primary_key=tuple(key for _, key in keys),
        foreign_keys=_foreign_keys(connection, name),
    )


def _foreign_keys(connection: sqlite3.Connection, name: str) -> tuple[ForeignKey, ...]:
    found: dict[int, list[tuple[str, str, str]]] = {}
    for number, _, table, column, target, *_ in connection.execute(f"PRAGMA main.foreign_key_list({quoted(name)})"):
        if target is None:  # the primary key is meant
            info = connection.execute(f"PRAGMA main.table_info({quoted(table)})").fetchall()
            keys = [key for _, key in sorted((row[5], row[1]) for row in info if row[5])]
            target = keys[len(found.get(number, []))] if len(keys) > len(found.get(number, [])) else ""
        found.setdefault(number, []).append((column, table, target))
    keys = []
    for parts in found.values():
        if all(target for _, _, target in parts):
            columns, tables, targets = zip(*parts, strict=True)
            keys.append(ForeignKey(columns, tables[0], targets))
    return tuple(sorted(keys, key=lambda key: key.columns))


def _leads(child: StoredTable, parent: StoredTable, key: ForeignKey) -> bool:
    column, target = key.columns[0], key.targets[0]
    if len(key.columns) > 1 or not quotable(column) or not quotable(target):
        return False
    if column not in child.frame.columns or target not in parent.frame.columns:  # SQL ignores case, a frame does not
        return False
    known = Counter(parent.column(target))
    if None in known or max(known.values()) > 1 or not told_apart(known):
        return False
    return all(value in known for value in present(child.column(column)))


def _roles(table: StoredTable) -> ColumnRoles:
    keys = {*table.primary_key, *(name for key in table.foreign_keys for name in key.columns)}
    numbers, groups, labels, dates, gaps, repeated = [], [], [], [], [], []
    for name in filter(quotable, table.frame.columns):
        values = present(table.column(name))
        sizes = Counter(values)
        if 1 < len(sizes) < len(values) and told_apart(sizes):
            repeated.append(name)
        if name in keys:
            continue
        whole, few = len(values) == table.rows, 2 * len(sizes) <= table.rows
        if 0 < len(values) < table.rows:
            gaps.append(name)
        if len(sizes) < 2:
            continue
        if all(isinstance(value, int | float) for value in values):
            if all(math.isfinite(value) and abs(value) < 1e12 for value in values):
                numbers.append(name)
            if whole and few and len(sizes) <= 12 and all(isinstance(value, int) for value in sizes):
                groups.append(name)
        elif all(isinstance(value, str) for value in values) and told_apart(sizes):
            if all(map(_is_day, values)):
                dates.append(name)
            elif whole and len(sizes) == table.rows and all(value.strip() and value.isprintable() for value in sizes):
                labels.append(name)
            elif whole and few and len(sizes) <= 30 and all(map(quotable, sizes)):
                groups.append(name)
    return ColumnRoles(*map(tuple, (numbers, groups, labels, dates, gaps, repeated)))


def present(values: list[Any]) -> list[Any]:
    """The values that are not missing."""
    return [value for value in values if value is not None]


def told_apart(values: Iterable[object]) -> bool:
    """Whether different values are different in SQL under any collation; bytes are left to nobody."""
    different = set(values)
    folded = {value.rstrip().lower() if isinstance(value, str) else value for value in different}
    return len(folded) == len(different) and not any(isinstance(value, bytes) for value in different)


def _is_day(text: str) -> bool:
    if not DAY.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


# ---- SQL -------------------------------------------------------------------------------------------------------------


@cache
def sql_name(name: str) -> str:
    """A name as people write it in SQL: bare where SQLite can read it so.

    Else in backticks and not in double quotes, which SQLite takes for a text where no such column exists.
    """
    if PLAIN.fullmatch(name):
        probe = f"WITH {name} AS (SELECT 1 AS {name}) SELECT {name}.{name} FROM {name} WHERE {name} = 1 ORDER BY {name}"
        with closing(sqlite3.connect(":memory:")) as empty, suppress(sqlite3.Error):
            if empty.execute(probe).fetchall() == [(1,)]:
                return name
    return "`" + name.replace("`", "``") + "`"


# ---- description -----------------------------------------------------------------------------------------------------


def describe_database(database: Database, budget: int, *, count_tokens: Callable[[str], int] = len) -> str:
    """The schema of a database as it would be created, with keys, numbers of rows and first rows, within a budget.

    Where the budget is short, rows go first, then types, then columns, then tables, of which a count is left.

    Args:
        budget: the most that `count_tokens` may give for the text; where nothing fits, the shortest form comes.
        count_tokens: the measure of a text; its characters by default.
    """
    tables = database.tables
    head = f'SQLite database "{database.file}", {len(tables)} tables:'
    widest = max((len(table.types) for table in tables), default=0)
    forms = ("\n".join([head, *(_create(table, rows) for table in tables)]) for rows in SAMPLE_ROWS)

    def part(count: int) -> str:
        """Keys, and the names of the first columns, of all tables; nothing of them without a column."""
        created = (_create(table, 0, types=False, columns=count) for table in tables)
        return "\n".join([head, *created]) if count else head

    text = richest(forms, part, widest, budget, count_tokens)
    return text if text != head else _named(database, head, budget, count_tokens)


def _named(database: Database, head: str, budget: int, count_tokens: Callable[[str], int]) -> str:
    names = [f"{sql_name(table.name)} ({table.rows} rows)" for table in database.tables]

    def part(count: int) -> str:
        return f"{head} {', '.join([*names[:count], f'{len(names) - count} more'])}"

    return richest([f"{head} {', '.join(names)}"], part, len(names) - 1, budget, count_tokens)


def _create(table: StoredTable, rows: int, *, types: bool = True, columns: int | None = None) -> str:
    """CREATE TABLE with the number of rows behind it and the first `rows` rows below."""
    names = list(table.frame.columns)[:columns]
    parts = [
        f"{sql_name(name)} {' '.join(kind.split())}".rstrip() if types else sql_name(name)
        for name, kind in zip(names, table.types, strict=False)
    ]
    if left_out := len(table.types) - len(names):
        parts.append(f"... {left_out} more columns")
    if table.primary_key:
        parts.append(f"PRIMARY KEY ({_listed(table.primary_key)})")
    for key in table.foreign_keys:
        target = f"{sql_name(key.table)} ({_listed(key.targets)})"
        parts.append(f"FOREIGN KEY ({_listed(key.columns)}) REFERENCES {target}")
    lines = [f"CREATE TABLE {sql_name(table.name)} ({', '.join(parts)}); -- {table.rows} rows"]
    if rows:
        lines += [f"-- {line}" for line in csv_lines(table.frame.head(rows).itertuples(index=False, name=None))]
    return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(sql_name, names))
