"""Every example of the documentation runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

from groupwise.rollout.environment import Environment

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```", (ROOT / "docs" / "embedding.md").read_text(), re.M | re.S)


def test_all_examples_run_in_one_process(tmp_path: Path) -> None:
    """One after another, so that none leaves anything behind that another one minds, and in silence."""
    assert len(EXAMPLES) == 4
    whole = "\n".join(f"exec({text!r}, {{'__name__': 'example'}})" for _, text in EXAMPLES)
    done = subprocess.run([sys.executable, "-c", whole], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_an_environment_is_one_function() -> None:
    def run(text: str, history: tuple[str, ...], files: tuple[str, ...]) -> str:
        if text == "fall":
            raise ValueError("no such thing")
        return f"{text} after {list(history)} on {list(files)}"

    with Environment(run) as environment:
        one, other = environment.open(["/t.csv"], "python"), environment.open([], "python")
        assert one.submit("a").result().output == "a after [] on ['/t.csv']"
        failed = one.submit("fall").result()
        assert (failed.ok, failed.output, failed.verdict) == (False, "ValueError: no such thing", "error")
        assert one.submit("b").result().output == "b after ['a'] on ['/t.csv']"
        assert other.submit("c").result().output == "c after [] on []"


def test_the_parts_are_imported_without_touching_logging_or_the_environment() -> None:
    code = (
        "import importlib, logging, os; before = dict(os.environ); handlers = list(logging.getLogger().handlers)\n"
        "for part in ('kernels', 'engine', 'rollout', 'rewards'):\n"
        "    importlib.import_module(f'groupwise.{part}')\n"
        "    logger = logging.getLogger()\n"
        "    assert (logger.handlers, logger.level) == (handlers, logging.WARNING), part\n"
        "    changed = {k for k in os.environ.keys() | before.keys() if os.environ.get(k) != before.get(k)}\n"
        "    assert not changed, (part, changed)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
