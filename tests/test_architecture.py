"""The shape of the house: imports run one way, no training library is used, the package imports without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["kernels", "engine", "rollout", "rewards", "data", "recipes"]
FOREIGN = {
    "trl",
    "verl",
    "openrlhf",
    "transformers",
    "accelerate",
    "deepspeed",
    "lightning",
    "vllm",
    "sglang",
    "peft",
    "ray",
}
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, list[str]]]:
    """(line, dotted parts from the package's root) of every import in a file, those inside functions too."""
    here = ["groupwise", *path.relative_to(ROOT).with_suffix("").parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name.split(".")) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            found += [(node.lineno, [*module, name.name]) for name in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    for line, parts in imports(path):
        assert parts[0] not in FOREIGN, f"{path}:{line} imports {parts[0]}"
        if parts[0] == "groupwise" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS.index(parts[1]) <= floor, f"{path}:{line} imports {'.'.join(parts)}, which stands above it"


def test_the_reader_of_imports_sees_relative_and_nested_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "kernels" / "bad.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from ..rollout import sampler\n    import trl.trainer\n")
    assert imports(file) == [(2, ["groupwise", "rollout", "sampler"]), (3, ["trl", "trainer"])]


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {}
    names = {".".join(["groupwise", *path.relative_to(ROOT).with_suffix("").parts]): path for path in FILES}
    for name, path in names.items():
        joined = [".".join(parts) for _, parts in imports(path)]
        targets = {target if target in names else target.rpartition(".")[0] for target in joined}
        graph[name] = {target for target in targets if target in names and path.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_files_are_read_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, groupwise; print('torch' in sys.modules, groupwise.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("False ")
