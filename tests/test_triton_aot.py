"""Every Triton kernel compiled ahead of time: it still compiles, spills nothing, and uses the matrix units."""

import re
from typing import Any

import pytest

pytest.importorskip("triton")
from groupwise.bench.compile import TARGETS, assembly_of, cases, compiled, measure


def seldom(case: Any) -> bool:
    """Other forms of attention than one that is common, heads of 128 in groups of 7: they take minutes to compile."""
    if not case.name.startswith(("attention", "paged", "exact attention")) or "join" in case.name:
        return False
    constants = case.constants
    shared = constants.get("SHARED") or constants.get("GROUP") == 7
    return not (case.on_matrix_units and shared and constants["SIZE"] == 128)


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


@pytest.mark.parametrize("target", TARGETS)
def test_both_tiles_of_the_exact_product_sum_equally_many_inputs_an_instruction(target: str) -> None:
    """So that a row's bits can be the same in both: what an instruction sums, it rounds but once."""
    products = [case for case in cases(target) if case.name.startswith("exact product") and case.dtype == "bf16"]
    assert len(products) >= 2
    found = set()
    for case in products:
        names = re.findall(
            r"HGMMA\.64x\d+x(\d+)|HMMA\.168(\d+)|mfma_f32_(\d+x\d+x\d+)", assembly_of(compiled(case, target))
        )
        assert names
        found |= set(names)
        assert case.constants["DEPTH"] == products[0].constants["DEPTH"]
    assert len(found) == 1
