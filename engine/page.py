"""One HTML file that needs nothing else: no network, no font, no library, and only the script that is in it.

    write_page(file, "a title", sections({"Curves": figure, "Settings": table(("name", "value"), rows)}))

Text from models, tables and files goes through ``escaped``. What slips through still runs nothing: the page's policy
(Content-Security-Policy) allows the one script by its hash, and no address.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .atomic import write_atomically

# A terminal obeys control characters, which models and tables may write too; XML forbids them. They are shown instead.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys([*range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def visible(text: str) -> str:
    """Text from a model or a table as a terminal or a page may get it: control characters give way to pictures."""
    return text.translate(CONTROLS)


def escaped(text: object) -> str:
    """Any text as the content or the attribute of an element."""
    return html.escape(visible(str(text)))


def sections(parts: Mapping[str, str]) -> str:
    """Parts of the page by their titles, with links to them in front; the values are HTML."""
    names = {title: escaped(title.lower().replace(" ", "-")) for title in parts}
    links = "".join(f'<a href="#{names[title]}">{escaped(title)}</a>' for title in parts)
    shown = (f'<section id="{names[title]}"><h2>{escaped(title)}</h2>{part}</section>' for title, part in parts.items())
    return f"<nav>{links}</nav>{''.join(shown)}"


def missing(text: str) -> str:
    """Says in its place what there is not."""
    return f'<p class="missing">{escaped(text)}</p>'


def note(text: str) -> str:
    """A remark in small type."""
    return f'<p class="note">{escaped(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], wide: Sequence[int] = (0,)) -> str:
    """A table of texts; the columns ``wide`` are prose, left-aligned, all others are numbers."""

    def line(kind: str, cells: Sequence[object]) -> str:
        return "".join(
            f"<{kind}{' class=prose' if place in wide else ''}>{escaped(cell)}</{kind}>"
            for place, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """HTML that a click opens."""
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


def grid(*figures: str) -> str:
    """Figures beside one another, as many as the width has room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def write_page(file: Path, title: str, body: str) -> None:
    """Writes the page: the new file or, whatever happens, the old one. ``body`` is HTML."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    write_atomically(
        file,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f'<body><h1>{escaped(title)}</h1>{body}<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n',
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5d6b7a; --grid: #e1e5ea; --back: #fff; --card: #f6f8fa;
  --p0: #2563eb; --p1: #d9620c; --p2: #1f8a4c; --p3: #7c4dbe; --p4: #c7304a; --p5: #148297; --p6: #8a7a12;
  --p7: #74808d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #9aa7b4; --grid: #303943; --back: #14181d;
  --card: #1c2229; --p0: #6ea8fe; --p1: #ff9d57; --p2: #52cc85; --p3: #c09bff; --p4: #ff7d92; --p5: #54cbe0;
  --p6: #d8c653; --p7: #a3b1bf } }
.c0 { --c: var(--p0) } .c1 { --c: var(--p1) } .c2 { --c: var(--p2) } .c3 { --c: var(--p3) }
.c4 { --c: var(--p4) } .c5 { --c: var(--p5) } .c6 { --c: var(--p6) } .c7 { --c: var(--p7) }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 12px 16px 48px; max-width: 1500px; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 8px 0 } h2 { font-size: 1.15rem; margin: 32px 0 8px; border-top: 1px solid var(--grid);
  padding-top: 16px } h3 { font-size: 1rem; margin: 20px 0 6px }
a { color: var(--p0) } nav { margin-top: 10px } nav a { margin-right: 14px; display: inline-block }
.note, .missing { color: var(--muted); font-size: .87rem; margin: 6px 0 }
.missing { border: 1px dashed var(--grid); border-radius: 6px; padding: 10px 12px }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)) }
figure { margin: 0; padding: 10px 10px 4px; background: var(--card); border-radius: 8px; min-width: 0 }
figcaption { font-weight: 600; font-size: .9rem } figure:has(table) { max-height: 420px; overflow-y: auto }
figure .note { margin: 2px 0 6px }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: .78rem; color: var(--muted); margin: 2px 0 4px }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; background: var(--c);
  margin-right: 5px }
svg { display: block; width: 100%; height: auto; touch-action: pan-y } svg text { font-size: 11px; fill: var(--muted) }
.rule { stroke: var(--grid) } .cursor { stroke: var(--muted); visibility: hidden }
.line, .dots, .range { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round }
.line { stroke-width: 2 } .dots { stroke-width: 5; opacity: .4 } .range { stroke-width: 2.5 }
.bar { fill: var(--c) } .bar:hover, .knob:hover { opacity: .7 } .knob { fill: var(--c) }
.outline { fill: var(--c); fill-opacity: .16; stroke: var(--c); stroke-width: 1.5 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; margin: 6px 0 12px }
th, td { text-align: right; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  font-variant-numeric: tabular-nums; unicode-bidi: isolate; overflow-wrap: normal }
th { color: var(--muted); font-weight: 600 } .prose { text-align: left; overflow-wrap: anywhere; min-width: 7em }
summary { cursor: pointer; color: var(--muted); margin: 8px 0 }
.finding { border-left: 3px solid var(--p4); padding: 2px 10px; margin: 8px 0; max-width: 900px }
.tiles { display: flex; flex-wrap: wrap; gap: 8px } .tile { background: var(--card); border-radius: 8px;
  padding: 8px 12px; font-size: .8rem; color: var(--muted) } .tile b { display: block; font-size: 1.05rem;
  color: var(--ink); font-weight: 600 }
.group { display: flex; gap: 10px; overflow-x: auto; padding-bottom: 8px; align-items: flex-start }
.sample { flex: 0 0 min(88vw, 400px); background: var(--card); border-radius: 8px; padding: 8px 10px;
  max-height: 720px; overflow-y: auto; border-top: 3px solid var(--c) }
.sample header, .sample footer { font-size: .82rem; color: var(--muted) } .sample b { color: var(--ink) }
.sample table { margin: 4px 0 } .text { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; margin: 4px 0; padding: 2px 6px; border-left: 3px solid var(--c) }
.prompt { --c: var(--p7) } .model { --c: var(--p2) } .forced { --c: var(--p6) } .environment { --c: var(--p5) }
.text.model { background: color-mix(in srgb, var(--c) 13%, transparent) } .text.unlearnt { background: none;
  border-left-style: dotted } .text.prompt, .dim { opacity: .65 } .italic { font-style: italic }
.bold { font-weight: 600 } .reverse { outline: 1px solid var(--c); border-radius: 2px }
.sample .right { color: var(--p2) } .sample .wrong { color: var(--p4) } .text.environment { color: var(--c) }
.badge { border: 1px solid var(--c); color: var(--c); border-radius: 4px; padding: 0 5px; font-size: .78rem;
  margin-right: 5px; display: inline-block }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--back); border: 1px solid var(--grid);
  border-radius: 6px; padding: 6px 9px; font-size: .8rem; box-shadow: 0 2px 8px #0004; max-width: 90vw }
#tip i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; background: var(--c); margin-right: 6px }
"""

# Shows the values of a chart's lines at the step under the pointer. The numbers are those of `charts.line_chart`.
SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
  return low && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
};
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const { box, from, to, lines } = JSON.parse(svg.dataset.lines), cursor = svg.querySelector(".cursor");
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  const show = (event) => {
    const place = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;
    const share = ((event.clientX - place.left) / place.width * wide - box[0]) / (box[1] - box[0]);
    const wanted = from + Math.min(1, Math.max(0, share)) * (to - from);
    const all = lines.map((line) => line.x[nearest(line.x, wanted)]);
    const step = all.reduce((best, x) => Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best);
    const rows = lines.flatMap((line) => {
      const at = nearest(line.x, step), row = document.createElement("div"), mark = document.createElement("i");
      if (line.x[at] !== step) return [];
      mark.className = line.color;
      row.append(mark, `${line.label} ${line.y[at]}`);
      return [row];
    });
    tip.replaceChildren(`step ${step}`, ...rows);
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
    const x = box[0] + (to > from ? (step - from) / (to - from) : 0.5) * (box[1] - box[0]);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
"""
