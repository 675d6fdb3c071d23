"""Sampled groups as HTML: the trajectories of one task side by side, each with what it earned.

Who wrote a stretch of text is its colour, as in the terminal (`view.py`); only what the model wrote can bear loss. The
prompt, which all share, stands above them. Long texts lose their middle, and say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.text import Text

from ..engine.page import escaped, folded
from .trajectory import Status
from .view import Painter

SHOWN_CHARS = 8_000  # of a trajectory; the prompt has as many
SHOWN_SAMPLES = 8


def group_view(title: str, records: Sequence[Mapping[str, Any]], masked: Collection[Status]) -> str:
    """One group.

    Args:
        title: in front of the task's own words.
        records: what `Trajectory.to_record` gives, of one task; the first SHOWN_SAMPLES are shown.
        masked: statuses whose trajectories bear no loss.
    """
    task = records[0]["task"]
    prompt = next((span["text"] for span in records[0]["spans"] if span["writer"] == "prompt"), "")
    about = f"{title}: {task['task_type']}, {len(records)} samples"
    if len(records) > SHOWN_SAMPLES:
        about += f", the first {SHOWN_SAMPLES} are shown"
    samples = "".join(_sample(record, masked) for record in records[:SHOWN_SAMPLES])
    known = f'<p class="note">known answer: <b>{escaped(_cut(str(task["answer"]), SHOWN_CHARS))}</b></p>'
    shared = folded("the prompt", f'<div class="text prompt">{escaped(_cut(prompt, SHOWN_CHARS))}</div>')
    question = f"<p>{escaped(_cut(task['question'], SHOWN_CHARS))}</p>"
    return f'<h3>{escaped(about)}</h3>{question}{known}{shared}<div class="group">{samples}</div>'


def unlearnt(record: Mapping[str, Any], masked: Collection[Status]) -> str:
    """Why no token of a trajectory bears policy-gradient loss; "" if the model's do."""
    if not record["scored"]:
        return "no judge gave a verdict"
    if record["status"] == "failed" or record["status"] in masked:
        return f"its end, {record['status']}, is masked"
    return "" if record["advantage"] else "its advantage is 0"


def _sample(record: Mapping[str, Any], masked: Collection[Status]) -> str:
    painter, why = Painter(record["task"]["mode"]), unlearnt(record, masked)
    spans = [span for span in record["spans"] if span["writer"] != "prompt"]
    room = SHOWN_CHARS
    shown = []
    for span in spans:
        text = _cut(span["text"].strip("\n"), room)
        room = max(room - len(text), 200)
        name = f"text {span['writer']}" + (" unlearnt" if why else "")
        shown.append(f'<div class="{name}">{_spans(painter.paint(span["writer"], text))}</div>')
        if len(shown) == SHOWN_CHARS // 200:
            shown.append(f'<p class="note">{len(spans) - len(shown)} more spans are left out</p>')
            break
    advantage = record["advantage"]
    color = "c2" if advantage > 0 else "c4" if advantage < 0 else "c7"
    badges = "".join(
        f'<span class="badge {"c2" if done["ok"] else "c4"}">{escaped(done["verdict"])} {done["wall_s"]:.2g} s</span>'
        for done in record["executions"][:20]
    )
    parts = ", ".join(f"{name} {value:.4g}" for name, value in record["rewards"].items())
    earned = f"<br>{escaped(parts or 'not scored yet')}"
    return (
        f'<article class="sample {color}"><header>sample {escaped(record["sample"])}, '
        f"<b>{escaped(record['status'])}</b>, {escaped(record['turns'])} turns, "
        f"{escaped(record['completion_tokens'])} tokens<br>reward <b>{record['reward']:.4g}</b>, "
        f"advantage <b>{advantage:+.4g}</b>{earned}"
        + (f"<br>bears no policy-gradient loss: {escaped(why)}" if why else "")
        + f"</header>{''.join(shown)}<footer>{badges}<br>answer {_answer(record)}{_error(record)}</footer>"
        "</article>"
    )


def _answer(record: Mapping[str, Any]) -> str:
    if record["answer"] is None:
        return "<b>none</b>"
    right = record["rewards"].get("answer")
    name = "" if right is None else "right" if right > 0 else "wrong"
    return f'<b class="{name}">{escaped(_cut(record["answer"], SHOWN_CHARS))}</b>'


def _error(record: Mapping[str, Any]) -> str:
    return f'<br><span class="wrong">{escaped(_cut(record["error"], SHOWN_CHARS))}</span>' if record["error"] else ""


def _spans(painted: Text) -> str:
    """Text with styles as HTML: their words, all but the colours', are classes of the page."""
    return "".join(
        f'<span class="{escaped(span.style)}">{escaped(painted.plain[span.start : span.end])}</span>'
        for span in painted.spans
    ) or escaped(painted.plain)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n... {len(text) - most} characters left out ...\n{text[len(text) - most // 2 :]}"
