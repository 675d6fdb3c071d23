"""Fourteen billion parameters on eight ranks by the real code, on the meta device: shapes and bytes without memory."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import CountingMesh, run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from groupwise.engine.config import load_config
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model
from groupwise.engine.optim import AdamW
from groupwise.engine.reference import Reference
from groupwise.engine.shard import ShardedModel

QWEN2_5_14B = load_config("datarus").model
PARAMETERS = 14_770_033_664  # of Qwen/Qwen2.5-14B
ROOT = 2 * 152064 * 5120 + 5120  # embedding, head and last norm
RANKS, TOKENS = 8, 8192


def attention(layer, q, k, v, cos, sin):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def step(mesh, shard_size):
    """One step on rank 3 of eight, whose peers are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=RANKS)
    meta = torch.device("meta")
    ranks = Mesh(rank=3, world_size=RANKS, device=meta, backend="fake", group=dist.group.WORLD, shard_size=shard_size)
    counting = CountingMesh(ranks)
    with meta:
        model, frozen = Model(QWEN2_5_14B), Model(QWEN2_5_14B)
    policy = ShardedModel(model, counting, compute_dtype=torch.bfloat16, activation_checkpointing=True)
    optimizer = AdamW(policy.shards, lr=1e-6)
    reference = Reference(frozen, ranks, torch.bfloat16)
    whole = []  # bytes of gathered parameters whenever a block computes, forward, recomputed or backward
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: whole.append(gathered(policy)))
    inputs = torch.zeros(TOKENS, dtype=torch.int64, device=meta), torch.arange(TOKENS, device=meta), attention
    hidden = policy(*inputs)
    policy.backward((hidden[:64] @ model.output_weight.T).float().sum())
    optimizer.step(1e-6)
    with torch.no_grad():
        assert reference.sharded(*inputs).shape == (TOKENS, 5120)
    stored = {
        "master": sum(nbytes(shard.data) for shard in policy.shards),
        "gradients": sum(nbytes(shard.grad) for shard in policy.shards),
        "moments": sum(map(nbytes, [*optimizer.exp_avg, *optimizer.exp_avg_sq])),
        "reference": sum(nbytes(shard.data) for shard in reference.sharded.shards),
        "left whole": gathered(policy) + gathered(reference.sharded),
    }
    result = sum(p.numel() for p in model.parameters()), stored, dict(counting.calls), dict(counting.elements)
    dist.destroy_process_group()
    return *result, max(whole), len(whole)


def nbytes(tensor):
    return tensor.numel() * tensor.element_size()


def gathered(policy):
    return sum(unit.flat.untyped_storage().nbytes() for unit in policy._all)


@pytest.mark.parametrize("shard_size", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_of_fourteen_billion_parameters(shard_size):
    (parameters, stored, calls, elements, whole, blocks_run), *_ = run_ranks(step, 1, shard_size)
    assert parameters == PARAMETERS
    own = parameters / shard_size
    expected = {"master": 4 * own, "gradients": 4 * own, "moments": 8 * own, "reference": 2 * own, "left whole": 0}
    assert stored == pytest.approx(expected, rel=1e-6)  # but for padding
    assert blocks_run == 2 * 48  # forward, and again in the backward
    block = (parameters - ROOT) / 48
    assert whole == pytest.approx(2 * (ROOT + 2 * block), rel=1e-6)  # bfloat16: the root, a block, and the next one
    copies = {} if shard_size == RANKS else {"replicas": 49}
    assert calls == {"gather": 1 + 2 * 48, "scatter": 1 + 48, **copies}
    moved = {"gather": ROOT + 2 * 48 * block, "scatter": parameters} | dict.fromkeys(copies, own)
    assert elements == pytest.approx(moved, rel=1e-6)
