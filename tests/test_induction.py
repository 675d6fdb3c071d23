import torch

from groupwise.engine.config import ModelConfig
from groupwise.engine.induction import lay_induction
from groupwise.engine.model import Model, PackedAttention

SHAPE = ModelConfig(vocab_size=300, rope_theta=1e5)


def copied(model: Model) -> float:
    """Share of tokens guessed right in the second half of random sequences whose two halves are equal."""
    half = torch.randint(0, 300, (16, 40), generator=torch.Generator().manual_seed(5))
    ids = torch.cat((half, half), dim=1)
    attention = PackedAttention(torch.arange(0, 16 * 80 + 1, 80, dtype=torch.int32), 80)
    with torch.no_grad():
        hidden = model(ids.flatten(), torch.arange(80).repeat(16), attention).view(16, 80, -1)
        guess = (hidden @ model.output_weight.T).argmax(-1)
    return (guess[:, 40:-1] == ids[:, 41:]).float().mean().item()


def test_a_model_copies_what_it_never_saw_before_any_training() -> None:
    model = Model(SHAPE)
    model.init_weights(0)
    assert copied(model) < 0.05
    lay_induction(model, 0)
    assert copied(model) > 0.25


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
