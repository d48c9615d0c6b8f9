"""In which dtype a parameter travels, and what a loader's tape says about it."""

import pytest
import torch
from oddloaders import Tensors, Toy, both, changed, land, whole

from rollcast.comm import Manifest, ParamSpec
from rollcast.rollout.landing.compiler import record
from rollcast.rollout.landing.dtypes import assumed_manifest, landed_manifest, wire_dtype

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FP8, INT8 = torch.float8_e4m3fn, torch.int8
CHOICES = [
    ("a master of a weight", FP32, [BF16], BF16),
    ("a float32 island", FP32, [FP32], FP32),
    ("an island in a bfloat16 trainer", BF16, [FP32], BF16),
    ("a bfloat16 trainer", BF16, [BF16], BF16),
    ("a bfloat16 trainer of float16 engines", BF16, [FP16], FP16),
    ("a float16 trainer of bfloat16 engines", FP16, [BF16], BF16),
    ("a master in float64", FP64, [FP32], FP32),
    ("an island and a weight", FP32, [BF16, FP32], FP32),
    ("two weights", FP32, [BF16, FP16], FP32),
    ("a quantised weight", FP8, [FP8], FP8),
    ("a scale", FP32, [FP32], FP32),
    ("whole numbers", torch.int64, [torch.int32], torch.int64),
    ("kinds that do not fit", FP32, [FP8], FP32),
    ("a quantised weight in a plain engine", FP8, [BF16], FP8),
    ("nothing", FP32, [], FP32),
]


@pytest.mark.parametrize(("held", "targets", "expected"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_a_parameter_travels_as_the_trainer_has_it_where_that_fits_else_as_its_target(
    held: torch.dtype, targets: list[torch.dtype], expected: torch.dtype
) -> None:
    assert wire_dtype(held, targets) == wire_dtype(held, targets[::-1]) == expected
    # What has been decided stays so: plans are compiled again from their own manifest.
    assert wire_dtype(expected, targets) == expected


def test_values_of_the_wire_are_those_of_a_checkpoint_in_the_engines_dtype() -> None:
    held = torch.randn(1000)
    for target in (BF16, FP16, FP32):
        wire = held.to(wire_dtype(FP32, [target]))
        assert torch.equal(wire.to(target), held.to(target))


def computed(live: Tensors, weights: Tensors) -> None:
    live["direct"].copy_(weights["w"])
    live["island"].copy_(weights["i"])
    live["A"].copy_(-torch.exp(weights["A_log"].float()))
    stacked = torch.empty(2, 4, dtype=weights["q"].dtype, device=weights["q"].device)
    stacked[0].copy_(weights["q"])
    stacked[1].copy_(weights["k"])
    live["qk"].copy_(stacked * 2)
    live["both"].copy_(weights["b"])
    live["both again"].copy_(live["both"].float() + 1)


SHAPES = dict.fromkeys(["w", "i", "A_log", "q", "k", "b", "unused"], (4,))
TARGETS = {"direct": BF16, "island": FP32, "A": FP32, "qk": BF16, "both": BF16, "both again": FP32}


def test_a_parameter_lands_in_what_is_computed_of_it_too() -> None:
    held = Manifest(tuple(ParamSpec(name, shape, FP32) for name, shape in SHAPES.items()))
    sent = assumed_manifest(held, BF16)
    assert {spec.dtype for spec in sent.specs} == {BF16}
    shapes = dict.fromkeys(TARGETS, (4,)) | {"qk": (2, 4)}
    live = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name, dtype in TARGETS.items()}
    recording = record(lambda pairs: computed(live, dict(pairs)), live, sent)
    landed = landed_manifest(held, recording.landing_dtypes())
    assert {spec.name: spec.dtype for spec in landed.specs} == {
        "w": BF16,
        "i": FP32,
        "A_log": FP32,
        "q": BF16,
        "k": BF16,
        "b": FP32,
        "unused": FP32,
    }


@pytest.mark.parametrize("wire", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kept", [BF16, FP16, FP32], ids=str)
def test_a_toy_lands_in_every_mixture_of_dtypes(wire: torch.dtype, kept: torch.dtype) -> None:
    def load(live: Tensors, weights: Tensors) -> None:
        live["a"].copy_(weights["a"])
        live["b"].copy_(-torch.exp(weights["b"].float()))

    toy = Toy(whole(load), {"a": (3, 5), "b": (7,)}, {"a": (3, 5), "b": (7,)}, wire, kept)
    plan, live = toy.compile(), toy.parameters()
    land(plan, live, list(toy.weights(seed=3).values()))
    assert changed(live, toy.native(seed=3)) == []


def test_a_nan_lands_bit_for_bit() -> None:
    toy = Toy(both(lambda p, w: p.copy_(w)), {"a": (4,)}, {"a": (4,)}, FP32, FP32)
    live, sent = toy.parameters(), torch.tensor([0x7FC00001, 0x7F800000, -1, 0], dtype=torch.int32).view(FP32)
    land(toy.compile(), live, [sent])
    assert torch.equal(live["a"].view(torch.int32), sent.view(torch.int32))
