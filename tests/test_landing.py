"""Compiling a loader into moves: replaying them must write what the loader writes, bit for bit.

The loaders here are short functions in the manner of vLLM's: they copy one named weight into live tensors.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from rollcast.comm import Manifest, ParamSpec
from rollcast.rollout.landing import DirectLanding, LandingError, LandingPlan, compile_landing

Tensors = dict[str, torch.Tensor]
Loader = Callable[[Tensors, str, torch.Tensor], Any]
Change = Callable[[torch.Tensor], torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


class Case(NamedTuple):
    """A loader, and the shapes and dtypes of what it reads (sources) and writes (live parameters)."""

    loader: Loader
    sources: Shapes
    live: Shapes
    source_dtype: torch.dtype = torch.float32
    live_dtype: torch.dtype = torch.float32

    def weights(self, *, seed: int) -> Tensors:
        torch.manual_seed(seed)
        return {name: (torch.randn(shape) * 8).to(self.source_dtype) for name, shape in self.sources.items()}

    def parameters(self) -> Tensors:
        random = {name: (torch.randn(shape) * 8).to(self.live_dtype) for name, shape in self.live.items()}
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in random.items()}

    def loaded(self, *, seed: int) -> Tensors:
        """Live parameters as the loader leaves them."""
        live = self.parameters()
        for name, weight in self.weights(seed=seed).items():
            self.loader(live, name, weight)
        return live

    def compile(self, live: Tensors) -> LandingPlan:
        specs = (ParamSpec(name, tuple(t.shape), t.dtype) for name, t in self.weights(seed=0).items())
        return compile_landing(lambda pairs: [self.loader(live, *p) for p in pairs], live, Manifest(tuple(specs)))


def each(change: Change) -> Loader:
    """Copies what `change` makes of a weight."""
    return lambda live, name, w: live[name].data.copy_(change(w))


def into(part: Change) -> Loader:
    """Copies into a part of the parameter."""
    return lambda live, name, w: part(live[name].data).copy_(w)


def then(change: Change) -> Loader:
    """Copies, then changes the parameter."""
    return lambda live, name, w: (live[name].data.copy_(w), change(live[name].data))


def fused_qkv(live: Tensors, name: str, w: torch.Tensor) -> None:
    live["qkv"].data.narrow(0, *{"q": (0, 8), "k": (8, 4), "v": (12, 4)}[name]).copy_(w)


def fused_gate_up(live: Tensors, name: str, w: torch.Tensor) -> None:
    live["gate_up"].data.chunk(2, dim=0)[("gate", "up").index(name)].copy_(w)


def experts(live: Tensors, name: str, w: torch.Tensor) -> None:
    expert, _, kind = name.partition(".")
    w13, w2 = live["w13"].data[int(expert)], live["w2"].data[int(expert)]
    {"w1": w13[:3], "w3": w13[3:], "w2": w2}[kind].copy_(w)


def padded_vocabulary(live: Tensors, name: str, w: torch.Tensor) -> None:
    live[name].data[: len(w)].copy_(w)
    live[name].data[len(w) :].fill_(0)


def zeroed_first(live: Tensors, name: str, w: torch.Tensor) -> None:
    live[name].data.zero_()
    live[name].data[0].copy_(torch.arange(3.0))
    live[name].data[1, :2].copy_(w)


EXACT = {
    "plain": Case(each(lambda w: w), {"a": (3, 4), "b": ()}, {"a": (3, 4), "b": ()}),
    "fused qkv": Case(fused_qkv, {"q": (8, 6), "k": (4, 6), "v": (4, 6)}, {"qkv": (16, 6)}),
    "fused gate_up": Case(fused_gate_up, {"gate": (5, 3), "up": (5, 3)}, {"gate_up": (10, 3)}),
    "experts": Case(
        experts,
        {f"{expert}.{kind}": (4, 3) if kind == "w2" else (3, 4) for expert in range(3) for kind in ("w1", "w2", "w3")},
        {"w13": (3, 6, 4), "w2": (3, 4, 3)},
    ),
    "column parallel": Case(each(lambda w: w.narrow(0, 4, 4)), {"a": (8, 6)}, {"a": (4, 6)}),
    "row parallel": Case(each(lambda w: w.narrow(1, 3, 3)), {"a": (8, 6)}, {"a": (8, 3)}),
    "transposed source": Case(each(lambda w: w.t()), {"a": (3, 5)}, {"a": (5, 3)}),
    "transposed part": Case(each(lambda w: w.t()[1:, ::2]), {"a": (6, 5)}, {"a": (4, 3)}),
    "transposed target": Case(into(lambda t: t.t()), {"a": (3, 5)}, {"a": (5, 3)}),
    "reshaped": Case(each(lambda w: w.view(2, 3, 4).transpose(0, 1)), {"a": (6, 4)}, {"a": (3, 2, 4)}),
    "squeezed": Case(each(lambda w: w.squeeze(1)), {"a": (4, 1, 3)}, {"a": (4, 3)}),
    "unsqueezed": Case(each(lambda w: w), {"a": (4,)}, {"a": (1, 4)}),
    "scalar to one": Case(each(lambda w: w), {"a": ()}, {"a": (1,)}),
    "repeated": Case(each(lambda w: w.expand(3, 4)), {"a": (1, 4)}, {"a": (3, 4)}),
    "zero elements": Case(each(lambda w: w), {"a": (0, 4), "b": (2,)}, {"a": (0, 4), "b": (2,)}),
    "cast on copy": Case(each(lambda w: w), {"a": (50, 3)}, {"a": (50, 3)}, torch.float32, torch.bfloat16),
    "cast by to": Case(each(lambda w: w.bfloat16()), {"a": (50, 3)}, {"a": (50, 3)}, torch.float32, torch.bfloat16),
    "fp8": Case(each(lambda w: w), {"a": (50,)}, {"a": (50,)}, torch.float8_e4m3fn, torch.float8_e4m3fn),
    "clone": Case(each(lambda w: w.clone()), {"a": (4, 3)}, {"a": (4, 3)}),
    "contiguous": Case(each(lambda w: w.t().contiguous()), {"a": (4, 4)}, {"a": (4, 4)}),
    "copy of a part": Case(each(lambda w: w[1:, 2:].clone().contiguous()), {"a": (4, 4)}, {"a": (3, 2)}),
    "to a device": Case(each(lambda w: w.to("cpu", torch.float64)), {"a": (4, 4)}, {"a": (4, 4)}),
    "padding": Case(padded_vocabulary, {"a": (5, 4)}, {"a": (8, 4)}),
    "zeroed first": Case(zeroed_first, {"a": (2,)}, {"a": (2, 3)}),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_replay_is_the_loader_bit_for_bit(case: Case) -> None:
    live = case.parameters()
    before = {name: tensor.clone() for name, tensor in live.items()}
    plan = case.compile(live)
    assert changed(live, before) == []
    assert plan.check(live) == []
    assert changed(replay(plan, live, case.weights(seed=2)), case.loaded(seed=2)) == []


@pytest.mark.parametrize("name", ["padding", "zeroed first"])
def test_a_landing_that_waits_for_weights_leaves_the_old_ones(name: str) -> None:
    live, before = EXACT[name].loaded(seed=1), EXACT[name].loaded(seed=1)
    DirectLanding(EXACT[name].compile(live), live)
    assert changed(live, before) == []


def test_replay_follows_tied_targets() -> None:
    case, live = EXACT["plain"], EXACT["plain"].parameters()
    live["head"] = live["a"]
    replay(case.compile(live), live, case.weights(seed=2))
    assert torch.equal(live["head"], case.weights(seed=2)["a"])


def test_replay_reaches_parameters_that_share_a_storage() -> None:
    flat, weights = torch.zeros(20), {"a": torch.randn(3, 4), "b": torch.randn(6)}
    live = {"a": flat[2:14].view(3, 4), "b": flat[14:]}
    replay(Case(each(lambda w: w), {"a": (3, 4), "b": (6,)}, {}).compile(live), live, weights)
    assert torch.equal(flat, torch.cat([torch.zeros(2), weights["a"].flatten(), weights["b"]]))


FOUR: Shapes = {"first": (4,), "a": (4,)}
REFUSED = {
    "computed": (each(lambda w: w + 1), "computes the value"),
    "joined": (each(lambda w: torch.cat([w[:2], w[2:]])), "computes the value"),
    "item": (lambda live, name, w: live[name].data.fill_(w[0].item()), "item"),
    "boolean mask": (lambda live, name, w: live[name].data.__setitem__(w > 0, 0.0), "in place|meta"),
    "edited source": (each(lambda w: w.mul_(2)), "in place"),
    "edited copy": (each(lambda w: w.clone().add_(1)), "in place"),
    "edited parameter": (then(lambda t: t.mul_(2)), "in place"),
    "part of a copy": (each(lambda w: w.clone()[:2]), "part of a copy"),
    "stretched": (into(lambda t: t.expand(2, 4)), "stretches"),
    "staging buffer": (each(lambda w: torch.zeros(4).copy_(w)), "in place"),
    "data-dependent": (each(lambda w: w if w.any() else -w), "meta"),
    "unknown name": (lambda live, name, w: live["model." + name].data.copy_(w), "model.first"),
}


@pytest.mark.parametrize(("loader", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_move_cannot_say_is_refused_by_name(loader: Loader, words: str) -> None:
    case = Case(loader, FOUR, FOUR)
    live = case.parameters()
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(LandingError, match=f"parameter first .*: .*({words})"):
        case.compile(live)
    assert changed(live, before) == []


CHECKS = {
    "complete": (each(lambda w: w), "ab", []),
    "never written": (each(lambda w: w), "a", ["b: 12 of 12 elements"]),
    "partly written": (lambda live, n, w: live[n].data[1:].copy_(w[1:]), "ab", ["a: 4 of 12", "b: 4 of 12"]),
    "written twice": (lambda live, _, w: live["a"].data.copy_(w), "ab", ["a: .* 0 to 12 twice", "b: 12 of 12"]),
    "overlap": (lambda live, n, w: live["a"].data["ab".index(n) :][:2].copy_(w[:2]), "ab", ["a: .* 4 to 8 twice", "b"]),
    "no place": (lambda *_: None, "c", ["a: 12 of 12", "b: 12 of 12", "c: the engine's model has no place"]),
}


@pytest.mark.parametrize(("loader", "sent", "words"), CHECKS.values(), ids=CHECKS)
def test_check_names_what_does_not_fit(loader: Loader, sent: str, words: list[str]) -> None:
    case = Case(loader, dict.fromkeys(sent, (3, 4)), {"a": (3, 4), "b": (3, 4)})
    problems = case.compile(live := case.parameters()).check(live)
    assert len(problems) == len(words)
    assert all(re.match(start, problem) for problem, start in zip(problems, words, strict=True)), problems


def onwards(change: Change) -> Loader:
    """Copies into a parameter, and from that into another."""
    return lambda live, _, w: (live["a"].data.copy_(w), live["b"].data.copy_(change(live["a"].data)))


A: Shapes = {"a": (50,)}
AB: Shapes = {"a": (50,), "b": (50,)}
SILENT = {
    # vLLM's composed_weight_loader does this to Mamba's A, and in LongCat-Flash and PLaMo 3.
    "computed from the parameter": Case(then(lambda t: t.copy_(-torch.exp(t))), A, A),
    "copied from another parameter": Case(onwards(lambda t: t), A, AB),
    "computed from another parameter": Case(onwards(lambda t: t * 2), A, AB),
    "filled over what was written": Case(then(lambda t: t[2:].zero_()), A, A),
    "cast to less than the target": Case(each(lambda w: w.bfloat16()), A, A),
    "cast to an integer": Case(each(lambda w: w.int()), A, A),
    "source seen as another dtype": Case(each(lambda w: w.view(torch.int16)), A, A, torch.bfloat16, torch.int16),
    "copy seen as another dtype": Case(each(lambda w: w.clone().view(torch.int16)), A, A, torch.bfloat16, torch.int16),
}


TWO_CASTS = Case(each(lambda w: w.bfloat16().float()), A, A)


@pytest.mark.parametrize("case", [*SILENT.values(), TWO_CASTS], ids=[*SILENT, "two casts"])
def test_nothing_is_silently_wrong(case: Case) -> None:
    """Refused, reported, or right."""
    live = case.parameters()
    try:
        plan = case.compile(live)
    except LandingError:
        return
    if not plan.check(live):
        assert changed(replay(plan, live, case.weights(seed=2)), case.loaded(seed=2)) == []


def replay(plan: LandingPlan, live: Tensors, weights: Tensors) -> Tensors:
    """Land every weight as a sync does."""
    landing = DirectLanding(plan, live)
    landing.begin()
    for index, weight in enumerate(weights.values()):
        landing.land(index, weight)
    return live


def changed(got: Tensors, expected: Tensors) -> list[str]:
    """Names of the tensors whose bytes differ."""
    flat = {name: (got[name].reshape(-1), tensor.reshape(-1)) for name, tensor in expected.items()}
    return [name for name, (a, b) in flat.items() if not torch.equal(a.view(torch.uint8), b.view(torch.uint8))]
