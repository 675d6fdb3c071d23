"""Hugging Face folders: equal logits both ways, both spellings of the configuration, and errors that name the fault."""

import itertools
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file

from groupwise.engine import hf
from groupwise.engine.config import ModelConfig, RopeScaling
from groupwise.engine.errors import UserError
from groupwise.engine.hf import load_hf, load_weights, read_config, save_hf
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model, PackedAttention
from groupwise.engine.shard import ShardedModel

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

SCALING = RopeScaling(8.0, 1.0, 4.0, 64)  # of heads of 16 channels some turn fast, some slowly, and one is between


def wild_model(**changes: object) -> Model:
    """Random biases, norms and wide attention: with the plain initialisation a forgotten one would pass."""
    model = Model(ModelConfig(**{**SIZES, "rope_theta": 5000.0, "rms_norm_eps": 1e-5, **changes}))
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


def assert_same_state(model: Model, other: Model) -> None:
    for (name, a), (twin, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == twin
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "head_dim": 24, "tie_word_embeddings": False},
        {"model_type": "qwen3", "head_dim": 24},
        {"model_type": "qwen3", "tie_word_embeddings": False},
        {"model_type": "llama", "tie_word_embeddings": False},
        {"model_type": "llama", "head_dim": 24},
        {"model_type": "llama", "rope_scaling": SCALING},
        {"model_type": "llama", "rope_scaling": SCALING, "head_dim": 24, "tie_word_embeddings": False},
        {"model_type": "qwen3", "rope_scaling": SCALING},
    ],
    ids=lambda shape: "-".join([shape["model_type"], *list(shape)[1:]]),
)
def test_transformers_computes_the_same(tmp_path, monkeypatch, shape):
    from transformers import AutoModelForCausalLM

    model = wild_model(**shape)
    monkeypatch.setattr(hf, "PART_BYTES", 100_000)
    save_hf(model, tmp_path / "model")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert type(theirs).__name__.lower() == f"{shape['model_type']}forcausallm"
    ids = torch.randint(101, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    for size in ("100KB", "1GB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        back = load_hf(tmp_path / size)
        assert_same_state(back, model)
        assert torch.equal(logits(back, ids), logits(model, ids))
    assert len(list((tmp_path / "100KB").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("limit", [10**9, 100_000, 1])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_round_trip(tmp_path, monkeypatch, family, limit):
    monkeypatch.setattr(hf, "PART_BYTES", limit)
    scaling = SCALING if family == "llama" else None
    model = wild_model(tie_word_embeddings=False, model_type=family, head_dim=16, rope_scaling=scaling)
    save_hf(model, tmp_path)
    assert read_config(tmp_path) == model.config
    loaded = load_hf(tmp_path)
    assert_same_state(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_hf(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_state(load_hf(tmp_path / "half", dtype=torch.bfloat16), model.bfloat16())

    files = sorted(tmp_path.glob("*.safetensors"))
    contents = [load_file(file) for file in files]
    if limit == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
        return
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in contents]
    assert all(size <= limit or len(content) == 1 for size, content in zip(sizes, contents, strict=True))
    assert all(one + next_one > limit for one, next_one in itertools.pairwise(sizes))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {
        name: file.name for file, content in zip(files, contents, strict=True) for name in content
    }


OLD_LLAMA = {  # as Llama 3.1's
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-05,
}


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "qwen2", "rope_theta": 1e6, "torch_dtype": "bfloat16", "rope_scaling": None},
        {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3, "tie_word_embeddings": True},
        {"model_type": "qwen2", "num_attention_heads": 32, "num_key_value_heads": "absent"},
        {"model_type": "qwen3", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": None},
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 3, "head_dim": 32},
        {"model_type": "qwen3", "num_attention_heads": 32, "num_key_value_heads": "absent"},
        {"model_type": "llama", "num_key_value_heads": "absent"},
        {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
        OLD_LLAMA,
        {**OLD_LLAMA, "rope_scaling": {**OLD_LLAMA["rope_scaling"], "type": "llama3", "rope_type": "llama3"}},
        {
            **{key: value for key, value in OLD_LLAMA.items() if not key.startswith("rope")},
            "rope_parameters": {**OLD_LLAMA["rope_scaling"], "rope_theta": 500000.0},
        },
    ],
)
def test_both_spellings_and_what_is_left_out_are_read_as_transformers_does(tmp_path, raw):
    from transformers import AutoConfig

    raw = {key: value for key, value in {**SIZES, **raw}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for name in ("model_type", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_size == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling is None) == (rope["rope_type"] == "default")
    if ours.rope_scaling is not None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            assert getattr(ours.rope_scaling, name) == rope[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_type", "yarn"]),
        ({"use_sliding_window": True, "max_window_layers": 2}, ["use_sliding_window"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["sliding_attention"]),
        ({"model_type": "llama", "attention_bias": True}, ["attention_bias"]),
        ({"model_type": "qwen3", "attention_bias": True}, ["attention_bias"]),
        ({"model_type": "llama", "mlp_bias": True}, ["mlp_bias"]),
        ({"model_type": "llama"}, ["bias", "which a model of its config.json has not"]),
        ({"model_type": "qwen3"}, ["bias", "which a model of its config.json has not"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention", "one flat object"]),
        ({"rope_scaling": {**OLD_LLAMA["rope_scaling"], "factor": None}}, ["lacks factor"]),
        ({"rope_scaling": {**OLD_LLAMA["rope_scaling"], "factor": 0}}, ["factor", "0", "more than 0"]),
        ({"rope_scaling": {**OLD_LLAMA["rope_scaling"], "high_freq_factor": 1}}, ["high_freq_factor", "1"]),
        ({"vocab_size": 0}, ["vocab_size 0", "at least 1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers True"]),
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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_save_that_fails_anywhere_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.setattr(hf, "PART_BYTES", 100_000)
    model = wild_model()
    save_hf(model, folder)
    (folder / "logs").mkdir()
    (folder / "logs" / "config.json").write_text("kept")
    (folder / "tokenizer.json").write_text("kept")
    before = snapshot(folder)
    parts = len(list(folder.glob("*.safetensors")))
    model.init_weights(3)

    real, calls = os.fsync, 0

    def full_disk(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    for number in range(1, parts + 3):
        fails_at = number
        for target in (folder, tmp_path / "other"):
            calls = 0
            with pytest.raises(UserError, match="No space left"):
                save_hf(model, target)
        assert snapshot(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    fails_at = 0

    monkeypatch.setattr(hf, "PART_BYTES", 10**9)  # now one file, and the parts of the earlier model go
    save_hf(model, folder)
    assert set(snapshot(folder)) == {"config.json", "model.safetensors", "tokenizer.json", "logs/config.json"}
    assert (folder / "tokenizer.json").read_text() == (folder / "logs" / "config.json").read_text() == "kept"
    assert_same_state(load_hf(folder), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o077 == (0o777 & ~current_umask()) & 0o077


def test_a_folder_is_replaced_without_the_kernels_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.ctypes, "CDLL", lambda name: SimpleNamespace())
    model = wild_model()
    for seed in (0, 1):
        model.init_weights(seed)
        save_hf(model, tmp_path / "model")
        (tmp_path / "model" / "tokenizer.json").write_text("kept")
    assert_same_state(load_hf(tmp_path / "model"), model)
    save_hf(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "kept"

    real, before = os.rename, snapshot(tmp_path)

    def once(source: Path, target: Path) -> None:
        if target == tmp_path / "model" and "earlier" not in str(source):
            raise OSError(16, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(UserError, match="busy"):
        save_hf(wild_model(), tmp_path / "model")
    assert snapshot(tmp_path) == before


def test_a_folder_behind_a_link_and_the_working_directory(tmp_path, monkeypatch):
    model = wild_model()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_hf(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_state(load_hf(tmp_path / "real"), model)
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(UserError, match="is the working directory"):
        save_hf(model, ".")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model"):
        save_hf(model, tmp_path / "file" / "model")


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# On ranks ------------------------------------------------------------------------------------------------------


def sharded_of(folder: Path, mesh: Mesh, dtype: torch.dtype = torch.float32) -> ShardedModel:
    model = Model(read_config(folder))
    model.init_weights(9)
    return ShardedModel(model, mesh, compute_dtype=dtype, trainable=dtype == torch.float32)


def load_and_save(mesh: Mesh, folder: Path, families: list[str]) -> list[dict[str, torch.Tensor]]:
    hf.PART_BYTES = 100_000
    states = []
    for family in families:
        model = sharded_of(folder / family, mesh)
        load_weights(model, folder / family)
        states.append(dict(model.state_dict_full()))
        save_hf(model, folder / f"{family}-{mesh.world_size}")
        frozen = sharded_of(folder / family, mesh, torch.bfloat16)
        load_weights(frozen, folder / f"{family}-{mesh.world_size}")
        states.append(dict(frozen.state_dict_full()))
    return states


@pytest.mark.parametrize("world_size", [1, 3])
def test_shards_are_filled_and_written_as_the_whole_model_is(tmp_path, monkeypatch, world_size):
    families = ["qwen2", "qwen3", "llama"]
    for family in families:
        save_hf(wild_model(model_type=family, tie_word_embeddings=family == "qwen3"), tmp_path / family)
    results = run_ranks(load_and_save, world_size, tmp_path, families)
    for family, full, half in zip(families, results[0][::2], results[0][1::2], strict=True):
        expected = load_hf(tmp_path / family)
        assert full.keys() == half.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(full[name], tensor), name
            assert torch.equal(half[name], tensor.bfloat16()), name
        written = tmp_path / f"{family}-{world_size}"
        assert len(list(written.glob("*.safetensors"))) > 2
        assert read_config(written) == read_config(tmp_path / family)
        assert_same_state(load_hf(written), expected)
    assert len(results) == world_size


def failures(mesh: Mesh, folder: Path) -> list[str]:
    """What each rank is told of a load that fails on rank 1 alone, and of two saves that fail on rank 0."""
    model = sharded_of(folder / "good", mesh)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    found = []
    for action in (
        lambda: load_weights(model, folder / ("torn" if mesh.rank == 1 else "good")),
        lambda: save_hf(model, folder / "good"),
        lambda: save_hf(model, folder / "good" / "config.json" / "model"),
    ):
        try:
            action()
        except UserError as error:
            found.append(str(error))
    load_weights(model, folder / "good")  # the ranks are still in step
    return found


def test_a_failure_of_one_rank_is_told_to_all(tmp_path):
    save_hf(wild_model(), tmp_path / "good")
    save_hf(wild_model(), tmp_path / "torn")
    state = load_file(tmp_path / "torn" / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "torn" / "model.safetensors")
    before = snapshot(tmp_path)
    first, second = run_ranks(failures, 2, tmp_path)
    assert first == second
    assert [words in text for words, text in zip(("model.norm.weight", "too large", "good/"), first, strict=True)]
    assert len(first) == 3
    assert snapshot(tmp_path) == before


# Memory --------------------------------------------------------------------------------------------------------

BIG = {**SIZES, "vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5}
MIB = 2**20


def growth(action) -> int:
    """Bytes by which the resident memory of this process, mapped files included, grew at most."""
    status = Path("/proc/self/status")

    def figure(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = figure("VmRSS")
    action()
    return figure("VmHWM") - before


def memory(mesh: Mesh, folder: Path) -> dict[str, int]:
    hf.PART_BYTES = 60 * MIB
    model = sharded_of(folder, mesh)
    load = growth(lambda: load_weights(model, folder))
    save = growth(lambda: save_hf(model, folder / f"again-{mesh.world_size}", dtype=torch.bfloat16))
    kept = growth(lambda: dict(model.state_dict_full()))
    return {"load": load, "save": save, "kept": kept}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' record of the peak")
def test_memory_peaks_at_the_shard_and_one_tensor(tmp_path):
    model = Model(ModelConfig(**BIG))
    tensor = max(parameter.nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert whole > 3.5 * tensor
    save_hf(model, tmp_path)
    del model
    for world_size in (1, 2):
        for used in run_ranks(memory, world_size, tmp_path):
            assert used["kept"] > 0.75 * whole  # so the measure sees what is not given back
            assert used["load"] < tensor + 8 * MIB
            assert used["save"] < tensor + 24 * MIB  # two chunks on their way to the file, and what gloo holds
