from dataclasses import replace

import pytest
import torch

from groupwise.engine.config import ModelConfig
from groupwise.engine.errors import UserError
from groupwise.engine.induction import lay_induction
from groupwise.engine.model import Model, PackedAttention

SHAPE = ModelConfig(vocab_size=300, rope_theta=1e5)


def copied(model: Model, alphabet: int, first: int = 7, second: int = 7) -> float:
    """Share of tokens guessed right in the second half of sequences that hold the same names twice.

    The halves start with the tokens `first` and `second`; each sequence draws from `alphabet` tokens of its own.
    """
    generator = torch.Generator().manual_seed(5)
    own = torch.stack([torch.randperm(290, generator=generator)[:alphabet] + 10 for _ in range(16)])
    half = own.gather(1, torch.randint(0, alphabet, (16, 40), generator=generator))
    starts = [torch.tensor([[4, start]]).expand(16, 2) for start in (first, second)]
    ids = torch.cat((starts[0], half, starts[1], half), dim=1)
    length = ids.shape[1]
    attention = PackedAttention(torch.arange(0, 16 * length + 1, length, dtype=torch.int32), length)
    with torch.no_grad():
        hidden = model(ids.flatten(), torch.arange(length).repeat(16), attention).view(16, length, -1)
        scores = hidden @ model.output_weight.T
    # The stream starts with the token itself, which weighs as much as what is copied: training has to settle that.
    guess = scores.scatter(2, ids[..., None], -torch.inf).argmax(-1)
    begin = length // 2 + 1
    return (guess[:, begin:-1] == ids[:, begin + 1 :]).float().mean().item()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_copies_what_it_never_saw_before_any_training(tied: bool) -> None:
    model = Model(replace(SHAPE, tie_word_embeddings=tied))
    model.init_weights(0)
    assert copied(model, 290) < 0.05
    lay_induction(model, 0)
    assert copied(model, 290) > 0.95


def test_the_last_two_tokens_decide_where_one_alone_has_many_places() -> None:
    model = Model(SHAPE)
    lay_induction(model, 0)
    assert copied(model, 20) > 0.7  # a token stands at two places of a half, with 20 to follow it


def test_after_tokens_that_are_alike_the_same_follows() -> None:
    shares = []
    for alike in ([], [[7, 8]]):
        model = Model(SHAPE)
        lay_induction(model, 0, alike)
        whole, started = copied(model, 290, 7, 8), torch.equal(*model.model.embed_tokens.weight[[7, 8]])
        assert started == bool(alike)
        shares.append(whole)
    assert shares[1] > shares[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"hidden_size": 64, "head_dim": 32}, "hidden_size is 64"),
    ],
)
def test_a_shape_without_room_for_the_circuit_is_refused(change: dict[str, int], name: str) -> None:
    with pytest.raises(UserError, match=name):
        replace(SHAPE, initialization="induction", **change)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_family_without_biases_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"model_type '{family}'"):
        replace(SHAPE, initialization="induction", model_type=family)


def test_the_same_seed_gives_the_same_weights() -> None:
    models = [Model(SHAPE) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(0)
        lay_induction(model, seed)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(
        first["model.layers.1.self_attn.k_proj.weight"], other["model.layers.1.self_attn.k_proj.weight"]
    )
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
