import random

import pandas as pd
import pytest

from groupwise.data import names, tables
from groupwise.engine.errors import UserError


def rows(count: int) -> str:
    return "".join(f"{n},{n * 1.5},{'ab'[n % 2]}\n" for n in range(count))


def test_clean_keeps_what_can_be_named_and_asked():
    frame = pd.DataFrame(
        {
            "Unnamed: 0": range(30),
            " x ": range(30),
            "X": range(30),
            'say "hi"': range(30),
            "n" * 99: range(30),
            "constant": 1,
            "numbers": ["1", "2", " 3"] * 10,
            "words": ["a ", " b", "c"] * 10,
        }
    )
    cleaned, omitted = tables.clean(frame)
    assert list(cleaned.columns) == ["x", "numbers", "words"]
    assert cleaned["numbers"].tolist()[:3] == [1, 2, 3]
    assert cleaned["words"].tolist()[:3] == ["a", "b", "c"]
    reasons = {drop.source: drop.reason for drop in omitted}
    assert set(reasons) == {"column 1", "X", 'say "hi', "n" * 99, "constant"}
    assert reasons["column 1"] == "no name"
    assert reasons["X"] == "another column has its name"
    assert reasons["constant"] == "fewer than two different values"
    assert reasons['say "hi'] == reasons["n" * 99]


def test_columns_keep_any_name_that_can_stand_in_quotes():
    names = [
        "class",
        "def",
        "größe",
        "😀 count",
        "a b",
        "=SUM(A1)",
        "100%",
        "it's",
        "two\nlines",
        "{x}",
        "tab\tbed",
        " ",
    ]
    frame = pd.DataFrame({name: range(30) for name in names})
    cleaned, omitted = tables.clean(frame)
    assert list(cleaned.columns) == names[:7]
    assert [drop.source for drop in omitted] == ["it's", "two\nlines", "{x}", "tab\tbed", "column 12"]


def test_roles():
    frame = pd.DataFrame(
        {
            "year": range(1990, 2020),
            "value": [n * 0.5 for n in range(30)],
            "group": ["x", "y", "z"] * 10,
            "code": [1, 2] * 15,
            "label": [f"row {n}" for n in range(30)],
            "once": ["only", *["many"] * 29],
            "huge": [n * 1e9 for n in range(30)],
        }
    )
    found = tables.roles(frame)
    assert found == tables.Roles(("value",), ("group", "code"), ("label",), ("year",))


def test_dropped_with_a_reason(tmp_path):
    (tmp_path / "good.csv").write_text("a,b,c\n" + rows(30))
    (tmp_path / "short.csv").write_text("a,b,c\n" + rows(5))
    (tmp_path / "long.csv").write_text("a,b,c\n" + rows(200))
    (tmp_path / "words.csv").write_text("a,b\n" + "x,y\nz,w\n" * 20)
    (tmp_path / "headless.csv").write_text("0.5,1.25\n" * 30)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "one.csv").write_text("a,b,c\n" + rows(1))
    (tmp_path / "same.csv").write_text("a,b\n" + "1,1\n" * 30)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3,4\n" * 20)
    found, dropped = tables.find_tables(tmp_path, max_rows=100)
    assert [table.name for table in found] == ["good"]
    reasons = {drop.source: drop.reason for drop in dropped}
    assert reasons["short.csv"] == "under 20 rows"
    assert reasons["one.csv"] == "under 20 rows"
    assert reasons["long.csv"] == "over 100 rows"
    assert reasons["words.csv"] == "no usable column: none holds numbers"
    assert reasons["same.csv"] == "no usable column: none can be named and has two values"
    assert "has no header" in reasons["headless.csv"]
    assert "is empty" in reasons["empty.csv"]
    assert "binary" in reasons["sub/binary.csv"]
    assert "cannot be read as .csv" in reasons["ragged.csv"]
    assert not any(str(tmp_path) in reason for reason in reasons.values())


def test_bad_folders_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"missing does not exist; give a folder"):
        tables.find_tables(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no \.csv file, workbook or database"):
        tables.find_tables(tmp_path)
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(UserError, match=r"none of the 1 files .* is empty"):
        tables.find_tables(tmp_path)
    with pytest.raises(UserError, match="too few"):
        tables.split_tables([tables.Table("one", pd.DataFrame())])


def test_longer_names_serve_where_they_are_allowed(tmp_path):
    long = "a name of more than thirty characters"
    (tmp_path / "t.csv").write_text(f"{long},b,c\n" + rows(30))
    (short,), _ = tables.find_tables(tmp_path)
    assert [drop.source for drop in short.omitted] == [long]
    (whole,), _ = tables.find_tables(tmp_path, max_name=60)
    assert list(whole.frame.columns) == [long, "b", "c"]
    assert whole.omitted == ()


def test_equal_file_names_stay_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text("a,b,c\n" + rows(30))
    found, _ = tables.find_tables(tmp_path)
    assert len({table.name for table in found}) == 2


def test_split_is_disjoint_and_depends_on_names_only():
    many = [tables.Table(f"table{n}", pd.DataFrame({"x": [n]})) for n in range(30)]
    training, evaluation = tables.split_tables(many)
    assert len(evaluation) == 10
    assert {t.name for t in training} | {t.name for t in evaluation} == {t.name for t in many}
    assert not {t.name for t in training} & {t.name for t in evaluation}
    again = tables.split_tables(many[::-1])
    assert {t.name for t in again[1]} == {t.name for t in evaluation}
    assert {t.name for t in tables.split_tables(many, seed=1)[1]} != {t.name for t in evaluation}


def test_shared_headers_ignore_case():
    assert tables.shared_headers(["Year", "x"], ["YEAR", "y"]) == ["year"]


def test_bundled_tables_serve():
    pytest.importorskip("sklearn")
    pytest.importorskip("statsmodels")
    found, dropped = tables.find_tables()
    assert len(found) >= 25
    assert {"iris", "fair", "sunspots"} <= {table.name for table in found}
    assert all(table.roles.numeric and len(table.frame) >= tables.MIN_ROWS for table in found)
    assert all(drop.reason for drop in dropped)


def test_names_are_new_and_quotable():
    avoid = names.NOUNS[:200]
    for seed in range(30):
        maker = names.NameMaker(random.Random(seed), avoid)
        drawn = maker.columns(7) + maker.values(20) + [maker.file().removesuffix(".csv") for _ in range(5)]
        lowered = [name.lower() for name in drawn]
        assert len(set(lowered)) == len(drawn)
        assert not set(lowered) & set(avoid)
        assert all(tables.quotable(name) for name in drawn)
