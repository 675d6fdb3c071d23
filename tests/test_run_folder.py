"""Run folders that cannot be written: one sentence, and nothing lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from groupwise.bench.bigram_run import prepare


@pytest.fixture
def disk(tmp_path):
    """A file system of 500 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", folder], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_read_only_run_folder_is_one_sentence(disk: Path) -> None:
    remount(disk, "ro")
    program = "from groupwise.recipes.run import launch; launch(lambda run: None)"
    done = python("-c", program, f"run.folder={disk}")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {disk}/train cannot be written: Read-only file system; choose another run.folder"
    ]


@pytest.mark.slow
def test_a_run_goes_on_when_a_full_disk_has_room_again(disk: Path) -> None:
    command = ["-m", "groupwise.recipes.grpo", *prepare(disk / "run"), "grpo.steps=40", "run.checkpoint_every=5"]
    full = python(*command)
    assert full.returncode == 2
    assert "no space left on the device" in full.stderr.splitlines()[-1].lower()
    assert "Traceback" not in full.stderr
    checkpoints = sorted(path.name for path in (disk / "run" / "grpo" / "checkpoints").iterdir())
    remount(disk, "size=8m")
    resumed = python(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed after step {checkpoints[-1].rpartition('-')[2]}" in resumed.stdout
