"""Every tensor of a model has a name, and those that come from weights without being loaded are found."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

from rollcast.comm import Manifest, Region, VerifyError
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing import derived
from rollcast.rollout.landing.derived import derived_tensors
from rollcast.rollout.landing.model_tensors import model_tensors, owner_path
from rollcast.rollout.landing.plan import LandingPlan, ParameterView, Stage
from rollcast.rollout.worker.fingerprint import fingerprint_64bit, raise_if_changed

PLAN = LandingPlan(Manifest(()), (), ())
PARTED = (ParameterView("mix.view", "mix.conv.weight", Region((6, 4), (4, 1), 0, torch.float32)),)


class Kernel:
    """Stands for an object of vLLM's that keeps tensors for a layer."""

    __module__ = "vllm.model_executor.layers.kernel"

    def __init__(self) -> None:
        self.packed = torch.ones(3)
        self.again = self


class Mixer(nn.Module):
    """A module with a view of a weight, constants, and what kernels keep."""

    view: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 6, bias=False)
        self.conv.weight.data = self.conv.weight.data.unsqueeze(1)
        self.register_buffer("view", self.conv.weight.detach().view(6, 4), persistent=False)
        self.register_buffer("scale", torch.tensor([1.0, float("nan")]), persistent=False)
        self.tables = {"a": [torch.zeros(2), 3], "none": None}
        self.kernel = Kernel()
        self.linear = make_linear(torch.full((2,), 5.0))
        self.kv_cache = [torch.zeros(1000)]
        self.empty = torch.zeros(0)


def make_linear(packed: torch.Tensor) -> FunctionType:
    def linear(x: torch.Tensor) -> torch.Tensor:
        return x @ packed

    linear.__module__ = "vllm.layers"
    return linear


def build() -> nn.Module:
    """Return a model as vLLM has built it."""
    model = nn.Module()
    model.mix = Mixer()
    model.rotary = nn.Module()
    model.rotary.cache = torch.zeros(3)
    derived._note(model)
    return model


def test_every_tensor_has_a_name_but_caches_of_requests() -> None:
    names = ["mix.conv.weight", "mix.view", "mix.scale", "mix:tables.a.0", "mix:kernel.packed", "mix:linear.packed"]
    assert list(model_tensors(build())) == [*names, "rotary:cache"]
    assert [owner_path(name) for name in names] == ["mix.conv", *["mix"] * 5]


def part(model: Any) -> None:
    model.mix.conv.weight.data = model.mix.conv.weight.data.permute(2, 1, 0).contiguous()


CHANGES: dict[str, tuple[Callable[[Any], object], tuple[ParameterView, ...], list[str]]] = {
    "nothing": (lambda model: None, (), []),
    "loaded in place": (lambda model: model.mix.conv.weight.data.fill_(3), (), []),
    "weight in other memory": (part, PARTED, []),
    "another parameter": (
        lambda model: setattr(model.mix.conv, "weight", nn.Parameter(model.mix.conv.weight.detach().clone())),
        PARTED,
        [],
    ),
    "weight dropped": (lambda model: delattr(model.mix.conv, "weight"), PARTED, []),
    "new tensor": (lambda model: setattr(model.mix, "twice", model.mix.conv.weight.detach() * 2), (), ["mix:twice"]),
    "new view": (lambda model: setattr(model.mix, "rows", model.mix.conv.weight.detach()[1:]), (), []),
    "changed buffer": (lambda model: model.mix.scale.fill_(2), (), ["mix.scale"]),
    "changed in a kernel": (lambda model: model.mix.kernel.packed.mul_(2), (), ["mix:kernel.packed"]),
    "changed in a list": (lambda model: model.mix.tables["a"][0].add_(1), (), ["mix:tables.a.0"]),
    "table without weights": (lambda model: model.rotary.cache.add_(1), (), []),
    "whole numbers": (lambda model: setattr(model.mix, "index", torch.arange(3)), (), []),
}


@pytest.mark.parametrize("case", CHANGES)
def test_views_that_were_parted_are_written_and_what_was_computed_is_named(case: str) -> None:
    change, views, refused = CHANGES[case]
    model = build()
    change(model)
    found = derived_tensors(model, PLAN)
    assert found[0] == views
    assert [text.split()[0] for text in found[1]] == refused


def test_what_vllm_processes_after_each_load_needs_no_other_step() -> None:
    model: Any = build()
    model.mix.scale.fill_(2)
    plan = LandingPlan(Manifest(()), (), (), stages=(Stage("mix", "staged", ()),))
    assert derived_tensors(model, plan) == ((), [])


def test_a_model_that_was_built_unseen_is_refused() -> None:
    with pytest.raises(LandingError, match="before the worker could watch it"):
        derived_tensors(nn.Linear(2, 2), PLAN)


def test_a_self_test_looks_at_every_tensor_and_at_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollcast.rollout.worker.fingerprint.probe", lambda module: None)
    model: Any = build()
    before = fingerprint_64bit(model)
    raise_if_changed(before, fingerprint_64bit(model))
    for tensor, name in ((model.mix.kernel.packed, "mix:kernel.packed"), (model.mix.scale, "mix.scale")):
        tensor.view(torch.int32)[-1] += 1
        with pytest.raises(VerifyError, match=f"1 of .* {name}"):
            raise_if_changed(before, fingerprint_64bit(model))
        tensor.view(torch.int32)[-1] -= 1
