"""The picture of a run: one HTML file that opens anywhere, for a finished run or one that is at work.

    python -m groupwise.recipes.report RUN [OTHER_RUN ...]

Writes ``RUN/report.html``: curves, lengths, time and memory by phase, the sandbox's verdicts, the doctor's findings,
evaluations, the data, the settings, and sampled groups side by side. Further runs are drawn into the same plots, and
their settings and evaluations are compared. What was not recorded is said in its place. It needs neither ranks nor a
configuration, and changes nothing else.
"""

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.outcomes import Outcome, compare
from ..data.report import COUNTS
from ..engine.charts import COLORS, MAX_BARS, Line, histogram, interval_chart, line_chart, stacked_chart
from ..engine.curves import series
from ..engine.errors import UserError
from ..engine.metrics import TIMING, WHOLE
from ..engine.page import escaped, folded, grid, missing, note, sections, table, write_page
from ..rollout.group_view import group_view
from .command import Arguments, run_command
from .past_run import PastRun
from .scoreboard import HEADER, shown
from .scoreboard import sections as score_sections

GIB = 2**30
LISTED = 40  # rows of a table of counts


@dataclass(frozen=True)
class Panel:
    """A plot of some figures of a step: their names, or with ``*`` at the end what their names begin with.

    Of several panels the first draws a figure.
    """

    title: str
    names: tuple[str, ...]
    log: bool = False

    def found(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that it draws, in its order."""
        exact = {name for name in self.names if not name.endswith("*")}
        starts = tuple(name[:-1] for name in self.names if name.endswith("*"))
        return sorted(name for name in names if name in exact or (starts and name.startswith(starts)))


TRAINING = (
    Panel("Loss", ("loss", "loss/*")),
    Panel("Learning rate", ("lr",)),
    Panel("Gradient norm", ("grad_norm",), log=True),
    Panel("Skipped steps", ("skipped_steps",)),
)
GRPO = (
    Panel("Reward", ("reward",)),
    Panel("Deviation of the reward in a group", ("reward_std",)),
    Panel("pass@1 of the training tasks", ("rewards/answer",)),
    Panel("Parts of the reward, normed in their group", ("rewards/tag_norm", "rewards/hrm_norm")),
    Panel("Parts of the reward", ("rewards/*",)),
    Panel("Curriculum: weight of structure, and of experts (gamma)", ("reward/structure_weight", "gamma")),
    Panel("Groups asked and with contrast", ("groups/*",)),
    Panel("Share of groups without deviation", ("frac_reward_zero_std",)),
    *TRAINING,
    Panel("KL to the reference, nats", ("kl",)),
    Panel("Entropy, nats", ("entropy",)),
    Panel("Clipped tokens, share", ("clip_ratio/*",)),
    Panel("Ratio of new to old probability", ("ratio/*",), log=True),
    Panel("Length of a completion, tokens", ("completions/mean_length",)),
    Panel("Turns", ("completions/mean_turns",)),
    Panel("Cut and failed completions, share", ("completions/clipped_ratio", "completions/failed_ratio")),
    Panel("Failed executions, share", ("tools/failure_frequency",)),
    Panel("Trainer and sampler apart, nats", ("sampling/logp_difference_*", "sampling/kl"), log=True),
    Panel("Effective sample size, share", ("sampling/ess",)),
    Panel("Tokens that bear loss", ("tokens/*",)),
    Panel("Tokens sampled a second", ("sampling/tokens_per_s",)),
    Panel("Tokens a second by phase", ("perf/tokens_per_s/*",), log=True),
    Panel("Share of the device's peak: products (mfu), bandwidth of decoding (mbu)", ("perf/mfu*", "perf/mbu")),
    Panel("Seconds that rollouts waited for tools", ("tools/wait_s",)),
)
MEMORY = (
    Panel("KV blocks used at most, share", ("sampling/kv_peak_share",)),
    Panel("KV blocks used at most, GiB", ("sampling/kv_peak_gib",)),
    Panel("Prefix cache hits, share of prompt tokens", ("sampling/prefix_hit_rate",)),
    Panel("Preempted sequences", ("sampling/preemptions",)),
    Panel("Peak memory, GiB", ("perf/peak_memory_gib",)),
)
ELSEWHERE = (TIMING, "doctor/")  # how figures begin that other sections show


def report(argv: Sequence[str], console: Console) -> None:
    """Writes the page of the runs that a command line names.

    Raises:
        UserError: what ``write_report`` raises.
    """
    parser = Arguments("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; the page goes into the first"
    )
    file = write_report(parser.parse_args(argv).runs)
    console.print(f"{file}, {file.stat().st_size / 1e6:.1f} MB", soft_wrap=True, markup=False)


def write_report(folders: Sequence[Path]) -> Path:
    """Writes ``report.html`` into the first of some runs' folders, and returns its path.

    Raises:
        UserError: a folder holds no run, a file in it is broken, there are more runs than colours, or the page cannot
            be written.
    """
    if len(folders) > COLORS:
        raise UserError(f"{len(folders)} runs are given, and a page has colours for {COLORS}; leave some out")
    runs = [PastRun(folder) for folder in folders]
    names = [run.name for run in runs]
    for place, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({place + 1})"
    file = folders[0] / "report.html"
    try:
        write_page(file, "groupwise: " + ", ".join(run.name for run in runs), page_body(runs))
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}); free space or make the folder writable"
        ) from error
    return file


def page_body(runs: Sequence[PastRun]) -> str:
    """The whole page below its title. Curves, time, memory and scores are of all runs, the rest is of the first."""
    first = runs[0]
    parts = {
        "Doctor": findings(runs),
        "Evaluation": evaluation(runs),
        "GRPO": curves(runs, "grpo", GRPO),
        "Lengths and endings": endings(first),
        "Time": timing(runs),
        "Memory": memory(runs),
        "Groups": groups(first),
        "SFT": curves(runs, "sft", TRAINING),
        "Reward model": curves(runs, "hrm", TRAINING),
        "Data": data(first),
        "Settings": settings(runs),
    }
    return overview(runs) + sections(parts)


def overview(runs: Sequence[PastRun]) -> str:
    """How far each run is and what it reached, in tiles."""
    parts = []
    for number, run in enumerate(runs):
        tiles = {name: str(value) for name, value in run.summary.items() if not isinstance(value, (dict, list))}
        done = [f"{phase} {records[-1]['step'] + 1} steps" for phase, records in run.records.items() if records]
        times = [records[-1]["time"] for records in run.records.values() if records and records[-1].get("time")]
        last = datetime.datetime.fromtimestamp(max(times), datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") if times else ""
        state = "finished" if run.summary else "not finished (summary.json is not there yet)"
        line = ", ".join([state, *done, *([f"last step at {last}"] if last else [])])
        cells = "".join(f'<div class="tile">{escaped(k)}<b>{escaped(v)}</b></div>' for k, v in tiles.items())
        name = f'<b class="badge c{number}">{escaped(run.name)}</b>' if len(runs) > 1 else ""
        parts.append(f'<p class="note">{name}{escaped(line)}</p><div class="tiles">{cells}</div>')
    return "".join(parts)


def curves(runs: Sequence[PastRun], phase: str, panels: Sequence[Panel]) -> str:
    """The figures of a phase by step: in one run a colour for each figure, of several a plot each with the runs."""
    recorded = {name for run in runs for record in run.records[phase] for name in record}
    rest = {name for name in recorded - {"step", "time"} if not name.startswith(ELSEWHERE)}
    if not rest:
        return missing(f"not recorded: {phase}.jsonl is not there or has no step")
    figures = _panels(runs, phase, panels, rest)
    rest -= {name for panel in MEMORY for name in panel.found(rest)}
    others = [_panel(runs, phase, name, [name], False) for name in sorted(rest)]
    return grid(*figures) + (folded(f"{len(others)} more figures", grid(*others)) if others else "")


def _panels(runs: Sequence[PastRun], phase: str, panels: Sequence[Panel], names: set[str]) -> list[str]:
    """Figures; the names that they draw are taken out of ``names``."""
    figures = []
    for panel in panels:
        found = panel.found(names)
        names -= set(found)
        figures.append(_panel(runs, phase, panel.title, found, panel.log) if found else line_chart(panel.title, []))
    return figures


def _panel(runs: Sequence[PastRun], phase: str, title: str, names: Sequence[str], log: bool) -> str:
    if len(runs) > 1 and len(names) > 1:
        return "".join(_panel(runs, phase, f"{title}: {name}", [name], log) for name in names)
    lines, remarks = [], []
    for place, (run, name) in enumerate((run, name) for run in runs for name in names):
        label = run.name if len(runs) > 1 else name
        steps, values = series(run.records[phase], name)
        lines.append(Line(label, steps, values, place % COLORS))
        absent = sum(1 for record in run.records[phase] if name in record) - len(steps)
        if absent:
            remarks.append(f"{label} is not finite in {absent} steps")
        elif not len(steps):
            remarks.append(f"not recorded in {label}")
    return line_chart(title, lines, log=log, remark="; ".join(remarks))


def findings(runs: Sequence[PastRun]) -> str:
    """What the doctor said, and in how many steps it held."""
    parts = []
    for run in runs:
        if run.findings is None:
            parts.append(missing(f"not recorded: {run.folder / 'grpo' / 'doctor.jsonl'} is not there"))
            continue
        parts += [f"<h3>{escaped(run.name)}</h3>"] * (len(runs) > 1) + [note("no finding")] * (not run.findings)
        for found in run.findings:
            name = str(found.get("name"))
            held = sum(1 for record in run.records["grpo"] if record.get(f"doctor/{name}"))
            head = f"<b>{escaped(name)}</b> since step {found['step'] + 1}, in {held} steps"
            text = escaped(f"{found.get('evidence', '')} {found.get('remedy', '')}")
            parts.append(f'<div class="finding">{head}<br>{text}</div>')
    return "".join(parts)


def evaluation(runs: Sequence[PastRun]) -> str:
    """Scores with their intervals, what differs with its significance, and all rows of each result."""
    results: dict[str, dict[str, Any]] = {}
    parts: list[str] = []
    rows: list[tuple[str, float, Sequence[float], int]] = []
    for number, run in enumerate(runs):
        parts += map(missing, run.broken_results)
        for name, result in run.results.items():
            label = _label(runs, run, name)
            results[label] = result
            for k, value in result["pass_at"].items():
                color = number if len(runs) > 1 else len(results) - 1
                rows.append((f"{label}, pass@{k}", value, result["intervals"][f"pass_at_{k}"], color % COLORS))
    if not results:
        return "".join(parts) + missing(f"not recorded: {runs[0].folder / 'evaluate'} holds no result")
    parts.append(grid(interval_chart("Scores with 95 % intervals", rows)))
    pairs = [pair for run in runs for pair in pairwise(_label(runs, run, name) for name in run.results)]
    pairs += [
        (_label(runs, runs[0], name), _label(runs, run, name))
        for run in runs[1:]
        for name in run.results
        if name in runs[0].results
    ]
    parts += [_difference(one, other, results) for one, other in pairs]
    for label, found in results.items():
        tables = "".join(f"<h3>{escaped(title)}</h3>{table(HEADER, lines)}" for title, lines in score_sections(found))
        parts.append(folded(f"{label}: {found['num_tasks']} tasks, {found['num_runs']} runs", tables))
    return "".join(parts)


def _label(runs: Sequence[PastRun], run: PastRun, name: str) -> str:
    return f"{run.name}: {name}" if len(runs) > 1 else name


def _difference(one: str, other: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    before, after = ([Outcome.from_dict(outcome) for outcome in results[name]["outcomes"]] for name in (one, other))
    try:
        found = compare(before, after)
    except UserError as error:
        return missing(f"{one} and {other}: {error}")
    rows = [
        (name.replace("_", " "), shown(row["one"]), shown(row["other"]), f"{row['difference']:+.4g}",
         f"{row['interval'][0]:+.4g} to {row['interval'][1]:+.4g}", f"{row['p_value']:.4f}")
        for name, row in found["rows"].items()
    ]  # fmt: skip
    title = f"A: {one}, B: {other}, on {found['num_tasks']} common tasks"
    return f"<h3>{escaped(title)}</h3>" + table(("", "A", "B", "B - A", "95 % interval", "p"), rows)


def endings(run: PastRun) -> str:
    """Lengths, turns, ends and verdicts of the sampled trajectories."""
    found = run.sampled
    if not found.steps:
        return missing(f"not recorded: {run.folder / 'trajectories' / 'grpo'} holds no trajectories")
    thirds = [part.tolist() for part in np.array_split(found.steps, min(3, len(found.steps)))]
    spans = {f"steps {part[0] + 1} to {part[-1] + 1}": part for part in thirds}
    read = f"{run.name}: {len(found.steps)} of {found.num_steps} steps are read"

    def parts(counts: Mapping[int, Counter[str]]) -> dict[str, list[float]]:
        names = sorted({name for counter in counts.values() for name in counter})
        return {name: [float(counts[step][name]) for step in found.steps] for name in names}

    columns = [str(step + 1) for step in found.steps]
    figures = [
        histogram(
            title, {name: [x for step in part for x in values[step]] for name, part in spans.items()}, remark=read
        )
        for title, values in (("Length of a completion, tokens", found.lengths), ("Turns of a trajectory", found.turns))
    ]
    figures.append(stacked_chart("How trajectories end", columns, parts(found.endings), remark=read))
    figures.append(stacked_chart("Verdicts of the sandbox, executions", columns, parts(found.verdicts), remark=read))
    return grid(*figures)


def timing(runs: Sequence[PastRun]) -> str:
    """Seconds of each phase of a GRPO step, as bars and summed, and the largest cost in words."""
    parts = []
    for run in runs:
        records = run.records["grpo"]
        names = sorted({name for record in records for name in record if name.startswith(TIMING)} - {WHOLE})
        if not names:
            parts.append(missing(f"{run.name}: the time of phases is not recorded"))
            continue
        buckets = np.array_split(np.arange(len(records)), min(len(records), MAX_BARS))
        values = np.array([[record.get(name) or 0.0 for name in names] for record in records])  # [steps, phases]
        means = [values[bucket].mean(axis=0) for bucket in buckets]
        columns = [_stretch(records[bucket[0]]["step"] + 1, records[bucket[-1]]["step"] + 1) for bucket in buckets]
        phases = {name.removeprefix(TIMING): [float(mean[i]) for mean in means] for i, name in enumerate(names)}
        averaged = "" if len(buckets) == len(records) else f"a bar is the mean of {len(buckets[0])} steps at most"
        chart = stacked_chart(f"{run.name}: time of a step, s", columns, phases, unit="s", remark=averaged)
        sums = values.sum(axis=0)
        total = float(sums.sum()) or 1.0
        costs = [(names[place].removeprefix(TIMING), float(sums[place])) for place in np.argsort(-sums)]
        rows = [(name, f"{cost:.1f}", f"{cost / len(records):.3g}", f"{cost / total:.1%}") for name, cost in costs]
        largest = f"The largest cost is {rows[0][0]}: {rows[0][3]} of {total:.0f} s in {len(records)} steps."
        if waited := sum(record.get("tools/wait_s") or 0.0 for record in records):
            largest += f" Rollouts waited {waited:.1f} s for tools, {waited / total:.1%}, with nothing to decode."
        details = f"<figure>{table(('phase', 's in all', 's a step', 'share'), rows)}{note(largest)}</figure>"
        parts.append(grid(chart, details))
    return "".join(parts)


def _stretch(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def memory(runs: Sequence[PastRun]) -> str:
    """The planned memory of each phase beside what was measured in each step."""
    recorded = {name for run in runs for record in run.records["grpo"] for name in record}
    return grid(*map(_planned_memory, runs), *_panels(runs, "grpo", MEMORY, recorded))


def _planned_memory(run: PastRun) -> str:
    title = f"{run.name}: memory by phase as planned, GiB"
    try:
        plan = run.plan()
    except (UserError, KeyError, TypeError, ValueError) as error:
        return stacked_chart(title, (), {}, remark=f"it cannot be planned: {error}")
    if plan is None:
        return stacked_chart(title, (), {}, remark="it takes a config.json, a summary.json and GRPO's use of KV blocks")
    on_host = plan.device_type == "cpu"  # where it is the same memory
    items = dict.fromkeys(name for phase in plan.phases for name in (*phase.device, *phase.host))
    parts = {
        name: [(phase.device.get(name, 0) + on_host * phase.host.get(name, 0)) / GIB for phase in plan.phases]
        for name in items
    }
    remark = f"tensors on a rank of {plan.num_ranks} on {plan.device_type}"
    names = [phase.name for phase in plan.phases]
    return stacked_chart(title, names, parts, kind="", unit="GiB", remark=remark)


def groups(run: PastRun) -> str:
    """Groups of some steps, side by side."""
    if not run.sampled.groups:
        return missing(f"not recorded: {run.folder / 'trajectories' / 'grpo'} holds no trajectories")
    about = (
        f"{run.name}: of {len(run.sampled.groups)} of {run.sampled.num_steps} steps the group with the largest "
        "advantage, or where there is none the widest rewards. "
        "Filled green is what the model wrote and learnt from, without filling it bears no loss; "
        "yellow was forced, blue came from the environment. Thoughts are italic, code is bold, answers are framed."
    )
    shown_groups = (group_view(f"step {step + 1}", members, run.masked) for step, members in run.sampled.groups)
    return note(about) + "".join(shown_groups)


def data(run: PastRun) -> str:
    """What the expert trajectories are."""
    if not run.data:
        return missing(f"not recorded: {run.folder / 'data' / 'report.json'} is not there")
    total, figures = run.data.get("count", 0), []
    for name in COUNTS:
        counts = run.data.get(name) or {}
        rows = [(key, n, f"{n / max(total, 1):.1%}") for key, n in sorted(counts.items(), key=lambda kv: -kv[1])]
        more = note(f"and {len(rows) - LISTED} more") if len(rows) > LISTED else ""
        content = table((name, "count", "share of the kept"), rows[:LISTED]) + more if rows else note(f"{name}: none")
        figures.append(f"<figure>{content}</figure>")
    lengths = [(name, *(run.data[name][key] for key in ("mean", "median", "max")))
               for name in ("turns", "words") if name in run.data]  # fmt: skip
    spreads = table(("of a trajectory", "mean", "median", "max"), lengths) if lengths else ""
    examples = [
        folded(f"example: {stratum}", f'<div class="text prompt">{escaped(text)}</div>')
        for stratum, text in run.data.get("examples", {}).items()
    ]
    return note(f"{run.name}: {total} expert trajectories") + grid(*figures) + spreads + "".join(examples)


def settings(runs: Sequence[PastRun]) -> str:
    """All settings of the first run, and which differ in the others."""
    flat = [{f"{section}.{key}": value for section, values in run.settings.items() for key, value in values.items()}
            for run in runs]  # fmt: skip
    if not flat[0]:
        return missing(f"not recorded: {runs[0].folder / 'config.json'} is not there")
    names = sorted({name for values in flat for name in values})
    rows = [(name, *(str(values.get(name, "not recorded")) for values in flat)) for name in names]
    header, prose = ("setting", *(run.name for run in runs)), tuple(range(1 + len(runs)))
    every = folded(f"all {len(rows)} settings", table(header, rows, prose))
    if len(runs) == 1:
        return every
    different = [row for row in rows if len(set(row[1:])) > 1]
    return (table(header, different, prose) if different else note("no setting differs")) + every


if __name__ == "__main__":
    run_command(report)
