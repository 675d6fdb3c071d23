"""What a step of training takes, phase by phase, how fast the phases go, and where they are traced."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from ..engine.batch import Batch
from ..engine.config import ModelConfig
from ..engine.errors import UserError
from ..engine.flops import forward_flops, peak_of, work_of
from ..engine.metrics import Timer
from ..engine.settings import step_numbers
from ..engine.together import together
from .policy import compute_dtype
from .run import Run


class Pace:
    """The phases of the step under way. ``with pace("update", batches): ...``

    Args:
        run: configuration and ranks.
        model: what is trained.
    """

    def __init__(self, run: Run, model: ModelConfig) -> None:
        self._mesh, self._model = run.mesh, model
        self._peak = peak_of(run.mesh.device, compute_dtype(run))
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._timer = Timer(self._mesh.device)
        self._passed: list[tuple[str, Sequence[Batch]]] = []
        self._tokens: Counter[str] = Counter()

    def __call__(self, phase: str, batches: Sequence[Batch] = ()) -> AbstractContextManager[None]:
        """Times a phase, in which micro-batches pass through the model once."""
        self._passed.append((phase, batches))
        return self._timer(phase)

    def add_tokens(self, phase: str, tokens: int) -> None:
        """Counts what a phase went through beside micro-batches."""
        self._tokens[phase] += tokens

    def metrics(self) -> dict[str, float]:
        """The step so far, over all ranks. Collective; on CUDA it waits for the device.

        ``timing_s/PHASE`` and ``timing_s/step`` are means of the ranks, ``perf/tokens_per_s/PHASE`` is the sum of what
        passed through. ``perf/mfu`` is the model's arithmetic in the update (``engine.flops``) by that time and the
        devices' peak, ``perf/mfu_step`` by the time of the whole step; both only where the peak is known.
        """
        seconds, tokens, flops = self._timer.seconds, Counter(self._tokens), 0.0
        seconds["step"] = self._timer.elapsed_s()
        for phase, batches in self._passed:
            work = work_of(batches)
            tokens[phase] += work.tokens
            if phase == "update":
                flops += 3 * forward_flops(self._model, work)
        ranks = self._mesh.all_gather_object((seconds, tokens, flops))
        means = {phase: fmean(rank[phase] for rank, *_ in ranks) for phase in seconds}
        found = {f"timing_s/{phase}": value for phase, value in means.items()}
        for phase in tokens:
            if total := sum(counted[phase] for _, counted, _ in ranks):
                found[f"perf/tokens_per_s/{phase}"] = total / means[phase]
        if self._peak is not None and "update" in means:
            rate = fmean(done for *_, done in ranks) / self._peak.flops
            found |= {"perf/mfu": rate / means["update"], "perf/mfu_step": rate / means["step"]}
        return found


def traced(run: Run, phase: str, step: int) -> AbstractContextManager[None]:
    """Where ``run.profile_steps`` has the step, keeps its trace: ``RUN/PHASE/profile/step-000012-rank-0.json.gz``.

    It is a Chrome trace of all operations on host and device, with the phases as ranges. Open it in
    https://ui.perfetto.dev, which reads it in the browser and sends it nowhere. Steps count from 0, as in
    ``PHASE.jsonl``; one that is traced is slower, and a long one leaves hundreds of megabytes. Collective.

    Raises:
        UserError: the file cannot be written.
    """
    if step not in step_numbers("run.profile_steps", run.config.run.profile_steps):
        return nullcontext()
    return _trace(run, run.folder / phase / "profile" / f"step-{step:06d}-rank-{run.mesh.rank}.json.gz")


@contextmanager
def _trace(run: Run, file: Path) -> Iterator[None]:
    with torch.profiler.profile() as profile:
        yield
    together(run.mesh, partial(_write, profile, file))


def _write(profile: torch.profiler.profile, file: Path) -> None:
    partial_file = file.with_name(f".{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(partial_file))
        partial_file.replace(file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the trace {file} cannot be written: {error}; make room for it or leave it out") from error
