"""One run of a recipe: configuration, ranks, folder, and how it ends.

Every recipe is started in the same way, alone or under torchrun:

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.grpo [CONFIG] [section.key=value ...]

CONFIG is a TOML file or the name of one in ``configs/``. A mistake of the user ends the run with one sentence and
status 2; Ctrl-C or SIGTERM ends it after the step under way with what is done saved, and status 130.
"""

import contextlib
import ctypes
import errno
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..engine.config import Config, describe_settings, load_config
from ..engine.errors import UserError
from ..engine.mesh import Mesh
from ..engine.metrics import tree_rss_gib
from ..kernels import dispatch
from .plan import PlannedMemory

USER_ERROR, INTERRUPTED = 2, 130
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Run:
    """What the stages of a recipe share.

    Args:
        config: the whole configuration.
        mesh: the ranks.
        claim: the folder becomes this configuration's; False for a recipe that only looks at a run.
        phases: of ``engine.planner.PHASES``, those whose memory is planned.

    Raises:
        UserError: the run's folder belongs to a run of another configuration; a phase does not fit the memory.
    """

    def __init__(self, config: Config, mesh: Mesh, claim: bool = True, phases: Sequence[str] = ()) -> None:
        self.config, self.mesh = config, mesh
        self.planned = PlannedMemory(config, mesh, phases)
        self.folder = Path(config.run.folder) / config.run.name
        self._stop_requested = False
        self._in_steps = False
        self.memory = MemoryWatch()
        if claim:
            self._claim_folder()

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

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        asked = torch.tensor(float(self._stop_requested), device=self.mesh.device)
        return bool(self.mesh.all_reduce(asked, op="max").item())

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends at once outside of steps, after the step under way within them."""
        self._stop_requested = True
        if not self._in_steps:
            raise KeyboardInterrupt

    def _claim_folder(self) -> None:
        if not self.is_main:
            self.mesh.barrier()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file, mine = self.folder / "config.json", self.config.to_dict()
        if file.exists():
            theirs = json.loads(file.read_text())
            changed = [
                f"{section}.{key} {theirs.get(section, {}).get(key)!r} -> {value!r}"
                for section, values in mine.items()
                for key, value in values.items()
                if theirs.get(section, {}).get(key) != value
            ]
            if changed:
                raise UserError(
                    f"{self.folder} holds a run of another configuration ({', '.join(changed[:5])}); "
                    "choose another run.name or remove the folder"
                )
        else:
            write_atomically(file, json.dumps(mine, indent=1))
        self.mesh.barrier()


class MemoryWatch:
    """Largest resident memory of this process and all its children, by looking twice a second."""

    def __init__(self) -> None:
        self._peak, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            self._peak = max(self._peak, tree_rss_gib())

    def stop(self) -> float:
        """Ends the watch and returns the peak in GiB; shared pages count once for each process."""
        self._ended.set()
        self._thread.join()
        return max(self._peak, tree_rss_gib())


def write_atomically(file: Path, text: str) -> None:
    """Writes the whole text or nothing: a temporary file beside ``file``, then a rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def launch(recipe: Callable[[Run], None], claim: bool = True, phases: Sequence[str] = ()) -> None:
    """Entry point of every recipe: reads the command line, opens the ranks, runs, and turns an end into a status."""
    argv = sys.argv[1:]
    if any(arg in ("-h", "--help") for arg in argv):
        print(f"{sys.modules[recipe.__module__].__doc__}\nSettings and their defaults:{describe_settings()}")
        return
    status, mesh = 0, None
    _keep_freed_memory()
    try:
        path = argv[0] if argv and "=" not in argv[0] else None
        config = load_config(path, argv[1:] if path else argv)
        mesh = Mesh.create(config.run.timeout_s, config.run.shard_size)
        run = Run(config, mesh, claim, phases)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.on_signal)
        run.say(f"{mesh.describe()} | {dispatch.describe()}")
        recipe(run)
    except UserError as error:
        status = _end(USER_ERROR, f"error: {error}")
    except KeyboardInterrupt:
        status = INTERRUPTED
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            _end(status, f"stopped; what is done is saved. To go on:\n  {_command(argv)}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        status = _end(
            USER_ERROR, f"error: no space left on the device for {error.filename or 'the run folder'}; free some"
        )
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        status = _end(1, f"ended because another rank did: {str(error).splitlines()[0]}")
    if status == 0 and mesh is not None:
        mesh.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # other ranks may wait in a collective: leave without joining it, torchrun ends them


def _keep_freed_memory() -> None:
    """Lets glibc reuse freed tensors: by default it returns large ones to the kernel, which zeroes them page by page.

    Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 512 * 2**20)


def _end(status: int, sentence: str) -> int:
    """Says why this rank ends, on the console and, for torchrun's closing report, in the file that it reads."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(1.0)  # where rank 0 has the same to say, torchrun has ended this one by then
        sentence = f"rank {rank}: {sentence}"
    print(sentence, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
    return status


def _command(argv: list[str]) -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    module = (sys.modules["__main__"].__spec__ or sys.modules[__name__].__spec__).name  # type: ignore[union-attr]
    return f"torchrun --standalone --nproc-per-node {ranks} -m {module} {shlex.join(argv)}".rstrip()
