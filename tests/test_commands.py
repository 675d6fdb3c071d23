"""Every command of the README and of docs/ names what exists, and those of the shell blocks run, in their order."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from endpoints import serving
from small_databases import small_database
from small_tables import small_tables
from test_recipes import SMALL
from test_synthesis import Analyst

from groupwise.engine.doctor import DIAGNOSES
from groupwise.recipes.settings import settings_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = r"(\w+=\S+ )?(\S*python -m |torchrun |make |pytest )"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
CONFIGURED = ("train", "synthesize", "sft", "hrm", "grpo", "evaluate")  # recipes that read a configuration
SMALLER = [
    *SMALL,
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.detail=short",
    "hrm.steps=2",
    "hrm.search_tasks=0",
    "grpo.mu_decay_steps=2",
    "grpo.num_minibatches=1",
    "run.checkpoint_every=1",
    "run.capture_steps=1",
]


def blocks(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without comments."""
    text = "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)).replace("\\\n", " ")
    return [shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def mentions(page: Path) -> list[str]:
    """The commands between single backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text) if re.match(STARTS, found)]


def test_every_command_names_what_exists() -> None:
    commands = [command for page in PAGES for command in blocks(page) + mentions(page)]
    assert len(commands) > 40
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets is not None
    for command in commands:
        for module in re.findall(r"-m (groupwise\.\S+)", command):
            assert importlib.util.find_spec(module), command
        for file in re.findall(r"tests/\S+\.py", command):
            assert (ROOT / file).exists(), command
        if command.startswith("make "):
            assert command.split()[1] in targets[1].split(), command


def test_every_file_that_the_pages_name_exists() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)
        folders = "bench|configs|data|docs|engine|kernels|recipes|rewards|rollout|tests"
        for file in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", page.read_text()):
            assert (ROOT / file).exists(), (page.name, file)


def test_the_page_of_settings_is_what_its_command_prints() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == settings_table() + "\n"


def test_every_diagnosis_is_explained_with_the_settings_of_its_remedy() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", text, re.M | re.S))
    assert list(sections) == [diagnosis.name for diagnosis in DIAGNOSES]
    for diagnosis in DIAGNOSES:
        for setting in re.findall(r"\b\w+\.\w+\b", diagnosis.remedy):
            assert setting in sections[diagnosis.name]


class Shell:
    """Runs commands of the pages in one folder: with real paths for names, and settings that make it small."""

    def __init__(self, folder: Path, teacher: str) -> None:
        self.folder = folder
        self.places = {
            "/data/my_tables": str(folder / "tables"),
            "/data/tables": str(folder / "tables"),
            "=FOLDER": f"={folder / 'tables'}",
            "sales.csv": str(folder / "tables" / "table1.csv"),
            "MODEL@http://HOST:PORT/v1": teacher,
            "/models/Qwen2.5-14B-Instruct": "runs/train/grpo/model",
            "--nproc-per-node 8": "--nproc-per-node 2",
            "RUN/": "runs/train/",
            "report RUN": "report runs/train",
        }

    def run(self, command: str) -> None:
        command = re.sub(r"'?\[[^]]*\]'?", "", command)  # what may be left out
        if command.startswith("make train"):
            command = self.made(command)
        for name, place in self.places.items():
            command = command.replace(name, place)
        words = [self.found(word) for word in shlex.split(command)]
        recipe = re.search(r"groupwise\.recipes\.(\w+)", command)
        if recipe and recipe[1] in CONFIGURED and "--help" not in words and "--compare" not in words:
            words += [*SMALLER, *(["hrm.steps=0"] if "datarus" not in command else [])]
        start = TORCHRUN if words[0].endswith("torchrun") else [sys.executable]
        done = subprocess.run(
            [*start, *words[1:]], cwd=self.folder, capture_output=True, text=True, timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"

    def made(self, command: str) -> str:
        """What make would run, once its environment stands."""
        done = subprocess.run(
            shlex.split(f"make -n -o .venv/.train RANKS=2 {command[5:]}"), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    def found(self, word: str) -> str:
        """A file of the run where the page has an example of its name."""
        for example, pattern in (("FILE.jsonl", "**/*.jsonl"), ("step-000050.rank0.safetensors", "*.safetensors")):
            if word.endswith(example):
                return str(min((self.folder / word.removesuffix(example)).glob(pattern)))
        return word


@pytest.mark.slow
def test_the_commands_of_the_shell_blocks_run(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    for table in small_tables():
        table.frame.to_csv(tmp_path / "tables" / table.file, index=False)
    for name in ("shop", "store", "stall"):
        small_database(tmp_path / "tables" / f"{name}.sqlite")
    with serving(Analyst()) as server:
        shell = Shell(tmp_path, server.spec)
        for page in PAGES:
            for command in blocks(page):
                if command.startswith("make test"):
                    continue  # this is one of its tests
                print(command, flush=True)
                shell.run(command)
