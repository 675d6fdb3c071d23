"""Every Triton kernel compiled ahead of time: it still compiles, spills nothing, and uses the matrix units."""

from typing import Any

import pytest

pytest.importorskip("triton")
from groupwise.bench.compile import TARGETS, cases, measure

CASES = [pytest.param(case, target, id=f"{target} {case}") for target in TARGETS for case in cases(target)]


@pytest.mark.parametrize(("case", "target"), CASES)
def test_spills_nothing_and_uses_the_matrix_units(case: Any, target: str) -> None:
    usage = measure(case, target)
    assert usage.stack == usage.spills == 0
    assert usage.matrix or not case.on_matrix_units
    assert bool(usage.bulk_loads) == bool(case.blocks)
