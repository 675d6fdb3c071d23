"""Hugging Face folders, both ways: ``config.json`` in its two spellings and weights in safetensors.

Our parameters bear Hugging Face's names, so there is no table of names: what is checked here is that the folder
holds every tensor of the model, in its shape, and nothing that the model would silently ignore.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .errors import UserError
from .mesh import Mesh
from .model import Model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Sizes that config.json must give; what the file may leave out is read in read_config, with Qwen2's defaults.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class Sharded(Protocol):
    """What saving needs of ``engine.ShardedModel``: whole tensors one unit at a time, on all ranks together."""

    mesh: Mesh
    module: Any

    def state_dict_full(self) -> Iterable[tuple[str, Tensor]]: ...


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the shape of a Qwen2 model from ``config.json``.

    Both spellings are read: ``rope_theta`` at the top level, and ``rope_parameters`` since transformers 5.

    Raises:
        UserError: no such file, no JSON, another ``model_type``, a size missing or of a wrong type, or a feature
            that this decoder has not (rope scaling, sliding windows, another activation).
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    kind = raw.get("model_type")
    if kind != "qwen2":
        raise UserError(f"{path} has model_type {kind!r}, expected 'qwen2'; convert the model or choose another one")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    rope_types = [rope.get("rope_type"), scaling.get("rope_type"), scaling.get("type")]
    rope_type = next((kind for kind in rope_types if kind not in (None, "default")), "default")
    unsupported = {
        "rope_type": (rope_type, "default"),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
    }
    for key, (found, expected) in unsupported.items():
        if found != expected:
            raise UserError(f"{path} has {key} {found!r}, this decoder only has {expected!r}; choose another model")
    sizes = {key: _number(raw, key, path, int) for key in _SIZES}
    theta = rope if "rope_theta" in rope else raw
    return ModelConfig(
        **sizes,
        head_dim=_number(raw, "head_dim", path, int, 0),
        rms_norm_eps=_number(raw, "rms_norm_eps", path, float, 1e-6),
        rope_theta=_number(theta, "rope_theta", path, float, 10000.0),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=_number(raw, "initializer_range", path, float, 0.02),
    )


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
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _tensors(path):
            if name not in expected:
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue  # Both repeat what the configuration and the embedding already say.
                raise UserError(f"{path} holds the tensor {name}, which a Qwen2 model of its config.json has not")
            if tensor.shape != expected[name]:
                raise UserError(
                    f"tensor {name} in {path} has shape {list(tensor.shape)}, config.json asks for "
                    f"{list(expected[name])}; take both files from the same model"
                )
            state[name] = tensor.to(device=device, dtype=dtype)
    missing = [name for name in expected if name not in state]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the tensor {missing[0]}{more}; take config.json and weights of the same model")
    model.load_state_dict(state, assign=True)
    return model


def save_hf(model: Model | Sharded, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` so that transformers loads them as ``Qwen2ForCausalLM``.

    A reader finds the earlier folder or the new one, never half of a file. Other files of an existing folder
    (a tokenizer) stay. With a sharded model all ranks must call; rank 0 writes, and all of them learn of a failure.

    Args:
        model: a whole or a sharded model.
        folder: made if it does not exist.

    Raises:
        UserError: the folder cannot be written (no space, no permission).
    """
    if isinstance(model, Model):
        _write(model.config, {name: _plain(tensor) for name, tensor in model.state_dict().items()}, Path(folder))
        return
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict_full():
        if model.mesh.rank == 0:
            state[name] = _plain(tensor)
    failure = None
    if model.mesh.rank == 0:
        try:
            _write(model.module.config, state, Path(folder))
        except UserError as error:
            failure = str(error)
    failure = model.mesh.broadcast_object(failure)
    if failure:
        raise UserError(failure)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _config_json(config: ModelConfig, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    raw: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in _SIZES},
        **({"head_dim": config.head_dim} if config.head_dim else {}),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": name,
        "dtype": name,
    }
    return json.dumps(raw, indent=2) + "\n"


def _write(config: ModelConfig, state: dict[str, Tensor], folder: Path) -> None:
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        staging.chmod(0o777 & ~_umask())
        save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        dtype = next(iter(state.values())).dtype
        (staging / "config.json").write_text(_config_json(config, dtype), encoding="utf-8")
        for name in (WEIGHTS, "config.json"):
            with open(staging / name, "rb") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            os.rename(staging, folder)
            staging = None
            return
        for name in (WEIGHTS, "config.json"):
            os.replace(staging / name, folder / name)
        (folder / INDEX).unlink(missing_ok=True)  # It names the parts of the model that was there before.
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {folder}: {error}; free space or choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
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
    value = default if value is None else value
    if value is None:
        raise UserError(f"{path} lacks {key}, expected {kind.__name__}; take the config.json that belongs to the model")
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{path} has {key} {value!r}, expected {kind.__name__}; correct it")
    return kind(value)
