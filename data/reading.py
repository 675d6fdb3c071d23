"""Files -> frames: .csv in any usual form, sheets of .xlsx, tables of SQLite, all typed as their .csv text would be.

A source is data of strangers: its size is looked at before it is read, nothing in it is evaluated, and whatever is
wrong with it ends in one sentence (`UserError`, or the reason in place of a frame where other parts still serve).
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import itertools
import os
import re
import sqlite3
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from ..engine.errors import UserError
from ..rollout.sandbox.sql import DATABASES, read_only_uri

MAX_BYTES = 64 * 2**20
MAX_COLUMNS = 1000
TEXTS, WORKBOOKS = (".csv", ".tsv"), (".xlsx",)
SUFFIXES = (*TEXTS, *WORKBOOKS, *DATABASES)
BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
COMMA_NUMBER = re.compile(r"[;\t]-?\d+,\d+(?=[;\t\r\n])")
POINT_NUMBER = re.compile(r"[;\t]-?\d+\.\d+(?=[;\t\r\n])")
HEADER_ROWS = 20  # among which the header stands, under titles and notes
LOCK_S = 1.0  # patience with a database that another program writes

Row = Sequence[object]


@dataclass(frozen=True)
class Dropped:
    """What could not serve: a file, a part of one or a column, with the reason in a few words."""

    source: str
    reason: str


def find_files(folder: str | Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Dropped]]:
    """The files under `folder` with one of the lower-case `suffixes`, sorted, and the folders that cannot be listed.

    Links to folders are not followed, so that none is read twice or without end.

    Raises:
        UserError: the folder is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"the folder of tables {root} does not exist; give a folder that holds tables.")
    unreadable: list[Dropped] = []

    def note(error: OSError) -> None:
        unreadable.append(Dropped(os.path.relpath(error.filename, root), f"cannot be listed ({error.strerror})"))

    paths = [Path(base) / name for base, _, names in os.walk(root, onerror=note) for name in names]
    return sorted(path for path in paths if path.suffix.lower() in suffixes), unreadable


def read_frames(path: Path, max_rows: int) -> Iterator[tuple[str, pd.DataFrame | str]]:
    """The tables of one file, as (name inside the file, frame), or a reason in place of a frame that cannot be made.

    Args:
        path: a file of `TEXTS` (whose one table has the name ""), `WORKBOOKS` or `DATABASES`.
        max_rows: a sheet or a table of a database that has more rows is not read.

    Raises:
        UserError: nothing can be read from the file.
    """
    suffix = path.suffix.lower()
    if suffix in WORKBOOKS:
        yield from _read_workbook(path, max_rows)
    elif suffix in DATABASES:
        yield from _read_database(path, max_rows)
    else:
        frame = read_csv(path, max_rows + 1)
        yield "", frame if len(frame) <= max_rows else f"over {max_rows} rows"


def check_file(path: Path) -> None:
    """Refuse what is no file, or is too large to be read whole.

    Raises:
        UserError: it is missing, no regular file, empty, or over MAX_BYTES.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise UserError(f"the file {path} does not exist; give the path of a .csv file.") from error
    except OSError as error:
        raise UserError(f"the file {path} cannot be read ({error.strerror}); check the path.") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"the file {path} is not a file; give the path of a .csv file.")
    if found.st_size > MAX_BYTES:
        size, limit = found.st_size // 2**20, MAX_BYTES // 2**20
        raise UserError(f"the file {path} has {size} MiB, over {limit} MiB; take a part of it.")
    if not found.st_size:
        raise UserError(f"the file {path} is empty; it must hold a header and rows.")


# ---- text ------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, most: int | None = None) -> pd.DataFrame:
    """Read one .csv file, whichever of the usual separators, quotes and encodings it uses.

    Args:
        path: the file.
        most: read so many rows at most; None for all.

    Raises:
        UserError: the file is missing, empty, over a limit, has no header, or no table can be read from it.
    """
    check_file(path)
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"the table {path} cannot be read ({error.strerror}); check its permissions.") from error
    if not text.strip():
        raise UserError(f"the table {path} is empty; it must hold a header and rows.")
    start = text[:65536]
    if "\0" in text or len(CONTROL.findall(start)) > len(start) // 100:
        raise UserError(f"the table {path} holds binary data; a .csv file must be text.")
    lines = start.strip().splitlines()[:5]
    quote = "'" if lines[0].lstrip().startswith("'") else '"'
    return _parse(text, path, _separator(lines, quote), quote, most)


def decode(raw: bytes) -> str:
    """Bytes as text: by their mark, else UTF-8; a line that is not UTF-8 is Windows-1252, else Latin-1."""
    for mark, encoding in BOMS:
        if raw.startswith(mark):
            return raw.decode(encoding, "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "".join(map(_decode_line, raw.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)))


def _decode_line(line: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding)
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1")


def _separator(lines: list[str], quote: str) -> str:
    """The mark that stands most often in each of the first lines; spaces only if they cut all lines into as many."""
    bare = [re.sub(f"{quote}[^{quote}]*{quote}", "", line) for line in lines]
    counts = {mark: min(line.count(mark) for line in bare) for mark in ",;\t|"}
    best = max(counts, key=lambda mark: counts[mark])
    words = {len(line.split()) for line in lines}
    return best if counts[best] or len(words) > 1 or words == {1} else r"\s+"


def _parse(text: str, path: Path, separator: str = ",", quote: str = '"', most: int | None = None) -> pd.DataFrame:
    """The table of a .csv text, without titles above its header."""
    if "\n" not in text:
        text = text.replace("\r", "\n")
    if separator == r"\s+":
        header = [cell.strip(quote) for cell in text.partition("\n")[0].split()]
    else:
        text, header = _from_header(text, separator, quote)
    if len(header) > MAX_COLUMNS:
        raise UserError(f"the table {path} has {len(header)} columns, over {MAX_COLUMNS}; take some of them.")
    text = _mended(text, header, separator)
    decimal = "," if len(COMMA_NUMBER.findall(text)) > len(POINT_NUMBER.findall(text)) else "."
    try:
        frame = pd.read_csv(
            io.StringIO(text), sep=separator, quotechar=quote, skipinitialspace=True, low_memory=False,
            decimal="." if separator == "," else decimal, nrows=most,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the table {path} cannot be read as .csv ({reason}); repair or remove it.") from error
    if _is_data(header, frame):
        raise UserError(f"the table {path} has no header: its first line is data; put a line of column names first.")
    return frame


def _mended(text: str, header: list[str], separator: str) -> str:
    """The text without lines that repeat the header, as where files were joined, and with as many names as cells."""
    first, _, rest = text.partition("\n")
    if len(header) > 1 and not any(map(NUMBER.fullmatch, header)) and f"\n{first}\n" in f"\n{rest}\n":
        rest = "\n".join(line for line in rest.split("\n") if line != first)
    lines = rest[:65536].splitlines()[:5]
    if lines and all(line.endswith(separator) and line.count(separator) == len(header) for line in lines):
        # The mark at the end of each line opens a column that has no name; pandas would move the names by one.
        first = first.rstrip("\r") + separator
    return f"{first}\n{rest}"


def _from_header(text: str, separator: str, quote: str) -> tuple[str, list[str]]:
    """The text from the header on, and its cells: the first row that fills half of the width of the first rows."""

    def rows_of(lines: io.StringIO) -> Iterator[list[str]]:
        try:
            yield from csv.reader(lines, delimiter=separator, quotechar=quote, skipinitialspace=True)
        except csv.Error:  # a field of more than 128 KiB
            return

    text = text.lstrip("\r\n")
    rows = list(itertools.islice(rows_of(io.StringIO(text, newline="")), HEADER_ROWS))
    filled = [sum(bool(cell.strip()) for cell in row) for row in rows]
    start = next((number for number, count in enumerate(filled) if count and 2 * count >= max(filled)), 0)
    lines = io.StringIO(text, newline="")
    titles = rows_of(lines)
    for _ in range(start):
        next(titles)
    return lines.read(), [cell.strip() for cell in rows[start]] if rows else []


def _is_data(header: list[str], frame: pd.DataFrame) -> bool:
    """Whether a first line is numbers wherever numbers stand below it, and not such as people choose for names.

    Years and other whole numbers that only rise or only fall may name columns.
    """
    if len(header) != len(frame.columns):
        return False
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    over = [cell for cell, below in zip(header, numeric, strict=True) if below and cell]
    if not over or not all(map(NUMBER.fullmatch, over)):
        return False
    values = [float(cell) for cell in over]
    pairs = list(itertools.pairwise(values))
    falls = all(one > other for one, other in pairs)
    return any(not value.is_integer() for value in values) or not (falls or all(one < other for one, other in pairs))


# ---- workbooks -------------------------------------------------------------------------------------------------------


def _read_workbook(path: Path, max_rows: int) -> Iterator[tuple[str, pd.DataFrame | str]]:
    """Each sheet of an .xlsx file: the values that were stored, formulas as they came out when it was saved."""
    check_file(path)
    try:
        with path.open("rb") as file:
            if file.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
                raise UserError(f"the workbook {path} is encrypted or in the old .xls format; save it as plain .xlsx.")
        with zipfile.ZipFile(path) as archive:
            size, limit = sum(item.file_size for item in archive.infolist()) // 2**20, 4 * MAX_BYTES // 2**20
            if size > limit:
                raise UserError(f"the workbook {path} unpacks to {size} MiB, over {limit} MiB; take a part of it.")
            merges = _merges(archive)
        book = pd.ExcelFile(path, engine="openpyxl")
    except UserError:
        raise
    except ImportError:
        raise UserError(f"the workbook {path} needs openpyxl; install groupwise[data].") from None
    except Exception as error:  # openpyxl raises whatever it stumbles over in a broken file
        raise UserError(f"the workbook {path} cannot be read ({_short(error)}); repair or remove it.") from error
    with book:
        for sheet in book.book.worksheets:
            try:
                sheet.reset_dimensions()  # what the file says of them may be wrong
                rows = _filled(sheet.iter_rows(values_only=True), merges.get(sheet.title, []), max_rows)
                yield sheet.title, _sheet_frame(rows, path, max_rows)
            except Exception as error:
                yield sheet.title, str(error) if isinstance(error, UserError) else f"cannot be read ({_short(error)})"


def _sheet_frame(rows: list[Row], path: Path, max_rows: int) -> pd.DataFrame | str:
    if not rows:
        return "empty sheet"
    width = max(map(len, rows))
    frame = _parse(_to_csv((*row, *[None] * (width - len(row))) for row in rows), path)
    return frame if len(frame) <= max_rows else f"over {max_rows} rows"


def _filled(rows: Iterable[Row], merges: list[tuple[int, int, int]], max_rows: int) -> list[Row]:
    """The rows that hold something, at most a few more than `max_rows`; cells merged downwards all hold their value."""
    starts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, last, column in merges:
        starts[first].append((last, column))
    under: list[tuple[int, int, object]] = []  # last row, column, value
    kept: list[Row] = []
    for number, row in enumerate(rows, 1):
        values = list(row)
        under = [merge for merge in under if merge[0] >= number]
        for _, column, value in under:
            values += [None] * (column - len(values))
            values[column - 1] = value
        for last, column in starts.get(number, ()):
            if column <= len(values):
                under.append((last, column, values[column - 1]))
        if any(value not in (None, "") for value in values):
            kept.append(values)
        if len(kept) > max_rows + HEADER_ROWS:
            break
    return kept


def _merges(archive: zipfile.ZipFile) -> dict[str, list[tuple[int, int, int]]]:
    """By sheet, first row, last row and column (from 1) of cells merged downwards; reading row by row hides them."""
    relations = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
    targets = {item.get("Id"): item.get("Target", "") for item in relations}
    found: dict[str, list[tuple[int, int, int]]] = {}
    for item in ElementTree.fromstring(archive.read("xl/workbook.xml")).iter():
        if not item.tag.endswith("}sheet"):
            continue
        relation = next((value for key, value in item.attrib.items() if key.endswith("}id")), "")
        target = targets.get(relation, "")
        sheet = archive.read(target.lstrip("/") if target.startswith("/") else f"xl/{target}")
        refs = re.findall(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+)(\d+):[A-Z]+(\d+)"', sheet)
        found[item.get("name", "")] = [
            (int(first), int(last), _column(letters)) for letters, first, last in refs if int(last) > int(first)
        ]
    return found


def _column(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + letter - ord("A") + 1
    return number


# ---- databases -------------------------------------------------------------------------------------------------------


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can only read an SQLite file; what goes wrong while it is open is one sentence.

    Raises:
        UserError: the file is too large, locked, encrypted, corrupt or no database.
    """
    check_file(path)
    try:
        with closing(sqlite3.connect(read_only_uri(str(path)), uri=True, timeout=LOCK_S)) as connection:
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":  # some faults would be read as rows
                raise UserError(
                    f"the database {path} is corrupt ({' '.join(fault.split())[:100]}); repair or remove it."
                )
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"the database {path} cannot be read ({_short(error)}); repair or remove it.") from error


def table_names(connection: sqlite3.Connection) -> list[str]:
    """The ordinary tables of a database, by name; those of SQLite and of its extensions are left out."""
    rows = connection.execute("PRAGMA main.table_list").fetchall()
    return sorted(row[1] for row in rows if row[2] == "table" and not row[1].startswith("sqlite_"))


def quoted(name: str) -> str:
    """A name as SQL reads it, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def _read_database(path: Path, max_rows: int) -> Iterator[tuple[str, pd.DataFrame | str]]:
    with open_database(path) as connection:
        for name in table_names(connection):
            try:
                cursor = connection.execute(f"SELECT * FROM {quoted(name)} LIMIT {max_rows + 1}")
                rows = cursor.fetchall()
                header = [column[0] for column in cursor.description]
                found = _parse(_to_csv([header, *rows]), path) if len(rows) <= max_rows else f"over {max_rows} rows"
            except (sqlite3.Error, UserError) as error:
                found = _short(error)
            yield name, found


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    return text.getvalue()


def _cell(value: object) -> object:
    """A value as .csv text holds it; bytes are no part of a table."""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return "" if isinstance(value, bytes) else value
