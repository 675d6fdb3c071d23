"""Hugging Face folders: equal logits both ways, both spellings of the configuration, and errors that name the fault."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from groupwise.engine.config import ModelConfig
from groupwise.engine.errors import UserError
from groupwise.engine.hf import load_hf, read_config, save_hf
from groupwise.engine.model import Model, PackedAttention

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def wild_model(**changes: object) -> Model:
    """Random biases, norms and wide attention: with the plain initialisation a forgotten one would pass."""
    model = Model(ModelConfig(**{**SIZES, "rope_theta": 5000.0, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    return model


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), PackedAttention(bounds, len(ids))) @ model.output_weight.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [0, 24])
def test_transformers_computes_the_same(tmp_path, tied, head_dim):
    from transformers import Qwen2ForCausalLM

    model = wild_model(tie_word_embeddings=tied, head_dim=head_dim)
    save_hf(model, tmp_path / "model")
    theirs, info = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(101, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_hf(tmp_path / "theirs")
    assert torch.equal(logits(back, ids), logits(model, ids))


@pytest.mark.parametrize("parts", [1, 3])
def test_round_trip(tmp_path, parts):
    model = wild_model(tie_word_embeddings=False)
    save_hf(model, tmp_path)
    assert read_config(tmp_path) == model.config
    if parts > 1:
        state = load_file(tmp_path / "model.safetensors")
        names = sorted(state)
        index = {name: f"model-{i % parts:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(names)}
        for part in set(index.values()):
            save_file({name: state[name] for name in names if index[name] == part}, tmp_path / part)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = load_hf(tmp_path)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert load_hf(tmp_path, dtype=torch.bfloat16).output_weight.dtype == torch.bfloat16


def test_both_spellings(tmp_path):
    old = {**SIZES, "model_type": "qwen2", "rope_theta": 1e6, "torch_dtype": "bfloat16", "rope_scaling": None}
    new = {
        **SIZES,
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": "bfloat16",
    }
    configs = []
    for raw in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        configs.append(read_config(tmp_path))
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 1e6
    assert not configs[0].tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_type", "yarn"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"intermediate_size": 97}, ["model.layers.0.mlp.down_proj.weight", "[64, 96]", "[64, 97]"]),
        ({"num_hidden_layers": 4}, ["model.layers.3."]),
        ({"num_hidden_layers": 2}, ["model.layers.2."]),
        ({"tie_word_embeddings": False}, ["lm_head.weight"]),
    ],
)
def test_a_wrong_config_is_named(tmp_path, change, words):
    save_hf(wild_model(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(UserError) as caught:
        load_hf(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_missing_and_torn_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_hf(tmp_path)
    save_hf(wild_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_hf(tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = wild_model()
    save_hf(model, folder)
    (folder / "tokenizer.json").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    model.init_weights(3)
    with pytest.raises(UserError, match="No space left"):
        save_hf(model, folder)
    with pytest.raises(UserError, match="No space left"):
        save_hf(model, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_hf(model, folder)
    assert (folder / "tokenizer.json").read_text() == "kept"
    assert torch.equal(load_hf(folder).output_weight, model.output_weight)
    assert folder.stat().st_mode & 0o077 == (0o777 & ~current_umask()) & 0o077


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
