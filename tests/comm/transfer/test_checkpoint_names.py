"""What is sent of a transformers model in memory is what `save_pretrained` writes, for whole and sharded models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, CONVERTED, IMAGES, build, save
from fake_ranks import rank_of
from shards import put_together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rollcast.comm import Holders, WeightSource, checkpoint_names

Tensors = dict[str, torch.Tensor]


def every_architecture(quick: list[str]) -> list[Any]:
    names = [*ARCHITECTURES, *IMAGES]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def check_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(got[name], tensor.to(got[name].dtype))]
    assert not wrong


@pytest.mark.parametrize("name", every_architecture(quick=[*CONVERTED, *IMAGES]))
def test_names_in_memory_become_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = build(name, seed=0)
    source = WeightSource(model)
    check_same(put_together([source]), save(name, model, tmp_path))
    assert source.stable_params() is not None
    # Views: an optimizer step is seen as it is.
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    assert source.peek_manifest() is source.manifest
    check_same(put_together([source]), save(name, model, tmp_path))


@pytest.mark.parametrize("name", every_architecture(quick=["granitemoehybrid", "mixtral", "llava"]))
def test_what_was_loaded_is_sent_as_it_would_be_saved(name: str, tmp_path: Path) -> None:
    first = save(name, build(name, seed=0), tmp_path / "first")
    auto = transformers.AutoModelForImageTextToText if name in IMAGES else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "first", dtype=torch.float32)
    check_same(put_together([WeightSource(model)]), first)


@pytest.mark.parametrize("name", every_architecture(quick=["deepseek_v3", "minimax_m2", "qwen3_moe", "gemma3-images"]))
def test_shards_make_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    expected = save(name, build(name, seed=0), tmp_path)
    sources: list[WeightSource] = []
    got: Tensors = {}
    for rank in range(3):
        with rank_of(3, rank):
            model = build(name, seed=0)
            for module in model.modules():
                if isinstance(module, nn.ModuleList):
                    for layer in module:
                        fully_shard(layer)
            fully_shard(model)
            sources.append(WeightSource(model))
            put_together(sources[-1:], into=got)
            assert sources[-1].stable_params() is not None
    check_same(got, expected)
    Holders.of([source.statement for source in sources])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_of_ranks_and_parts_of_experts_make_the_same_checkpoint(dim: int, tmp_path: Path) -> None:
    """Expert parallel (whole experts on each rank), tensor parallel inside of experts, and FSDP2 around both."""
    expected = save("mixtral", build("mixtral", seed=0), tmp_path)
    sources: list[WeightSource] = []
    got: Tensors = {}
    for rank in range(4):
        with rank_of(4, rank):
            model = build("mixtral", seed=0)
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
            for path, param in list(model.named_parameters()):
                owner, _, attribute = path.rpartition(".")
                placed = [Shard(dim)] if param.dim() == 3 else [Replicate()]
                tensor = distribute_tensor(param.data, mesh["experts"], placed, src_data_rank=None)
                setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
            fully_shard(model, mesh=mesh["data"])
            sources.append(WeightSource(model))
            put_together(sources[-1:], into=got)
    check_same(got, expected)
    Holders.of([source.statement for source in sources])


def test_a_text_model_of_a_model_with_images_has_the_names_of_the_whole(tmp_path: Path) -> None:
    whole = save("qwen3_5-images", build("qwen3_5-images", seed=0), tmp_path / "whole")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    got = put_together([WeightSource(text)])
    check_same(got, {name: tensor for name, tensor in whole.items() if "visual" not in name})


def test_a_state_dict_takes_the_conversion_of_its_model(tmp_path: Path) -> None:
    model = build("mixtral", seed=0)
    source = WeightSource(model.state_dict(), names=checkpoint_names(model))
    check_same(put_together([source]), save("mixtral", model, tmp_path))
    assert checkpoint_names(nn.Linear(2, 2)) is None


def test_names_can_be_kept_as_they_are() -> None:
    model = build("mixtral", seed=0)
    assert {spec.name for spec in WeightSource(model, names=dict).manifest.specs} == set(model.state_dict())
