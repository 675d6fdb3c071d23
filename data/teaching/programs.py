"""Programs in many styles: the steps of a question as code that people would write, one style a trajectory."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from random import Random

import pandas as pd

from ..asking.questions import DECIMALS, Step

CONDITION = r'(\w+)\[\1\["([^"]+)"\] ([<>=!]=?) ("[^"]*"|-?[\w.]+)\]'  # df[df["a"] > 3]
QUOTED = re.compile(r'("[^"\n]*")')
RESERVED = frozenset(("index", "inf", "nan", "level"))
MAX_LABEL = 60


@dataclass(frozen=True)
class Chunk:
    """Code that prints a result in its last line, behind `label`."""

    code: str
    label: str

    def value(self, output: str) -> str:
        """The result as text, from what the code printed."""
        return output.strip().rpartition("\n")[2].removeprefix(self.label).strip()


class Writer:
    """Writes the chunks of one program in one style.

    Args:
        file: the table's base name.
        steps: the computations of the program.
        rng: the source of chance for the style.
    """

    def __init__(self, file: str, steps: tuple[Step, ...], rng: Random) -> None:
        self.file, self.rng = file, rng
        self.frame = rng.choice(("df", "df", "df", "df", "data", "table"))
        self.numpy = any("np." in code for step in steps for code in (*step.forms, *(slip for _, slip in step.slips)))
        self.comments = rng.random() < 0.3
        self.labels = rng.random() < 0.4

    def header(self) -> str:
        """Imports, and the table read."""
        imports = ["import pandas as pd", *(["import numpy as np"] if self.numpy else [])]
        comment = ["# Read the table."] if self.comments else []
        if self.rng.random() < 0.15:
            name = self.rng.choice(("path", "file", "filename"))
            lines = [f'{name} = "{self.file}"', f"{self.frame} = pd.read_csv({name})"]
        else:
            lines = [f'{self.frame} = pd.read_csv("{self.file}")']
        return "\n".join([*imports, *comment, *lines])

    def look(self, columns: tuple[str, ...]) -> str:
        """A line that shows what the table is like."""
        names = ", ".join(f'"{name}"' for name in columns[:2])
        line = self.rng.choice(
            (
                "print({df}.head(3))",
                "{df}.info()",
                "print({df}.dtypes)",
                "print({df}.shape)",
                "print({df}.isna().sum())",
                f"print({{df}}[[{names}]].head())",
                f"print({{df}}[[{names}]].describe())",
                f'print({{df}}["{columns[0]}"].describe())',
            )
            if columns
            else ("print({df}.head(3))", "print({df}.shape)", "print({df}.isna().sum())")
        )
        return line.replace("{df}", self.frame)

    def chunk(self, step: Step, *, form: str = "", header: str = "", keep: bool = False) -> Chunk:
        """The code of one step.

        Args:
            step: the step.
            form: another program than one of the step's own, a slip.
            header: what stands before it.
            keep: later steps need the result and the rows under their names.
        """
        program = form or self.rng.choice(step.forms)
        before, newline, expression = varied(program, self.rng).rpartition("\n")
        label = self._label(step) if self.labels else ""
        name = step.name
        if not keep and name == "result":
            name = self.rng.choice(("result", "result", "answer", "value", "out"))
        if keep or label or self.rng.random() < 0.5:
            before, newline, expression = f"{before}{newline}{name} = {expression}", "\n", name
        shown = self._shown(step.shape, expression, label)
        if self.comments:
            before = f"# {step.thought.rstrip('.')}\n{before}"
        code = renamed_frame(f"{before}{newline}{shown}", self.frame)
        return Chunk(f"{header}\n{code}" if header else code, f"{label}:" if label else "")

    def _label(self, step: Step) -> str:
        words = step.thought.rstrip(".?").replace('"', "")
        return self.rng.choice((words if len(words) <= MAX_LABEL else step.name, step.name, "Result"))

    def _shown(self, shape: str, expression: str, label: str) -> str:
        if shape == "number":
            if label and "{" not in label and self.rng.random() < 0.5:
                return f'print(f"{label}: {{{expression}:.{DECIMALS}f}}")'
            if self.rng.random() < 0.6:
                expression = f"round({expression}, {DECIMALS})"
        elif shape == "check" and self.rng.random() < 0.5:
            expression = f'"yes" if {expression} else "no"'
        return f'print("{label}:", {expression})' if label else f"print({expression})"


def varied(program: str, rng: Random) -> str:
    """The same program with some of its parts written in another way that means the same."""
    draw = rng.random()
    if draw < 0.12:
        return re.sub(CONDITION + r'\["([^"]+)"\]', r'\1.loc[\1["\2"] \3 \4, "\5"]', program)
    if draw < 0.24:
        return re.sub(CONDITION, _query, program)
    one_line = "\n" not in program
    if draw < 0.36 and one_line and (found := re.search(CONDITION, program)):
        frame, test = found[1], f'{found[1]}["{found[2]}"] {found[3]} {found[4]}'
        mask = rng.choice(("mask", "selected", "chosen"))
        return f"{mask} = {test}\n{program.replace(found[0], f'{frame}[{mask}]')}"
    if draw < 0.48 and one_line and (found := re.search(r'df\["[^"]+"\]', program)):
        return f"values = {found[0]}\n{program.replace(found[0], 'values')}"
    if draw < 0.6 and "] = " not in program:
        return re.sub(r'\b(df|rows_\d)\["([A-Za-z_]\w*)"\]', _attribute, program)
    return program


def _query(found: re.Match[str]) -> str:
    frame, name, sign, value = found.groups()
    if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        return found[0]
    if value.isidentifier():
        value = f"@{value}"
    return f"{frame}.query('{name} {sign} {value}')"


def _attribute(found: re.Match[str]) -> str:
    frame, name = found.groups()
    plain = not keyword.iskeyword(name) and not hasattr(pd.DataFrame, name) and not name.startswith("_")
    return f"{frame}.{name}" if plain else found[0]


def renamed_frame(code: str, name: str) -> str:
    """`code` with the table called `name`; what stands between quotes stays."""
    if name == "df":
        return code
    pieces = QUOTED.split(code)
    # An f-string's value stands between quotes, but it is never the table itself.
    return "".join(piece if index % 2 else re.sub(r"\bdf\b", name, piece) for index, piece in enumerate(pieces))
