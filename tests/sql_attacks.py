"""Attacks and accidents in SQL, for whatever runs queries: on a database (`SQLITE`), on .csv files (`DUCKDB`).

Each is a name -> (query, a regular expression for what the model reads). Under `LIMITS` each ends within seconds, no
file of the task changes, no file appears beside the result, and what `build` puts into files that are not the task's
(`SECRET`) is not read.
"""

import sqlite3
from pathlib import Path

LIMITS = {"sql_s": 0.5, "max_rows": 1000, "max_bytes": 2**20, "memory_mib": 64}
SECRET = "xyzzy"

ONLY_READS = "only one query that reads"
NO_PRAGMA = "PRAGMA .* is not available"
LATE = "stopped after 0.5 s"
BIG = "too big|more than 64 MiB|stopped after"
CAPPED = "Only the first 1000 rows"
NO_FUNCTION = "no such function|not available here"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"

SQLITE = {
    "ATTACH another file": ("ATTACH 'other.db' AS o", ONLY_READS),
    "ATTACH a new file": ("ATTACH 'new.db' AS o", ONLY_READS),
    "ATTACH a URI": ("ATTACH 'file:new.db?mode=rwc' AS o", ONLY_READS),
    "ATTACH memory": ("ATTACH ':memory:' AS o", ONLY_READS),
    "ATTACH an expression": ("ATTACH 'other' || '.db' AS o", ONLY_READS),
    "DETACH": ("DETACH main", ONLY_READS),
    "VACUUM": ("VACUUM", ONLY_READS),
    "VACUUM INTO": ("VACUUM INTO 'copy.db'", ONLY_READS),
    "VACUUM INTO a URI": ("VACUUM main INTO 'file:copy.db?mode=rwc'", ONLY_READS),
    "PRAGMA journal_mode": ("PRAGMA journal_mode = WAL", NO_PRAGMA),
    "PRAGMA writable_schema": ("PRAGMA writable_schema = ON", NO_PRAGMA),
    "PRAGMA query_only": ("PRAGMA query_only = OFF", NO_PRAGMA),
    "PRAGMA temp_store_directory": ("PRAGMA temp_store_directory = '/tmp'", NO_PRAGMA),
    "PRAGMA hard_heap_limit": ("PRAGMA hard_heap_limit = 0", NO_PRAGMA),
    "PRAGMA user_version": ("PRAGMA main.user_version = 7", NO_PRAGMA),
    "PRAGMA page_size": ("PRAGMA page_size = 512", NO_PRAGMA),
    "PRAGMA database_list": ("PRAGMA database_list", NO_PRAGMA),
    "PRAGMA case": ("pRaGmA MMAP_SIZE(0)", NO_PRAGMA),
    "PRAGMA as a function": ("SELECT * FROM pragma_database_list", "PRAGMA database_list is not available"),
    "load_extension": ("SELECT load_extension('./evil.so')", NO_FUNCTION),
    "load_extension in a subquery": ("SELECT 1 WHERE (SELECT LOAD_EXTENSION('x', 'y'))", NO_FUNCTION),
    "writefile": ("SELECT writefile('new.txt', 'x')", NO_FUNCTION),
    "readfile": ("SELECT readfile('other.csv')", NO_FUNCTION),
    "edit": ("SELECT edit('x', 'sh')", NO_FUNCTION),
    "fts3_tokenizer": ("SELECT fts3_tokenizer('simple')", NO_FUNCTION),
    "fts3_tokenizer with a pointer": ("SELECT fts3_tokenizer('x', x'4141414141414141')", NO_FUNCTION),
    "fts5 without a pointer": ("SELECT fts5(NULL)", "wrong number|no such function|1 rows"),
    "fts command": ("INSERT INTO notes(notes) VALUES ('rebuild')", ONLY_READS),
    "fts shadow table": ("DELETE FROM notes_data", ONLY_READS),
    "fts syntax": ("SELECT * FROM notes WHERE notes MATCH '\"(('", "syntax error|unterminated string"),
    "csv table": ("CREATE VIRTUAL TABLE temp.t USING csv(filename='other.csv')", ONLY_READS),
    "virtual table": ("CREATE VIRTUAL TABLE t USING fts5(a)", ONLY_READS),
    "INSERT": ("INSERT INTO sales VALUES (9, 'x', 1)", ONLY_READS),
    "INSERT after WITH": ("WITH a AS (SELECT 1) INSERT INTO sales(id) SELECT * FROM a", ONLY_READS),
    "INSERT RETURNING": ("INSERT INTO sales(id) VALUES (9) RETURNING *", ONLY_READS),
    "UPDATE": ("UPDATE sales SET amount = 0", ONLY_READS),
    "UPDATE the schema": ("UPDATE sqlite_master SET sql = ''", "may not be modified"),
    "UPDATE the schema by its new name": ("UPDATE sqlite_schema SET sql = ''", "may not be modified"),
    "DELETE": ("DELETE FROM sales", ONLY_READS),
    "REPLACE": ("REPLACE INTO sales VALUES (1, 'x', 1)", ONLY_READS),
    "DROP": ("DROP TABLE sales", ONLY_READS),
    "ALTER": ("ALTER TABLE sales ADD COLUMN x", ONLY_READS),
    "RENAME": ("ALTER TABLE sales RENAME TO s", ONLY_READS),
    "CREATE": ("CREATE TABLE t(a)", ONLY_READS),
    "CREATE AS": ("CREATE TABLE t AS SELECT * FROM sales", ONLY_READS),
    "CREATE INDEX": ("CREATE INDEX i ON sales(city)", ONLY_READS),
    "CREATE VIEW": ("CREATE VIEW v AS SELECT 1", ONLY_READS),
    "CREATE TRIGGER": ("CREATE TRIGGER g AFTER INSERT ON sales BEGIN SELECT 1; END", ONLY_READS),
    "TEMP TABLE": ("CREATE TEMP TABLE t AS SELECT * FROM sales", ONLY_READS),
    "TEMP VIEW": ("CREATE TEMP VIEW t AS SELECT * FROM sales", ONLY_READS),
    "ANALYZE": ("ANALYZE", ONLY_READS),
    "REINDEX": ("REINDEX", ONLY_READS),
    "BEGIN": ("BEGIN EXCLUSIVE", ONLY_READS),
    "SAVEPOINT": ("SAVEPOINT s", ONLY_READS),
    "EXPLAIN of a write": ("EXPLAIN DELETE FROM sales", ONLY_READS),
    "two statements": ("SELECT 1; DROP TABLE sales", ONLY_READS),
    "two reads": ("SELECT 1; SELECT 2;", ONLY_READS),
    "statement after a comment": ("SELECT 1; /* x */ DELETE FROM sales", ONLY_READS),
    "statement in a string": ("SELECT '; DROP TABLE sales; --'", "1 rows x 1 columns"),
    "endless recursion": (f"{ENDLESS} SELECT x FROM c", CAPPED),
    "endless recursion, counted": (f"{ENDLESS} SELECT count(*) FROM c", LATE),
    "endless recursion, sorted": (f"{ENDLESS} SELECT x FROM c ORDER BY -x", BIG),
    "huge cross join": ("SELECT count(*) FROM " + ", ".join(f"sales s{i}" for i in range(40)), LATE),
    "too many tables": ("SELECT 1 FROM " + ", ".join(f"sales s{i}" for i in range(80)), "at most 64 tables"),
    "cross join, all rows": ("SELECT a.* FROM sales a, sales b, sales c, sales d", CAPPED),
    "zeroblob": ("SELECT zeroblob(1000000000)", BIG),
    "randomblob": ("SELECT hex(randomblob(1000000000))", BIG),
    "printf": ("SELECT length(printf('%1000000000d', 1))", BIG + "|NULL"),
    "printf, many": (f"SELECT {', '.join(['printf(chr, 1)'] * 100)} FROM (SELECT '%.1000000c' AS chr)", BIG + "|Only"),
    "replace": ("SELECT replace(replace(hex(zeroblob(9999)), '0', hex(zeroblob(99))), '0', hex(zeroblob(9999)))", BIG),
    "doubling": (
        "WITH RECURSIVE d(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM d) SELECT max(length(s)) FROM d",
        BIG,
    ),
    "rows of big values": (
        f"{ENDLESS} SELECT zeroblob(1000000) FROM c",
        "Only the first 0 rows|Only the first 1 rows|more than 64 MiB",
    ),
    "sorted big values": (f"{ENDLESS} SELECT randomblob(1000000) AS b FROM c ORDER BY b", BIG),
    "sorted in memory": (
        f"{ENDLESS} SELECT length(b) FROM (SELECT hex(zeroblob(500000)) || x AS b FROM c LIMIT 300) ORDER BY b",
        BIG,
    ),
    "wide row of big values": ("SELECT " + ", ".join(["zeroblob(1000000)"] * 300), BIG),
    "group_concat": (f"{ENDLESS} SELECT group_concat(hex(zeroblob(1000))) FROM c", BIG),
    "json depth": ("SELECT json('" + "[" * 50000 + "')", "malformed JSON"),
    "json of many": ("SELECT value FROM json_each('[' || replace(hex(zeroblob(9999)), '0', '1,') || '1]')", CAPPED),
    "REGEXP": ("SELECT 'aaaa' REGEXP '(a+)+$'", "no such function: REGEXP"),
    "LIKE": ("SELECT hex(zeroblob(400000)) LIKE '" + "%0" * 600 + "'", "pattern too complex"),
    "GLOB": ("SELECT hex(zeroblob(400000)) GLOB '" + "*0" * 600 + "'", "pattern too complex"),
    "expression depth": ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "too large|overflow"),
    "NOT depth": ("SELECT " + "NOT " * 3000 + "1", "too large|overflow"),
    "compound depth": (" UNION ALL ".join(["SELECT 1"] * 3000), "too many terms|too large"),
    "many columns": ("SELECT " + ", ".join("1" * 3000), "too many columns"),
    "long query": ("SELECT '" + "x" * 200000 + "'", "too large"),
    "variables": ("SELECT ?32000", "variable number|too many SQL variables"),
    "a variable": ("SELECT * FROM sales WHERE id = ?", "bindings"),
    "null character": ("SELECT 1\0", "null"),
    "lone surrogate": ("SELECT '\ud800'", "not Unicode"),
    "empty": ("", "empty"),
    "comment only": ("-- SELECT 1", "empty"),
    "open comment": ("/* SELECT 1", "empty"),
    "semicolons": (";;;", "empty"),
    "prose": ("I would count the rows.", "syntax error"),
    "unclosed string": ("SELECT 'x", "unrecognized token"),
    "wrong column": ("SELECT price FROM sales", "no such column: price"),
    "wrong table": ("SELECT * FROM shops", "no such table: shops"),
}  # fmt: skip

# Versions of DuckDB differ in words and in what they have.
DENIED = "disabled (by|through) configuration"
LOCKED = "configuration has been locked|does not exist|0 rows"

DUCKDB = {
    "COPY TO": ("COPY sales TO 'copy.csv'", ONLY_READS),
    "COPY FROM": ("COPY sales FROM 'other.csv'", ONLY_READS),
    "COPY in EXPLAIN": ("EXPLAIN ANALYZE COPY sales TO 'copy.csv'", DENIED),
    "EXPORT": ("EXPORT DATABASE 'folder'", ONLY_READS),
    "IMPORT": ("IMPORT DATABASE 'folder'", ONLY_READS + "|" + DENIED),
    "ATTACH": ("ATTACH 'new.duckdb'", ONLY_READS),
    "ATTACH a database": ("ATTACH 'other.db' (TYPE sqlite)", ONLY_READS),
    "DETACH": ("DETACH memory", ONLY_READS),
    "USE": ("USE memory", ONLY_READS),
    "INSTALL": ("INSTALL httpfs", ONLY_READS),
    "LOAD": ("LOAD httpfs", ONLY_READS),
    "FORCE INSTALL": ("FORCE INSTALL sqlite FROM community", ONLY_READS),
    "SET access": ("SET enable_external_access = true", ONLY_READS),
    "RESET": ("RESET lock_configuration", ONLY_READS),
    "SET threads": ("SET threads = 64", ONLY_READS),
    "SET memory": ("SET memory_limit = '100GB'", ONLY_READS),
    "PRAGMA": ("PRAGMA database_list", ONLY_READS + "|1 rows x 3 columns"),
    "PRAGMA that sets": ("PRAGMA memory_limit = '100GB'", ONLY_READS),
    "CALL": ("CALL pragma_version()", ONLY_READS),
    "logging as a table": ("SELECT * FROM enable_logging(storage = 'file', storage_path = 'log')", LOCKED),
    "logging to a file": ("SELECT write_log('x') FROM enable_logging(storage = 'file', storage_path = 'log')", LOCKED),
    "profiling as a table": ("SELECT * FROM enable_profiling(save_location = 'profile')", LOCKED),
    "PREPARE": ("PREPARE p AS SELECT 1", ONLY_READS),
    "BEGIN": ("BEGIN", ONLY_READS),
    "CREATE": ("CREATE TABLE t AS SELECT 1", ONLY_READS),
    "CREATE MACRO": ("CREATE MACRO f(a) AS a + 1", ONLY_READS),
    "CREATE SECRET": ("CREATE PERSISTENT SECRET (TYPE s3)", ONLY_READS),
    "INSERT": ("INSERT INTO sales SELECT * FROM sales", ONLY_READS),
    "DROP": ("DROP TABLE sales", ONLY_READS),
    "two statements": ("SELECT 1; COPY sales TO 'copy.csv'", ONLY_READS),
    "another file as a table": ("SELECT * FROM 'other.csv'", DENIED),
    "the own file as a table": ("SELECT * FROM 'sales.csv'", DENIED),
    "quoted file as a table": ('SELECT * FROM "other.csv"', DENIED),
    "read_csv": ("SELECT * FROM read_csv('other.csv')", DENIED),
    "read_text": ("SELECT * FROM read_text('/etc/passwd')", DENIED),
    "read_blob": ("SELECT * FROM read_blob('other.db')", DENIED),
    "read_json": ("SELECT * FROM read_json('other.csv')", DENIED),
    "read_parquet": ("SELECT * FROM read_parquet('other.parquet')", DENIED),
    "sniff_csv": ("SELECT * FROM sniff_csv('other.csv')", DENIED),
    "glob": ("SELECT * FROM glob('/etc/*')", DENIED),
    "file in a query string": ("SELECT * FROM query('FROM read_text(''/etc/passwd'')')", DENIED),
    "COPY in a query string": ("SELECT * FROM query('COPY sales TO ''copy.csv''')", "single SELECT"),
    "https": ("SELECT * FROM 'https://example.com/x.csv'", DENIED),
    "s3": ("SELECT * FROM read_csv('s3://bucket/x.csv')", DENIED),
    "sqlite_scan": ("SELECT * FROM sqlite_scan('other.db', 't')", "does not exist|not in the catalog"),
    "getenv": ("SELECT getenv('HOME')", "does not exist"),
    "variable of the program": ("SELECT * FROM files", "does not exist"),
    "pointer": ("SELECT * FROM pandas_scan(12345)", "No function matches"),
    "endless recursion": (f"{ENDLESS} SELECT x FROM c", CAPPED + "|" + BIG),
    "endless recursion, counted": (f"{ENDLESS} SELECT count(*) FROM c", LATE),
    "huge range": ("SELECT count(*) FROM range(1000000000000) a", LATE),
    "huge result": ("SELECT * FROM range(1000000000000)", CAPPED),
    "huge cross join": ("SELECT count(*) FROM range(10000000) a, range(10000000) b", LATE + "|" + BIG),
    "huge sort": ("SELECT * FROM range(1000000000000) ORDER BY random()", BIG),
    "huge list": ("SELECT list(a) FROM range(1000000000000) t(a)", BIG),
    "huge string": ("SELECT repeat('x', 4000000000)", BIG),
    "many strings": ("SELECT list(repeat('x', 100000)) FROM range(1000000)", BIG),
    "sleep": ("SELECT sleep_ms(60000)", LATE + "|does not exist"),
    "parameters": ("SELECT ?", "parameters"),
    "null character": ("SELECT 1\0", "null"),
    "lone surrogate": ("SELECT '\ud800'", "not Unicode"),
    "empty": ("-- nothing", "empty"),
    "prose": ("I would count the rows.", "syntax error"),
    "wrong column": ("SELECT price FROM sales", '"price" not found'),
    "wrong table": ("SELECT * FROM shops", "shops does not exist"),
}


def build(folder: Path) -> tuple[str, str]:
    """Makes the task's files `shop.db` and `sales.csv`, and others that are not the task's; returns the two paths."""
    rows = [(i, ("Oslo", "Rome", "Lima")[i % 3], i / 4) for i in range(50)]
    with sqlite3.connect(folder / "shop.db") as shop:
        shop.execute("CREATE TABLE sales (id INTEGER PRIMARY KEY, city TEXT, amount REAL)")
        shop.executemany("INSERT INTO sales VALUES (?, ?, ?)", rows)
        shop.execute("CREATE VIRTUAL TABLE notes USING fts5(body)")
        shop.execute("INSERT INTO notes VALUES ('sold in Oslo'), ('sold in Rome')")
    shop.close()
    (folder / "sales.csv").write_text("id,city,amount\n" + "".join(f"{i},{city},{x}\n" for i, city, x in rows))
    with sqlite3.connect(folder / "other.db") as other:
        other.execute(f"CREATE TABLE t AS SELECT '{SECRET}' AS word")
    other.close()
    (folder / "other.csv").write_text(f"word\n{SECRET}\n")
    return str(folder / "shop.db"), str(folder / "sales.csv")
