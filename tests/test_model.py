"""The decoder: positions, segments, initialisation; its agreement with transformers is in test_hf.py."""

import dataclasses

import pytest
import torch

from groupwise.engine.config import ModelConfig, RopeScaling
from groupwise.engine.model import Model, PackedAttention, Rotary
from groupwise.kernels import apply_rotary

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def wild_model(config: ModelConfig = CONFIG, seed: int = 0) -> Model:
    """Random weights wide enough that a forgotten bias, norm or mask shows."""
    model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    return model


def run(model: Model, lengths: list[int], ids: torch.Tensor, **kwargs: object):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model(ids, positions, PackedAttention(bounds, max(lengths)), **kwargs)


def test_segments_do_not_see_each_other():
    model = wild_model()
    ids = torch.randint(97, (24,), generator=torch.Generator().manual_seed(1))
    lengths = [7, 1, 16]
    whole = run(model, lengths, ids)
    parts = torch.cat([run(model, [len(part)], part) for part in ids.split(lengths)])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_a_token_sees_only_what_came_before():
    model = wild_model()
    ids = torch.randint(97, (20,), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[12] = (ids[12] + 1) % 97
    before, after = run(model, [20], ids), run(model, [20], changed)
    assert torch.equal(before[:12], after[:12])
    assert (before[12:] - after[12:]).abs().amax(1).min() > 1e-3


def test_rotation_is_relative_and_keeps_lengths():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 16, generator=generator) for _ in range(2))
    rotary = Rotary(16, 10000.0)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rotary(x, x, *rotary.angles(torch.tensor([position]), torch.float32))[0]

    score = (turned(q, 5) * turned(k, 2)).sum()
    assert torch.allclose(score, (turned(q, 105) * turned(k, 102)).sum(), atol=1e-4)
    assert not torch.allclose(score, (turned(q, 6) * turned(k, 2)).sum(), atol=1e-2)
    assert torch.allclose(turned(q, 77).norm(), q.norm())


def test_llama3_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **dataclasses.asdict(scaling)}
    theirs = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain, scaled = Rotary(128, 500000.0).frequencies(), Rotary(128, 500000.0, scaling).frequencies()
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
    assert torch.equal(scaled[:20], plain[:20])
    assert torch.equal(scaled[-20:], plain[-20:] / 8)


def test_families_differ_in_biases_and_norms():
    names = {
        family: {name for name, _ in Model(dataclasses.replace(CONFIG, model_type=family)).named_parameters()}
        for family in ("qwen2", "qwen3", "llama")
    }
    attention = {
        family: {name.removeprefix("model.layers.1.self_attn.") for name in own if "layers.1.self_attn" in name}
        for family, own in names.items()
    }
    matrices = {f"{part}_proj.weight" for part in "qkvo"}
    assert attention["llama"] == matrices
    assert attention["qwen2"] == matrices | {f"{part}_proj.bias" for part in "qkv"}
    assert attention["qwen3"] == matrices | {"q_norm.weight", "k_norm.weight"}


def test_logprobs_are_those_of_the_logits():
    model = wild_model()
    ids = torch.randint(97, (15,), generator=torch.Generator().manual_seed(4))
    targets = ids.roll(-1)
    targets[9] = -100
    logprob, entropy = run(model, [10, 5], ids, targets=targets, temperature=0.7, entropy=True)
    expected = torch.log_softmax(run(model, [10, 5], ids) @ model.output_weight.T / 0.7, 1)
    chosen = expected.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    torch.testing.assert_close(logprob, chosen, atol=1e-5, rtol=0)
    live = targets >= 0
    torch.testing.assert_close(entropy[live], -(expected.exp() * expected).sum(1)[live], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_initialisation(tied: bool):
    config = ModelConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=4, tie_word_embeddings=tied, initializer_range=0.02
    )
    before = torch.random.get_rng_state()
    one, same, other = Model(config), Model(config), Model(config)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator must not move"
    one.init_weights(5), same.init_weights(5), other.init_weights(6)
    for (name, a), b in zip(one.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.output_weight, other.output_weight)
    assert ("lm_head.weight" in one.state_dict()) is not tied
    assert one.output_weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert one.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.03)
    assert one.layers[3].self_attn.q_proj.bias.abs().max() == 0
    assert (one.layers[1].input_layernorm.weight == 1).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_model_on_the_meta_device_gives_the_weights_of_a_real_one(family: str):
    config = dataclasses.replace(CONFIG, model_type=family, tie_word_embeddings=False)
    real = Model(config)
    real.init_weights(5)
    with torch.device("meta"):
        weights = Model(config).initial_weights(5)
        for (name, values), (twin, parameter) in zip(weights, real.named_parameters(), strict=True):
            assert name == twin
            assert values.device.type == "cpu"
            assert torch.equal(values, parameter), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_it_learns(family: str):
    model = wild_model(dataclasses.replace(CONFIG, model_type=family))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    ids = torch.randint(97, (30,), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -run(model, [29], ids[:-1], targets=ids[1:])[0].mean()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
