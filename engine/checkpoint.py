"""The whole training state on disk: weights, moments, counters, random states and what the recipe adds.

A checkpoint is a folder ``checkpoint-000007-step-120`` with one safetensors part for each rank and a manifest::

    save_checkpoint("runs/a/checkpoints", model=policy, optimizer=optimizer, state={"step": 120}, mesh=mesh)
    state = load_checkpoint("runs/a/checkpoints", model=policy, optimizer=optimizer, mesh=mesh)

It is written under a temporary name, every file is flushed to the device, the manifest comes last with the size and
SHA-256 of each part and of itself, and then the folder gets its name. So a checkpoint with a name is whole, a damaged
one is found out, and the one before it serves. Parts hold ranges of the units' flat buffers, which do not depend on
the number of ranks, so any number can read them. The folder must be one that all ranks see.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open

from .errors import UserError
from .mesh import Mesh
from .optim import AdamW
from .shard import ShardedModel
from .unit import Shard

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d{6,})(-step-\d+)?")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
MOMENTS = ("exp_avg", "exp_avg_sq")

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
        UserError: it could not be written, on whichever rank; nothing half-written is left, and the former
            checkpoints are untouched.
        TypeError: ``state`` is nothing JSON can hold.
    """
    if keep < 1:
        raise UserError(f"keep is {keep} but at least 1 checkpoint must be kept.")
    folder = Path(folder)
    body = _describe(model, optimizer, state, mesh)
    temporary = folder / ".saving"
    final = folder
    try:
        serial = _together(mesh, lambda: _prepare(folder, temporary) if mesh.rank == 0 else None, folder)[0]
        final = folder / (f"checkpoint-{serial:06d}" + (f"-step-{state['step']}" if "step" in state else ""))
        records = _together(mesh, lambda: _write_part(temporary, model, optimizer, mesh), folder)
        body["files"] = dict(records)
        _together(mesh, lambda: _commit(temporary, final, body, keep) if mesh.rank == 0 else None, folder)
    except BaseException:
        if mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(folder: str | Path, *, model: ShardedModel, optimizer: AdamW | None, mesh: Mesh) -> dict[str, Any]:
    """Read the newest whole checkpoint of ``folder`` (or ``folder`` itself, if it is one), and return its ``state``.

    Weights and moments are filled in place. Random states of Python, NumPy and torch are restored on every rank that
    existed at the save. Damaged checkpoints are named in a warning and passed over. A collective.

    Raises:
        UserError: there is no whole checkpoint, or it is one of another model.
    """
    chosen = None
    for path in mesh.broadcast_object(_candidates(Path(folder))):
        damage = [found for found in mesh.all_gather_object(_damage(path, mesh.rank, mesh.world_size)) if found]
        if not damage:
            chosen = path
            break
        if mesh.rank == 0:
            logger.warning("%s; the checkpoint is passed over.", damage[0])
    if chosen is None:
        raise UserError(f"there is no whole checkpoint in {folder}; give the folder of a run that saved one.")
    body = _read_manifest(chosen)
    _check_same_model(chosen, body, model)
    if optimizer is not None and body["optimizer"] is None:
        raise UserError(f"{chosen} holds no moments; load it without an optimiser, or resume from one that has them.")
    parts = [f"{chosen}/{_part_name(rank, body['world_size'])}" for rank in range(body["world_size"])]
    for index, shard in enumerate(model.shards):
        _fill(shard.data, shard, "weight", parts)
        if optimizer is not None:
            for kind in MOMENTS:
                _fill(getattr(optimizer, kind)[index], shard, kind, parts)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer.state_dict() | body["optimizer"])
    if mesh.rank < len(parts):
        _restore_random(parts[mesh.rank])
    state: dict[str, Any] = body["state"]
    return state


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder that is whole to the last byte, or None; not a collective."""
    return next((path for path in _candidates(Path(folder)) if _damage(path) is None), None)


# Writing -------------------------------------------------------------------------------------------------------


def _together(mesh: Mesh, action: Any, folder: Path) -> list[Any]:
    """Run ``action`` on each rank and give all its results to all; if one rank fails, every rank raises the same."""
    error, value = "", None
    try:
        value = action()
    except OSError as problem:
        error = f"cannot write a checkpoint in {folder}: {problem.strerror or problem} (rank {mesh.rank}); "
        error += "make room or name another folder, the former checkpoints are untouched."
    outcomes = mesh.all_gather_object((error, value))
    failed = [error for error, _ in outcomes if error]
    if failed:
        raise UserError(failed[0])
    return [value for _, value in outcomes]


def _prepare(folder: Path, temporary: Path) -> int:
    """Make the temporary folder, and return the serial number of the new checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return max((_serial(path) for path in _candidates(folder)), default=0) + 1


def _describe(model: ShardedModel, optimizer: AdamW | None, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    scalars = None
    if optimizer is not None:
        scalars = {name: value for name, value in optimizer.state_dict().items() if name not in MOMENTS}
    body = {
        "format": FORMAT,
        "world_size": mesh.world_size,
        "units": _layout(model),
        "optimizer": scalars,
        "state": state,
    }
    json.dumps(body)  # a state that JSON cannot hold fails on every rank, before anything is written
    return body


def _layout(model: ShardedModel) -> list[dict[str, Any]]:
    return [
        {
            "name": shard.name,
            "numel": shard.numel,
            "parameters": [[slot.name, list(slot.shape), slot.offset] for slot in shard.slots],
        }
        for shard in model.shards
    ]


def _part_name(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def _write_part(
    temporary: Path, model: ShardedModel, optimizer: AdamW | None, mesh: Mesh
) -> tuple[str, dict[str, Any]]:
    """Write this rank's part; return its name, and its size and hash for the manifest."""
    tensors: dict[str, torch.Tensor] = {}
    for index, shard in enumerate(model.shards):
        tensors[f"weight/{shard.name}"] = shard.data
        if optimizer is not None:
            tensors |= {f"{kind}/{shard.name}": getattr(optimizer, kind)[index] for kind in MOMENTS}
    tensors["random/torch"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(mesh.device)
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    other = {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *rest]}  # type: ignore[union-attr]
    name = _part_name(mesh.rank, mesh.world_size)
    with open(temporary / name, "xb") as file:
        digest = _write_safetensors(file, tensors, {"random": json.dumps(other)})
        size = file.tell()
        _flush(file)
    return name, {"bytes": size, "sha256": digest}


def _write_safetensors(file: BinaryIO, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Write tensors one after another, and return the SHA-256: one pass, one tensor on the host at a time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for chunk in _chunks(struct.pack("<Q", len(text)) + text, tensors):
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def _chunks(head: bytes, tensors: dict[str, torch.Tensor]) -> Iterator[Any]:
    yield head
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(temporary: Path, final: Path, body: dict[str, Any], keep: int) -> None:
    """The manifest, the name, and then the end of the checkpoints that are too many."""
    text = json.dumps(body)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    with open(temporary / (MANIFEST + ".new"), "xb") as file:
        file.write(json.dumps(whole).encode())
        _flush(file)
    os.rename(temporary / (MANIFEST + ".new"), temporary / MANIFEST)
    _flush_folder(temporary)
    os.rename(temporary, final)
    _flush_folder(final.parent)
    for path in _candidates(final.parent)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


# Reading -------------------------------------------------------------------------------------------------------


def _serial(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    if (folder / MANIFEST).is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_serial, reverse=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    whole = json.loads((path / MANIFEST).read_bytes())
    body: dict[str, Any] = whole["body"]
    if hashlib.sha256(json.dumps(body).encode()).hexdigest() != whole["sha256"]:
        raise ValueError("its checksum does not fit")
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']} and this version reads {FORMAT}")
    return body


def _damage(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; of several ranks each reads every ``world_size``-th part."""
    try:
        body = _read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"{path / MANIFEST} is missing or damaged ({problem})"
    for name, record in list(body["files"].items())[rank::world_size]:
        try:
            size = (path / name).stat().st_size
            if size != record["bytes"]:
                return f"{path / name} has {size} bytes instead of {record['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    return f"{path / name} was altered: its checksum does not fit"
        except OSError as problem:
            return f"{path / name} cannot be read ({problem.strerror})"
    return None


def _check_same_model(path: Path, body: dict[str, Any], model: ShardedModel) -> None:
    theirs = {name: shape for unit in body["units"] for name, shape, _ in unit["parameters"]}
    ours = {slot.name: list(slot.shape) for shard in model.shards for slot in shard.slots}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path} is of another model: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here; resume with the configuration it was made with."
            )
    if body["units"] != _layout(model):
        raise UserError(f"{path} is of the same parameters in other units; resume with the units it was made with.")


def _fill(target: torch.Tensor, shard: Shard, kind: str, parts: list[str]) -> None:
    """Fill this rank's range of a unit from the parts that hold pieces of it; padding becomes 0."""
    target.zero_()
    first, last = shard.start, min(shard.start + target.numel(), shard.numel)
    for rank, part in enumerate(parts):
        with safe_open(part, framework="pt") as file:
            piece = file.get_slice(f"{kind}/{shard.name}")
            length = piece.get_shape()[0]
            begin, end = max(first, rank * length), min(last, (rank + 1) * length)
            if begin < end:
                target[begin - first : end - first].copy_(piece[begin - rank * length : end - rank * length])


def _restore_random(part: str) -> None:
    with safe_open(part, framework="pt") as file:
        other = json.loads(file.metadata()["random"])
        torch.set_rng_state(file.get_tensor("random/torch"))
        if "random/cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"))
    version, internal, gauss = other["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = other["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
