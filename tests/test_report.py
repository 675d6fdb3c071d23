"""The picture of a run: every figure is the record's, hostile texts stay texts, and what is missing is said."""

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from groupwise.data.outcomes import Outcome, summarise
from groupwise.engine.charts import Line, histogram, line_chart, stacked_chart
from groupwise.engine.config import load_config
from groupwise.engine.curves import brief, log_ticks, spread, thinned, ticks
from groupwise.engine.errors import UserError
from groupwise.engine.page import escaped, visible
from groupwise.engine.planner import plan_memory
from groupwise.recipes.report import report
from groupwise.rollout.group_view import SHOWN_CHARS, group_view, unlearnt
from groupwise.rollout.trajectory import TRUNCATED, masked_statuses

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \"'& \x00\x1b[2J\u202e\ud800 \U0001f600 ]]>"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """The elements of a page: what it shows, the tags in it, and what every chart draws."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []  # of bars and intervals
        self.captions: list[str] = []
        self.lines: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}  # by section, chart, label
        self.section = ""
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        found = dict(attrs)
        self.attributes |= set(found)
        if tag == "section":
            self.section = found["id"] or ""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if found.get("data-lines"):
            for line in json.loads(found["data-lines"] or "")["lines"]:
                self.lines[self.section, self.captions[-1], line["label"]] = line["x"], line["y"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "figcaption":
            self.captions.append(data)
        elif self.open and self.open[-1] == "title" and "svg" in self.open:
            self.titles.append(data)
        elif self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def make_record(step: int, sample: int = 0, text: str = "2", **changes: Any) -> dict[str, Any]:
    """A trajectory as it is on disk."""
    task = {
        "id": f"t{step}", "question": f"How many {text}?", "files": [], "description": "", "answer": text,
        "answer_type": "number", "task_type": "counting", "mode": "datamind", "table": "", "language": "python",
    }  # fmt: skip
    spans = [
        {"writer": "prompt", "text": f"prompt {text}"},
        {"writer": "model", "text": f"<think>{text}</think>\n<code>\nprint(1){text}\n</code>"},
        {"writer": "environment", "text": f"\n<interpreter>{text}</interpreter>\n"},
        {"writer": "model", "text": f"<answer>{text}"},
        {"writer": "forced", "text": "</answer>"},
    ]
    execution = {"ok": sample % 2 == 0, "output": text, "verdict": ("ok", "error")[sample % 2], "wall_s": 0.5}
    return {
        "task": task, "sample": sample, "status": ("answered", "void")[sample % 2], "error": "", "answer": text,
        "reward": sample / 4, "rewards": {"answer": 0.0, "tag": 0.6}, "advantage": sample - 0.5, "scored": True,
        "turns": 2, "completion_tokens": 10 * step + sample, "spans": spans, "executions": [execution], **changes,
    }  # fmt: skip


def make_run(folder: Path, steps: int = 6, text: str = "2", seed: int = 0) -> Path:
    """The folder of a finished run, and its records in it."""
    rng = np.random.default_rng(seed)
    lines: dict[str, list[dict[str, Any]]] = {"sft": [], "grpo": []}
    names = ("reward", "reward_std", "rewards/answer", "rewards/tag", "kl", "entropy", "clip_ratio/low_mean",
             "lr", "grad_norm", "loss", "gamma", "completions/mean_length", "sampling/kv_peak_share",
             "custom/figure")  # fmt: skip
    for step in range(steps):
        timing = {"timing_s/generate": 2.0 + step, "timing_s/update": 1.0, "timing_s/step": 99.0, "tools/wait_s": 0.5}
        values = {name: float(rng.normal()) for name in names} | timing
        lines["grpo"].append({"step": step, "time": 1e9 + step, **values, "kl": None if step == 1 else values["kl"]})
        lines["sft"].append({"step": step, "time": 1e9, "loss": math.exp(-step)})
        records = [make_record(step, sample, text) for sample in range(4)]
        write_lines(folder / "trajectories" / "grpo" / f"{step:06d}.rank0.jsonl", records)
    for phase, records in lines.items():
        write_lines(folder / f"{phase}.jsonl", records)
    finding = {"step": 3, "name": "kl_spike", "evidence": f"KL is {text}.", "remedy": "Lower grpo.lr."}
    write_lines(folder / "grpo" / "doctor.jsonl", [finding])
    for name, right in (("sft", 1), ("grpo", 3)):
        outcomes = [Outcome(f"t{task}", "counting", "", run < right, "right" if run < right else "void", 10, 2)
                    for task in range(5) for run in range(4)]  # fmt: skip
        result = {"benchmark": "", **summarise(outcomes), "dropped": {}}
        write_json(folder / "evaluate" / f"{name}.json", result | {"outcomes": [one.to_dict() for one in outcomes]})
    write_json(folder / "evaluate" / "grpo.asked.json", {"seed": 0})
    write_json(folder / "summary.json", {"pass_at_1_sft": 0.25, "results": {}})
    write_json(folder / "config.json", load_config(None, [f"run.seed={seed}"]).to_dict())
    counts = {"types": {"counting": 3, text: 1}, "strata": {"success": 4}}
    write_json(folder / "data" / "report.json", {"count": 4, **counts, "examples": {"success": text}})
    return folder


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def read_page(*folders: Path) -> Page:
    report([str(folder) for folder in folders], Console(quiet=True))
    return Page((folders[0] / "report.html").read_text(encoding="utf-8"))


def recorded(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{phase}.jsonl").read_text().splitlines()]


def test_every_figure_of_every_step_is_the_records(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path / "run", steps=30))
    for phase in ("sft", "grpo"):
        records = recorded(tmp_path / "run", phase)
        for name in records[0].keys() - {"step", "time"}:
            if name.startswith("timing_s/"):
                continue
            points = [(r["step"] + 1, r[name]) for r in records if r[name] is not None]
            drawn = [list(zip(xs, ys, strict=True)) for (*_, label), (xs, ys) in page.lines.items() if label == name]
            expected = [(x, pytest.approx(y, rel=1e-5)) for x, y in points]
            assert expected in drawn, name
    assert "kl is not finite in 1 steps" in page.text


def test_bars_findings_and_scores_are_the_records(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path / "run"))
    for step in range(6):
        for told in (f"generate {2.0 + step} s", "update 1.0 s", "answered 2.0", "void 2.0", "ok 2.0", "error 2.0"):
            assert f"step {step + 1}: {told}" in page.titles
    assert not any("99" in title for title in page.titles)  # the sum of the phases is no phase
    assert "The largest cost is generate: 81.8% of 33 s in 6 steps. Rollouts waited 3.0 s for tools, 9.1%" in page.text
    assert "steps 1 to 2: 8 values, mean 6.5, median 6.5, at most 13.0" in page.titles
    assert "kl_spike since step 4, in 0 steps" in page.text
    assert "sft, pass@1: 0.25, interval 0.25 to 0.25" in page.titles
    assert "grpo, pass@4: 1.0, interval 1.0 to 1.0" in page.titles
    assert "pass at 10.250.75+0.5" in page.text
    assert "finished, sft 6 steps, grpo 6 steps, last step at 2001-09-09 01:46 UTC" in page.text
    assert "run.seed0" in page.text
    assert re.search(r"counting375\.0%", page.text)


def test_a_group_shows_who_wrote_what_and_what_it_earned(tmp_path: Path) -> None:
    records = [make_record(0, sample) for sample in range(3)]
    text = group_view("step 1", records, masked_statuses(True, False))
    page = Page(text)
    shown = page.text
    for part in (
        "sample 2, answered, 2 turns, 2 tokens",
        "reward 0.5",
        "advantage +1.5",
        "answer 0, tag 0.6",
        "ok 0.5 s",
    ):
        assert part in shown
    assert shown.count("bears no policy-gradient loss: its end, void, is masked") == 1
    assert text.count('class="text model"') == 4  # of the two answered ones
    assert text.count('class="text model unlearnt"') == 2
    assert {'<span class="bold green">', '<span class="italic green">'} <= set(re.findall("<span[^>]*>", text))
    assert unlearnt(make_record(0, advantage=0.0), frozenset()) == "its advantage is 0"
    assert unlearnt(make_record(0, scored=False), frozenset()) == "no judge gave a verdict"
    assert unlearnt(make_record(0, 1), frozenset()) == ""
    assert masked_statuses(True, True) == {"void", "failed"}
    assert masked_statuses(True, False) == TRUNCATED | {"void", "failed"}
    assert masked_statuses(False, False) == frozenset()


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run", steps=2, text=HOSTILE)
    plain = read_page(make_run(tmp_path / "plain", steps=2))
    page = read_page(folder)
    assert set(page.tags) == set(plain.tags)
    assert {**page.tags, "span": 0} == {**plain.tags, "span": 0}  # spans: the grammar's tags in the text are dimmed
    assert not any(name.startswith("on") for name in page.attributes)
    shown = visible(HOSTILE)
    assert f"How many {shown}?" in page.text
    assert f"KL is {shown}." in page.text
    assert f"print(1){shown}" in page.text
    assert "<b>run" in page.text
    assert not set(page.text) & {chr(code) for code in range(32) if chr(code) not in "\n\t"}


@settings(deadline=None)
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_text_is_one_text_of_the_page(text: str) -> None:
    page = Page(f"<p>{escaped(text)}</p>")
    assert page.text == visible(text)
    assert page.tags == Counter(p=1)
    ElementTree.fromstring(f'<p title="{escaped(text)}">{escaped(text)}</p>')


def test_every_drawing_is_well_formed_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = read_page(make_run(tmp_path / "run", text=HOSTILE))
    text = (tmp_path / "run" / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        numbers = [value for node in ElementTree.fromstring(drawing).iter() for value in node.attrib.values()]
        assert not any(re.search(r"\b(nan|inf)\b", value) for value in numbers)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert {address for address in page.addresses if not address.startswith("#")} == {"data:,"}
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert all(f'id="{address[1:]}"' in text for address in page.addresses if address.startswith("#"))


def test_memory_is_planned_as_the_run_was_launched(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "it takes a config.json, a summary.json" in read_page(folder).text
    write_json(folder / "summary.json", {"ranks": 2, "device": "cuda:0"})
    write_lines(folder / "grpo.jsonl", [{"step": 0, "sampling/kv_peak_share": 0.25, "sampling/kv_peak_gib": 0.5}])
    page = read_page(folder)
    plan = plan_memory(load_config(None, ["rollout.kv_memory=2"]), 2, "cuda")
    for phase in plan.phases:
        told = [title for title in page.titles if title.startswith(f"{phase.name}: ")]
        shown = sum(float(title.split()[-2]) for title in told)
        assert shown == pytest.approx(phase.device_bytes / 2**30, rel=1e-4)
    assert "rollout: KV blocks 2.0 GiB" in page.titles
    config = load_config(None).to_dict()
    write_json(folder / "config.json", config | {"rollout": {"temperature": "hot"}})
    assert "it cannot be planned: rollout.temperature" in read_page(folder).text


def test_what_is_missing_is_said_in_its_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "sft.jsonl", [])
    page = read_page(tmp_path / "run")
    for part in ("doctor.jsonl is not there", "evaluate holds no result", "grpo.jsonl is not there or has no step",
                 "holds no trajectories", "report.json is not there", "config.json is not there",
                 "not finished (summary.json is not there yet)", "the time of phases is not recorded"):  # fmt: skip
        assert part in page.text, part
    assert page.lines == {}
    write_lines(tmp_path / "run" / "grpo.jsonl", [{"step": 0, "reward": 0.5}])
    write_json(tmp_path / "run" / "evaluate" / "sft.json", {"outcomes": [{"task": "t"}]})
    write_json(tmp_path / "run" / "evaluate" / "old.json", {"pass_at_1": 0.5})
    records = [make_record(0, sample, rewards={}, reward=0.0, advantage=0.0) for sample in (1, 0)]  # at work
    file = tmp_path / "run" / "trajectories" / "grpo" / "000000.rank0.jsonl"
    write_lines(file, records)
    file.write_text(file.read_text() + '{"task": ')
    page = read_page(tmp_path / "run")
    assert page.lines["grpo", "Reward", "reward"] == ([1.0], [0.5])
    assert "sft.json is no result of this version of evaluate" in page.text
    assert "old.json is no result of an evaluation" in page.text
    assert page.text.count("not scored yet") == 2
    assert page.text.index("sample 0") < page.text.index("sample 1")
    kl = page.text[page.text.index("KL to the reference") if "KL to the reference" in page.text else 0 :]
    assert "not recorded" in kl


def test_two_runs_share_their_plots(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run")
    two = make_run(tmp_path / "b" / "other", steps=9, seed=1)
    page = read_page(one, two)
    for label, folder in (("run", one), ("other", two)):
        records = recorded(folder, "grpo")
        xs, ys = page.lines["grpo", "Reward", label]
        assert xs == [record["step"] + 1 for record in records]
        assert ys == pytest.approx([record["reward"] for record in records], rel=1e-5)
        assert page.lines["grpo", "Parts of the reward", label][1] == pytest.approx(
            [r["rewards/tag"] for r in records], rel=1e-5
        )
    assert "run.seed01" in page.text
    assert "A: run: sft, B: other: sft, on 5 common tasks" in page.text
    assert "other: grpo, pass@1: 0.75, interval 0.75 to 0.75" in page.titles
    assert not (two / "report.html").exists()
    same = read_page(one, make_run(tmp_path / "c" / "run"))
    assert {label for _, chart, label in same.lines if chart == "Reward"} == {"run (1)", "run (2)"}


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    rng = np.random.default_rng(0)
    records = [{"step": step, **{f"x/{i}": float(rng.normal()) for i in range(60)}} for step in range(500)]
    write_lines(folder / "grpo.jsonl", records)
    hostile = "<think><code>&" * 600  # text that takes most room
    for step in range(60):
        spans = [{"writer": "model", "text": hostile}] * 2
        group = [make_record(step, sample, spans=spans) for sample in range(9)]
        write_lines(
            folder / "trajectories" / "grpo" / f"{step:06d}.rank0.jsonl", group if step in (0, 59) else group[:1]
        )
    page = read_page(folder)
    assert (folder / "report.html").stat().st_size < 5e6
    assert "40 of 60 steps are read" in page.text
    assert "of 6 of 60 steps the group" in page.text
    assert "9 samples, the first 8 are shown" in page.text
    assert "characters left out" in page.text
    long = group_view("step 1", [make_record(0, text="a" * 100_000)], frozenset())
    assert len(long) < 12 * SHOWN_CHARS
    spans = [{"writer": "model", "text": "a" * 10_000}] * 60
    many = Page(group_view("step 1", [make_record(0, spans=spans)], frozenset())).text
    assert SHOWN_CHARS < many.count("a") < 3 * SHOWN_CHARS
    assert "20 more spans are left out" in many


def test_thinned_points_are_records_and_keep_the_spikes() -> None:
    values = np.random.default_rng(0).normal(size=20_001)
    values[12_345] = 100.0
    kept = thinned(values, 1000)
    assert len(kept) <= 1000
    assert {0, 12_345, 20_000, int(values.argmin())} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thinned(values[:1000], 1000).tolist() == list(range(1000))
    chart = line_chart("x", [Line("y", np.arange(1.0, 20_002), values)])
    ((xs, ys),) = Page(chart).lines.values()
    assert ys == pytest.approx([values[int(x) - 1] for x in xs], rel=1e-5)
    assert f"{20_001 - len(xs)} points between the extremes are not drawn" in chart


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert len(found) <= 6
    for mark in found:
        assert low - 1e-6 * width <= mark + 1e-11 * abs(mark)
        assert low + 1.000001 * width >= mark - 1e-11 * abs(mark)


def test_axes_are_brief() -> None:
    assert [brief(x) for x in (0, 0.00055, 1e-5, -2e-16, 2500, 1e7, 0.05)] == [
        "0", "5.5e-4", "1e-5", "-2e-16", "2500", "1e7", "0.05",
    ]  # fmt: skip
    assert log_ticks(0.02, 300) == [0.1, 1, 10, 100]
    assert log_ticks(2, 8) == ticks(2, 8)
    assert spread(500, 6) == [0, 100, 200, 299, 399, 499]
    assert (spread(2, 6), spread(1, 6), spread(0, 6)) == ([0, 1], [0], [])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_a_histogram_leaves_nothing_out(values: list[int]) -> None:
    drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", histogram("x", {"a": values}))[0])  # type: ignore[index]
    (path,) = [node for node in drawing.iter() if node.get("class") == "outline c0"]
    heights = [166 - float(y) for y in re.findall(r"V([\d.]+)H", path.get("d", ""))]
    assert 1 <= len(heights) <= 20
    peak = max(heights)  # drawn at 1 / 1.05 of the height; the shares' sum is 1
    counts = [round(height / peak * len(values), 6) for height in heights]
    assert sum(counts) >= len(values) * 0.99


def test_more_runs_than_colours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9 runs are given"):
        report([str(tmp_path)] * 9, Console(quiet=True))


def test_small_parts_share_the_last_colour() -> None:
    parts = {f"p{i}": [float(i), 1.0] for i in range(12)}
    titles = Page(stacked_chart("x", ("1", "2"), parts)).titles
    assert "step 1: 5 others 10.0" in titles
    assert "step 1: p11 11.0" in titles
    assert len(titles) == 16


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nowhere", "holds no run"),
        ("metrics", "line 1 is no record of a step"),
        ("config", "cannot be read as JSON"),
        ("trajectory", "a record in"),
        ("folder", "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(case: str, words: str, tmp_path: Path) -> None:
    if case != "nowhere":
        write_lines(tmp_path / "sft.jsonl", [{"steps": 1}] if case == "metrics" else [{"step": 0, "loss": 1.0}])
    if case == "config":
        (tmp_path / "config.json").write_text("{")
    if case == "trajectory":
        write_lines(tmp_path / "trajectories" / "grpo" / "000000.rank0.jsonl", [{"task": {}}])
    if case == "folder":
        (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        report([str(tmp_path)], Console(quiet=True))
    assert "\n" not in str(caught.value)
