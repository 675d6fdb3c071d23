"""What a production made, in numbers, in words and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from .filters import words
from .trajectories import Expert

COUNTS = ("types", "strata", "grammars", "operations", "tables", "dropped")
EXAMPLE_CHARS = 2_000


@dataclass
class Report:
    """Counts of what was kept, by task type, stratum, grammar, operation and table, and of what was dropped, by reason;
    and a first example of each stratum.
    """

    types: Counter[str] = field(default_factory=Counter)
    strata: Counter[str] = field(default_factory=Counter)
    grammars: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    tables: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    written: Counter[int] = field(default_factory=Counter)  # words and marks of the teacher, to the next ten
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of trajectories kept."""
        return self.strata.total()

    def add(self, expert: Expert) -> None:
        """Count one kept trajectory."""
        self.types[expert.task.task_type] += 1
        self.strata[expert.stratum] += 1
        self.grammars[expert.grammar] += 1
        self.operations[expert.operation] += 1
        self.tables[expert.task.table] += 1
        texts = [text for writer, text in expert.spans if writer == "model"]
        self.turns[len(texts)] += 1
        self.written[-(-sum(len(words(text)) for text in texts) // 10) * 10] += 1
        if expert.stratum not in self.examples:
            whole = f"{expert.task.question}\n\n" + "\n".join(text for _, text in expert.spans)
            self.examples[expert.stratum] = whole[:EXAMPLE_CHARS]

    def drop(self, reasons: Mapping[str, int]) -> None:
        """Count what was dropped."""
        self.dropped.update(reasons)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, keys sorted; shares of the strata are of 1, lengths in words and marks that the teacher wrote."""
        return {
            "count": self.count,
            **{name: dict(sorted(getattr(self, name).items())) for name in COUNTS},
            "strata_shares": {name: round(n / self.count, 4) for name, n in sorted(self.strata.items())},
            "turns": _spread(self.turns),
            "words": _spread(self.written),
            "examples": dict(sorted(self.examples.items())),
        }


def _spread(counts: Counter[int]) -> dict[str, float]:
    values = list(counts.elements()) or [0]
    return {"mean": round(fmean(values), 2), "median": median(values), "max": max(values)}


def markdown(report: Mapping[str, Any]) -> str:
    """`Report.to_dict`, and whatever else a recipe adds to it, as a page."""
    parts = [f"# {report['count']} expert trajectories\n"]
    for name in COUNTS:
        if counts := report[name]:
            rows = "".join(f"| {key} | {n} | {n / max(report['count'], 1):.1%} |\n" for key, n in counts.items())
            parts.append(f"## {name}\n\n| | count | share of the kept |\n| --- | ---: | ---: |\n{rows}")
    for name in ("turns", "words"):
        spread = report[name]
        parts.append(f"{name}: mean {spread['mean']}, median {spread['median']}, at most {spread['max']}\n")
    for stratum, text in report["examples"].items():
        parts.append(f"## example: {stratum}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def plot(report: Report, file: Path) -> None:
    """Counts as bars and lengths as a histogram, into a .png file."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    *rows, last = figure.subplots(2, 2).flat
    for axis, name in zip(rows, ("types", "strata", "dropped"), strict=True):
        counts = getattr(report, name)
        keys = sorted(counts)
        axis.barh(keys, [counts[key] for key in keys])
        axis.set(title=name)
    values = sorted(report.written)
    last.bar(values, [report.written[value] for value in values], width=8)
    last.set(title="words and marks of the teacher", xlabel="in a trajectory")
    figure.savefig(file, dpi=110)
