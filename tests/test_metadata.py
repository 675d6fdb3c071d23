"""What is told of a table: true, within its budget, and of every column of a whole view."""

import re
from collections.abc import Callable
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import small_tables

from groupwise.data.asking.operations import OPERATIONS
from groupwise.data.metadata import describe_fully
from groupwise.data.tables import Table, describe
from groupwise.data.views import WHOLE_COLUMNS, evaluation_view, training_view, whole_view

FRAME = pd.DataFrame(
    {
        "price": [1.5, 2.25, np.nan, 1000000.125] * 6,
        "count": range(24),
        "kind": ["b", "a", "a", None] * 6,
        "code": [f"x{n}" for n in range(24)],
        "open": [True, False] * 12,
        "text": ["a long text, " * 9 + "\n" + str(n % 3) for n in range(24)],
    }
)


def test_the_full_form_tells_types_ranges_gaps_frequent_values_and_rows() -> None:
    lines = describe_fully("t.csv", FRAME, 10_000).splitlines()
    assert lines[:6] == [
        'read_csv("t.csv"), 24 rows, 6 columns:',
        '"price" float, 1.5 to 1000000.125, 3 unique, 6 missing',
        '"count" int, 0 to 23, 24 unique',
        '"kind" text, 2 unique, 6 missing: a (12), b (6)',
        '"code" text, 24 unique',
        '"open" bool, 2 unique: True (12), False (12)',
    ]
    assert lines[7] == "First rows:"
    assert lines[8] == '1.5,0,b,x0,True,"a long text, a long text, a long text..."'
    assert lines[10].startswith(",2,a,x2")
    assert len(lines) == 13


@pytest.mark.parametrize("measure", [len, lambda text: len(re.findall(r"\w+|\W", text))])
def test_it_fits_its_budget_and_gives_up_rows_first_and_columns_last(measure: Callable[[str], int]) -> None:
    wide = pd.DataFrame({f"column {n}": range(30) for n in range(60)})
    for frame in (FRAME, wide):
        shortest = measure(describe_fully("t.csv", frame, 0, count_tokens=measure))
        seen = []
        longest = measure(describe_fully("t.csv", frame, 10**6))
        for budget in range(shortest, longest + 1, (longest - shortest) // 12):
            text = describe_fully("t.csv", frame, budget, count_tokens=measure)
            assert measure(text) <= budget
            named = len(re.findall(r'^"', text, re.MULTILINE))
            left_out = re.search(r"\.\.\. (\d+) more columns", text)
            assert named + (int(left_out[1]) if left_out else 0) == len(frame.columns)
            assert not (left_out and "First rows" in text)
            seen.append(named)
        assert seen == sorted(seen)
        assert seen[-1] == len(frame.columns)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=4), st.binary(max_size=3)), min_size=1
    ),
    st.integers(0, 400),
)
def test_any_values_can_be_told(values: list[object], budget: int) -> None:
    text = describe_fully("t.csv", pd.DataFrame({"a": values}, dtype=object), budget)
    assert text.startswith('read_csv("t.csv")')


def test_a_whole_view_is_the_table_under_its_real_names() -> None:
    for table in small_tables():
        view = whole_view(table, 2000)
        assert (view.table, view.file) == (table.name, table.file)
        pd.testing.assert_frame_equal(view.frame, table.frame, check_dtype=False)
        assert view.description == describe_fully(view.file, view.frame, 2000)
        assert len(view.description) <= 2000
        assert all(f'"{name}"' in view.description for name in table.frame.columns)
        asked = [operation.ask(view, Random(1)) for operation in OPERATIONS]
        assert sum(question is not None for question in asked) > 20


def test_a_whole_view_of_a_wide_table_has_a_column_of_numbers_and_names_all() -> None:
    columns: dict[str, list[object]] = {f"a rather long name of text {n}": list("ab" * 15) for n in range(60)}
    table = Table("wide", pd.DataFrame({**columns, "number": range(30)}))
    view = whole_view(table, 2500)
    assert len(view.frame.columns) == WHOLE_COLUMNS
    assert "number" in view.roles.numeric
    assert "more columns" not in view.description


def test_other_views_keep_the_short_form() -> None:
    table = small_tables(1)[0]
    for view in (training_view(table, Random(0)), evaluation_view(table, Random(0))):
        assert view.description == describe(view.file, view.frame)
        assert "\n" not in view.description
