"""What a checkpoint is on disk: its name, its parts, and the manifest that says what they hold and should hash to.

A run's folder of checkpoints::

    .lock                         held by the one process that writes
    .saving/                      a checkpoint that has no name yet
    checkpoint-000007-step-120/   a whole one
        part-00000-of-00004.safetensors, …    one for each rank
        manifest.json             size and SHA-256 of each part and of itself, layout, counters, state
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from .mesh import Mesh
from .optim import AdamW
from .shard import ShardedModel

FORMAT = 2
MANIFEST, LOCK = "manifest.json", ".lock"
MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"checkpoint-(\d{6,})(-step-\d+)?")


def list_checkpoints(folder: Path) -> list[Path]:
    """All that bear a checkpoint's name, newest first, looked at no further; ``folder`` alone if it is one itself."""
    if (folder / MANIFEST).is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _serial(path)), key=_serial, reverse=True)


def next_name(folder: Path, state: dict[str, Any]) -> str:
    """The name of the checkpoint that follows those of ``folder``."""
    serial = max((_serial(path) for path in list_checkpoints(folder)), default=0) + 1
    return f"checkpoint-{serial:06d}" + (f"-step-{state['step']}" if "step" in state else "")


def _serial(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def part_name(rank: int, world_size: int) -> str:
    """The file of a rank."""
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def writer_of(unit: int, shard_rank: int, shard_size: int, world_size: int) -> int:
    """The rank whose part holds a shard of a unit: all copies of the model hold it, and they take turns by unit."""
    return unit % (world_size // shard_size) * shard_size + shard_rank


def describe(model: ShardedModel, optimizer: AdamW | None, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The manifest but for its parts, as JSON gives it back: no later change of ``state`` reaches it.

    Raises:
        TypeError: ``state`` is nothing JSON can hold.
    """
    scalars = None
    if optimizer is not None:
        scalars = {name: value for name, value in optimizer.state_dict().items() if name not in MOMENTS}
    body = {
        "format": FORMAT,
        "world_size": mesh.world_size,
        "shard_size": mesh.shard_size,
        "units": layout(model),
        "optimizer": scalars,
        "state": state,
    }
    copy: dict[str, Any] = json.loads(json.dumps(body))
    return copy


def layout(model: ShardedModel) -> list[dict[str, Any]]:
    """Where each parameter lies in which unit."""
    return [
        {
            "name": shard.name,
            "numel": shard.numel,
            "parameters": [[slot.name, list(slot.shape), slot.offset] for slot in shard.slots],
        }
        for shard in model.shards
    ]


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    """Write it, flushed to the device, into a folder that holds the parts."""
    text = json.dumps(body)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    with open(path / MANIFEST, "xb") as file:
        file.write(json.dumps(whole).encode())
        flush(file)


def read_manifest(path: Path) -> dict[str, Any]:
    """What :func:`describe` gave, with ``files``.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, damaged or of another format.
    """
    whole = json.loads((path / MANIFEST).read_bytes())
    body: dict[str, Any] = whole["body"]
    if hashlib.sha256(json.dumps(body).encode()).hexdigest() != whole["sha256"]:
        raise ValueError("its checksum does not fit")
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']} and this version reads {FORMAT}")
    return body


def find_damage(path: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with a checkpoint, or None; each of several ranks reads every ``world_size``-th part whole."""
    try:
        body = read_manifest(path)
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


def flush(file: BinaryIO) -> None:
    """Return when the device has what was written."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Return when the device has the names in ``folder``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
