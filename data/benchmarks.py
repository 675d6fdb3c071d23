"""Benchmarks as tasks: a folder with the files of one, as its authors publish them, recognised by what is in them.

    benchmark = read_benchmark("DABench", work=run_folder / "data" / "benchmark", mode="datamind", sandbox=sandbox)
    benchmark.items[0].task, benchmark.items[0].level, benchmark.dropped

`LAYOUTS` lists the benchmarks. A row that cannot be asked or scored is dropped with a reason. Text questions without a
table are asked in the reflection mode, all others in the mode that the caller names. How a benchmark scores an answer
is a rule of `data.scorers`, named by each item.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..rewards.value_match import parse_number
from ..rollout.sandbox import Sandbox
from ..rollout.task import Task
from .metadata import describe_fully
from .reading import DATABASES, read_frames
from .scorers import Rule, labels_met
from .tables import MAX_ROWS, Dropped, describe

Row = Mapping[str, Any]

QUESTION_FILES = (".jsonl", ".json", ".csv")
NUMBER = "Answer with the number alone."
LETTER = "Answer with the letter of one option."
TEN_PERCENT = ("CorrelationAnalysis", "TrendForecasting", "StatisticalAnalysis")  # of TableBench


class Unusable(Exception):
    """A row of a benchmark that gives no task; the message is the reason in a few words."""


@dataclass(frozen=True)
class BenchmarkItem:
    """A question of a benchmark.

    Args:
        task: what is asked.
        rule: how its answers are scored.
        level: the benchmark's word for how hard it is, "" where it has none.
    """

    task: Task
    rule: Rule = "answer"
    level: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The questions of a folder, and the rows that gave none."""

    name: str
    items: list[BenchmarkItem]
    dropped: list[Dropped]

    def headers(self) -> frozenset[str]:
        """The column names of all its tables, as far as they can be read."""
        files = {Path(file) for item in self.items for file in item.task.files}
        found: set[str] = set()
        for file in files:
            with suppress(UserError):
                for _, frame in read_frames(file, MAX_ROWS):
                    found.update(str(name) for name in getattr(frame, "columns", ()))
        return frozenset(found)


class Source:
    """What a reader needs beside its row.

    Args:
        folder: of the benchmark.
        work: where tables that stand inside of questions are written as files.
        mode: the grammar of questions about tables.
        sandbox: runs the gold queries.
        budget: see `read_benchmark`.
    """

    def __init__(self, folder: Path, work: Path, mode: str, sandbox: Sandbox, budget: int) -> None:
        self.folder, self.work, self.mode, self.sandbox, self.budget = folder, work, mode, sandbox, budget
        self.table = cache(self._table)
        self.schema = cache(self._schema)

    @cached_property
    def labels(self) -> dict[Any, list[tuple[str, str]]]:
        """DABench's gold values by the number of the question."""
        return {row["id"]: row["common_answers"] for file in self.folder.glob("*labels.jsonl") for row in _rows(file)}

    def find(self, *places: str) -> Path:
        """The first of the paths below the folder, in which ``*`` stands for anything, that there is.

        Raises:
            Unusable: there is none.
        """
        for place in places:
            if found := next((path for path in sorted(self.folder.glob(place)) if path.is_file()), None):
                return found.resolve()
        raise Unusable(f"{Path(places[0]).suffix} file not found")

    def _table(self, path: Path) -> str:
        try:
            frame = pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise Unusable("table cannot be read") from error
        return describe_fully(path.name, frame, self.budget) if self.budget else describe(path.name, frame)

    def _schema(self, path: Path) -> str:
        """The statements that made a database's tables."""
        query = "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND sql IS NOT NULL ORDER BY rowid"
        return "\n".join(row["sql"] for row in csv.DictReader(io.StringIO(self.result(query, path))))

    def result(self, query: str, path: Path) -> str:
        """The whole result of a query as CSV, header first.

        Raises:
            Unusable: it fails, or is over the limits of the sandbox.
        """
        execution = self.sandbox.run(query, [str(path)], language="sql")
        if not execution.ok or execution.table is None:
            raise Unusable(f"gold SQL fails ({execution.verdict})")
        if execution.output.rstrip().rpartition("\n")[2].startswith("Only the first "):
            raise Unusable("gold SQL gives too many rows")
        return execution.table


def read_benchmark(folder: str | Path, *, work: str | Path, mode: str, sandbox: Sandbox, budget: int = 0) -> Benchmark:
    """The benchmark in ``folder``; the same tasks in the same order each time.

    Args:
        folder: holds the files of one benchmark.
        work: where tables that stand inside of questions are written as files.
        mode: the grammar of questions about tables, one of ``rollout.task.MODES``.
        sandbox: runs the gold queries of SQL benchmarks.
        budget: characters that a table's description may have; 0: its columns and their types alone.

    Raises:
        UserError: the folder is missing, holds no known benchmark or several, or no row of it is usable.
    """
    folder = Path(folder)
    layout, files = _recognise(folder)
    source = Source(folder, Path(work), mode, sandbox, budget)
    items: dict[str, BenchmarkItem] = {}
    dropped: list[Dropped] = []
    for file in files:
        for number, row in enumerate(_rows(file)):
            place = f"{file.stem}-{number:05d}"
            try:
                item = layout.read(row, f"{layout.name}-{place}", source)
                if item.task.id in items:
                    raise Unusable("repeated id")
                items[item.task.id] = item
            except Unusable as reason:
                dropped.append(Dropped(place, str(reason)))
            except KeyError as error:
                dropped.append(Dropped(place, f"no field {error}"))
            except (TypeError, ValueError, AttributeError, IndexError):
                dropped.append(Dropped(place, "malformed row"))
    if not items:
        reasons = ", ".join(sorted({drop.reason for drop in dropped})[:3])
        raise UserError(f"none of the {len(dropped)} rows of {folder} is usable ({reasons}); complete the folder")
    return Benchmark(layout.name, list(items.values()), dropped)


def _recognise(folder: Path) -> tuple[Layout, list[Path]]:
    if not folder.is_dir():
        raise UserError(f"the benchmark {folder} does not exist; give a folder")
    found: dict[str, list[Path]] = {}
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in QUESTION_FILES):
        first = next((row for row in _rows(file) if row), {})
        if layout := next((layout for layout in LAYOUTS if layout.fits(first)), None):
            found.setdefault(layout.name, []).append(file)
    if not found:
        known = "; ".join(layout.looks for layout in LAYOUTS)
        raise UserError(f"{folder} holds no benchmark that is known; expected one of {known}")
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(sorted(found))}; give a folder with one benchmark")
    ((name, files),) = found.items()
    return next(layout for layout in LAYOUTS if layout.name == name), files


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a file; what is no row of it is an empty one."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return
    if file.suffix.lower() == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    if file.suffix.lower() == ".json":
        whole = _parse(text)
        yield from (row if isinstance(row, dict) else {} for row in (whole if isinstance(whole, list) else []))
        return
    for line in text.split("\n"):
        if line.strip():
            row = _parse(line)
            yield row if isinstance(row, dict) else {}


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- one reader for each layout --------------------------------------------------------------------------------------


def _dabench(row: Row, name: str, source: Source) -> BenchmarkItem:
    number, file = row["id"], row["file_name"]
    path = source.find(f"*tables/{_base(file)}")
    gold = ", ".join(f"@{name}[{value}]" for name, value in source.labels.get(number, []))
    if not any(labels_met(gold, gold).values()):
        raise Unusable("no label")
    task = Task(
        id=f"dabench-{number}",
        question="\n".join(row[part] for part in ("question", "constraints", "format")),
        files=(str(path),),
        description=source.table(path),
        answer=gold,
        answer_type="named",
        task_type=row["concepts"][0].lower(),
        mode=source.mode,
        table=file,
    )
    return BenchmarkItem(task, "dabench", row.get("level", ""))


def _tablebench(row: Row, name: str, source: Source) -> BenchmarkItem:
    kind, subtype, gold = row["qtype"], row["qsubtype"], _text(row["answer"])
    if kind == "Visualization":
        raise Unusable("charts are not scored")
    table = json.loads(row["table"]) if isinstance(row["table"], str) else row["table"]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([table["columns"], *table["data"]])
    digest = hashlib.sha256(written.getvalue().encode()).hexdigest()[:12]
    path = (source.work / "tables" / digest / "table.csv").resolve()
    if not path.exists():
        write_atomically(path, written.getvalue())
    rule: Rule = "rouge_l"
    if kind != "DataAnalysis" or subtype == "ImpactAnalysis":
        rule = "exact_match"
    elif subtype in TEN_PERCENT:
        rule = "exact_match_10_percent"
    task = Task(
        id=f"tablebench-{row['id']}" if row.get("id") else name,
        question=_text(row["question"]),
        files=(str(path),),
        description=source.table(path),
        answer=gold,
        answer_type="free" if rule == "rouge_l" else "text",
        task_type=subtype,
        mode=source.mode,
        table=digest,
    )
    return BenchmarkItem(task, rule)


def _bird(row: Row, name: str, source: Source) -> BenchmarkItem:
    database = _base(row["db_id"])
    path = source.find(*(f"*{place}{ending}" for place in (f"/{database}/{database}", f"/{database}", database)
                         for ending in DATABASES))  # fmt: skip
    hint = row.get("evidence") or ""
    task = Task(
        id=f"bird-{row['question_id']}" if "question_id" in row else name,
        question=_text(row["question"]) + (f"\n{hint}" if hint else ""),
        files=(str(path),),
        description=source.schema(path),
        answer=source.result(_text(row["SQL"]), path),
        answer_type="table",
        task_type="text to SQL",
        mode=source.mode,
        table=database,
        language="sql",
    )
    return BenchmarkItem(task, "execution_match", row.get("difficulty") or "")


def _qrdata(row: Row, name: str, source: Source) -> BenchmarkItem:
    files = [source.find(f"*/{_base(file)}", _base(file)) for file in row["data_files"]]
    about, gold = row.get("meta_data") or {}, _text(row["answer"])
    numerical = about.get("question_type") == "numerical"
    if numerical and parse_number(gold) is None:
        raise Unusable("answer is no number")
    told = [row.get("data_description") or "", *(source.table(path) for path in files)]
    task = Task(
        id=name,
        question=_text(row["question"]),
        files=tuple(map(str, files)),
        description="\n".join(filter(None, told)),
        answer=gold,
        answer_type="number" if numerical else "choice",
        task_type=(about.get("keywords") or ["data analysis"])[0].lower(),
        mode=source.mode,
        table=files[0].name,
    )
    return BenchmarkItem(task)


def _gsm8k(row: Row, name: str, source: Source) -> BenchmarkItem:
    _, mark, gold = row["answer"].rpartition("####")
    if not mark or parse_number(gold) is None:
        raise Unusable("no number behind ####")
    return BenchmarkItem(_text_task(name, f"{_text(row['question'])}\n{NUMBER}", gold.strip(), "mathematics"), "number")


def _aime(row: Row, name: str, source: Source) -> BenchmarkItem:
    fields = {key.lower(): value for key, value in row.items()}
    gold = int(fields["answer"])
    if not 0 <= gold <= 999:
        raise Unusable("answer is no integer from 0 to 999")
    question = _text(fields.get("problem") or fields["question"])
    return BenchmarkItem(_text_task(name, f"{question}\n{NUMBER}", str(gold), "mathematics"), "number")


def _gpqa(row: Row, name: str, source: Source) -> BenchmarkItem:
    right = _text(row["Correct Answer"])
    options = [right, *(_text(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3))]
    if len(set(options)) < len(options):
        raise Unusable("two options are the same")
    Random(f"gpqa:{row['Question']}").shuffle(options)
    listed = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    question = "\n".join([_text(row["Question"]), *listed, LETTER])
    subject = (row.get("High-level domain") or "science").lower()
    return BenchmarkItem(_text_task(name, question, listed[options.index(right)], subject, "choice"))


def _text_task(name: str, question: str, gold: str, task_type: str, answer_type: str = "text") -> Task:
    return Task(name, question, (), "", gold, answer_type, task_type, "reflection")


def _text(value: object) -> str:
    """A field that must say something, as text."""
    text = "" if value is None else str(value).strip()
    if not text:
        raise Unusable("empty field")
    return text


def _base(name: str) -> str:
    """A file's name, literally, for a search by pattern; a path would lead out of the folder."""
    if name != Path(name).name:
        raise Unusable("file name is a path")
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in name)


@dataclass(frozen=True)
class Layout:
    """A benchmark's files.

    Args:
        name: of the benchmark.
        looks: its files in words.
        fits: whether a row is one of its questions.
        read: the item of a row, whose name by its place in the files is the second argument.

    Raises:
        Unusable: from `read`, with the reason.
    """

    name: str
    looks: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, str, Source], BenchmarkItem]


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: set(fields) <= set(row)


LAYOUTS = (
    Layout(
        "dabench", "DABench (questions.jsonl, labels.jsonl and tables/)",
        _has("id", "question", "constraints", "format", "file_name"), _dabench,
    ),
    Layout(
        "tablebench", "TableBench (.jsonl with qtype, qsubtype, table, question, answer)",
        _has("qtype", "qsubtype", "table", "question", "answer"), _tablebench,
    ),
    Layout(
        "bird", "BIRD-style SQL (dev.json with db_id, question, SQL, and dev_databases/DB/DB.sqlite)",
        _has("db_id", "question", "SQL"), _bird,
    ),
    Layout(
        "qrdata", "QRData (.json with data_files, question, answer, and data/)",
        _has("data_files", "question", "answer"), _qrdata,
    ),
    Layout(
        "gpqa", "GPQA (.csv with Question, Correct Answer, Incorrect Answer 1 to 3)",
        _has("Question", "Correct Answer", "Incorrect Answer 1"), _gpqa,
    ),
    Layout(
        "gsm8k", "GSM8K (.jsonl with question, and answer that ends with ####)",
        lambda row: _has("question", "answer")(row) and "####" in str(row["answer"]), _gsm8k,
    ),
    Layout(
        "aime", "AIME (.jsonl with problem and an integer answer)",
        lambda row: _has("problem", "answer")({key.lower(): row for key in row if isinstance(key, str)}), _aime,
    ),
)  # fmt: skip
