"""Production of expert trajectories: many at once, filtered in order, written in shards, resumed where it was stopped.

Works do not depend on each other and each is the same whenever it is done, so the shards do not depend on the number of
threads, nor on when the process was killed.

    FOLDER/experts-00000.jsonl, ...     up to `SHARD` works each
    FOLDER/manifest.json                of the shards that are whole: trajectories, bytes, SHA-256, what was dropped
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from random import Random

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..engine.metrics import ProgressBar
from ..rewards.answer import is_right
from ..rollout.agent import Executes
from .filters import Filters
from .report import Report
from .tasks import Problem, shares_to_counts
from .taxonomy import Detail
from .teachers import STRATA, scripted
from .teaching.attempts import play
from .teaching.script import Abandoned
from .trajectories import SHARDS, Expert, read_experts, to_line

SHARD = 250
AHEAD = 2  # works that are begun for each thread before the first of them is needed
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Work:
    """What one or more trajectories of one task come from.

    Args:
        stratum: what is asked for.
        make: gives them, in any thread, or raises `Abandoned` with the reason why there are none.
    """

    stratum: str
    make: Callable[[], Sequence[Expert]]


@dataclass(frozen=True)
class Made:
    """What came of a work: trajectories, or the reason why there are none."""

    stratum: str
    experts: tuple[Expert, ...] = ()
    reason: str = ""


def made(works: Iterable[Work], threads: int) -> Iterator[Made]:
    """Does works in so many threads and gives what came of them, in their order."""
    waiting: deque[Future[Made]] = deque()
    works = iter(works)
    with ThreadPoolExecutor(threads, "production") as pool:
        try:
            while True:
                for work in islice(works, AHEAD * threads - len(waiting)):
                    waiting.append(pool.submit(_do, work))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _do(work: Work) -> Made:
    try:
        return Made(work.stratum, tuple(work.make()))
    except Abandoned as reason:
        return Made(work.stratum, reason=str(reason))


@dataclass(frozen=True)
class _Shard:
    """An entry of the manifest.

    Args:
        dropped: why trajectories, or works that gave none, are missing, with their counts.
        empty: the strata of the works of which nothing was kept.
    """

    file: str
    experts: int
    bytes: int
    sha256: str
    dropped: dict[str, int]
    empty: list[str]


class Production:
    """Writes what works give into a folder.

    Args:
        folder: of the shards; those that are whole are not made again.
        filters: through which all trajectories go.
        inputs: a hash of what the works are made from.
        threads: works at once.

    Attributes:
        report: of all that was kept and dropped so far.

    Raises:
        UserError: the folder was begun with other inputs.
    """

    def __init__(self, folder: Path, filters: Filters, *, inputs: str, threads: int) -> None:
        self._folder, self._filters, self._inputs, self._threads = folder.absolute(), filters, inputs, threads
        self._before = self._whole()
        self._shards: list[_Shard] = []
        self.report = Report()

    def run(self, works: Sequence[Work], description: str = "synthesize") -> list[str]:
        """Does works, below a progress bar, and returns the strata of those of which nothing was kept, in order."""
        with ProgressBar(len(works), description) as bar:
            return self._run(works, bar)

    def _run(self, works: Sequence[Work], bar: ProgressBar) -> list[str]:
        empty: list[str] = []
        for start in range(0, len(works), SHARD):
            some = works[start : start + SHARD]
            if len(self._shards) < len(self._before):
                shard = self._restored(self._before[len(self._shards)])
                bar.advance(len(some))
            else:
                shard = self._made(some, bar)
            self._shards.append(shard)
            self.report.drop(shard.dropped)
            empty += shard.empty
            self._write_manifest(complete=False)
        return empty

    def finish(self) -> None:
        """Says in the manifest that nothing is missing."""
        self._write_manifest(complete=True)

    def _made(self, works: Sequence[Work], bar: ProgressBar) -> _Shard:
        lines: list[str] = []
        dropped: Counter[str] = Counter()
        empty: list[str] = []
        for found in made(works, self._threads):
            reasons = [self._filters.reason(expert) for expert in found.experts]
            kept = [expert for expert, reason in zip(found.experts, reasons, strict=True) if not reason]
            dropped.update(filter(None, [found.reason, *reasons]))
            if not kept:
                empty.append(found.stratum)
            self._keep(kept)
            lines += [to_line(expert, self._folder) for expert in kept]
            bar.advance()
        file = self._folder / SHARDS.replace("*", f"{len(self._shards):05d}")
        write_atomically(file, lines)
        content = "".join(lines).encode()
        digest = hashlib.sha256(content).hexdigest()
        return _Shard(file.name, len(lines), len(content), digest, dict(sorted(dropped.items())), empty)

    def _restored(self, shard: _Shard) -> _Shard:
        for expert in read_experts(self._folder / shard.file):
            self._keep([expert])
        return shard

    def _keep(self, experts: Sequence[Expert]) -> None:
        self._filters.keep(experts)
        for expert in experts:
            self.report.add(expert)

    def _whole(self) -> list[_Shard]:
        """The shards of a production that was stopped, up to the first that is not as the manifest says."""
        if not (self._folder / MANIFEST).exists():
            return []
        manifest = json.loads((self._folder / MANIFEST).read_text())
        if manifest["inputs"] != self._inputs:
            raise UserError(
                f"{self._folder} was begun with other tables or another version of groupwise; remove it to begin anew"
            )
        shards = [_Shard(**entry) for entry in manifest["shards"]]
        return list(takewhile(self._is_whole, shards))

    def _is_whole(self, shard: _Shard) -> bool:
        file = self._folder / shard.file
        return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == shard.sha256

    def _write_manifest(self, *, complete: bool) -> None:
        manifest = {
            "complete": complete,
            "experts": sum(shard.experts for shard in self._shards),
            "inputs": self._inputs,
            "shards": [asdict(shard) for shard in self._shards],
        }
        write_atomically(self._folder / MANIFEST, json.dumps(manifest, indent=1))


def scripted_works(
    problems: Sequence[Problem], strata: Sequence[str], sandbox: Executes, seed: int, detail: Detail = "short"
) -> list[Work]:
    """What the scripted teacher does with problems, each in the stratum that stands at its place."""
    return [
        Work(stratum, partial(_scripted, problem, stratum, sandbox, seed, detail))
        for problem, stratum in zip(problems, strata, strict=True)
    ]


def _scripted(problem: Problem, stratum: str, sandbox: Executes, seed: int, detail: Detail) -> list[Expert]:
    task, question = problem.task, problem.question
    attempt = play(scripted(problem, stratum, Random(f"{seed}:{task.id}:teacher"), detail), task, sandbox)
    if is_right(attempt.answer, attempt.executions, task) != (stratum != "failure"):
        raise Abandoned("failure with a right answer" if stratum == "failure" else "answer is not the known one")
    return [Expert.of(task, attempt, stratum, question.operation, question.wording)]


def assign_strata(problems: Sequence[Problem], shares: Mapping[str, float], seed: int) -> list[str]:
    """A stratum for each problem, in the given shares of all; problems without code can only succeed.

    Raises:
        UserError: an unknown stratum, or more mistakes asked for than there are problems with code.
    """
    if unknown := set(shares) - set(STRATA):
        raise UserError(f"unknown stratum {min(unknown)!r}; expected some of {', '.join(STRATA)}.")
    counts = shares_to_counts(shares, len(problems))
    faulty = [name for name, count in counts.items() if name != "success" for _ in range(count)]
    with_code = [index for index, problem in enumerate(problems) if problem.question.code]
    if len(faulty) > len(with_code):
        raise UserError(
            f"{len(faulty)} trajectories with mistakes were asked for, but only {len(with_code)} of {len(problems)} "
            "problems use code; raise the share of success or lower that of the reflection mode."
        )
    rng = Random(f"{seed}:strata")
    strata = ["success"] * len(problems)
    for index, name in zip(rng.sample(with_code, len(faulty)), faulty, strict=True):
        strata[index] = name
    return strata
