"""Writing checkpoints while training goes on.

    saver = Saver("runs/a/checkpoints", mesh)
    for step in ...:
        ...
        saver.poll()                                        # the one before gets its name here, once it is written
        if due:
            saver.save(policy, optimizer, {"step": step})   # takes as long as a copy to host memory
    saver.wait()

A save has two halves. First each rank copies its shards, moments and random states to host memory, and a thread of its
own writes, hashes and flushes them into a folder without a name. When the threads of all ranks are done, rank 0 adds
the manifest and the name. So whatever ends a run leaves a checkpoint with a name, whole, or none. Threads only write:
what the ranks must agree on is agreed on inside the three calls above, and all of them are collectives.
"""

import contextlib
import io
import json
import os
import random
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from .errors import UserError
from .lock import Lock
from .manifest import (
    LOCK,
    MANIFEST,
    MOMENTS,
    describe,
    flush,
    flush_folder,
    list_checkpoints,
    next_name,
    part_name,
    write_manifest,
    writer_of,
)
from .mesh import Mesh
from .optim import AdamW
from .shard import ShardedModel
from .tensorfile import write_tensors
from .together import together


class Saver:
    """Saves checkpoints of one run in the background and removes all but the newest ones.

    It keeps a copy of this rank's shards and moments in host memory, pinned where they are on a GPU.

    Args:
        folder: of all checkpoints of this run, which every rank sees; made if need be.
        mesh: the ranks.
        keep: how many stay on disk, at least 1.

    Raises:
        UserError: from every method: the folder cannot be written, on whichever rank, or another run writes there.
            Then nothing half-written is left, the former checkpoints are untouched, and another save may follow.
    """

    def __init__(self, folder: str | Path, mesh: Mesh, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep} but at least 1 checkpoint must be kept.")
        self._folder, self._mesh, self._keep = Path(folder), mesh, keep
        self._temporary = self._folder / ".saving"
        self._buffers: dict[str, torch.Tensor] = {}
        self._lock: Lock | None = None  # rank 0's, while a save is under way
        self._writer: _PartWriter | None = None  # this rank's, likewise
        self._final = self._folder
        self._body: dict[str, Any] = {}

    def save(self, model: ShardedModel, optimizer: AdamW | None, state: dict[str, Any]) -> None:
        """Begin to save, after the end of a save that is under way; training may go on at once.

        Args:
            model: its master shards are saved.
            optimizer: its moments and counters are saved; None where there are none.
            state: anything JSON can hold; ``state["step"]``, if there, becomes part of the name.

        Raises:
            TypeError: ``state`` is nothing JSON can hold.
        """
        self.wait()
        mesh = self._mesh
        self._body = describe(model, optimizer, state, mesh)
        self._final = together(mesh, lambda: self._open(state) if mesh.rank == 0 else self._folder)[0]
        try:
            tensors = self._copy(model, optimizer)
            path = self._temporary / part_name(mesh.rank, mesh.world_size)
            writer = _PartWriter(path, tensors, {"random": _random_text()})
            # Also where nobody waits, as at the end of a process, which a thread stopped inside of torch may abort.
            self._end_writer = weakref.finalize(self, writer.end)
            writer.start()
            self._writer = writer
        except BaseException:
            self._close()
            raise

    def poll(self) -> Path | None:
        """Return the checkpoint of the save under way if it has ended by now, else None; free when none is."""
        return self._commit_together() if self._writer is not None and self._all_written() else None

    def wait(self) -> Path | None:
        """Return the checkpoint of the save under way when it has ended, or None if there is none."""
        if self._writer is None:
            return None
        while not self._all_written():  # the slowest rank asks once a second, so that no collective runs out of time
            self._writer.join(1.0)
        return self._commit_together()

    def _open(self, state: dict[str, Any]) -> Path:
        """Take the folder for this save, and return where it will end."""
        with _one_sentence(self._folder, 0):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self._folder / LOCK)
            try:
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir()
                return self._folder / next_name(self._folder, state)
            except BaseException:
                self._close()
                raise

    def _copy(self, model: ShardedModel, optimizer: AdamW | None) -> dict[str, torch.Tensor]:
        """This rank's part in host memory, as it is now."""
        mesh, tensors = self._mesh, {}
        for index, shard in enumerate(model.shards):
            if mesh.rank != writer_of(index, mesh.shard_rank, mesh.shard_size, mesh.world_size):
                continue
            tensors[f"weight/{shard.name}"] = shard.data
            if optimizer is not None:
                tensors |= {f"{kind}/{shard.name}": getattr(optimizer, kind)[index] for kind in MOMENTS}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer.copy_(tensor, non_blocking=True)
        if mesh.device.type == "cuda":
            torch.cuda.current_stream(mesh.device).synchronize()
        return {name: self._buffers[name] for name in tensors} | _random_tensors(mesh.device)

    def _all_written(self) -> bool:
        assert self._writer is not None
        done = torch.tensor(float(not self._writer.is_alive()), device=self._mesh.device)
        return bool(self._mesh.all_reduce(done, op="min").item())

    def _commit_together(self) -> Path:
        mesh, writer = self._mesh, self._writer
        assert writer is not None

        def record() -> tuple[str, dict[str, Any]]:
            with _one_sentence(self._folder, mesh.rank):
                return writer.result()

        def commit() -> None:
            with _one_sentence(self._folder, mesh.rank):
                self._commit()

        try:
            self._body["files"] = dict(together(mesh, record))
            together(mesh, commit if mesh.rank == 0 else lambda: None)
        finally:
            self._close()
        return self._final

    def _commit(self) -> None:
        """The manifest, the name, and then the end of the checkpoints that are too many."""
        write_manifest(self._temporary, self._body)
        flush_folder(self._temporary)
        os.rename(self._temporary, self._final)
        flush_folder(self._folder)
        removed = self._folder / ".removed"
        shutil.rmtree(removed, ignore_errors=True)
        for path in list_checkpoints(self._folder)[self._keep :]:
            with contextlib.suppress(OSError, UserError), Lock(path / MANIFEST, patience_s=0):  # one being read stays
                os.rename(path, removed)  # half of a checkpoint must not bear its name
            shutil.rmtree(removed, ignore_errors=True)

    def _close(self) -> None:
        """End the save under way, whatever came of it."""
        if self._writer is not None:
            self._end_writer()
            self._writer = None
        if self._lock is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._lock.close()
            self._lock = None


class _PartWriter(threading.Thread):
    """Writes one part. It keeps no process alive."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._path, self._tensors, self._metadata = path, tensors, metadata
        self._ending = threading.Event()
        self._record: dict[str, Any] = {}
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            with _EndingFile(io.FileIO(self._path, "xb")) as file:
                file.ending = self._ending
                layout = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}
                digest = write_tensors(cast(BinaryIO, file), layout, self._tensors.values(), self._metadata)
                self._record = {"bytes": file.tell(), "sha256": digest}
                flush(cast(BinaryIO, file))
        except BaseException as error:
            self._error = error

    def result(self) -> tuple[str, dict[str, Any]]:
        """The part's name, and its size and hash for the manifest; raises what ended the thread."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._path.name, self._record

    def end(self) -> None:
        """Return when the thread has ended; what it has not begun to write it leaves out."""
        self._ending.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()


class _EndingFile(io.BufferedWriter):
    ending: threading.Event

    def write(self, data: Any) -> int:
        if self.ending.is_set():
            raise InterruptedError("the save was given up")
        return super().write(data)


@contextlib.contextmanager
def _one_sentence(folder: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise UserError(
            f"cannot write a checkpoint in {folder}: {problem.strerror or problem} (rank {rank}); "
            "make room or name another folder, the former checkpoints are untouched."
        ) from problem


def _random_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"random/torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _random_text() -> str:
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *rest]}  # type: ignore[union-attr]
    return json.dumps(state)
