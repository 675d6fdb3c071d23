"""A trajectory in the terminal: who wrote what in colour, the parts of a turn in their styles, the rewards below.

Trained tokens are green, forced ones yellow, observations cyan, the prompt dim. In what the model wrote, thoughts are
italic, code is bold, answers are reversed, and tags are dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Group as Stack
from rich.panel import Panel
from rich.text import Text

from ..engine.page import visible
from .grammar import GRAMMARS
from .trajectory import Writer

STYLES: dict[Writer, str] = {"prompt": "dim", "model": "green", "forced": "yellow", "environment": "cyan"}


class Painter:
    """Colours the text of one trajectory piece by piece, as it is written.

    Args:
        mode: names the grammar.
    """

    def __init__(self, mode: str) -> None:
        grammar = GRAMMARS[mode]
        self._tags = grammar.tags
        self._tag = re.compile(f"({'|'.join(self._tags)})", re.IGNORECASE)
        parts = ((grammar.thought, "italic "), (grammar.code, "bold "), (grammar.answer, "reverse "))
        self._parts = {f"<{name}>": style for name, style in parts if name}
        self._part = ""  # style of the part that is being written
        self._held = ""  # what may be the beginning of a tag

    def paint(self, writer: Writer, text: str, *, more: bool = False) -> Text:
        """The next piece of text; with ``more`` of this writer to come, what may begin a tag at its end waits."""
        text = visible(text)
        if writer not in ("model", "forced"):
            return Text(text, STYLES[writer])
        text, self._held = self._held + text, ""
        cut = text.rfind("<")
        if more and cut >= 0 and self._begins_tag(text[cut:].lower()):
            text, self._held = text[:cut], text[cut:]
        painted = Text()
        for piece in self._tag.split(text):
            if is_tag := self._tag.fullmatch(piece) is not None:
                self._part = self._parts.get(piece.lower(), "")
            painted.append(piece, ("dim " if is_tag else self._part) + STYLES[writer])
        return painted

    def _begins_tag(self, text: str) -> bool:
        return any(tag != text and tag.startswith(text) for tag in self._tags)


def trajectory_panel(record: Mapping[str, Any]) -> Panel:
    """A panel that shows what ``Trajectory.to_record`` gives, and whether it is right if ``correct`` says so."""
    task, painter = record["task"], Painter(record["task"]["mode"])
    lines = [painter.paint(span["writer"], span["text"].strip("\n")) for span in record["spans"]]
    end = Text(f"answered {record['answer']!r}, known {task['answer']!r} ({record['status']})")
    if "correct" in record:
        right = record["correct"]
        end = Text.assemble(("right" if right else "wrong", "bold green" if right else "bold red"), ": ", end)
    lines.append(end)
    if record["rewards"]:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in record["rewards"].items())
        lines.append(Text(f"reward {record['reward']:.3g} ({parts}), advantage {record['advantage']:+.3g}"))
    return Panel(Stack(*lines), title=Text(visible(f"{task['task_type']}: {task['question']}")), title_align="left")
