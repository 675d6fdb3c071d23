"""Fixtures of several test files."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from sandboxes import LIMITS

from groupwise.rollout.sandbox import Sandbox

torch.set_num_threads(1)  # tensors are small here, and on a busy machine threads wait for each other
settings.register_profile("untimed", deadline=None)  # nor does time say there whether a test is right
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as shared:
        yield shared


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},x{i % 3}\n" for i in range(40)))
    return str(path)
