"""Hugging Face folders, both ways: ``config.json`` in its two spellings and weights in safetensors, streamed.

Our parameters bear Hugging Face's names, so there is no table of names: what is checked here is that the folder
holds every tensor of the model, in its shape, and nothing that the model would silently ignore. A sharded model is
read and written without ever being whole: a rank reads the rows of its shards, and rank 0 writes tensor by tensor.
"""

import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelConfig, RopeScaling
from .errors import UserError
from .model import Model
from .scorer import Scorer
from .shard import ShardedModel
from .tensorfile import Layout, num_bytes, write_tensors
from .together import together

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PART_BYTES = 5 * 10**9  # a larger model is written in numbered parts

# The files that a save replaces or removes.
_OURS = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}

# Sizes that config.json must give.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

# What transformers takes where config.json lacks a key, as far as the families differ.
_DEFAULTS = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {},
}


# Configuration -------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> ModelConfig:
    """Reads family and shape of a model from ``config.json``.

    Both spellings are read: ``rope_theta`` and ``rope_scaling`` at the top level, and ``rope_parameters`` since
    transformers 5. What the file may leave out is as in transformers' configuration of the family.

    Raises:
        UserError: no such file, no JSON, another ``model_type``, a size missing or of a wrong type, or a feature
            that this decoder has not (rope scaling other than Llama 3's, sliding windows, other biases or activation).
    """
    path = Path(folder) / CONFIG
    raw = _read_json(path)
    family = raw.get("model_type")
    if family not in _FAMILIES:
        known = ", ".join(map(repr, _FAMILIES))
        raise UserError(f"{path} has model_type {family!r}, expected one of {known}; choose another model")
    raw = _DEFAULTS[family] | raw
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path} has rotary parameters {rope!r}, expected one flat object; choose another model")
    sizes = {key: _number(raw, key, path, int) for key in _SIZES}
    _check_features(raw, rope, sizes["num_hidden_layers"], path)
    return ModelConfig(
        model_type=family,
        **sizes,
        num_key_value_heads=_number(raw, "num_key_value_heads", path, int, sizes["num_attention_heads"]),
        head_dim=_number(raw, "head_dim", path, int, 0),
        rms_norm_eps=_number(raw, "rms_norm_eps", path, float, 1e-6),
        rope_theta=_number(raw | rope, "rope_theta", path, float, 10000.0),
        rope_scaling=_rope_scaling(rope, sizes["max_position_embeddings"], path),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=_number(raw, "initializer_range", path, float, 0.02),
    )


def _check_features(raw: dict[str, Any], rope: dict[str, Any], num_layers: int, path: Path) -> None:
    features = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False}
    if raw["model_type"] == "qwen2":
        del features["attention_bias"]  # transformers does not look at it there: Qwen2 has its biases
    for key, expected in features.items():
        found = (raw | rope).get(key)
        if found not in (None, expected):
            raise UserError(f"{path} has {key} {found!r}, this decoder only has {expected!r}; choose another model")
    windows = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    some = windows and raw.get("max_window_layers", 28) < num_layers
    for kind in raw.get("layer_types") or ["sliding_attention" if some else "full_attention"]:
        if kind != "full_attention":
            raise UserError(
                f"{path} has layers of {kind} (layer_types, use_sliding_window), this decoder only has full attention; "
                "choose another model"
            )


def _rope_scaling(rope: dict[str, Any], max_position_embeddings: int, path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path} has rope_type {kind!r}, this decoder only has 'default' and 'llama3'; choose another")
    return RopeScaling(
        factor=_number(rope, "factor", path, float),
        low_freq_factor=_number(rope, "low_freq_factor", path, float),
        high_freq_factor=_number(rope, "high_freq_factor", path, float),
        original_max_position_embeddings=_number(
            rope, "original_max_position_embeddings", path, int, max_position_embeddings
        ),
    )


def _config_json(config: ModelConfig, labels: Sequence[str], dtype: torch.dtype) -> str:
    scaling = config.rope_scaling
    rope = {"rope_type": "llama3", **dataclasses.asdict(scaling)} if scaling else {"rope_type": "default"}
    name = str(dtype).removeprefix("torch.")
    raw: dict[str, Any] = {
        "architectures": [_FAMILIES[config.model_type] + ("ForSequenceClassification" if labels else "ForCausalLM")],
        "model_type": config.model_type,
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        **({"head_dim": config.head_size} if config.head_dim or "head_dim" in _DEFAULTS[config.model_type] else {}),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "torch_dtype": name,
        "dtype": name,
    }
    if labels:  # each has a logit of its own
        raw["problem_type"] = "multi_label_classification"
        raw["id2label"] = dict(enumerate(labels))
        raw["label2id"] = {label: index for index, label in enumerate(labels)}
    return json.dumps(raw, indent=2) + "\n"


# Reading -------------------------------------------------------------------------------------------------------


def load_hf(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Builds the model that a Hugging Face folder holds.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or an index with its parts.
        device: where the weights go.
        dtype: what they are cast to.

    Raises:
        UserError: what :func:`read_config` raises; a weight file absent or unreadable; a tensor missing, of a wrong
            shape, or unknown to the model (each named).
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Model(read_config(folder))
    state: dict[str, Tensor] = {}
    for name, path in _find(folder, {name: tensor.shape for name, tensor in model.state_dict().items()}).items():
        with _opened(path) as file:
            state[name] = file.get_tensor(name).to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    return model


def load_weights(model: ShardedModel, folder: str | Path, *, zeros: Sequence[str] = ()) -> None:
    """Fills the shards of a sharded ``Model`` or ``Scorer`` from a Hugging Face folder; a collective.

    Each rank reads the rows that its shards hold and no more, so its host memory peaks at its shards and one tensor.

    Args:
        model: of the shape that :func:`read_config` gives; its master weights are overwritten, cast to their dtype.
        folder: as for :func:`load_hf`.
        zeros: names of parameters that the folder lacks and that start at 0, such as the head of a new scorer.

    Raises:
        UserError: what :func:`load_hf` raises for weights, on every rank alike.
    """

    def fill() -> None:
        shapes = {slot.name: slot.shape for shard in model.shards for slot in shard.slots if slot.name not in zeros}
        paths = _find(Path(folder), shapes)
        for shard in model.shards:
            for slot, here, there in shard.overlaps():
                if slot.name in zeros:
                    shard.data[here].zero_()
                    continue
                with _opened(paths[slot.name]) as file:  # for one tensor: closing gives back the pages that were read
                    shard.data[here].copy_(_elements(file.get_slice(slot.name), slot.shape, there))

    together(model.mesh, fill)


def _elements(rows: Any, shape: Sequence[int], wanted: slice) -> Tensor:
    """A range of the elements of a flattened tensor, of which only the rows that cover it are read."""
    width = math.prod(shape[1:])
    first = wanted.start // width
    covering = rows[first : -(-wanted.stop // width)]
    return covering.reshape(-1)[wanted.start - first * width : wanted.stop - first * width]


def _find(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Path]:
    """The file of each of the model's tensors, all of them checked by the headers of the files."""
    found: dict[str, Path] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in sorted(file.keys()):
                if name not in shapes:
                    if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight":
                        continue  # They repeat what the configuration and the embedding, tied here, already say.
                    raise UserError(f"{path} holds the tensor {name}, which a model of its config.json has not")
                shape = file.get_slice(name).get_shape()
                if shape != list(shapes[name]):
                    raise UserError(
                        f"tensor {name} in {path} has shape {shape}, config.json asks for "
                        f"{list(shapes[name])}; take both files from the same model"
                    )
                found[name] = path
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the tensor {missing[0]}{more}; take config.json and weights of the same model")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give a Hugging Face folder with safetensors")
    index = _read_json(folder / INDEX)
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; download the folder again")
    return [folder / part for part in sorted(set(parts.values()))]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path} is named by {INDEX} and absent; download the folder again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; download or save the model again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a Hugging Face folder with config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; download or save the model again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, expected a JSON object; download or save the model again")
    return raw


def _number(raw: dict[str, Any], key: str, path: Path, kind: type, default: Any = None) -> Any:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{path} lacks {key}, expected {kind.__name__}; take the config.json that belongs to the model")
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{path} has {key} {value!r}, expected {kind.__name__}; correct it")
    minimum = 0 if kind is float else 1
    if not minimum <= value < math.inf:
        raise UserError(f"{path} has {key} {value}, expected at least {minimum}; correct it")
    return kind(value)


# Writing -------------------------------------------------------------------------------------------------------


def save_hf(model: Model | Scorer | ShardedModel, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that transformers loads: ``config.json`` and weights, in numbered parts if over 5 GB.

    At any moment the folder is the earlier or the new one, never half of each: the new one is made beside it and takes
    its place. Files that are not the model's (a tokenizer) stay; nobody else should write to the folder meanwhile.
    With a sharded model all ranks must call: rank 0 writes tensor by tensor, and all of them learn of a failure.

    Args:
        model: whole or sharded; a ``Scorer`` is written as a model for the classification of sequences.
        folder: made if it does not exist.
        dtype: what the weights are cast to; None: as they are (the master weights of a sharded model).

    Raises:
        UserError: the folder cannot be written (no space, no permission), or the process works in it.
    """
    folder = Path(folder).resolve()
    if not isinstance(model, ShardedModel):
        layout = {name: (dtype or tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        _write(model, layout, iter(model.state_dict().values()), folder)
        return
    module = cast(Model | Scorer, model.module)
    layout = {slot.name: (dtype or shard.data.dtype, slot.shape) for shard in model.shards for slot in shard.slots}
    tensors = map(itemgetter(1), model.state_dict_full())  # unlike a generator it keeps none while the next is made

    def write() -> None:
        try:
            if model.mesh.rank == 0:
                _write(module, layout, tensors, folder)
        finally:
            deque(tensors, maxlen=0)  # a collective: run out on the ranks that write nothing, and after a failure

    together(model.mesh, write)


def _write(model: Model | Scorer, layout: Layout, tensors: Iterator[Tensor], folder: Path) -> None:
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder} is replaced as a whole and is the working directory; save to a folder below it")
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        staging.chmod(0o777 & ~_umask())
        parts = _parts(layout)
        for name, part in parts.items():
            with _durable(staging / name) as file:
                write_tensors(file, part, tensors, {"format": "pt"})
        texts = {CONFIG: _config_json(model.config, model.labels, next(iter(layout.values()))[0])}
        if len(parts) > 1:
            texts[INDEX] = _index_json(parts)
        for name, text in texts.items():
            with _durable(staging / name) as file:
                file.write(text.encode())
        _put_in_place(staging, folder)
    except OSError as error:
        raise UserError(f"cannot write the model to {folder}: {error}; free space or choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _parts(layout: Layout) -> dict[str, Layout]:
    """Which tensors go to which file: in their order, with a new file where one would grow over PART_BYTES."""
    parts: list[dict[str, tuple[torch.dtype, Sequence[int]]]] = []
    size = 0
    for name, (dtype, shape) in layout.items():
        more = num_bytes(dtype, shape)
        if not parts or size + more > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = (dtype, shape)
        size += more
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _index_json(parts: Mapping[str, Layout]) -> str:
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    sizes = {
        "total_parameters": sum(math.prod(shape) for _, shape in tensors),
        "total_size": sum(num_bytes(dtype, shape) for dtype, shape in tensors),
    }
    places = {name: file for file, part in parts.items() for name in part}
    return json.dumps({"metadata": sizes, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def _put_in_place(staging: Path, folder: Path) -> None:
    """Makes ``staging`` the folder; ``staging`` is then the earlier one, or gone."""
    if not folder.exists():
        os.rename(staging, folder)
        return
    top = str(folder)

    def replaced(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if directory == top and _OURS.fullmatch(name)}

    shutil.copytree(top, staging, symlinks=True, ignore=replaced, copy_function=_link, dirs_exist_ok=True)
    _exchange(staging, folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders in one step where kernel and file system can, else with a moment in which ``old`` is absent."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_name(new.name + "-earlier")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
