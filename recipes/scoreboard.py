"""The result of an evaluation for people: a table in the terminal, Markdown, and a picture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..engine.plots import BLUE, GREEN, INK, MUTED, RED, dress, save

Row = tuple[str, str, str, str]  # what, value, interval, number of tasks or runs

HEADER: Row = ("", "value", "95 % interval", "count")
WORST = 10  # kinds of errors shown


def shown(value: float | None) -> str:
    """A number in four digits."""
    return "-" if value is None else f"{value:.4g}"


def sections(result: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Titles and rows of a result, as ``data.outcomes.summarise`` gives it."""
    tasks, runs, intervals = result["num_tasks"], result["num_runs"], result["intervals"]
    passes = {f"pass@{k}": (value, intervals[f"pass_at_{k}"]) for k, value in result["pass_at"].items()}
    own = {name: (value, intervals[name]) for name, value in result["measures"].items()}
    scores = [_row(name, value, interval, tasks) for name, (value, interval) in {**passes, **own}.items()]
    yield "scores", scores
    means = {
        "answered, share of runs": result["answered"],
        "tokens of a run": result["tokens"],
        "tokens of a right one": result["tokens_right"],
        "turns of a run": result["turns"],
        "turns of a right one": result["turns_right"],
    }
    yield "runs", [_row(name, value, None, runs) for name, value in means.items()]
    for title, key in (("pass@1 by level", "by_level"), ("pass@1 by type", "by_type")):
        if rows := result.get(key):
            yield (
                title,
                [
                    _row(name or "other", row["pass_at_1"], row["interval"], row["num_tasks"])
                    for name, row in rows.items()
                ],
            )
    yield "how runs end", [_row(name, count / runs, None, count) for name, count in result["endings"].items()]
    if errors := list(result["code_errors"].items())[:WORST]:
        yield "errors of the code, a run", [_row(name, count / runs, None, count) for name, count in errors]
    if dropped := result["dropped"]:
        yield "rows left out", [(name, "", "", str(count)) for name, count in dropped.items()]


def _row(name: str, value: float | None, interval: tuple[float, float] | None, count: int) -> Row:
    return name, shown(value), f"{shown(interval[0])} to {shown(interval[1])}" if interval else "", str(count)


def print_result(result: Mapping[str, Any], name: str, console: Console) -> None:
    """Shows a result in the terminal."""
    table = Table(title=_title(result, name), title_justify="left")
    for column in HEADER:
        table.add_column(column, justify="right" if column else "left")
    for title, rows in sections(result):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            table.add_row(*row)
    console.print(table)


def to_markdown(result: Mapping[str, Any], name: str) -> str:
    """A result as Markdown, a table for each section."""
    lines = [f"# {_title(result, name)}", ""]
    for title, rows in sections(result):
        lines += [f"## {title}", "", _line(HEADER), "| --- | ---: | ---: | ---: |"]
        lines += [*map(_line, rows), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _title(result: Mapping[str, Any], name: str) -> str:
    of = f"{name} on {result['benchmark']}" if result["benchmark"] else name
    return f"{of}: {result['num_tasks']} tasks, {result['num_runs']} runs"


def draw(result: Mapping[str, Any], name: str, png: str | Path) -> None:
    """Draws scores with intervals, pass@1 by level and type, and how runs end into one PNG.

    Args:
        png: is replaced whole or not at all.
    """
    intervals = result["intervals"]
    scores = {f"pass@{k}": (value, intervals[f"pass_at_{k}"]) for k, value in result["pass_at"].items()}
    scores |= {name.replace("_", " "): (value, intervals[name]) for name, value in result["measures"].items()}
    groups = {**result.get("by_level", {}), **result["by_type"]}
    types = {name or "other": (row["pass_at_1"], row["interval"]) for name, row in groups.items()}
    runs = result["num_runs"]
    ends = {name.replace("_", " "): (count / runs, None) for name, count in result["endings"].items()}
    errors = list(result["code_errors"].items())[:WORST]
    failures = {name: (count / runs, None) for name, count in errors}
    most = max(map(len, (scores, types, ends, failures)))
    figure = Figure(figsize=(17, 2.0 + 0.3 * most), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(result, name), x=0.012, ha="left", fontsize=15, color=INK, weight="bold")
    panels = (
        ("Scores, with 95 % intervals", scores, BLUE, 1.0),
        ("pass@1 by level and type", types, GREEN, 1.0),
        ("How runs end, share", ends, MUTED, 1.0),
        ("Errors of the code, a run", failures, RED, None),
    )
    for axes, (title, bars, color, limit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        dress(axes, title if bars else f"{title}: none", "")
        _bars(axes, bars, color)
        axes.set_xlim(0, limit)
        axes.set_ylim(most - 0.5, -0.5)  # the first bar on top, all of one height
    save(figure, png)


def _bars(axes: Axes, bars: Mapping[str, tuple[float, tuple[float, float] | None]], color: str) -> None:
    for place, (value, interval) in enumerate(bars.values()):
        axes.barh(place, value, 0.7, color=color, alpha=0.8)
        if interval:
            axes.plot(interval, (place, place), color=INK, linewidth=1.5)
        axes.text(0.01, place, f"{value:.3f}", va="center", fontsize=8, color=INK, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(bars)), list(bars))
    axes.grid(False, axis="y")
