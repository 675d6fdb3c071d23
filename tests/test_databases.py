"""Databases: read within limits, described within a budget, written whole, and asked only what they can answer."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from small_databases import small_database

from groupwise.data import databases
from groupwise.data.databases import Database, ForeignKey, describe_database, find_databases, sql_name
from groupwise.engine.errors import UserError


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("shop")
    small_database(folder / "my shop.db")
    found, dropped = find_databases(folder)
    assert dropped == []
    return found[0]


def test_tables_keys_and_values(shop: Database) -> None:
    tables = {table.name: table for table in shop.tables}
    assert list(tables) == ["city", "customer", "it's odd", "order", "part"]
    assert (shop.name, shop.table, shop.file) == ("my_shop", "my_shop", "my_shop.sqlite")
    assert tables["part"].primary_key == ("order_id", "number")
    # A key without a target means the primary key.
    assert tables["customer"].foreign_keys == (ForeignKey(("city",), "city", ("city id",)),)
    assert tables["order"].foreign_keys == (ForeignKey(("customer_id",), "customer", ("customer_id",)),)
    with closing(sqlite3.connect(shop.path)) as connection:
        for name, table in tables.items():
            assert table.complete
            assert [*table.frame.itertuples(index=False, name=None)] == connection.execute(
                f'SELECT * FROM "{name}"'
            ).fetchall()


def test_roles_and_links(shop: Database) -> None:
    tables = {table.name: table for table in shop.tables}
    order = tables["order"].roles
    assert (order.numbers, order.groups, order.dates, order.gaps) == (
        ("price", "pieces"),
        ("group", "pieces"),
        ("day",),
        ("price",),
    )
    assert tables["customer"].roles.labels == ("name",)
    assert tables["customer"].roles.gaps == ("phone",)
    assert tables["part"].roles.groups == ()  # "a" and "A" are one value where SQL ignores case
    assert "note" not in tables["part"].roles.repeated
    assert [table.name for table in shop.usable] == ["city", "customer", "order", "part"]
    assert [(child.name, parent.name) for child, parent, _ in shop.links] == [
        ("customer", "city"),
        ("order", "customer"),
        ("part", "order"),
    ]


def test_names_are_bare_where_sqlite_reads_them_so() -> None:
    assert [sql_name(name) for name in ("price", "Date", "_a1")] == ["price", "Date", "_a1"]
    with closing(sqlite3.connect(":memory:")) as connection:
        for name in ("order", "current_date", "a b", "1a", "a`b", "a]b", 'a"b', "größe", "Group", "a.b"):
            written = sql_name(name)
            assert written != name
            connection.execute(f"CREATE TABLE {written} ({written} INTEGER)")
            assert connection.execute(f"SELECT {written} FROM {written}").description[0][0] == name
            connection.execute(f"DROP TABLE {written}")
            with pytest.raises(sqlite3.OperationalError, match="no such"):  # and not a text
                connection.execute(f"SELECT {written}")


def test_large_tables_are_read_in_part_and_not_asked(shop: Database) -> None:
    found, _ = find_databases(shop.path.parent, max_rows=30)
    tables = {table.name: table for table in found[0].tables}
    assert (len(tables["order"].frame), tables["order"].rows) == (30, 80)
    assert not tables["order"].complete
    assert [table.name for table in found[0].usable] == ["city", "customer"]
    assert [child.name for child, _, _ in found[0].links] == ["customer"]
    assert "-- 80 rows" in found[0].description


@pytest.mark.parametrize("count_tokens", [len, lambda text: len(text.split())])
def test_descriptions_fit_their_budget(shop: Database, count_tokens: object) -> None:
    lengths = []
    for budget in range(3000, 20, -37):
        text = describe_database(shop, budget, count_tokens=count_tokens)
        lengths.append(count_tokens(text))
        assert lengths[-1] <= budget or text == 'SQLite database "my_shop.sqlite", 5 tables: 5 more'
        assert text.startswith('SQLite database "my_shop.sqlite", 5 tables:')
    assert lengths == sorted(lengths, reverse=True)
    whole = describe_database(shop, 10_000)
    assert "CREATE TABLE `order` (`order id` INTEGER, customer_id INTEGER, day TEXT, `group` TEXT" in whole
    assert "FOREIGN KEY (customer_id) REFERENCES customer (customer_id)); -- 80 rows\n-- 1," in whole
    assert "TEXT" not in describe_database(shop, 700)
    assert "customer (25 rows)" in describe_database(shop, 200)


def test_a_copy_is_whole_even_with_a_log_beside_it(tmp_path: Path) -> None:
    source = small_database(tmp_path / "live.db")
    with closing(sqlite3.connect(source, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO city VALUES (99, 'New')")
        (found,), dropped = find_databases(tmp_path)
        assert not dropped
        path = found.write(tmp_path / "out" / "0")
        assert found.write(tmp_path / "out" / "0") == path
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["live.sqlite"]
    with closing(sqlite3.connect(path)) as copy:
        assert copy.execute("SELECT count(*) FROM city").fetchone() == (7,)
    assert 99 in found.tables[0].column("city id")


def test_what_cannot_serve_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_databases(tmp_path) == ([], [])
    with pytest.raises(UserError, match="does not exist"):
        find_databases(tmp_path / "missing")
    (tmp_path / "noise.sqlite").write_bytes(bytes(range(256)) * 16)
    (tmp_path / "empty.db").write_bytes(b"")
    for name, schema in {"bare.db": "", "short": "CREATE TABLE t (a); INSERT INTO t VALUES (1);"}.items():
        with closing(sqlite3.connect((tmp_path / name).with_suffix(".db"))) as connection:
            connection.executescript("PRAGMA user_version = 1;" + schema)
    wide = ", ".join(f"c{number}" for number in range(1500))
    with closing(sqlite3.connect(tmp_path / "wide.db")) as connection:
        connection.execute(f"CREATE TABLE t ({wide})")
    small_database(tmp_path / "many.db")
    monkeypatch.setattr(databases, "MAX_TABLES", 4)
    found, dropped = find_databases(tmp_path)
    assert found == []
    reasons = {drop.source: drop.reason for drop in dropped}
    assert list(reasons) == ["bare.db", "empty.db", "many.db", "noise.sqlite", "short.db", "wide.db"]
    assert "no table of at least 20 rows" in reasons["bare.db"]
    assert "is empty" in reasons["empty.db"]
    assert "5 tables, over 4" in reasons["many.db"]
    assert "file is not a database" in reasons["noise.sqlite"]
    assert "no table of at least 20 rows" in reasons["short.db"]
    assert "over 1000 columns" in reasons["wide.db"]
