"""One run of a recipe: configuration, ranks, folder, and how it ends.

Every recipe is started in the same way, alone or under torchrun:

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.grpo [CONFIG] [section.key=value ...] [--dry-run]

CONFIG is a TOML file or the name of one in ``configs/``. A mistake of the user ends the run with one sentence and
status 2. ``--dry-run`` says the arithmetic of the run and ends before anything is written or sampled.

SIGTERM, a scheduler's notice, and Ctrl-C end a run with what is done saved. While trajectories are sampled the step is
given up at once on all ranks, whichever of them got the signal, and repeated after the resume: it is a function of its
number. Once its rewards are being computed it is finished. The status is 75 (EX_TEMPFAIL of sysexits.h: the same
command goes on) for SIGTERM and 130 for Ctrl-C.

torchrun hides the status of its ranks: it ends with 1 whatever theirs is. So a run that SIGTERM ended leaves the file
``RUN/resume``, which its next start removes:

    torchrun ... -m groupwise.recipes.grpo train || { [ -e runs/train/resume ] && scontrol requeue "$SLURM_JOB_ID"; }

torchrun kills its ranks 30 s after it got SIGTERM (``--shutdown-timeout``, where PyTorch has it): give a large model
the time of an update and of a checkpoint. A rank that alone gets SIGTERM stops all; torchrun then starts them again, as
after any failure, where ``--max-restarts`` allows it.
"""

import contextlib
import ctypes
import errno
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from ..engine.atomic import write_atomically
from ..engine.config import Config, describe_settings, is_changeable, load_config
from ..engine.errors import UserError
from ..engine.lock import Lock
from ..engine.mesh import Mesh
from ..engine.schedule import mixing, policy_rate
from ..engine.together import check_shared, together
from ..engine.watch import RankLost, leave_process
from ..kernels import dispatch
from .arithmetic import in_words
from .memory import PlannedMemory

USER_ERROR, TEMPORARY_FAILURE, INTERRUPTED = 2, 75, 130
DRY_RUN = "--dry-run"
RESUME = "resume"  # the file that a run leaves for a job script
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, by a signal with this ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Run:
    """What the stages of a recipe share.

    Args:
        config: the whole configuration.
        mesh: the ranks.
        claim: the folder becomes this configuration's; False for a recipe that only looks at a run.
        phases: of ``engine.planner.PHASES``, those whose memory is planned.

    Attributes:
        stopping: the number of the signal that all ranks have agreed to obey, 0 for none.

    Raises:
        UserError: the run's folder belongs to a run of another configuration, or a run is at work there; a
            phase does not fit the memory; the experts' weight or the warm-up takes more steps than ``grpo.steps``.
    """

    def __init__(self, config: Config, mesh: Mesh, claim: bool = True, phases: Sequence[str] = ()) -> None:
        self.config, self.mesh = config, mesh
        mixing(config.grpo)  # steps that do not add up are known before anything starts
        policy_rate(config.grpo)
        self.planned = PlannedMemory(config, mesh, phases)
        self.folder = Path(config.run.folder) / config.run.name
        self.stopping = self._signal = 0
        self._in_steps = False
        self._lock: Lock | None = None  # rank 0's, for as long as this run is
        if claim:
            together(mesh, self._claim_folder if self.is_main else lambda: None)
            check_shared(self.folder, mesh)

    def elapsed_s(self) -> float:
        """Wall seconds since this process was started by the system, imports included."""
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.mesh.rank == 0

    def say(self, text: str) -> None:
        """Prints a line, once for all ranks."""
        if self.is_main:
            print(text, flush=True)

    @contextlib.contextmanager
    def stop_between_steps(self) -> Iterator[None]:
        """Within it a signal is only noted, for ``agree_to_stop``; elsewhere it ends the run at once."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False
        if self._signal:
            raise Stopped(self._signal)

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        asked = torch.tensor(float(self._signal), device=self.mesh.device)
        self.stopping = int(self.mesh.all_reduce(asked, op="max").item())
        return bool(self.stopping)

    def stopped(self) -> Stopped:
        """What all ranks raise when they have agreed to stop."""
        return Stopped(self.stopping)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends at once outside of steps; within them the ranks agree to.

        Raises:
            Stopped: outside of steps.
            RankLost: another rank failed, and torchrun ends the others for that reason.
        """
        if lost := self.mesh.watch.lost():
            raise lost
        self._signal = max(self._signal, number)
        self.mesh.watch.request_stop()
        if not self._in_steps:
            raise Stopped(number)

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / ".lock")
        self.check_configuration()
        (self.folder / RESUME).unlink(missing_ok=True)
        file = self.folder / "config.json"
        if not file.exists():
            write_atomically(file, json.dumps(self.config.to_dict(), indent=1))

    def mark_resumable(self) -> None:
        """Leaves the file by which a job script knows that the run wants to go on."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.folder / RESUME).touch()

    def check_configuration(self) -> None:
        """Raises the UserError of a folder that holds a run of another configuration."""
        file, mine = self.folder / "config.json", self.config.to_dict()
        if file.exists():
            theirs = json.loads(file.read_text())
            changed = [
                f"{section}.{key} {theirs.get(section, {}).get(key)!r} -> {value!r}"
                for section, values in mine.items()
                for key, value in values.items()
                if theirs.get(section, {}).get(key) != value and not is_changeable(section, key)
            ]
            if changed:
                raise UserError(
                    f"{self.folder} holds a run of another configuration ({', '.join(changed[:5])}); "
                    "choose another run.name or remove the folder"
                )


def configured(argv: Sequence[str]) -> Config:
    """The configuration that a command line ``[CONFIG] [section.key=value ...]`` says."""
    path = argv[0] if argv and "=" not in argv[0] else None
    return load_config(path, argv[1:] if path else argv)


def launch(
    recipe: Callable[[Run], None],
    claim: bool = True,
    phases: Sequence[str] = (),
    stages: Sequence[str] = (),
    configure: Callable[[Sequence[str]], Config] = configured,
) -> None:
    """Entry point of every recipe: reads the command line, opens the ranks, runs, and turns an end into a status.

    Args:
        recipe: what is run.
        claim, phases: of ``Run``.
        stages: of ``recipes.arithmetic.STAGES``, those whose arithmetic is said before; ``--dry-run`` stops there.
        configure: reads the command line, less ``--dry-run``.
    """
    argv = sys.argv[1:]
    if any(arg in ("-h", "--help") for arg in argv):
        print(sys.modules[recipe.__module__].__doc__)
        if configure is configured:
            print(f"Settings and their defaults:{describe_settings()}")
        return
    mesh, run, dry = None, None, DRY_RUN in argv
    _keep_freed_memory()
    try:
        config = configure([arg for arg in argv if arg != DRY_RUN])
        mesh = Mesh.create(config.run.timeout_s, config.run.shard_size)
        _choose_attention(config, mesh)
        run = Run(config, mesh, claim and not dry, phases)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.on_signal)
        run.say(f"{mesh.describe()} | {dispatch.describe(mesh.device.type)}")
        if stages:
            run.say(in_words(config, mesh.world_size, run.folder, stages, run.planned.plan))
        if dry:
            if claim:
                run.check_configuration()
            run.say("dry run: nothing was written")
        else:
            recipe(run)
        mesh.close()
    except (Exception, KeyboardInterrupt) as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun's comes soon; this rank ends by itself
            signal.signal(number, signal.SIG_IGN)
        if run is not None and isinstance(error, Stopped) and error.number == signal.SIGTERM:
            run.mark_resumable()
        if mesh is not None:
            mesh.announce(error)
        _end(error, argv)


def _choose_attention(config: Config, mesh: Mesh) -> None:
    name, exact = config.run.attention, config.rollout.exact
    if exact and name != "auto":
        raise UserError(f"run.attention is {name!r} and rollout.exact takes its own attention; leave one of them out")
    try:
        if exact:
            dispatch.force_exact(mesh.device.type)
        else:
            dispatch.force("packed_attention", name, mesh.device.type)
    except ValueError as error:
        raise UserError(f"{'rollout.exact' if exact else f'run.attention is {name!r}'}: {error}") from error


def _keep_freed_memory() -> None:
    """Lets glibc reuse freed tensors: by default it returns large ones to the kernel, which zeroes them page by page.

    Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 512 * 2**20)


def _end(error: BaseException, argv: list[str]) -> NoReturn:
    """Ends the process with one sentence, after a traceback where nobody outside can have caused the error."""
    rank = os.environ.get("RANK", "0")
    mine = "" if rank == "0" else f"rank {rank}: "
    if isinstance(error, RankLost):
        leave_process(1, f"error: {error}", error.speaks_first)
    if isinstance(error, KeyboardInterrupt):  # all ranks stop together
        status = TEMPORARY_FAILURE if isinstance(error, Stopped) and error.number == signal.SIGTERM else INTERRUPTED
        stopped = f"stopped; what is done is saved. To go on:\n  {_command(argv)}"
        leave_process(status, "" if mine else stopped, at_once=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = UserError(f"no space left on the device for {error.filename or 'the run folder'}; free some")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
        error = UserError(f"{error.filename} cannot be written: {error.strerror}; choose another run.folder")
    if isinstance(error, UserError):
        leave_process(USER_ERROR, f"{mine}error: {error}", at_once=not mine)
    traceback.print_exc()
    leave_process(1, f"{mine}error: {type(error).__name__}: {error}", at_once=True)


def _command(argv: list[str]) -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    module = (sys.modules["__main__"].__spec__ or sys.modules[__name__].__spec__).name  # type: ignore[union-attr]
    return f"torchrun --standalone --nproc-per-node {ranks} -m {module} {shlex.join(argv)}".rstrip()
