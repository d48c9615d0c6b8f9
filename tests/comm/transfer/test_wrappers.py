"""The model is found inside what trainers put around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from rollcast.comm import WeightSource, open_source


class Engine(nn.Module):
    """As DeepSpeed's: the model is all that it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class WithValueHead(nn.Module):
    """As trl's: the policy, and a head beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = inner, nn.Linear(64, 1)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "engine": Engine,
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled wrapper": lambda model: compiled(nn.DataParallel(model)),
    "wrapped twice": lambda model: Engine(compiled(Engine(nn.DataParallel(model)))),
    "checkpoint wrapper": checkpoint_wrapper,
    "value head": WithValueHead,
    "wrapped value head": lambda model: compiled(nn.DataParallel(WithValueHead(Engine(model)))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_the_policy_is_sent_whatever_is_around_it(name: str, wrapper: str) -> None:
    model = build(name, seed=0)
    source = WeightSource(WRAPPERS[wrapper](model))
    assert source.manifest == WeightSource(model).manifest
    # A checkpoint wrapper renames what its state dict has.
    assert (source.stable_params() is None) is (wrapper == "checkpoint wrapper")


@pytest.mark.parametrize("wrapper", ["compiled wrapper", "value head"])
def test_adapters_are_found_in_wrappers(wrapper: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("qwen3", seed=0), peft.LoraConfig(target_modules=["q_proj"]))
    plain = open_source(model, adapters=True)
    assert open_source(WRAPPERS[wrapper](model), adapters=True).manifest == plain.manifest
    merged = open_source(WRAPPERS[wrapper](model), adapters=False)
    assert merged.manifest == WeightSource(build("qwen3", seed=0)).manifest


def test_folded_adapters_of_mixtures_have_the_names_of_the_checkpoint() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("mixtral", seed=0), peft.LoraConfig(target_modules=["q_proj"]))
    source = open_source(model, adapters=False)
    expected = WeightSource(build("mixtral", seed=0))
    assert source.manifest == expected.manifest
    wanted = dict(expected.gather(range(len(expected.manifest.specs))))
    for index, (tensor,) in source.gather(range(len(source.manifest.specs))):
        assert torch.equal(tensor, wanted[index][0])


def test_a_level_of_that_name_in_a_model_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    assert WeightSource(Net()).manifest.specs[0].name == "module.weight"


class Params4bit(nn.Parameter):
    """As bitsandbytes has it."""


def test_packed_weights_are_refused_by_name() -> None:
    packed = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"w is packed by bitsandbytes \(Params4bit\): send dequantised weights"):
        WeightSource({"w": packed})


def test_partitioned_weights_whose_share_is_missing_are_refused_by_name() -> None:
    param: Any = nn.Parameter(torch.empty(0))
    param.ds_shape, param.ds_id = (2, 2), 1
    with pytest.raises(ValueError, match=r"w is partitioned by DeepSpeed ZeRO-3, and this rank's share .* not there"):
        WeightSource({"w": param})


def test_what_is_kept_is_not_sent_and_is_stated() -> None:
    model = build("mixtral", seed=0)
    for param in model.model.layers[1].parameters():
        param.requires_grad_(False)
    everything = WeightSource(model).manifest
    named = WeightSource(model, keep=["layers.1"])
    frozen = WeightSource(model, keep_frozen=True)
    assert named.manifest == frozen.manifest and named.kept.manifest == frozen.kept.manifest
    assert {*named.manifest.specs, *named.kept.manifest.specs} == {*everything.specs}
    assert all("layers.1." in spec.name for spec in named.kept.manifest.specs)
    assert named.stable_params() is not None
