"""Checkpoint parameters as parts of the trainer's: compared with what the same function makes of real tensors."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from shards import put_together, random_shards

from rollcast.comm import Holders, Holding, WeightSource
from rollcast.comm.transfer.gathering import GatheringSource

Tensors = dict[str, torch.Tensor]


def experts(state: Tensors) -> Tensors:
    """As mixtures of experts are saved."""
    made = {"norm": state["norm"]}
    for name, parts in zip("gu", state["fused"].chunk(2, dim=1), strict=True):
        made |= {f"{index}.{name}": part.contiguous() for index, part in enumerate(parts.contiguous().unbind(0))}
    return made


def joined(state: Tensors) -> Tensors:
    return {"all": torch.cat([state["q"], state["k"], state["v"]]), "stack": torch.stack([state["q"], state["v"]], 1)}


def rotary(state: Tensors) -> Tensors:
    """Heads whose two halves interleave, as rotary embeddings have them."""
    q = state["q"].view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6)
    return {"qk": torch.cat([q, state["k"]]), "bias": state["bias"].view(2, 2, 2).transpose(1, 2).reshape(8)}


def permuted(state: Tensors) -> Tensors:
    return {
        "t": state["fused"].transpose(1, 2).contiguous(),
        "tc": state["fused"].transpose(0, 2).clone()[1:, ::2],
        "flat": state["fused"].reshape(4, -1)[:, 5:30],
        "rows": state["q"][::2].contiguous()[1:].T,
        "one": state["q"][3:4, 2].reshape(()),
        "same": state["q"].view(2, 24),
        "expanded": state["norm"].expand(3, 6),
    }


def chained(state: Tensors) -> Tensors:
    both = torch.cat([state["q"].T, state["v"].T], dim=1).contiguous()
    return {"head": torch.stack(both.chunk(4, dim=1)).transpose(0, 1).flatten(1)[2:], "tail": both[1].clone()}


FUNCTIONS = [experts, joined, rotary, permuted, chained]


def weights(seed: int) -> Tensors:
    torch.manual_seed(seed)
    shapes = {"fused": (4, 10, 6), "norm": (6,), "q": (8, 6), "k": (4, 6), "v": (8, 6), "bias": (8,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_whole_tensors_become_views(function: Callable[[Tensors], Tensors]) -> None:
    state = weights(0)
    source = WeightSource(state, names=function)
    assert same(put_together([source]), function(state))
    memory = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    for _, parts in source.gather(range(len(source.manifest.specs))):
        assert all(part.untyped_storage().data_ptr() in memory for part in parts)
    # Values that change in place are seen; nothing is made anew.
    before = source.stable_params()
    for tensor in state.values():
        tensor.mul_(2)
    assert source.peek_manifest() is source.manifest and source.stable_params() is before is not None
    assert same(put_together([source]), function(state))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_parts_on_several_ranks_make_the_same_whole(function: Callable[[Tensors], Tensors], seed: int) -> None:
    state = weights(seed)
    shards = random_shards(random.Random(seed), state, 3)
    nothing = {name: (Holding(torch.empty(0, *t.shape[1:]), t.shape, [0] * t.dim()),) for name, t in state.items()}
    sources = [WeightSource(nothing | held, names=function) for held in shards.held]
    assert same(put_together(sources), function(state))
    Holders.of([source.statement for source in sources])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gathered_tensors_are_put_together(function: Callable[[Tensors], Tensors]) -> None:
    state = weights(0)
    source = GatheringSource(state, names=function)
    got = dict(source.gather([*reversed(range(len(source.manifest.specs)))]))
    assert same({spec.name: got[i][0] for i, spec in enumerate(source.manifest.specs)}, function(state))


def test_parameters_keep_the_order_of_the_trainer() -> None:
    state = weights(0)
    source = WeightSource(state, names=lambda state: dict(sorted(state.items())))
    assert [spec.name for spec in source.manifest.specs] == list(state)


def test_memory_that_moves_is_followed() -> None:
    state = weights(0)
    source = WeightSource(state, names=experts)
    for name in state:
        state[name].data = state[name] + 1
    assert source.peek_manifest() is source.manifest
    assert same(put_together([source]), experts(state))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: {"w": s["q"] * 2}, r"w cannot be made of the trainer's weights: it is computed by aten.mul.*of q: "),
        (lambda s: {"w": s["q"].mul_(2)}, "w cannot be made .* computed by aten.mul_"),
        (lambda s: {"w": s["q"].half()}, "w cannot be made .* computed by aten._to_copy"),
        (lambda s: {"w": s["q"].view(torch.int32)}, "w cannot be made .* a change of dtype"),
        (lambda s: {"w": torch.cat([s["q"], s["k"] + 1])}, "w cannot be made .* aten.add.* of k"),
        (lambda s: {"w": torch.zeros(3)}, "w cannot be made .* aten.zeros"),
        (lambda s: {"w": REAL}, "w cannot be made .* it is not made of the trainer's tensors"),
        (lambda s: {"w": None}, "w is not a tensor but NoneType"),
    ],
)
def test_what_is_computed_is_refused_by_name(function: Callable[[Tensors], Tensors], message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message)):
        WeightSource(weights(0), names=function)


REAL = torch.ones(3)
