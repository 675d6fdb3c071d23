"""`run_sql`: one SQL statement that reads the task's files; the whole result goes to a CSV, a preview to the model.

    run_sql("SELECT city, sum(x) FROM sales GROUP BY city", ["sales.db"], "result.csv", limits=SqlLimits())

.sqlite and .db files are read by SQLite: the first is `main`, and where there are several, each has its stem as its
name. Without such a file, .csv files are tables named by their stems, read by DuckDB, an optional package.

Enforced for SQLite: files are opened read-only; an authorizer passes SELECT, reads of columns, functions without
effects, recursion and the PRAGMAs that show a schema, and refuses everything else, whatever statement it stands in;
lengths, depths, memory and time are capped. R-tree tables are refused: they ask for writes even when they are read. For
DuckDB: the files are copied into memory, then access to files, network and extensions is switched off and the settings
are locked; one SELECT, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN; memory and time are capped.

Not protected against: holes in the two engines, which read queries (and databases) made to break them, in C; a single
call of a function that runs long, since both look at the clock between operations only; the time that planning a query
takes; the strings that DuckDB has under way, which its cap on memory does not count. So it is meant for a process of
its own, confined and killed from outside (`child.py`), and it lowers the memory that SQLite may have in that process
for good.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from itertools import chain
from typing import Any, Literal
from urllib.parse import quote

DATABASES, TABLES = (".sqlite", ".sqlite3", ".db", ".db3"), (".csv",)
NOTHING = re.compile(r"(?:\s|;|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$))*", re.DOTALL)
QUOTED_LINE = re.compile(r"\n\s*LINE \d+: ")
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_CHARS = 10, 20, 40
ONE_READ = "only one query that reads is allowed (SELECT, WITH, VALUES, EXPLAIN)"

READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
EFFECTS = ("load_extension", "fts3_tokenizer")
SCHEMA = ("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list")
# What full-text indexes ask for themselves when they are read; it may not be set.
STATE = ("data_version", "page_size")
# What DuckDB reads of the machine whenever it starts; where it may not, it does not start.
DUCKDB_READS = ("/proc/self/cgroup", "/sys/fs/cgroup")
CLOCK_STEPS = 200  # of SQLite's virtual machine between two looks at the clock: a step may take milliseconds

Result = tuple[list[str], Iterable[Sequence[object]]]


class SqlError(Exception):
    """A query that failed or was refused; the message is one sentence for the model.

    Attributes:
        verdict: "error", or "timeout" or "memory" where that limit ended it.
    """

    def __init__(self, message: str, verdict: Literal["error", "timeout", "memory"] = "error") -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class SqlLimits:
    """Caps of one query.

    Args:
        sql_s: seconds until it is stopped, loading of .csv files included.
        max_rows: rows of the result kept.
        max_bytes: bytes of the result kept, and of any one value in SQLite (at least 1 MiB).
        memory_mib: MiB that the engine may use.
    """

    sql_s: float = 60.0
    max_rows: int = 100_000
    max_bytes: int = 16 * 2**20
    memory_mib: int = 512

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(f"{item.name} is {getattr(self, item.name)}; expected a number above 0")


def run_sql(query: str, files: Sequence[str], target: str, *, limits: SqlLimits) -> str:
    """Runs one statement and writes its result.

    Args:
        query: SQL, in a Markdown fence or not.
        files: the task's files; those that SQL cannot query are passed over.
        target: path of the CSV with a header; NULL is an empty field, a BLOB is X'hex'. It exists only on success.

    Returns:
        The first rows, aligned; the number of rows and columns; the name of the CSV.

    Raises:
        SqlError: the query is wrong, refused or over a limit, or the files cannot be read.
    """
    query = _statement(query)
    databases = [file for file in files if file.lower().endswith(DATABASES)]
    tables = [file for file in files if file.lower().endswith(TABLES)]
    if not databases and not tables:
        raise SqlError(f"none of the task's files can be queried by SQL; expected {', '.join(DATABASES + TABLES)}")
    if any(os.path.realpath(file) == os.path.realpath(target) for file in files):
        raise SqlError(f"the result cannot be written to {target}, which is one of the task's files")
    source = _sqlite(query, databases, limits) if databases else _duckdb(query, tables, limits)
    try:
        with source as (columns, rows):
            return _write(columns, rows, target, limits)
    except MemoryError:
        message = f"the query needs more than {limits.memory_mib} MiB of memory; let it return less"
        raise SqlError(message, "memory") from None


def _statement(query: str) -> str:
    """The query without a Markdown fence and without comments and semicolons before or semicolons after it."""
    query = query.strip()
    if query.startswith("```"):
        first, newline, rest = query[3:].partition("\n")
        query = (rest if newline else first).removesuffix("```")
    leading = NOTHING.match(query)
    query = query[leading.end() if leading else 0 :].rstrip("; \t\r\n")
    if not query:
        raise SqlError("the query is empty; expected one SELECT")
    if "\0" in query or query.encode("utf-8", "ignore").decode() != query:
        raise SqlError("the query has a null or another character that is not Unicode text")
    return query


def _names(files: Sequence[str], taken: tuple[str, ...]) -> list[str]:
    """A name in SQL for each file: its stem, or all of its name where the stem is taken (SQL ignores case)."""
    names: list[str] = []
    for file in files:
        base = os.path.basename(file)
        stem = os.path.splitext(base)[0]
        used = {name.lower() for name in (*taken, *names)}
        names.append(base if stem.lower() in used else stem)
    return names


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# ---- SQLite ----------------------------------------------------------------------------------------------------------


@contextmanager
def _sqlite(query: str, files: Sequence[str], limits: SqlLimits) -> Iterator[Result]:
    refused: list[str] = []
    deadline = time.monotonic() + limits.sql_s
    try:
        with closing(_open(files, limits)) as connection:
            connection.set_authorizer(_authorizer(refused))
            connection.set_progress_handler(lambda: time.monotonic() > deadline, CLOCK_STEPS)
            cursor = connection.execute(query)
            if cursor.description is None:
                raise SqlError(ONE_READ)
            yield [column[0] for column in cursor.description], cursor
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        message = str(error)
        if message == "interrupted":
            raise _late(limits) from None
        if "one statement at a time" in message:
            message = ONE_READ
        raise SqlError(refused[0] if refused else message) from None


def _open(files: Sequence[str], limits: SqlLimits) -> sqlite3.Connection:
    """A connection that reads the files, the first as `main`, and all under names of their own if there are several."""
    connection = sqlite3.connect(read_only_uri(files[0]), uri=True, isolation_level=None)
    try:
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.execute(f"PRAGMA hard_heap_limit = {limits.memory_mib * 2**20}")
        connection.execute("PRAGMA temp_store = MEMORY")
        if len(files) > 1:
            for file, name in zip(files, _names(files, ("main", "temp")), strict=True):
                connection.execute(f"ATTACH ? AS {_quoted(name)}", (read_only_uri(file),))
        caps = {
            sqlite3.SQLITE_LIMIT_LENGTH: max(limits.max_bytes, 2**20),  # or it cannot read a schema
            sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
            sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
            sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
            sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 100,  # full-text search uses some
            sqlite3.SQLITE_LIMIT_ATTACHED: 0,
        }
        for cap, value in caps.items():
            connection.setlimit(cap, value)
    except BaseException:
        connection.close()
        raise
    return connection


def read_only_uri(file: str) -> str:
    """The name by which SQLite opens a file that nobody writes through it."""
    path = os.path.abspath(file)
    # Without locks and logs, which need no writable folder; but what has a log beside it is whole only with it.
    alone = not any(os.path.exists(path + suffix) for suffix in ("-wal", "-journal"))
    return "file://" + quote(os.fsencode(path)) + "?mode=ro" + ("&immutable=1" if alone else "")


def _authorizer(refused: list[str]) -> Callable[..., int]:
    """Lets a statement only read; notes why it refused one."""

    def authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
        if action in READS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() not in EFFECTS:
                return sqlite3.SQLITE_OK
            refused.append(f"the function {second} is not available here")
        elif action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
            # Asked whenever a virtual table is opened; the parser refuses a statement that names this table.
            return sqlite3.SQLITE_OK
        elif action == sqlite3.SQLITE_PRAGMA:
            name = (first or "").lower()
            if name in SCHEMA or (name in STATE and second is None):
                return sqlite3.SQLITE_OK
            refused.append(f"PRAGMA {first} is not available here; read sqlite_master or PRAGMA table_info(table)")
        else:
            refused.append(ONE_READ)
        return sqlite3.SQLITE_DENY

    return authorize


# ---- DuckDB ----------------------------------------------------------------------------------------------------------


@contextmanager
def _duckdb(query: str, files: Sequence[str], limits: SqlLimits) -> Iterator[Result]:
    try:
        import duckdb
    except ImportError:
        raise SqlError("SQL on .csv files needs the package duckdb, which is not installed; use Python") from None
    settings: dict[str, Any] = {
        "threads": 1,
        "memory_limit": f"{limits.memory_mib}MiB",
        "temp_directory": "",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    try:
        with closing(duckdb.connect(":memory:", config=settings)) as connection, _time_limit(connection, limits):
            for file, name in zip(files, _names(files, ()), strict=True):
                # The name is a pattern there, and folders may look like columns.
                options = "header = true, sample_size = -1, hive_partitioning = false"
                load = f"CREATE TABLE {_quoted(name)} AS SELECT * FROM read_csv(?, {options})"
                connection.execute(load, [glob.escape(os.path.abspath(file))])
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            statements = connection.extract_statements(query)
            kinds = duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN
            if len(statements) != 1 or statements[0].type not in kinds:
                raise SqlError(ONE_READ)
            cursor = connection.execute(statements[0])
            columns = [column[0] for column in cursor.description or ()]
            yield columns, (row for rows in iter(lambda: cursor.fetchmany(1000), []) for row in rows)
    except duckdb.InterruptException:
        raise _late(limits) from None
    except duckdb.OutOfMemoryException:
        raise MemoryError from None
    except duckdb.Error as error:
        raise SqlError(" ".join(QUOTED_LINE.split(str(error))[0].split())) from None


@contextmanager
def _time_limit(connection: Any, limits: SqlLimits) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        late = not done.wait(limits.sql_s)
        # An interrupt between two statements is lost.
        while late and not done.wait(0.05):
            connection.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
    except RuntimeError:
        raise MemoryError from None
    try:
        yield
    finally:
        done.set()
        watcher.join()


# ---- the result ------------------------------------------------------------------------------------------------------


def _late(limits: SqlLimits) -> SqlError:
    return SqlError(f"the query was stopped after {limits.sql_s:g} s; let it read or join less", "timeout")


def _write(columns: list[str], rows: Iterable[Sequence[object]], target: str, limits: SqlLimits) -> str:
    """Writes the CSV; returns what the model sees of it."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\r\n")  # it quotes a value only for line ends that are its own
    first: list[Sequence[object]] = []
    count = size = 0
    cut = False
    try:
        with open(target, "wb") as file:
            for row in chain([columns], rows):
                writer.writerow([_field(value) for value in row])
                data = line.getvalue()[:-2].encode("utf-8", "replace") + b"\n"
                line.seek(0)
                line.truncate()
                size += len(data)
                cut = size > limits.max_bytes or count > limits.max_rows
                if cut:
                    break
                file.write(data)
                first += [row] if len(first) <= PREVIEW_ROWS else []
                count += 1
    except BaseException as error:
        with suppress(OSError):
            os.remove(target)
        if isinstance(error, OSError):
            raise SqlError(f"the result could not be written to {target}: {error.strerror}") from None
        raise
    return _describe(columns, first[1:], max(0, count - 1), cut, target, limits)


def _field(value: object) -> object:
    return f"X'{value.hex().upper()}'" if isinstance(value, bytes) else value


def _describe(
    columns: list[str], first: list[Sequence[object]], count: int, cut: bool, target: str, limits: SqlLimits
) -> str:
    left_out = len(columns) - PREVIEW_COLUMNS
    lines = _aligned([row[:PREVIEW_COLUMNS] for row in (columns, *first)])
    lines += [f"... {count - len(first)} more rows"] if count > len(first) else []
    lines += [f"... {left_out} more columns"] if left_out > 0 else []
    shape = f"{count} rows x {len(columns)} columns"
    name = os.path.basename(target)
    if cut:
        caps = f"{limits.max_rows} rows and {limits.max_bytes} bytes"
        lines.append(f"Only the first {shape} are in {name}: a result has at most {caps}; aggregate or select less.")
    else:
        lines.append(f"{shape}, written to {name}")
    return "\n".join(lines)


def _aligned(table: list[Sequence[object]]) -> list[str]:
    """The rows of a table, the first of which is its header, in columns of equal width; numbers to the right."""
    columns = []
    for header, *values in zip(*table, strict=True):
        cells = [_cell(value) for value in (header, *values)]
        width = max(map(len, cells))
        numbers = all(value is None or isinstance(value, int | float | Decimal) for value in values)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _cell(value: object) -> str:
    text = "NULL" if value is None else str(_field(value))
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return text if len(text) <= PREVIEW_CHARS else text[: PREVIEW_CHARS - 3] + "..."
