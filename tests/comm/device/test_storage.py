"""Snapshots of tensors' storage, and whether two tensors are the same memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rollcast.comm.device.storage import ModuleSnapshot, StorageSnapshot, aligned, flat_bytes, storage_id, tensor_id

Change = Callable[[nn.Linear], object]


def give_other_memory(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.clone()


def replace_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.data)


def test_new_values_leave_a_snapshot_unchanged() -> None:
    module = nn.Linear(4, 3)
    snapshot = ModuleSnapshot.of_module(module)
    assert snapshot.tensors == [module.weight, module.bias]
    module.weight.data.fill_(1.0)
    module.bias.data.zero_()
    assert snapshot.same_tensors()
    assert snapshot.unchanged()


@pytest.mark.parametrize(
    ("change", "same_tensors"),
    [
        (give_other_memory, True),
        (replace_parameter, False),
        (lambda module: module.register_buffer("scale", torch.ones(1)), False),
        (lambda module: module.register_parameter("bias", None), False),
        (lambda module: module.add_module("inner", nn.ReLU()), False),
        (lambda module: module.half(), True),
    ],
    ids=["other memory", "other parameter", "one more buffer", "one less", "one more module", "dtype"],
)
def test_a_snapshot_notices_every_change_of_memory(change: Change, same_tensors: bool) -> None:
    module = nn.Linear(4, 3)
    snapshot = ModuleSnapshot.of_module(module)
    change(module)
    assert snapshot.same_tensors() is same_tensors
    assert not snapshot.unchanged()


def test_a_snapshot_of_tensors_notices_other_memory_dtype_and_size() -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 3)]
    snapshot = StorageSnapshot(tensors)
    assert snapshot.unchanged()
    for data in (torch.zeros(2, 3), tensors[1].view(torch.int32), tensors[1][:1], tensors[1].t()):
        before, tensors[1] = tensors[1], data
        assert not snapshot.unchanged()
        tensors[1] = before
    assert snapshot.unchanged()


def test_views_share_a_storage_but_are_other_tensors() -> None:
    flat = torch.arange(12.0)
    views = [flat, flat.view(3, 4), flat.view(4, 3).t(), flat[:6], flat[6:], flat.view(torch.int32)]
    assert {storage_id(view) for view in views} == {storage_id(flat)}
    assert len({tensor_id(view) for view in views}) == len(views)
    assert tensor_id(flat.view(3, 4).detach()) == tensor_id(flat.view(3, 4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_without_elements_are_told_apart(device: str) -> None:
    one, other = torch.empty(0, device=device), torch.empty(0, device=device)
    assert storage_id(one) != storage_id(other)
    assert tensor_id(one) != tensor_id(other)


@pytest.mark.parametrize("tensor", [torch.arange(6), torch.arange(6).view(2, 3).t(), torch.tensor(7)], ids=str)
def test_flat_bytes_are_those_of_the_elements_in_order(tensor: torch.Tensor) -> None:
    data = flat_bytes(tensor)
    assert (data.dim(), data.dtype) == (1, torch.uint8)
    assert data.view(tensor.dtype).tolist() == tensor.flatten().tolist()
    assert (data.data_ptr() == tensor.data_ptr()) is tensor.is_contiguous()


def test_flat_bytes_of_one_element_with_any_stride() -> None:
    assert flat_bytes(torch.zeros(3, 2)[:1, 1]).numel() == 4


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512)])
def test_aligned(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected
