"""Every Triton kernel compiled ahead of time: it still compiles, spills nothing, and uses the matrix units."""

from typing import Any

import pytest

pytest.importorskip("triton")
from groupwise.bench.compile import TARGETS, cases, measure


def seldom(case: Any) -> bool:
    """Other forms of attention than those of common models, which take half a minute to compile."""
    common = case.on_matrix_units and (case.constants.get("SHARED") or case.constants.get("GROUP") in (6, 7))
    return case.name.startswith(("attention", "paged")) and "join" not in case.name and not common


CASES = [
    pytest.param(case, target, id=f"{target} {case}", marks=[pytest.mark.slow] if seldom(case) else [])
    for target in TARGETS
    for case in cases(target)
]


@pytest.mark.parametrize(("case", "target"), CASES)
def test_spills_nothing_and_uses_the_matrix_units(case: Any, target: str) -> None:
    usage = measure(case, target)
    assert usage.stack == usage.spills == 0
    assert usage.matrix or not case.on_matrix_units
    assert bool(usage.bulk_loads) == bool(case.blocks)
