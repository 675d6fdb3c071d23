"""A trajectory in the terminal: who wrote what in colour, code highlighted, the end and the reward below."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group as Stack
from rich.panel import Panel
from rich.text import Text

STYLES = {"prompt": "dim", "model": "green", "forced": "yellow", "environment": "cyan"}


def trajectory_panel(record: Mapping[str, Any]) -> Panel:
    """A panel that shows ``Trajectory.to_record``: trained tokens green, forced ones yellow, observations cyan."""
    spans = [Text(span["text"].strip("\n"), style=STYLES[span["writer"]]) for span in record["spans"]]
    task = record["task"]
    right = record["correct"]
    end = Text.assemble(
        ("right" if right else "wrong", "bold green" if right else "bold red"),
        f": answered {record['answer']!r}, known {task['answer']!r} ({record['status']})",
    )
    return Panel(Stack(*spans, end), title=Text(f"{task['task_type']}: {task['question']}"), title_align="left")
