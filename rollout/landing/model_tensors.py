"""Every tensor of a vLLM model: parameters, buffers, plain attributes, and what kernels and methods keep (worker)."""

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Tensors = dict[str, torch.Tensor]

# Attributes that torch keeps a module's own tensors and modules in.
TENSOR_DICTS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
# What requests fill: no part of the weights, and most of the memory.
CACHES = frozenset({"kv_cache", "kv_caches"})
# Packages whose objects keep tensors for a layer: quantisation methods, kernels, attention backends.
HELPER_PACKAGES = ("vllm.model_executor.layers.", "vllm.model_executor.kernels.", "vllm.v1.attention.")


def model_tensors(model: nn.Module) -> Tensors:
    """Return every tensor of the model with any elements, by name.

    Parameters and buffers have the names that torch gives them, all others "module:attribute", with further levels for
    containers, objects and the variables of functions.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in TENSOR_DICTS:
                tensors |= {f"{path}:{key}": tensor for key, tensor in _tensors_in(value, name, seen)}
    return {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor) and tensor.numel()}


def owner_path(name: str) -> str:
    """Return the path of the module that has the tensor of this name."""
    return name.partition(":")[0] if ":" in name else name.rpartition(".")[0]


def _tensors_in(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if name.rpartition(".")[2] in CACHES or id(value) in seen:
        return
    items = _items(value)
    if items:
        seen.add(id(value))
    for key, item in items.items():
        yield from _tensors_in(item, f"{name}.{key}", seen)


def _items(value: Any) -> Mapping[Any, Any]:
    """Return what a container, a function or a helper object holds, by key."""
    match value:
        case dict():
            return value
        case list() | tuple():
            return dict(enumerate(value))
        case types.FunctionType() if value.__closure__ and value.__module__.startswith("vllm."):
            cells = zip(value.__code__.co_freevars, value.__closure__, strict=True)
            return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    is_helper = type(value).__module__.startswith(HELPER_PACKAGES) and not isinstance(value, nn.Module | type)
    return getattr(value, "__dict__", {}) if is_helper else {}


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
