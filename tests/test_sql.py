"""SQL that reads: results as pandas reads them, files of every name and content, attacks that change nothing."""

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import sql_attacks
from hypothesis import example, given, settings
from hypothesis import strategies as st

from groupwise.rollout.sandbox import sql
from groupwise.rollout.sandbox.sql import SqlError, SqlLimits, run_sql

LIMITS = SqlLimits(sql_s=20)
ODD_STEMS = [
    "a b",
    "it's",
    'q"q',
    "100%",
    "a%41",
    "what?",
    "x#y",
    "a&mode=rwc",
    "é漢😀",
    "[1]",
    "*",
    ".hidden",
    "main",
    "temp",
]

# Runs every attack of a kind in one process with a cap on its memory, and says what became of the files.
RUNNER = """
import importlib.util, json, os, resource, sys
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
sql, attacks = load("sql", sys.argv[1]), load("sql_attacks", sys.argv[2])
kind, file = sys.argv[3:]
resource.setrlimit(resource.RLIMIT_AS, (1536 * 2**20,) * 2)
state = lambda: {name: open(name, "rb").read() for name in sorted(os.listdir(".")) if name != "result.csv"}
sql.run_sql("SELECT 1", [file], "result.csv", limits=sql.SqlLimits())  # what is loaded once counts for no attack
os.remove("result.csv")
before = state()
for name, (query, expected) in getattr(attacks, kind).items():
    try:
        said = sql.run_sql(query, [file], "result.csv", limits=sql.SqlLimits(**attacks.LIMITS))
        said += open("result.csv").read()
        os.remove("result.csv")
    except sql.SqlError as error:
        said = f"SqlError: {error}"
    print(json.dumps([name, said, os.path.exists("result.csv"), state() == before]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list]:
    running = []
    for kind in ("SQLITE", "DUCKDB"):
        folder = tmp_path_factory.mktemp(kind)
        file = sql_attacks.build(folder)[kind == "DUCKDB"]
        command = [sys.executable, "-c", RUNNER, sql.__file__, sql_attacks.__file__, kind, os.path.basename(file)]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((kind, process))
    found = {}
    for kind, process in running:
        try:
            output = process.communicate(timeout=100)[0]
        finally:
            process.kill()
        assert process.returncode == 0, output[-2000:]
        found |= {(kind, name): outcome for name, *outcome in map(json.loads, output.splitlines())}
    return found


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("SQLITE", "DUCKDB") for name in getattr(sql_attacks, kind)]
)
def test_attacks_fail_with_a_reason_and_change_nothing(
    outcomes: dict[tuple[str, str], list], kind: str, name: str
) -> None:
    said, left, unchanged = outcomes[kind, name]
    assert re.search(getattr(sql_attacks, kind)[name][1], said), said
    assert sql_attacks.SECRET not in said
    assert unchanged
    assert not left
    assert not said.startswith("SqlError") or len(said) < 500


@pytest.fixture
def shop(tmp_path: Path) -> str:
    return sql_attacks.build(tmp_path)[0]


@pytest.fixture
def sales(tmp_path: Path) -> str:
    return sql_attacks.build(tmp_path)[1]


def table_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def make(path: Path, statements: str) -> str:
    connection = sqlite3.connect(path)
    connection.executescript(statements)
    connection.close()
    return str(path)


def test_a_database_cannot_be_written_without_the_authorizer_either(shop: str, tmp_path: Path) -> None:
    before = Path(shop).read_bytes()
    with closing(sql._open([shop, shop], LIMITS)) as connection:
        for statement in ("DELETE FROM sales", "PRAGMA user_version = 7", "DELETE FROM shop.sales", "VACUUM"):
            with pytest.raises(sqlite3.OperationalError, match=r"readonly|too many attached databases"):
                connection.execute(statement)
        with pytest.raises(sqlite3.OperationalError, match="too many attached databases"):
            connection.execute("ATTACH ':memory:' AS m")
    assert Path(shop).read_bytes() == before


def test_variables_of_the_program_are_no_tables(sales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "frame", pd.DataFrame({"a": [1]}), raising=False)
    with pytest.raises(SqlError, match="frame does not exist"):
        run_sql("SELECT * FROM frame", [sales], str(tmp_path / "out.csv"), limits=LIMITS)


# ---- results ---------------------------------------------------------------------------------------------------------

QUERIES = [
    "SELECT * FROM sales",
    "SELECT city, sum(amount) AS total, count(*) AS n FROM sales GROUP BY city ORDER BY total DESC",
    "WITH big AS (SELECT * FROM sales WHERE amount > 6) SELECT avg(amount) AS mean, max(city) AS last FROM big",
    "SELECT a.id, b.city FROM sales a JOIN sales b ON a.id = b.id + 1 ORDER BY a.id LIMIT 7",
    "SELECT id, amount, sum(amount) OVER (ORDER BY id) AS running FROM sales WHERE city = 'Oslo'",
    "SELECT * FROM sales WHERE 1 = 0",
]


@pytest.mark.parametrize("query", QUERIES)
def test_a_database_gives_what_pandas_reads_from_it(shop: str, tmp_path: Path, query: str) -> None:
    said = run_sql(query, [shop], str(tmp_path / "out.csv"), limits=LIMITS)
    connection = sqlite3.connect(shop)
    expected = pd.read_sql_query(query, connection)
    connection.close()
    pd.testing.assert_frame_equal(table_of(tmp_path / "out.csv"), expected, check_dtype=len(expected) > 0)
    assert said.endswith(f"{len(expected)} rows x {expected.shape[1]} columns, written to out.csv")


@pytest.mark.parametrize("query", QUERIES)
def test_tables_in_csv_give_what_the_same_rows_give_in_a_database(sales: str, tmp_path: Path, query: str) -> None:
    run_sql(query, [sales], str(tmp_path / "out.csv"), limits=LIMITS)
    connection = sqlite3.connect(":memory:")
    pd.read_csv(sales).to_sql("sales", connection, index=False)
    expected = pd.read_sql_query(query, connection)
    connection.close()
    pd.testing.assert_frame_equal(table_of(tmp_path / "out.csv"), expected, check_dtype=len(expected) > 0)


def test_the_preview(tmp_path: Path) -> None:
    rows = ", ".join(f"({i}, 'line{i}' || char(10) || '{'x' * 60}', {i} / 4.0, NULL)" for i in range(12))
    shop = make(tmp_path / "a.db", f"CREATE TABLE t(id, text, share, none); INSERT INTO t VALUES {rows};")
    said = run_sql(
        "SELECT id, share, none, text FROM t ORDER BY id DESC", [shop], str(tmp_path / "o.csv"), limits=LIMITS
    )
    assert said.splitlines()[:3] == [
        "id  share  none  text",
        f"11   2.75  NULL  line11\\n{'x' * 29}...",
        f"10    2.5  NULL  line10\\n{'x' * 29}...",
    ]
    assert said.splitlines()[11:] == ["... 2 more rows", "12 rows x 4 columns, written to o.csv"]


def test_a_preview_of_a_wide_result_is_short(shop: str, tmp_path: Path) -> None:
    query = "SELECT " + ", ".join(f"{i} AS c{i}" for i in range(1500))
    said = run_sql(query, [shop], str(tmp_path / "out.csv"), limits=LIMITS)
    assert said.splitlines()[2:] == ["... 1480 more columns", "1 rows x 1500 columns, written to out.csv"]
    assert table_of(tmp_path / "out.csv").shape == (1, 1500)


VALUES = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.binary(max_size=20),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)  # fmt: skip


@settings(max_examples=50)
@example([("\r", "a\rb", "\n"), ("\r\n", '"', ","), ("", " ", "'")])
@given(st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=8))
def test_every_value_can_be_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("values")
    connection = sqlite3.connect(folder / "a.db")
    connection.execute("CREATE TABLE t(a, b, c)")
    connection.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
    connection.commit()
    connection.close()
    run_sql("SELECT * FROM t ORDER BY rowid", [str(folder / "a.db")], str(folder / "out.csv"), limits=LIMITS)
    with open(folder / "out.csv", newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read[0] == ["a", "b", "c"]
    assert len(read) == len(rows) + 1
    for row, texts in zip(rows, read[1:], strict=True):
        for value, text in zip(row, texts, strict=True):
            if isinstance(value, bytes):
                assert bytes.fromhex(text[2:-1]) == value
                assert text[:2] + text[-1] == "X''"
            else:
                assert ("" if value is None else type(value)(text)) == ("" if value is None else value)
    shutil.rmtree(folder)


def test_text_that_is_not_utf8_infinity_and_columns_of_one_name(tmp_path: Path) -> None:
    shop = make(tmp_path / "a.db", "CREATE TABLE t(w); INSERT INTO t VALUES (CAST(x'41ff42' AS TEXT));")
    query = "SELECT w, 1e999 AS w, -1e999 AS x, 0.0 / 0 AS nan FROM t"
    assert "A\ufffdB" in run_sql(query, [shop], str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text() == "w,w,x,nan\nA\ufffdB,inf,-inf,\n"


def test_types_of_duckdb(sales: str, tmp_path: Path) -> None:
    query = (
        "SELECT DATE '2024-02-29', TIMESTAMP '2024-02-29 12:00:00', 'nan'::DOUBLE, 1.50::DECIMAL(9, 2), "
        "'\\x00\\xFF'::BLOB, [1, 2], true, now() IS NULL, NULL, 170141183460469231731687303715884105727"
    )
    run_sql(query, [sales], str(tmp_path / "out.csv"), limits=LIMITS)
    assert list(csv.reader((tmp_path / "out.csv").read_text().splitlines()))[1] == [
        "2024-02-29", "2024-02-29 12:00:00", "nan", "1.50", "X'00FF'", "[1, 2]", "True", "False", "", str(2**127 - 1),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["shop.db", "sales.csv"])
@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS a;",
        " ;; SELECT 1 AS a ; ; \n",
        "-- why\nSELECT 1 AS a -- because;",
        "/* why */ SELECT 1 AS a; -- because",
        "```sql\nSELECT 1 AS a;\n```",
        "```\nSELECT 1 AS a\n```\n",
        "```SELECT 1 AS a```",
        "```SQL\n-- why\nSELECT 1 AS a",
        "VALUES (1)",
        "sElEcT 1 AS a",
    ],
)
def test_what_may_stand_around_a_statement(tmp_path: Path, kind: str, query: str) -> None:
    sql_attacks.build(tmp_path)
    run_sql(query, [str(tmp_path / kind)], str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ["1"]


# ---- caps and failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shop.db", "sales.csv"])
@pytest.mark.parametrize("rows", [49, 50, 51])
def test_the_cap_on_rows(tmp_path: Path, kind: str, rows: int) -> None:
    sql_attacks.build(tmp_path)
    said = run_sql(
        "SELECT id FROM sales", [str(tmp_path / kind)], str(tmp_path / "o.csv"), limits=SqlLimits(max_rows=rows)
    )
    assert table_of(tmp_path / "o.csv")["id"].tolist() == list(range(min(rows, 50)))
    assert ("Only the first 49 rows" in said) == (rows < 50)


def test_the_cap_on_bytes_cuts_between_rows(shop: str, tmp_path: Path) -> None:
    size = len("id\n") + 2 * 10 + 3 * 5
    for spare in (0, 2):
        said = run_sql(
            "SELECT id FROM sales", [shop], str(tmp_path / "o.csv"), limits=SqlLimits(max_bytes=size + spare)
        )
        assert "Only the first 15 rows x 1 columns are in o.csv" in said
        assert (tmp_path / "o.csv").stat().st_size == size


def test_a_query_that_fails_late_leaves_no_result(shop: str, tmp_path: Path) -> None:
    query = "SELECT CASE WHEN id < 20 THEN 1 ELSE abs(-9223372036854775808) END FROM sales"
    with pytest.raises(SqlError, match="integer overflow"):
        run_sql(query, [shop], str(tmp_path / "out.csv"), limits=LIMITS)
    assert not (tmp_path / "out.csv").exists()


def test_where_the_result_cannot_be_written(tmp_path: Path) -> None:
    shop, sales = sql_attacks.build(tmp_path)
    with pytest.raises(SqlError, match="No such file or directory"):
        run_sql("SELECT 1", [shop], str(tmp_path / "none" / "out.csv"), limits=LIMITS)
    before = Path(sales).read_bytes()
    (tmp_path / "link.csv").symlink_to(sales)
    for target in (sales, str(tmp_path / "link.csv")):
        with pytest.raises(SqlError, match="one of the task's files"):
            run_sql("SELECT 1", [shop, sales], target, limits=LIMITS)
    assert Path(sales).read_bytes() == before


def test_files_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("not a database" * 100)
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xff\xfe\n" * 10)
    with pytest.raises(SqlError, match="file is not a database"):
        run_sql("SELECT 1 FROM sqlite_master", [str(tmp_path / "a.db")], str(tmp_path / "o.csv"), limits=LIMITS)
    with pytest.raises(SqlError, match="unable to open database file"):
        run_sql("SELECT 1", [str(tmp_path / "none.db")], str(tmp_path / "o.csv"), limits=LIMITS)
    with pytest.raises(SqlError, match=r"a\.csv"):
        run_sql("SELECT * FROM a", [str(tmp_path / "a.csv")], str(tmp_path / "o.csv"), limits=LIMITS)
    with pytest.raises(SqlError, match="none of the task's files"):
        run_sql("SELECT 1", [str(tmp_path / "a.xlsx")], str(tmp_path / "o.csv"), limits=LIMITS)
    assert not (tmp_path / "none.db").exists()


def test_without_duckdb_one_sentence_says_so(sales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(SqlError, match="needs the package duckdb, which is not installed"):
        run_sql("SELECT 1", [sales], str(tmp_path / "out.csv"), limits=LIMITS)


def test_the_module_needs_the_standard_library_alone() -> None:
    code = "import sys; sys.modules['duckdb'] = None; exec(open(sys.argv[1]).read(), {'__name__': 'x'})"
    code = f"import sys, types; sys.modules['x'] = types.ModuleType('x'); {code}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, sql.__file__], check=True)


@pytest.mark.parametrize("name", ["sql_s", "max_rows", "max_bytes", "memory_mib"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        SqlLimits(**{name: 0})


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ODD_STEMS)
def test_databases_of_any_name_alone_and_beside_another(tmp_path: Path, stem: str) -> None:
    odd = make(tmp_path / f"{stem}.db", "CREATE TABLE t(a); INSERT INTO t VALUES (7);")
    first = make(tmp_path / "first.sqlite", "CREATE TABLE u(a); INSERT INTO u VALUES (5);")
    run_sql("SELECT a FROM t", [odd], str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text() == "a\n7\n"
    name = (f"{stem}.db" if stem in ("main", "temp") else stem).replace('"', '""')
    query = f'SELECT m.a + o.a + f.a AS a FROM main.u m, "{name}".t o, first.u f'
    run_sql(query, [first, odd], str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text() == "a\n17\n"
    assert sorted(os.listdir(tmp_path)) == sorted([f"{stem}.db", "first.sqlite", "out.csv"])


@pytest.mark.parametrize("stem", ODD_STEMS)
def test_csv_files_of_any_name(tmp_path: Path, stem: str) -> None:
    (tmp_path / "1.csv").write_text("a\n1\n")
    (tmp_path / f"{stem}.csv").write_text("a\n7\n")
    name = stem.replace('"', '""')
    files = [str(tmp_path / f"{stem}.csv"), str(tmp_path / "1.csv")]
    run_sql(f'SELECT o.a + n.a AS a FROM "{name}" o, "1" n', files, str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text() == "a\n8\n"


def test_names_that_differ_in_case_or_ending_alone(tmp_path: Path) -> None:
    files = [make(tmp_path / name, f"CREATE TABLE t AS SELECT '{name}' AS a;") for name in ("x.db", "X.db", "x.sqlite")]
    query = 'SELECT * FROM x.t UNION ALL SELECT * FROM "X.db".t UNION ALL SELECT * FROM "x.sqlite".t'
    run_sql(query, files, str(tmp_path / "out.csv"), limits=LIMITS)
    assert (tmp_path / "out.csv").read_text() == "a\nx.db\nX.db\nx.sqlite\n"


def test_relative_names_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "real.db", "CREATE TABLE t AS SELECT 3 AS a;")
    folder = tmp_path / "work=1"
    folder.mkdir()
    (folder / "a.db").symlink_to(tmp_path / "real.db")
    (folder / "a.csv").write_text("a\n4\n")
    monkeypatch.chdir(folder)
    assert "3" in run_sql("SELECT * FROM t", ["a.db"], "out.csv", limits=LIMITS)
    assert run_sql("SELECT * FROM a", ["a.csv"], "out.csv", limits=LIMITS).startswith("a\n4\n1 rows x 1 columns")


def test_a_database_with_a_log_is_read_with_it_and_without_it_alone(tmp_path: Path) -> None:
    writer = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t(a)")
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.execute("INSERT INTO t VALUES (1)")
    assert "1 rows" in run_sql("SELECT * FROM t", [str(tmp_path / "a.db")], str(tmp_path / "o.csv"), limits=LIMITS)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "a.db", alone)
    writer.close()
    assert "0 rows" in run_sql("SELECT * FROM t", [str(alone / "a.db")], str(tmp_path / "o.csv"), limits=LIMITS)
    assert os.listdir(alone) == ["a.db"]


def test_the_schema_can_be_read_and_full_text_searched(shop: str, tmp_path: Path) -> None:
    make(Path(shop), "CREATE VIRTUAL TABLE old USING fts4(body); INSERT INTO old VALUES ('sold in Lima');")
    for query, expected in {
        "SELECT name FROM sqlite_master WHERE name = 'sales'": "sales",
        "PRAGMA table_info(sales)": "amount",
        "pragma Table_Info('sales')": "amount",
        "SELECT name FROM pragma_table_info('sales')": "amount",
        "SELECT body FROM notes WHERE notes MATCH 'rome'": "sold in Rome",
        "SELECT body FROM old WHERE old MATCH 'lima'": "sold in Lima",
        "SELECT value FROM json_each('[1, 22]')": "22",
        "EXPLAIN QUERY PLAN SELECT * FROM sales": "SCAN sales",
    }.items():
        assert expected in run_sql(query, [shop], str(tmp_path / "out.csv"), limits=LIMITS), query


def test_the_schema_of_csv_files_can_be_read(sales: str, tmp_path: Path) -> None:
    for query, expected in {
        "DESCRIBE sales": "amount",
        "SHOW TABLES": "sales",
        "SUMMARIZE sales": "12.25",
        "FROM sales LIMIT 1": "Oslo",
        "EXPLAIN SELECT city FROM sales": "plan",
        "SELECT count(*) AS n FROM information_schema.tables": "1",
    }.items():
        assert expected in run_sql(query, [sales], str(tmp_path / "out.csv"), limits=LIMITS), query
