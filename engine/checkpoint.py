"""The whole training state on disk: weights, moments, counters, random states and what the recipe adds.

A checkpoint is a folder ``checkpoint-000007-step-120`` with one safetensors part for each rank and a manifest::

    save_checkpoint("runs/a/checkpoints", model=policy, optimizer=optimizer, state={"step": 120}, mesh=mesh)
    state = load_checkpoint("runs/a/checkpoints", model=policy, optimizer=optimizer, mesh=mesh)

It is written under a temporary name, every file is flushed to the device, the manifest comes last with the size and
SHA-256 of each part and of itself, and then the folder gets its name. So a checkpoint with a name is whole, a damaged
one is found out, and the one before it serves. Parts hold ranges of the units' flat buffers, which do not depend on
the number of ranks, so any number can read them, in any grid of shards and copies. The folder must be one that all
ranks see. A :class:`~groupwise.engine.saver.Saver` writes the same while training goes on.
"""

import contextlib
import json
import logging
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .errors import UserError
from .lock import Lock
from .manifest import (
    LOCK,
    MANIFEST,
    MOMENTS,
    find_damage,
    layout,
    list_checkpoints,
    part_name,
    read_manifest,
    writer_of,
)
from .mesh import Mesh
from .optim import AdamW
from .saver import Saver
from .shard import ShardedModel
from .together import together
from .unit import Shard

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: str | Path,
    *,
    model: ShardedModel,
    optimizer: AdamW | None,
    state: dict[str, Any],
    mesh: Mesh,
    keep: int = 2,
) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``; a collective.

    Args:
        folder: of all checkpoints of this run; made if need be.
        model: its master shards are saved.
        optimizer: its moments and counters are saved; None where there are none.
        state: anything JSON can hold; ``state["step"]``, if there, becomes part of the name.
        mesh: the ranks.
        keep: at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: it could not be written, on whichever rank, or another run writes there; nothing half-written is
            left, and the former checkpoints are untouched.
        TypeError: ``state`` is nothing JSON can hold.
    """
    saver = Saver(folder, mesh, keep)
    saver.save(model, optimizer, state)
    path = saver.wait()
    assert path is not None
    return path


def load_checkpoint(folder: str | Path, *, model: ShardedModel, optimizer: AdamW | None, mesh: Mesh) -> dict[str, Any]:
    """Read the newest whole checkpoint of ``folder`` (or ``folder`` itself, if it is one), and return its ``state``.

    Weights and moments are filled in place, cast where their dtype is another. Random states of Python, NumPy and
    torch are restored on every rank that existed at the save. Damaged checkpoints are named in a warning and passed
    over. To find damage, each part is read once, by one rank. A run that saves meanwhile leaves what is being read. A
    collective.

    Raises:
        UserError: there is no checkpoint, none is whole, it is one of another model, or another run writes there.
    """
    folder = Path(folder)
    with ExitStack() as held:
        path = _choose(folder, mesh, held)
        body = read_manifest(path)
        _check_same_model(path, body, model)
        if optimizer is not None and body["optimizer"] is None:
            raise UserError(f"{path} holds no moments; load it without an optimiser, or resume from one that has them.")
        names = [path / part_name(rank, body["world_size"]) for rank in range(body["world_size"])]
        parts = [held.enter_context(safe_open(name, framework="pt")) for name in names]
        for index, shard in enumerate(model.shards):
            grid = body["shard_size"], body["world_size"]
            pieces = [parts[writer_of(index, place, *grid)] for place in range(body["shard_size"])]
            _fill(shard.data, shard, "weight", pieces)
            if optimizer is not None:
                for kind in MOMENTS:
                    _fill(getattr(optimizer, kind)[index], shard, kind, pieces)
        if optimizer is not None:
            optimizer.load_state_dict(optimizer.state_dict() | body["optimizer"])
        if mesh.rank < len(parts):
            _restore_random(parts[mesh.rank])
        mesh.barrier()  # rank 0 holds the checkpoint for all
    state: dict[str, Any] = body["state"]
    return state


def _choose(folder: Path, mesh: Mesh, held: ExitStack) -> Path:
    """The newest whole checkpoint, held by rank 0 against removal."""
    damages = []
    for path in together(mesh, lambda: _readable(folder) if mesh.rank == 0 else [])[0]:
        if mesh.rank == 0:
            with contextlib.suppress(OSError):  # no manifest: that is damage, and nothing to hold
                held.enter_context(Lock(path / MANIFEST, shared=True))
        found = [damage for damage in mesh.all_gather_object(find_damage(path, mesh.rank, mesh.world_size)) if damage]
        if not found:
            return path
        damages += found[:1]
        if mesh.rank == 0:
            logger.warning("%s; the checkpoint is passed over.", found[0])
    if damages:
        raise UserError(f"no checkpoint in {folder} is whole: {damages[0]}; restore one, or remove them to start anew.")
    raise UserError(f"there is no checkpoint in {folder}; give the folder of a run that saved one.")


def _readable(folder: Path) -> list[Path]:
    paths = list_checkpoints(folder)
    lock = (paths[0].parent if paths else folder) / LOCK
    if lock.exists():  # none where nobody ever wrote
        Lock(lock, shared=True).close()
    return paths


def _check_same_model(path: Path, body: dict[str, Any], model: ShardedModel) -> None:
    theirs = {name: shape for unit in body["units"] for name, shape, _ in unit["parameters"]}
    ours = {slot.name: list(slot.shape) for shard in model.shards for slot in shard.slots}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path} is of another model: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here; resume with the configuration it was made with."
            )
    if body["units"] != layout(model):
        raise UserError(f"{path} is of the same parameters in other units; resume with the units it was made with.")


def _fill(target: torch.Tensor, shard: Shard, kind: str, pieces: Sequence[Any]) -> None:
    """Fill this rank's range of a unit from the files that hold it piece by piece; padding becomes 0."""
    target.zero_()
    first, last = shard.start, min(shard.start + target.numel(), shard.numel)
    for place, file in enumerate(pieces):
        piece = file.get_slice(f"{kind}/{shard.name}")
        length = piece.get_shape()[0]
        begin, end = max(first, place * length), min(last, (place + 1) * length)
        if begin < end:
            target[begin - first : end - first].copy_(piece[begin - place * length : end - place * length])


def _restore_random(part: Any) -> None:
    other = json.loads(part.metadata()["random"])
    torch.set_rng_state(part.get_tensor("random/torch"))
    if "random/cuda" in part.keys() and torch.cuda.is_available():  # noqa: SIM118
        torch.cuda.set_rng_state(part.get_tensor("random/cuda"))
    version, internal, gauss = other["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = other["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
