"""Loaders compiled to a plan: applying it writes what the loader writes, bit for bit, or the loader is refused by name.

The loaders here are short functions in the manner of vLLM's, run natively and through their plans.
"""

from typing import Any

import pytest
import torch
from oddloaders import Tensors, Toy, both, changed, each, land, whole

from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.plan import LandingPlan

A = {"a": (6, 4)}
AB = {"a": (6, 4), "b": (6, 4)}
SWAPPED = {"a": (4, 6)}
WIDE = {"a": (33, 777)}
ORDER = torch.tensor([3, 1, 0, 2, 5, 4])
BF16, FP32 = torch.bfloat16, torch.float32


def fused(live: Tensors, weights: Tensors) -> None:
    for name, start, count in (("q", 0, 8), ("k", 8, 4), ("v", 12, 4)):
        live["qkv"].narrow(0, start, count).copy_(weights[name])


def experts(live: Tensors, weights: Tensors) -> None:
    for name, weight in weights.items():
        expert, _, kind = name.partition(".")
        w13, w2 = live["w13"][int(expert)], live["w2"][int(expert)]
        {"w1": w13[:3], "w3": w13[3:], "w2": w2.t()}[kind].copy_(weight)


def in_parts(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    buffer = torch.empty_like(weight)
    buffer[:3].copy_(weight[3:])
    buffer[3:].copy_(weight[:3] * 2)
    parameter.copy_(buffer)


def on_its_device(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    buffer = torch.zeros(8, 4, device=weight.device)
    buffer[1:7].copy_(weight)
    parameter.copy_(buffer[:6] + torch.arange(4.0, device=weight.device))


EXPERTS = {f"{index}.{kind}": (3, 4) for index in range(3) for kind in ("w1", "w2", "w3")}
MOVED = {
    "plain": Toy(each(lambda w: w), {"a": (3, 4), "b": ()}, {"a": (3, 4), "b": ()}),
    "fused": Toy(whole(fused), {"q": (8, 6), "k": (4, 6), "v": (4, 6)}, {"qkv": (16, 6)}),
    "experts": Toy(whole(experts), EXPERTS, {"w13": (3, 6, 4), "w2": (3, 4, 3)}),
    "chunk": Toy(both(lambda p, w: [part.copy_(w) for part in p.chunk(2, 0)]), A, {"a": (12, 4)}),
    "rank's part": Toy(each(lambda w: w.narrow(1, 2, 2)), A, {"a": (6, 2)}),
    "transposed": Toy(each(lambda w: w.t()[1:, ::2]), A, {"a": (3, 3)}),
    "there and back": Toy(each(lambda w: w.t().contiguous().t()), A, A),
    "permuted": Toy(
        each(lambda w: w.permute(0, 2, 1).contiguous().narrow(1, 1, 2)), {"a": (2, 3, 4)}, {"a": (2, 2, 3)}
    ),
    "transposed in place": Toy(each(lambda w: w.t_()), {"a": (5, 5)}, {"a": (5, 5)}),
    "given other data": Toy(both(lambda p, w: (setattr(w, "data", w.data.t()), p.copy_(w))), A, SWAPPED),
    "expanded": Toy(each(lambda w: w.expand(6, 4)), {"a": (1, 4)}, A),
    "scalar": Toy(both(lambda p, w: p.fill_(w)), {"a": ()}, {"a": (1,)}),
    "zero elements": Toy(each(lambda w: w), {"a": (0, 4), "b": (2,)}, {"a": (0, 4), "b": (2,)}),
    "two targets": Toy(whole(lambda to, of: [p.copy_(of["a"]) for p in to.values()]), A, AB),
    "to the CPU": Toy(each(lambda w: w.to("cpu").clone()), A, A),
    "narrowing cast": Toy(each(lambda w: w), WIDE, WIDE, FP32, BF16),
    "widening cast": Toy(each(lambda w: w.float()), WIDE, WIDE, BF16, FP32),
    "there and back in fp32": Toy(each(lambda w: w.float()), WIDE, WIDE, BF16, BF16),
    "fp8": Toy(each(lambda w: w), WIDE, WIDE, torch.float8_e4m3fn, torch.float8_e4m3fn),
    "bytes and back": Toy(each(lambda w: w.view(torch.int32).view(FP32)), A, A),
    "zeroed first": Toy(both(lambda p, w: (p.zero_(), p[:6].copy_(w))), A, {"a": (8, 4)}),
    "padded beside": Toy(both(lambda p, w: (p[:6].copy_(w), p[6:].fill_(3))), A, {"a": (8, 4)}),
    "padded by item": Toy(both(lambda p, w: (p.__setitem__(slice(6, 8), 0.5), p[:6].copy_(w))), A, {"a": (8, 4)}),
    "constant beside": Toy(both(lambda p, w: (p[:6].copy_(w), p[6:].copy_(torch.arange(4.0)))), A, {"a": (8, 4)}),
}
COMPUTED = {
    "permutation": Toy(each(lambda w: w[ORDER]), A, A),
    "plus one": Toy(each(lambda w: w + 1), A, A),
    "plus one, transposed": Toy(each(lambda w: w.t() + 1), A, SWAPPED),
    "part of a result": Toy(each(lambda w: (w.t() * 2)[1:, ::2]), A, {"a": (3, 3)}),
    "edited copy": Toy(each(lambda w: w.t().clone().mul_(2)), A, SWAPPED),
    "sum over columns": Toy(each(lambda w: w.t().sum(0)), WIDE, {"a": (33,)}),
    "sum of a part": Toy(each(lambda w: w[:, :700].sum()), WIDE, {"a": ()}),
    "plus a transposed constant": Toy(each(lambda w: w[0] + torch.arange(24.0).view(4, 6).t()), A, A),
    "transposed constant": Toy(
        both(lambda p, w: (p[:6].copy_(w), p[6:].copy_(torch.arange(8.0).view(4, 2).t()))), A, {"a": (8, 4)}
    ),
    "channels last": Toy(
        each(lambda w: w.to(memory_format=torch.channels_last) + 1), {"a": (2, 3, 4, 5)}, {"a": (2, 3, 4, 5)}
    ),
    "exp": Toy(each(lambda w: -torch.exp(w.float())), A, A, BF16, FP32),
    "cast and scale": Toy(each(lambda w: w.float() * 1.1), WIDE, WIDE, BF16, BF16),
    "rounding": Toy(each(lambda w: w.bfloat16().float()), WIDE, WIDE),
    "cat": Toy(whole(lambda to, of: to["p"].copy_(torch.cat([of["a"], of["b"]]))), AB, {"p": (12, 4)}),
    "stack": Toy(whole(lambda to, of: to["p"].copy_(torch.stack([of["a"], of["b"]], 1))), AB, {"p": (6, 2, 4)}),
    "expanded, plus a column": Toy(each(lambda w: w.expand(6, 4) + torch.ones(6, 1)), {"a": (1, 4)}, A),
    "copy of what is edited next": Toy(both(lambda p, w: (t := w + 1, p.copy_((t.clone(), t.zero_())[0]))), A, A),
    "source zeroed": Toy(both(lambda p, w: (p[0].copy_(w[0]), w.zero_(), p[1:].copy_(w[1:]))), A, A),
    "source doubled": Toy(both(lambda p, w: (w[1:].mul_(2), p.copy_(w))), A, A),
    "where": Toy(each(lambda w: torch.where(w > 0, w, 0.25)), A, A),
    "mask set": Toy(both(lambda p, w: (p.copy_(w), p.__setitem__(p > 0, 0.0))), A, A),
    "in parts": Toy(both(in_parts), A, A),
    "buffer on its device": Toy(both(on_its_device), A, A),
    "like another": Toy(
        whole(lambda to, of: (to["n.b"].copy_(torch.zeros_like(to["m.a"]) + of["a"]), to["m.a"].copy_(of["a"]))),
        A,
        {"m.a": (6, 4), "n.b": (6, 4)},
    ),
    "transformed": Toy(both(lambda p, w: (p.copy_(w), p.copy_(-torch.exp(p)))), A, A),
    "transformed in place": Toy(both(lambda p, w: (p.copy_(w), p[2:].mul_(2))), A, A),
    "added to zeros": Toy(both(lambda p, w: (p.zero_(), p.add_(w))), A, A),
    "put by index": Toy(both(lambda p, w: (p.zero_(), p.__setitem__(ORDER, w))), A, A),
    "from its own half": Toy(both(lambda p, w: (p[:3].copy_(w[:3]), p[3:].copy_(p[:3]))), A, A),
    "from a neighbour": Toy(whole(lambda to, of: (to["a"].copy_(of["a"]), to["b"].copy_(to["a"] * 2))), A, AB),
}


@pytest.mark.parametrize("toy", [*MOVED.values(), *COMPUTED.values()], ids=[*MOVED, *COMPUTED])
def test_the_plan_is_the_loader_bit_for_bit(toy: Toy) -> None:
    compiled, live = toy.compile(), toy.parameters()
    assert compiled.check() == []
    for seed, plan in enumerate((compiled, LandingPlan.from_bytes(compiled.to_bytes()))):
        weights = toy.weights(seed=seed)
        land(plan, live, list(weights.values()))
        assert changed(live, toy.native(seed=seed)) == []
        assert changed(weights, toy.weights(seed=seed)) == [], "the trainer's tensors are not the loader's to change"


@pytest.mark.parametrize("name", MOVED)
def test_what_only_copies_needs_no_stage(name: str) -> None:
    assert MOVED[name].compile().stages == ()


def test_what_is_computed_from_arrives_in_the_order_of_memory() -> None:
    (move,) = COMPUTED["plus one, transposed"].compile().moves
    assert move.source.is_contiguous and move.region.is_contiguous


def test_tied_targets_are_loaded_once() -> None:
    toy = Toy(each(lambda w: w), {"head": (6, 4)}, A)
    plan = toy.compile(ties={"head": "a"})
    assert plan.check() == [] and [move.target for move in plan.moves] == ["a"]


KEPT: list[Any] = []
REFUSED = {
    "item": both(lambda p, w: p.fill_(w[0, 0].item())),
    "numpy": each(lambda w: torch.from_numpy(w.numpy())),
    "tolist": each(lambda w: torch.tensor(w.tolist())),
    "branch on a sum": both(lambda p, w: p.copy_(w if bool(w.sum() > 0) else -w)),
    "branch on equality": both(lambda p, w: p.copy_(w if torch.equal(w, w) else -w)),
    "boolean mask": each(lambda w: w[w > 0][:1].expand(6, 4)),
    "nonzero": each(lambda w: w[torch.nonzero(w)[0]].sum()),
    "own tensor": each(lambda w: torch.empty(6, 4).copy_(w)),
    "other dtype": each(lambda w: w.view(torch.int32)),
    "lost values": each(lambda w: w + torch.tensor([1.0], device=w.device)),
    "negated view": each(torch._neg_view),
    "random": each(lambda w: w + torch.randn_like(w)),
    "set": both(lambda p, w: p.set_(w.untyped_storage())),
    "out": both(lambda p, w: torch.add(w, 1, out=p)),
    "stashed": both(lambda p, w: (p.copy_(w), KEPT.append(w[1:]))),
    "stashed result": both(lambda p, w: (p.copy_(w), KEPT.append(w * 2))),
    "unknown name": whole(lambda to, of: to["model.first"].copy_(of["first"])),
    "other shape": both(lambda p, w: p.copy_(w[:5])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    with pytest.raises(LandingError, match=r"parameter first \[6, 4\] float32"):
        Toy(REFUSED[name], {"first": (6, 4)}, {"first": (6, 4)}).compile()
    KEPT.clear()


def test_a_loader_that_collects_all_weights_first_is_named_with_the_last() -> None:
    last = whole(lambda to, of: to["a"].copy_(of["a"][of["a"] > 0]))
    with pytest.raises(LandingError, match=r"parameter b .*the last one, or one that it had put aside: "):
        Toy(last, AB, AB).compile()


READS_OLD = {
    "average": both(lambda p, w: p.copy_(0.9 * p + 0.1 * w)),
    "average in place": both(lambda p, w: p.lerp_(w, 0.1)),
    "partly old": both(lambda p, w: (p[:3].copy_(w[:3]), p[3:].copy_(w[3:] + p[2:5]))),
    "put by index": both(lambda p, w: p.__setitem__(ORDER, w)),
}
OUT_OF_TURN = {
    "fill after the load": (both(lambda p, w: (p.copy_(w), p[2:].zero_())), "overwrites a part of a "),
    "load after a sum": (both(lambda p, w: (p.zero_(), p.add_(w), p[0].copy_(w[1]))), "sets a part of a "),
    "load after a read": (both(lambda p, w: (p.fill_(1), p2 := p + 0, p.copy_(w), p.add_(p2))), "sets a part of a "),
    "fill after a read": (both(lambda p, w: (p.fill_(1), p2 := p + 0, p.fill_(2), p.add_(p2))), "sets a part of a "),
} | {name: (loader, "old values of a$") for name, loader in READS_OLD.items()}


@pytest.mark.parametrize("name", OUT_OF_TURN)
def test_an_order_that_a_plan_cannot_keep_is_refused(name: str) -> None:
    loader, message = OUT_OF_TURN[name]
    with pytest.raises(LandingError, match=message):
        Toy(loader, A, A).compile()


def test_computing_with_another_module_is_refused() -> None:
    cross = whole(lambda to, of: (to["m.a"].copy_(of["a"]), to["n.b"].copy_(to["m.a"] * 2)))
    with pytest.raises(LandingError, match=r"m\.a, which belongs to another module"):
        Toy(cross, A, {"m.a": (6, 4), "n.b": (6, 4)}).compile()
