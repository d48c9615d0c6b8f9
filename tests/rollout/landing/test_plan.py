"""The plan as data: its problems are described, and its bytes hold all of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oddloaders import Loader, Toy, both, changed, each, land, whole

from rollcast.comm import Manifest, ParamSpec, Region
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.tape import from_plain, to_plain

BOTH = {"a": (3, 4), "b": (3, 4)}
ROW = torch.arange(4.0)
# A move, fills with and without values, a stage with inputs, constants and temporaries.
RICH = Toy(
    whole(
        lambda to, of: (
            to["x.p"][:3].copy_(of["a"]),
            to["x.p"][3:].copy_(ROW),
            to["y.q"].copy_(torch.cat([of["b"].t().contiguous(), of["a"].t() + ROW[:, None]], dim=1)),
            to["y.r"].copy_(of["b"]),
            to["y.r"].copy_(torch.exp(to["y.r"].double()).to(torch.bfloat16)),
        )
    ),
    BOTH,
    {"x.p": (4, 4), "y.q": (4, 6), "y.r": (3, 4)},
)

CHECKS: dict[str, tuple[Loader, str, list[str]]] = {
    "complete": (each(lambda w: w), "ab", []),
    "missing": (each(lambda w: w), "a", ["b: 12 of 12 elements"]),
    "partly written": (both(lambda p, w: p[1:].copy_(w[1:])), "ab", ["a: 4 of 12", "b: 4 of 12"]),
    "dropped": (whole(lambda to, of: to["a"].copy_(of["a"])), "ab", ["b: 12 of 12"]),
    "written twice": (both(lambda p, w: (p.copy_(w), p.copy_(w))), "ab", ["a: .* 0 to 12 twice", "b: .* twice"]),
    "overlap": (both(lambda p, w: (p[:2].copy_(w[:2]), p[1:].copy_(w[1:]))), "a", ["a: .* 4 to 8 twice", "b: 12"]),
    "computed twice": (both(lambda p, w: (p.copy_(w), p.copy_(w * 2))), "a", ["a: .* 0 to 12 twice", "b: 12"]),
    "copied onto a sum": (both(lambda p, w: (p.copy_(w + 1), p.copy_(w + 2))), "a", ["a: .* 0 to 12 twice", "b: 12"]),
    "stretched": (both(lambda p, w: p[:1].expand(3, 4).copy_(w)), "a", ["a: .* twice", "b: 12"]),
}


@pytest.mark.parametrize(("loader", "sent", "expected"), CHECKS.values(), ids=CHECKS)
def test_check_names_what_does_not_fit(loader: Loader, sent: str, expected: list[str]) -> None:
    problems = Toy(loader, dict.fromkeys(sent, (3, 4)), BOTH).compile().check()
    assert len(problems) == len(expected)
    assert all(re.match(start, problem) for problem, start in zip(problems, expected, strict=True)), problems


def loader_of_layers(live: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Weights `h.3.w1` and `h.3.w2` are the halves of parameter `model.h.3.w12`."""
    for name, weight in weights.items():
        layer, _, half = name.rpartition(".")
        target = live[f"model.{layer}.w12"]
        (target[:3] if half == "w1" else target[3:]).copy_(weight)


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        (
            ("h.1.w2",),
            {"model.h.1.w12": r"12 of 24 .* what they need, .* \(judging by other layers: h\.1\.w2\)$"},
        ),
        (("h.0.w1", "h.10.w1"), {"model.h.0.w12": r"h\.0\.w1\)$", "model.h.10.w12": r"h\.10\.w1\)$"}),
        (("h.1.w1", "h.1.w2"), {"model.h.1.w12": r"24 of 24 .* other layers: h\.1\.w1, h\.1\.w2\)$"}),
        (
            ("h.0.w1", "h.1.w1", "h.10.w1"),
            {f"model.h.{layer}.w12": "keeps what it has$" for layer in (0, 1, 10)},
        ),
    ],
)
def test_what_the_trainer_leaves_out_is_named_after_other_layers(without: tuple[str, ...], expected: Any) -> None:
    sent = {f"h.{layer}.{half}": (3, 4) for layer in (0, 1, 10) for half in ("w1", "w2")}
    targets = {f"model.h.{layer}.w12": (6, 4) for layer in (0, 1, 10)}
    kept = {name: shape for name, shape in sent.items() if name not in without}
    problems = dict(problem.split(": ", 1) for problem in Toy(whole(loader_of_layers), kept, targets).compile().check())
    assert problems.keys() == expected.keys()
    assert all(re.search(expected[name], problem) for name, problem in problems.items()), problems


def test_what_the_compiler_refuses_comes_first() -> None:
    plan = Toy(each(lambda w: w), {"a": (3, 4)}, BOTH).compile()
    assert replace(plan, refused=("a: no",)).check()[0] == "a: no"


def test_buffers_may_be_left_alone_but_not_half_written() -> None:
    plan = Toy(each(lambda w: w), {"a": (3, 4)}, BOTH).compile(buffers=["b"])
    assert plan.check() == []
    half = replace(plan.moves[0], target="b", region=plan.moves[0].region.rows(0, 2))
    assert replace(plan, moves=(*plan.moves, half)).check()[0].startswith("b: 4 of 12")


@pytest.mark.parametrize(
    ("wire", "kept", "fits"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.int64, torch.int32, True),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, True),
        (torch.int64, torch.float32, False),
        (torch.float32, torch.int8, False),
        (torch.bfloat16, torch.float8_e4m3fn, False),
        (torch.float8_e4m3fn, torch.bfloat16, False),
        (torch.float8_e4m3fn, torch.float8_e5m2, False),
    ],
)
def test_another_kind_of_number_from_the_trainer_is_named(wire: torch.dtype, kept: torch.dtype, fits: bool) -> None:
    problems = Toy(each(lambda w: w), {"a": (3, 4)}, {"a": (3, 4)}, wire, kept).compile().check()
    assert [problem.split(" [")[0] for problem in problems] == ([] if fits else ["a: the trainer's a"])


def test_a_parameter_that_lands_nowhere_is_unused() -> None:
    plan = Toy(whole(lambda to, of: to["a"].copy_(of["b"])), {"none": (0,), **BOTH}, {"a": (3, 4)}).compile()
    assert plan.check() == [] and plan.unused == [1]


@pytest.mark.parametrize("sent", [{"c": (3, 4)}, {"a": (3, 5)}, {"a": (4, 4)}, {"a": (2, 3, 4)}])
def test_an_extra_parameter_or_another_shape_is_refused_by_name(sent: dict[str, tuple[int, ...]]) -> None:
    (name, shape), *_ = sent.items()
    with pytest.raises(LandingError, match=re.escape(f"parameter {name} {list(shape)} float32: ")):
        Toy(each(lambda w: w), sent, BOTH).compile()


def test_a_parameter_cannot_be_sent_twice() -> None:
    spec = ParamSpec("a", (3, 4), torch.float32)
    with pytest.raises(ValueError, match="parameter a is listed twice"):
        Manifest((spec, spec))


def test_bytes_hold_the_whole_plan() -> None:
    plan = RICH.compile()
    assert plan.check() == [] and len(plan.stages) == 1 and plan.values and plan.fills
    copy = LandingPlan.from_bytes(plan.to_bytes())
    assert copy.digest == plan.digest == RICH.compile().digest
    assert (copy.moves, copy.targets, copy.manifest) == (plan.moves, plan.targets, plan.manifest)
    live = RICH.parameters()
    land(copy, live, list(RICH.weights(seed=3).values()))
    assert changed(live, RICH.native(seed=3)) == []


def test_attention_and_refusals_travel_too() -> None:
    plan = replace(RICH.compile(), attention=("layers.0.attn",), refused=("a: no",))
    copy = LandingPlan.from_bytes(plan.to_bytes())
    assert (copy.attention, copy.refused, copy.digest) == (plan.attention, plan.refused, plan.digest)


def _tape(plan: LandingPlan, **changes: object) -> LandingPlan:
    stage = plan.stages[0]
    op = replace(stage.tape[-1], **changes)  # pyright: ignore[reportArgumentType]
    return replace(plan, stages=(replace(stage, tape=(*stage.tape[:-1], op)),))


DIFFERENCES: dict[str, Callable[[LandingPlan], LandingPlan]] = {
    "manifest": lambda plan: replace(plan, manifest=Manifest((*plan.manifest.specs, ParamSpec("z", (), torch.int8)))),
    "target": lambda plan: replace(plan, targets=plan.targets[::-1]),
    "loadable": lambda plan: replace(plan, targets=tuple(replace(target, loadable=False) for target in plan.targets)),
    "move": lambda plan: replace(plan, moves=(replace(plan.moves[0], param=1), *plan.moves[1:])),
    "region": lambda plan: replace(plan, moves=(replace(plan.moves[0], source=plan.moves[0].source.rows(1, 1)),)),
    "order": lambda plan: replace(plan, moves=plan.moves[::-1]),
    "fill": lambda plan: replace(plan, fills=()),
    "fill's stage": lambda plan: replace(plan, fills=tuple(replace(fill, stage=0) for fill in plan.fills)),
    "kind": lambda plan: replace(plan, stages=(replace(plan.stages[0], kind="staged"),)),
    "shares": lambda plan: replace(plan, stages=(replace(plan.stages[0], shares=(("a", "b"),)),)),
    "operation": lambda plan: _tape(plan, func="aten.add_.Tensor"),
    "transform": lambda plan: _tape(plan, transforms=False),
    "constant": lambda plan: replace(plan, values=tuple(value + 1 for value in plan.values)),
    "attention": lambda plan: replace(plan, attention=("attn",)),
    "refused": lambda plan: replace(plan, refused=("a: no",)),
}


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES)
def test_digests_differ_where_plans_differ(change: Callable[[LandingPlan], LandingPlan]) -> None:
    plan = RICH.compile()
    assert change(plan).digest != plan.digest


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "a", (1, (2, None)), torch.bfloat16, torch.channels_last])
def test_plain_values_come_back(value: object) -> None:
    assert from_plain(to_plain(value)) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_constants_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.arange(torch.Size(shape).numel()) * 1.7).view(shape).to(dtype)
    copy = from_plain(to_plain(value))
    assert copy.dtype == dtype and copy.shape == value.shape and changed({"a": copy}, {"a": value}) == []


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(LandingError, match="passes a Generator"):
        to_plain({"generator": torch.Generator()})


def test_regions_come_back() -> None:
    region = Region((2, 3), (1, 4), 5, torch.int8)
    assert from_plain(to_plain(region)) == region
