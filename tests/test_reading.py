"""Files as strangers write them: read as they were meant or refused in one sentence; nothing crashes or hangs."""

import datetime
import gzip
import io
import os
import sqlite3
import tempfile
import zipfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.data import reading, tables
from groupwise.engine.errors import UserError

REAL = Path(os.environ.get("GROUPWISE_DATA", ""))


def rows(count: int, separator: str = ",") -> str:
    return "\n".join(separator.join((str(n), str(n * 1.5), "ab"[n % 2])) for n in range(count)) + "\n"


def read(path: Path, content: str | bytes) -> pd.DataFrame:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reading.read_csv(path)


def frames(path: Path, max_rows: int = 10_000) -> dict[str, pd.DataFrame | str]:
    return dict(reading.read_frames(path, max_rows))


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused; "" if it is read."""
    try:
        frames(path, max_rows=50)
    except UserError as error:
        return str(error)
    return ""


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_separators_and_encodings_are_found(tmp_path: Path, separator: str, encoding: str) -> None:
    text = separator.join(("x", "größe", "kind")) + "\n" + rows(25, separator)
    frame = read(tmp_path / "t.csv", text.encode(encoding))
    assert list(frame.columns) == ["x", "größe", "kind"]
    assert frame["größe"].tolist() == [n * 1.5 for n in range(25)]


def test_each_line_of_mixed_encodings_is_read_in_its_own(tmp_path: Path) -> None:
    names = ["Ärger", "“quoted”", "\x81", "漢"]
    lines = [name.encode(code) for name, code in zip(names, ("latin-1", "cp1252", "latin-1", "utf-8"), strict=True)]
    frame = read(tmp_path / "t.csv", b"a,b\n" + b"\n".join(line + b",1" for line in lines * 5))
    assert frame["a"].tolist() == names * 5


def test_spaces_separate_only_where_all_lines_agree(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", "a b\n" + "\n".join(f"{n} {n}" for n in range(20)))
    assert list(frame.columns) == ["a", "b"]
    frame = read(tmp_path / "t.csv", "full name\n" + "John Q Public\nAnn B\n" * 10)
    assert list(frame.columns) == ["full name"]


def test_quotes_hold_separators_line_ends_and_formulas(tmp_path: Path) -> None:
    text = 'a,"b, c; d"\n' + '"x, y\nz",1\n"=cmd|\' /C calc\'!A0",2\n=1+1,3\n' * 8
    frame = read(tmp_path / "t.csv", text)
    assert list(frame.columns) == ["a", "b, c; d"]
    assert frame["a"].tolist() == ["x, y\nz", "=cmd|' /C calc'!A0", "=1+1"] * 8


def test_decimal_commas(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", "a;b\n" + "1,5;-2,25\n" * 20)
    assert frame.iloc[0].tolist() == [1.5, -2.25]
    frame = read(tmp_path / "t.csv", "a;b\n" + "1.5;x, y\n" * 20)
    assert frame.iloc[0].tolist() == [1.5, "x, y"]


def test_a_mark_at_the_end_of_each_line_moves_no_column(tmp_path: Path) -> None:
    frame = read(tmp_path / "t.csv", "a,b\n" + "1,2,\n" * 20)
    assert frame[["a", "b"]].iloc[0].tolist() == [1, 2]


def test_titles_above_and_repetitions_of_the_header_are_left_out(tmp_path: Path) -> None:
    body = "name,price,weight\n" + "x,1,2\n" * 10
    for title in ("", "Prices of 2020\n", "Prices,,\n\n", '"Prices,\nall"\nsource: us\n'):
        frame = read(tmp_path / "t.csv", title + body + body)
        assert list(frame.columns) == ["name", "price", "weight"]
        assert frame["price"].tolist() == [1] * 20


@pytest.mark.parametrize(
    "text",
    ["0.5,1.25\n" * 30, "5.1,3.5,setosa\n4.9,3.0,setosa\n" * 20, "1,85,66,yes\n8,183,64,no\n" * 20, "3,1,2\n" * 30],
)
def test_a_first_line_of_data_is_no_header(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="no header"):
        read(tmp_path / "t.csv", text)


@pytest.mark.parametrize(
    "header", ["country,1990,1991,1992", "country,2015,2014,2013", "0,1,2,3", "a,b,b,", "x,0.5,y,z"]
)
def test_numbers_that_people_choose_as_names_are_a_header(tmp_path: Path, header: str) -> None:
    frame = read(tmp_path / "t.csv", header + "\n" + "x,1,2,3\n" * 20)
    assert len(frame) == 20
    assert list(frame.columns)[:2] == header.split(",")[:2]


def test_repeated_names_stay_apart(tmp_path: Path) -> None:
    assert list(read(tmp_path / "t.csv", "a,b,a\n" + "1,2,3\n" * 20).columns) == ["a", "b", "a.1"]


def test_what_is_no_table_is_said_in_one_sentence(tmp_path: Path) -> None:
    bad: dict[str, tuple[str | bytes, str]] = {
        "empty": (b"", "is empty"),
        "blank": (" \n\n ", "is empty"),
        "mark alone": (b"\xff\xfe", "is empty"),
        "bytes": (bytes(range(256)) * 4, "binary"),
        "gzip": (gzip.compress(rows(300).encode()), "binary"),
        "zip": (b"PK\x03\x04" + os.urandom(3000), "binary"),
        "ragged": ("a,b\n1,2\n1,2,3,4\n" * 20, "cannot be read as .csv"),
        "open quote": ('a,b\n1,"2\n' + "1,2\n" * 20, "cannot be read as .csv"),
        "wide": (",".join(f"c{n}" for n in range(5000)) + "\n" + "1," * 4999 + "1\n", "5000 columns, over 1000"),
    }
    for name, (content, message) in bad.items():
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / f"{name}.csv", content)
        assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.text(alphabet="ab1,.;\"'\n\r\t |=#é\0", max_size=200).map(str.encode))
def test_any_bytes_give_a_frame_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    said = refusal(path)
    assert not said or said.endswith(".")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_odd_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.csv", "wb") as huge:
        huge.truncate(2 * 2**30)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "around").symlink_to(tmp_path)
    for name in ("a.b.csv", "a_b.csv", "data.csv", "A B.CSV"):
        (tmp_path / name).write_text("a,b,c\n" + rows(30))
    found, dropped = tables.find_tables(tmp_path)
    assert sorted(table.name for table in found) == sorted([tmp_path.name[:24].strip("_"), "A_B", "a_b", "a_b_2"])
    reasons = {drop.source: drop.reason for drop in dropped}
    assert set(reasons) == {"huge.csv", "pipe.csv", "loop.csv", "gone.csv"}
    assert "2048 MiB, over 64 MiB" in reasons["huge.csv"]
    assert "not a file" in reasons["pipe.csv"]
    assert "cannot be read" in reasons["loop.csv"]
    assert "does not exist" in reasons["gone.csv"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_dropped() -> None:
    with tempfile.TemporaryDirectory() as name:  # in a folder that others may enter
        folder = Path(name)
        for name in ("a.csv", "secret.csv", "hidden/b.csv"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("a,b,c\n" + rows(30))
        folder.chmod(0o755)
        (folder / "secret.csv").chmod(0)
        (folder / "hidden").chmod(0)
        end, begin = os.pipe()
        if not (child := os.fork()):
            try:
                os.setuid(65534)
                found, dropped = tables.find_tables(folder)
                said = [*(table.name for table in found), *sorted(f"{drop.source}: {drop.reason}" for drop in dropped)]
                os.write(begin, "\n".join(said).encode())
            finally:
                os._exit(0)  # else it would go on with the tests
        os.close(begin)
        os.waitpid(child, 0)
    with os.fdopen(end) as pipe:
        said = pipe.read().splitlines()
    assert said[:2] == ["a", "hidden: cannot be listed (Permission denied)"]
    assert said[2].endswith("cannot be read (Permission denied); check its permissions.")


# ---- workbooks -------------------------------------------------------------------------------------------------------


def workbook(path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Sales 2020"
    sheet["A1"] = "Sales of all shops"
    sheet.merge_cells("A1:E1")
    header = ["shop", "product\n(kind)", "day", "price", "double"]
    for column, name in enumerate(header, 1):
        sheet.cell(3, column, name)
    for number in range(24):
        row = 4 + number
        if number % 3 == 0:
            sheet.cell(row, 1, f"shop {number // 3}")
            sheet.merge_cells(start_row=row, end_row=row + 2, start_column=1, end_column=1)
        sheet.cell(row, 2, "ab"[number % 2])
        sheet.cell(row, 3, datetime.datetime(2020, 1, 1 + number))
        sheet.cell(row, 4, number + 0.5)
        sheet.cell(row, 5, f"=2*D{row}")
    notes = book.create_sheet("Notes")
    notes["A1"] = "one cell"
    book.create_sheet("Empty")
    long = book.create_sheet("Long")
    for number in range(60):
        long.append([number, number * 2] if number else ["a", "b"])
    far = book.create_sheet("Far")
    far["XFD100000"] = 1
    book.save(path)


def test_sheets_are_tables_with_their_merged_cells_dates_and_titles(tmp_path: Path) -> None:
    workbook(tmp_path / "shop.xlsx")
    found = frames(tmp_path / "shop.xlsx", max_rows=50)
    assert list(found) == ["Sales 2020", "Notes", "Empty", "Long", "Far"]
    sales = found["Sales 2020"]
    assert isinstance(sales, pd.DataFrame)
    assert list(sales.columns) == ["shop", "product\n(kind)", "day", "price", "double"]
    assert sales["shop"].tolist() == [f"shop {number // 3}" for number in range(24)]
    assert sales["day"].tolist() == [f"2020-01-{1 + number:02d}" for number in range(24)]
    assert sales["price"].tolist() == [number + 0.5 for number in range(24)]
    assert sales["double"].isna().all()  # formulas that no program has computed yet
    assert found["Empty"] == "empty sheet"
    assert found["Long"] == "over 50 rows"
    kept, dropped = tables.find_tables(tmp_path, max_rows=50)
    assert [table.name for table in kept] == ["shop_Sales_2020"]
    assert {drop.source: drop.reason for drop in kept[0].omitted} == {
        "product\n(kind)": "its name is over 30 characters, or has quotes, braces or line breaks",
        "double": "fewer than two different values",
    }
    assert [drop.source for drop in dropped] == [
        "shop.xlsx, Notes",
        "shop.xlsx, Empty",
        "shop.xlsx, Long",
        "shop.xlsx, Far",
    ]


def test_formulas_are_read_as_they_came_out(tmp_path: Path) -> None:
    workbook(tmp_path / "t.xlsx")
    target = tmp_path / "computed.xlsx"
    with zipfile.ZipFile(tmp_path / "t.xlsx") as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("sheet1.xml"):
                content = (
                    content.replace(b"<v></v>", b"<v>7</v>")
                    .replace(b"<v />", b"<v>7</v>")
                    .replace(b"<v/>", b"<v>7</v>")
                )
            new.writestr(item, content)
    sales = frames(target)["Sales 2020"]
    assert isinstance(sales, pd.DataFrame)
    assert sales["double"].tolist() == [7] * 24


def test_broken_and_encrypted_workbooks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workbook(tmp_path / "good.xlsx")
    good = (tmp_path / "good.xlsx").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("hello.txt", "hello")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", bytes(9 * 2**20))
    monkeypatch.setattr(reading, "MAX_BYTES", 2 * 2**20)
    contents = {
        "encrypted": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(5000), "encrypted"),
        "cut": (good[: len(good) // 2], "cannot be read"),
        "text": (b"a,b\n1,2\n", "cannot be read"),
        "other": (other.getvalue(), "cannot be read"),
        "bomb": (bomb.getvalue(), "unpacks to 9 MiB, over 8 MiB"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / f"{name}.xlsx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            frames(tmp_path / f"{name}.xlsx")
    for place in range(0, len(good), 499):  # never anything but a frame, a reason or one sentence
        (tmp_path / "hurt.xlsx").write_bytes(good[:place] + b"\xff" + good[place + 1 :])
        assert "\n" not in refusal(tmp_path / "hurt.xlsx")


# ---- databases -------------------------------------------------------------------------------------------------------


def database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute('CREATE TABLE "Order" (id INTEGER PRIMARY KEY, "na""me" TEXT, price REAL, picture BLOB)')
        values = [(n, f"x{n % 3}", n / 2, bytes(3)) for n in range(40)]
        connection.executemany('INSERT INTO "Order" VALUES (?, ?, ?, ?)', values)
        connection.execute("CREATE TABLE tiny (a)")
        connection.execute("CREATE VIEW seen AS SELECT * FROM tiny")
        connection.execute("CREATE VIRTUAL TABLE words USING fts5(a)")


def test_tables_of_a_database_are_read(tmp_path: Path) -> None:
    database(tmp_path / "shop.db")
    before = (tmp_path / "shop.db").read_bytes()
    found = frames(tmp_path / "shop.db")
    assert list(found) == ["Order", "tiny"]
    order = found["Order"]
    assert isinstance(order, pd.DataFrame)
    assert order["price"].tolist() == [n / 2 for n in range(40)]
    assert order["picture"].isna().all()
    assert frames(tmp_path / "shop.db", max_rows=39)["Order"] == "over 39 rows"
    assert (tmp_path / "shop.db").read_bytes() == before
    assert os.listdir(tmp_path) == ["shop.db"]


def test_locked_corrupt_and_encrypted_databases_are_refused(tmp_path: Path) -> None:
    database(tmp_path / "good.db")
    good = (tmp_path / "good.db").read_bytes()
    for name, content in {
        "encrypted": os.urandom(4096),
        "text": b"a,b\n1,2\n",
        "cut": good[:4096],
        "corrupt": good[:4200] + b"\xff" * 3900 + good[8100:],
    }.items():
        (tmp_path / f"{name}.sqlite").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read|is corrupt"):
            frames(tmp_path / f"{name}.sqlite")
    with closing(sqlite3.connect(tmp_path / "good.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("INSERT INTO tiny VALUES (1)")
        with pytest.raises(UserError, match="database is locked"):
            frames(tmp_path / "good.db")
        writer.execute("ROLLBACK")
    assert isinstance(frames(tmp_path / "good.db")["Order"], pd.DataFrame)
    for place in range(0, len(good), 1009):
        (tmp_path / "hurt.db").write_bytes(good[:place] + b"\xff\xff\xff" + good[place + 3 :])
        assert "\n" not in refusal(tmp_path / "hurt.db")


# ---- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / "fivethirtyeight").is_dir(), reason="GROUPWISE_DATA names no folder of real tables")
def test_real_tables() -> None:
    found, dropped = tables.find_tables(REAL / "fivethirtyeight")
    assert len(found) == 58
    assert {drop.source for drop in dropped} == {"index.csv", "steak-survey__steak-risk-survey.csv"}
    found, dropped = tables.find_tables(REAL / "dabench")
    assert (len(found), dropped) == (40, [])
    found, dropped = tables.find_tables(REAL / "sqlite")
    assert len(found) == 8
    assert {drop.reason for drop in dropped} == {"under 20 rows"}
