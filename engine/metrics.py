"""One record a step, for machines (JSONL, TensorBoard) and for whoever watches (a console line, a bar with time left).

    metrics = Metrics(folder, mesh, phase="grpo", start_step=first)
    for step in progress(range(first, steps), "grpo", rank=mesh.rank):
        timer = Timer()
        with timer("generate"):
            ...
        metrics.log(step, {"reward": 0.4, "lr": 1e-4, "timing_s/step": timer.elapsed_s()})

Names are the ones practitioners read: reward, reward_std, frac_reward_zero_std, completions/mean_length,
clip_ratio/low_mean, entropy, kl, grad_norm, lr, sampling/logp_difference_max, timing_s/generate, ...
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .errors import UserError

Item = TypeVar("Item")

# What the console line shows of a record, in this order: (name, shown as, format).
CONSOLE = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("reward_std", "std", ".3f"),
    ("rewards/answer", "right", ".3f"),
    ("frac_reward_zero_std", "zero-std", ".2f"),
    ("completions/mean_length", "tokens", ".0f"),
    ("kl", "kl", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("sampling/logp_difference_max", "logp diff", ".1e"),
    ("grad_norm", "grad", ".3f"),
    ("lr", "lr", ".2e"),
    ("timing_s/step", "s", ".2f"),
)
TIMING = "timing_s/"  # how the names of phases begin
WHOLE = "timing_s/step"  # the step they are part of
LINE_EVERY_S = 5.0  # between progress lines where there is no terminal

_console = Console(highlight=False, soft_wrap=True)


class Ranked(Protocol):
    """What ``Metrics`` needs of a mesh."""

    @property
    def rank(self) -> int: ...


class Metrics:
    """The record of one phase of a run, written by rank 0: ``FOLDER/PHASE.jsonl`` and ``FOLDER/tensorboard/PHASE``.

    Args:
        folder: of the run; made if absent.
        mesh: the other ranks' calls do nothing.
        phase: "sft", "grpo", ...
        start_step: first step of this run; records of a former run from this step on are dropped.
        total_steps: shown beside the step; 0 for unknown.
        console_every: steps between console lines; 0 for none.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        mesh: Ranked,
        *,
        phase: str = "train",
        start_step: int = 0,
        total_steps: int = 0,
        console_every: int = 1,
    ) -> None:
        self.path = Path(folder) / f"{phase}.jsonl"
        self._phase, self._total_steps, self._console_every = phase, total_steps, console_every
        self._active = mesh.rank == 0
        if not self._active:
            return
        with _readable_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_from(self.path, start_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
            board = str(Path(folder) / "tensorboard" / phase)
            self._board = SummaryWriter(board, purge_step=start_step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record, the JSONL at once: numbers and 0-dim tensors by name. What is not finite is null there."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with _readable_errors(self.path):
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._console_every and (step % self._console_every == 0 or step + 1 == self._total_steps):
            say(self._line(step, numbers))

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        place = f"{step + 1}/{self._total_steps}" if self._total_steps else f"{step + 1}"
        shown = [f"{label} {values[name]:{form}}" for name, label, form in CONSOLE if name in values]
        return f"{self._phase} {place} | " + " | ".join(shown)

    def close(self) -> None:
        """Closes the files; safe to call twice."""
        if self._active:
            self._active = False
            self._file.close()
            self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file in order; an absent file has none, and a last line that was cut off is left out."""
    records: list[dict[str, Any]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return records
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no record of a step: {error}; remove the line") from error
    return records


def cost_line(records: Sequence[Mapping[str, float]]) -> str:
    """Where the time of some steps went, the largest first: shares of ``timing_s/step``; empty where none was timed."""
    whole = sum(record.get(WHOLE, 0.0) for record in records)
    if not whole:
        return ""
    names = {name for record in records for name in record if name.startswith(TIMING)} - {WHOLE}
    costs = {name.removeprefix(TIMING): sum(record.get(name, 0.0) for record in records) for name in names}
    costs["other"] = whole - sum(costs.values())
    waited = sum(record.get("tools/wait_s", 0.0) for record in records)
    ranked = sorted(costs.items(), key=lambda cost: -cost[1])
    parts = [
        f"{name} {cost / whole:.0%}"
        + (f" ({waited / cost:.0%} of it waiting for tools)" if name == "generate" and waited > 0.01 * cost else "")
        for name, cost in ranked
        if cost >= 0.01 * whole or name == ranked[0][0]
    ]
    return f"time of {len(records)} steps, {whole / len(records):.2g} s each: {', '.join(parts)}"


def say(text: str) -> None:
    """Prints a line above any progress bar."""
    _console.print(text, markup=False)


class Timer:
    """How long the phases of a step take. ``with timer("generate"): ...``; the same name adds up.

    On CUDA nothing is waited for in between: at both ends of a phase an event goes into the current stream, and all are
    read when they are asked for. A phase then lasts from where the device has done all that was asked before it to
    where it has done what the phase asked: the time in which the device waits for the host, or the host for tools,
    belongs to the phase in which it does, and host work that goes on beside the device's costs nothing. Phases that are
    not nested never add up to more than the step.

    A profiler shows them by their names.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._phases: list[tuple[str, _Mark, _Mark]] = []
        self._begin = self._mark()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self._mark()
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._phases.append((phase, begin, self._mark()))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase. On CUDA it waits for the device."""
        found: dict[str, float] = {}
        for phase, begin, end in self._phases:
            found[phase] = found.get(phase, 0.0) + _between(begin, end)
        return found

    def elapsed_s(self) -> float:
        """Seconds since the timer was made. On CUDA it waits for the device."""
        return _between(self._begin, self._mark())

    def _mark(self) -> "_Mark":
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


_Mark = float | torch.cuda.Event  # a moment, by the host's clock or in a stream


def _between(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class ProgressBar:
    """How far a stage is and the time left: a bar on a terminal, elsewhere an occasional line. ``advance()`` moves it.

    Bars may nest. Use it as a context manager, or ``progress`` around what is iterated.

    Args:
        total: units of work.
        description: of the stage.
        rank: ranks other than 0 show nothing.
    """

    _live: Progress | None = None  # rich draws one display at a time: nested bars share the outermost one's

    def __init__(self, total: int, description: str, *, rank: int = 0) -> None:
        self.total, self.description, self.done = total, description, 0
        self._shown = rank == 0
        self._begin = self._said = time.monotonic()
        self._owner = False

    def __enter__(self) -> "ProgressBar":
        self._begin = self._said = time.monotonic()
        if self._shown and _console.is_terminal:
            self._owner = ProgressBar._live is None
            if ProgressBar._live is None:
                ProgressBar._live = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=_console,
                )
                ProgressBar._live.start()
            self._task = ProgressBar._live.add_task(self.description, total=self.total)
        return self

    def advance(self, units: int = 1) -> None:
        """Says that ``units`` more are done."""
        self.done += units
        if not self._shown:
            return
        if ProgressBar._live is not None and _console.is_terminal:
            ProgressBar._live.advance(self._task, units)
        elif time.monotonic() - self._said >= LINE_EVERY_S and self.done < self.total:
            self._said = time.monotonic()
            say(self.line())

    def line(self) -> str:
        """The state in words."""
        spent = time.monotonic() - self._begin
        left = ""
        if 0 < self.done < self.total:
            left = f", about {_duration(spent / self.done * (self.total - self.done))} left"
        return f"{self.description}: {self.done}/{self.total}, {_duration(spent)}{left}"

    def __exit__(self, *_: object) -> None:
        if not self._shown:
            return
        if ProgressBar._live is None or not _console.is_terminal:
            say(self.line())
        elif self._owner:
            ProgressBar._live.stop()
            ProgressBar._live = None
        else:
            ProgressBar._live.remove_task(self._task)


def progress(work: Iterable[Item], description: str, *, total: int | None = None, rank: int = 0) -> Iterator[Item]:
    """Iterates over ``work`` under a ``ProgressBar``; ``total`` is needed where ``work`` has no length."""
    if total is None:
        if not isinstance(work, Sized):
            raise TypeError(f"the length of {description!r} is unknown; give total")
        total = len(work)
    with ProgressBar(total, description, rank=rank) as bar:
        for item in work:
            yield item
            bar.advance()


def free_memory(device: torch.device, local_ranks: int = 1) -> float:
    """Bytes that a rank may take: all of its GPU, or its share of what this machine has available."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return available * 1024 / local_ranks


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _status_kib("self", "VmHWM") / 2**20


def tree_rss_gib() -> float:
    """Resident memory of this process and all its descendants now (Linux); pages they share count once each."""
    parents: dict[str, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it has ended since
                stat = Path("/proc", entry, "stat").read_text()
                parents.setdefault(stat.rpartition(")")[2].split()[1], []).append(entry)
    family, queue = 0.0, [str(os.getpid())]
    while queue:
        process = queue.pop()
        family += _status_kib(process, "VmRSS")
        queue += parents.get(process, [])
    return family / 2**20


def _status_kib(process: str, field: str) -> float:
    with contextlib.suppress(OSError):  # it has ended since
        for line in Path("/proc", process, "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1])
    return 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def drop_from(path: Path, step: int) -> None:
    """Keeps the records before ``step``; the file is replaced whole or not at all."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] < step]
    fresh = path.with_suffix(".jsonl.tmp")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(fresh, path)


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"metrics cannot be written to {path}: {error.strerror}; free space or choose another folder"
        raise UserError(reason) from error
