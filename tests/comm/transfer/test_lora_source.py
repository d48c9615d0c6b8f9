"""The weights sent of a peft model: those of peft's checkpoint, or those of peft's own `merge_and_unload`."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapters import adapted
from architectures import build
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from sides import full_tensors
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from rollcast.comm import WeightSource, open_source
from rollcast.comm.transfer.lora_source import AdapterSource, MergedSource

SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Make a default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def randomized(model: Any) -> Any:
    """Return the model with new random values in all of A and B."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def sent(source: WeightSource) -> dict[str, torch.Tensor]:
    return {spec.name: tensor for spec, tensor in full_tensors(source)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_and_b_have_pefts_names_and_make_pefts_delta(settings: dict[str, Any]) -> None:
    model = randomized(adapted(**settings))
    source = open_source(model, adapters=True)
    weights = sent(source)
    assert isinstance(source, AdapterSource)
    assert weights.keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            delta = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            torch.testing.assert_close(delta, module.get_delta_weight("default"))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_merged_model_is_what_peft_merges(settings: dict[str, Any]) -> None:
    check_merged(randomized(adapted(**settings)))


def test_layers_that_keep_their_weight_transposed_are_merged_too() -> None:
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    check_merged(randomized(get_peft_model(build("gpt2", seed=0), config)))


def check_merged(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    source = open_source(model, adapters=False)
    weights = sent(source)
    assert isinstance(source, MergedSource)
    expected = WeightSource(copy.deepcopy(model).merge_and_unload())
    assert [spec.name for spec in source.manifest.specs] == [spec.name for spec in expected.manifest.specs]
    for spec, tensor in full_tensors(expected):
        torch.testing.assert_close(weights[spec.name], tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("adapters", [True, False])
def test_wrapped_and_sharded_models_send_the_same(adapters: bool) -> None:
    expected = sent(open_source(randomized(adapted()), adapters=adapters))
    sharded: Any = fully_shard(randomized(adapted()))
    compiled: Any = torch.compile(randomized(adapted()))
    parallel: Any = torch.nn.parallel.DistributedDataParallel(randomized(adapted()))
    for model in (sharded, compiled, parallel):
        weights = sent(open_source(model, adapters=adapters))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_values_and_scaling_are_those_of_the_moment() -> None:
    model = randomized(adapted())
    sources = [open_source(model, adapters=adapters) for adapters in (True, False)]
    before, settings = [sent(source) for source in sources], sources[0].settings
    with torch.no_grad():
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight.mul_(2)
        layer.set_scale("default", 3.0)
    after = [sent(source) for source in sources]
    name = "model.layers.0.self_attn.q_proj"
    b, weight = f"base_model.model.{name}.lora_B.weight", f"{name}.weight"
    torch.testing.assert_close(after[0][b], before[0][b] * 6)
    base = layer.base_layer.weight
    torch.testing.assert_close(after[1][weight] - base, (before[1][weight] - base) * 6)
    assert sources[0].settings != settings, "ranks of different scalings must find out"


def test_sums_are_made_in_the_wider_dtype() -> None:
    model = randomized(adapted(build("llama", seed=0).bfloat16(), target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    weight = sent(open_source(model, adapters=False))["model.layers.0.self_attn.q_proj.weight"]
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert torch.equal(weight, exact.float().bfloat16())


def test_one_of_several_adapters_is_chosen_by_name() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(open_source(model, adapters=True).manifest.specs) == 26
    assert len(open_source(model, adapters=True, adapter="other").manifest.specs) == 4
    assert len(open_source(model, adapters=False, adapter="other").manifest.specs) == 21
    with pytest.raises(ValueError, match="pass adapter=, one of default, other: third cannot be sent"):
        open_source(model, adapters=True, adapter="third")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="pass adapter=, one of default, other: default, other cannot be sent"):
        open_source(model, adapters=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora True"),
    "bias of B": ({"lora_bias": True}, "lora_bias True"),
    "saved modules": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens is an embedding: leave it out"),
}


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_need_more_than_a_and_b_are_refused(
    settings: dict[str, Any], message: str, adapters: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(adapted(**settings), adapters=adapters)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}])
def test_adapters_that_change_base_weights_can_only_be_merged(settings: dict[str, Any]) -> None:
    model = randomized(adapted(**settings))
    check_merged(model)
    with pytest.raises(ValueError, match="which changes the base weights that the engines keep"):
        open_source(model, adapters=True)


def test_other_kinds_of_adapters_are_refused() -> None:
    model = get_peft_model(build("llama", seed=0), AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    with pytest.raises(ValueError, match="adapter 'default' has peft_type ADALORA"):
        open_source(model, adapters=True)


def test_a_tied_layer_cannot_be_merged() -> None:
    model = adapted(build("llama-tied", seed=0), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is tied to another layer"):
        open_source(model, adapters=False)


def test_what_peft_has_merged_is_not_merged_twice() -> None:
    model = randomized(adapted())
    source = open_source(model, adapters=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: peft has merged an adapter already: call unmerge_adapter\(\)"):
        source.current_manifest()


def test_engines_with_lora_take_nothing_else() -> None:
    with pytest.raises(ValueError, match="pass the peft model, or start the engines without lora_rank"):
        open_source(build("llama", seed=0), adapters=True)
