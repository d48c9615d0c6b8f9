"""The examples of docs/sharded-trainers.md state what Megatron's ranks hold."""

import pytest
import torch
from examples import example
from shards import indices

from rollcast.comm import Holders, Holding, WeightSource


def check(states: list[dict[str, Holding]], full: dict[str, torch.Tensor]) -> None:
    """Check that the ranks hold the full weights, each element once."""
    sources = [WeightSource(state) for state in states]
    holders = Holders.of([source.statement for source in sources])
    assert {spec.name: spec.shape for spec in holders.manifest.specs} == {n: tuple(t.shape) for n, t in full.items()}
    for param, spec in enumerate(holders.manifest.specs):
        marks = torch.zeros(spec.shape, dtype=torch.int)
        for rank, source in enumerate(sources):
            index = [each.name for each in source.manifest.specs].index(spec.name)
            ((_, (part,)),) = source.gather([index])
            (box,) = source.statement[index].boxes
            where = indices(box)
            assert torch.equal(part, full[spec.name].view(box.shape)[where]), rank
            marks.view(box.shape)[where] += 1
        assert torch.equal(marks, torch.ones_like(marks)), param


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_qkv(ranks: int) -> None:
    heads, groups, head_dim, hidden = 8, 4, 3, 10
    torch.manual_seed(0)
    q, k, v = (torch.randn(count * head_dim, hidden) for count in (heads, groups, groups))
    # As Megatron's converters build it: group by group, queries, key and value.
    by_group = [each.view(groups, -1, head_dim, hidden) for each in (q, k, v)]
    fused = torch.cat(by_group, dim=1).reshape(-1, hidden)
    qkv_holdings = example("qkv", "qkv_holdings")
    sizes = {"heads": heads, "groups": groups, "head_dim": head_dim, "hidden": hidden}
    states = [
        qkv_holdings("attn", part, rank=rank, ranks=ranks, **sizes) for rank, part in enumerate(fused.chunk(ranks))
    ]
    check(states, {"attn.q_proj.weight": q, "attn.k_proj.weight": k, "attn.v_proj.weight": v})


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gate_and_up_projection(ranks: int) -> None:
    gate, up = torch.randn(8, 5), torch.randn(8, 5)
    gate_up_holdings = example("gate_up", "gate_up_holdings")
    states = [
        gate_up_holdings("mlp", torch.cat(parts), rank=rank, ranks=ranks)
        for rank, parts in enumerate(zip(gate.chunk(ranks), up.chunk(ranks), strict=True))
    ]
    check(states, {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up})


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padded_vocabulary(ranks: int) -> None:
    full = torch.randn(9, 3)
    padded = torch.cat((full, torch.zeros(7, 3)))
    vocabulary_holding = example("vocabulary", "vocabulary_holding")
    states = [
        {"embed.weight": vocabulary_holding(part, rank=rank, vocabulary=9)}
        for rank, part in enumerate(padded.chunk(ranks))
    ]
    check(states, {"embed.weight": full})
