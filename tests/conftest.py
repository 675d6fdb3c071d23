"""Fixtures of several test files."""

from collections.abc import Iterator

import pytest
from sandboxes import LIMITS

from groupwise.rollout.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as shared:
        yield shared


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},x{i % 3}\n" for i in range(40)))
    return str(path)
