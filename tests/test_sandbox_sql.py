"""Queries and packages in the sandbox: results as tables, attacks that leave nothing, what is installed is imported."""

import io
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import sql_attacks
from sandboxes import left_behind
from test_install import wheel, wheels  # noqa: F401

from groupwise.rollout.sandbox import Installer, Limits, Sandbox

LIMITS = Limits(wall_s=20, memory_gib=1, file_mib=1, sql_s=1, output_bytes=4096)
SLOW = re.compile("endless|huge|many|sleep|cross join|wide row|doubling|json of everything")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as own:
        yield own


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return sql_attacks.build(tmp_path_factory.mktemp("shop"))


@pytest.mark.parametrize("kind", ["SQLITE", "DUCKDB"])
def test_attacks_end_in_time_and_leave_nothing(sandbox: Sandbox, files: tuple[str, str], kind: str) -> None:
    file = files[kind == "DUCKDB"]
    before = Path(file).read_bytes()
    attacks: dict[str, tuple[str, str]] = getattr(sql_attacks, kind)
    # Those that run until a limit ends them are many; some of them stand for all here.
    slow = [name for name in attacks if SLOW.search(name)]
    names = [name for name in attacks if name not in slow[2::3] and name not in slow[1::3]]
    futures = {name: sandbox.submit(attacks[name][0], [file], language="sql") for name in names}
    for name, future in futures.items():
        result = future.result(120)
        assert result.verdict in ("ok", "error", "timeout", "memory"), (name, result)
        assert result.wall_s < LIMITS.sql_s + 3, (name, result)
        assert sql_attacks.SECRET not in result.output + (result.table or ""), name
        if name not in slow:
            said = ("" if result.ok else "SqlError: ") + result.output + (result.table or "")
            assert re.search(attacks[name][1], said), (name, said)
        assert (result.table is not None) == result.ok, name
    assert left_behind(sandbox) == []
    assert Path(file).read_bytes() == before
    assert sandbox.run("print(1)").output == "1\n"


def test_a_query_gives_a_table(sandbox: Sandbox, files: tuple[str, str]) -> None:
    for file, name in zip(files, ("sales", "sales"), strict=True):
        query = f"SELECT city, sum(amount) AS total FROM {name} GROUP BY city ORDER BY city"
        result = sandbox.run(query, [file], language="sql")
        assert result.ok, result
        assert "3 rows x 2 columns, written to result_1.csv" in result.output
        expected = pd.read_csv(files[1]).groupby("city")["amount"].sum().rename("total").reset_index()
        assert result.table is not None
        pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(result.table)), expected)


@pytest.mark.parametrize("execution", ["replay", "forked"])
def test_a_session_of_queries(files: tuple[str, str], execution: str) -> None:
    with Sandbox(LIMITS, execution=execution) as sandbox, sandbox.open([files[0]], "sql") as session:  # type: ignore[arg-type]
        assert "result_1.csv" in session.run("SELECT 1").output
        wrong = session.run("SELECT price FROM sales")
        assert (wrong.verdict, wrong.output) == ("error", "no such column: price\n")
        assert "result_2.csv" in session.run("SELECT 2").output
        late = session.run("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c")
        assert (late.verdict, late.table) == ("timeout", None)


def test_large_databases_are_read_in_place(sandbox: Sandbox, tmp_path: Path) -> None:
    file = sql_attacks.build(tmp_path)[0]
    with sqlite3.connect(file) as large:
        large.execute("CREATE TABLE filler AS SELECT zeroblob(6000000) AS x")
    large.close()
    result = sandbox.run("SELECT length(x) AS size FROM filler", [file], language="sql")
    assert result.table == "size\n6000000\n", result


@pytest.mark.parametrize("execution", ["replay", "forked"])
def test_allowed_packages_are_installed_as_they_are_imported(
    wheels: Path,  # noqa: F811
    tmp_path: Path,
    execution: str,
) -> None:
    wheel(wheels, "tiny-package", {"tiny_package.py": "VALUE = 7\n"})
    installer = Installer(["tiny_package=tiny-package", "absent"], str(tmp_path / "packages"))
    with Sandbox(LIMITS, execution=execution, installer=installer) as sandbox, sandbox.open() as session:  # type: ignore[arg-type]
        assert session.run("import tiny_package\nx = tiny_package.VALUE").ok
        assert session.run("print(x, tiny_package.VALUE)").output == "7 7\n"
        missing = session.run("import absent")
        assert not missing.ok
        assert "No module named 'absent'" in missing.output
        assert "The package absent is allowed but could not be installed" in missing.output
        other = session.run("import forbidden_one")
        assert other.output.endswith("ModuleNotFoundError: No module named 'forbidden_one'\n")
        written = session.run("import os\nopen(os.path.join(os.path.dirname(tiny_package.__file__), 'x'), 'w')")
        assert written.verdict == "error"
    assert sorted(os.listdir(tmp_path / "packages"))[-1] == "tiny_package.py"
