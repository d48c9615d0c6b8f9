"""Finds modules that vLLM processes after loading, so that copying into their live tensors is not enough (worker)."""

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes, storage_id, tensor_id
from rollcast.rollout.landing.model_tensors import TENSOR_DICTS
from rollcast.rollout.landing.vllm_reload import (
    LoadFormat,
    attention_layers,
    has_quant_method,
    materialize,
    process_weights,
    swapped_parameters,
)

aten = torch.ops.aten

# On CUDA these methods leave the weights as they were loaded.
PLAIN_ON_CUDA = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})


def staged_modules(model: nn.Module, formats: LoadFormat) -> dict[str, tuple[str, ...]]:
    """Return the modules, by path, that must be processed after each sync, with the reasons.

    A module is tried on random weights: processing must read nothing, change nothing, replace nothing and set no
    attribute that could hold a copy. Modules of equal configuration are tried once.
    """
    staged: dict[str, tuple[str, ...]] = {}
    tried: dict[object, tuple[str, ...]] = {}
    modules = dict(model.named_modules())
    for path, tensors in formats.modules.items():
        module = modules[path]
        if not has_quant_method(module):
            continue
        reasons = tuple(_layout_reasons(module, tensors))
        if not _is_known_plain(module):
            key = _configuration(module, tensors)
            if key not in tried:
                tried[key] = tuple(dict.fromkeys(_try_processing(module, tensors)))
            reasons += tried[key]
        if reasons:
            staged[path] = reasons
    return staged


def derived_attention(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Return attention layers, by path, that hold something computed from weights (again after each sync)."""
    live = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}
    derived: list[str] = []
    for path, layer in attention_layers(model).items() if live else ():
        implementation = getattr(layer, "impl", None)
        with _restored(layer), _restored(implementation), torch.no_grad(), AccessTracker(live) as tracker:
            layer.process_weights_after_loading(dtype)
        if tracker.accesses:
            derived.append(path)
    return derived


class AccessTracker(TorchDispatchMode):
    """Records operations that read or change the data of the given tensors.

    Views do neither, nor does the copy of a tensor onto itself.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.accesses: list[str] = []
        self._names = {storage_id(tensor): name for name, tensor in tensors.items() if tensor.numel()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_known(leaf)]
        outcome = func(*args, **(kwargs or {}))
        if known and not (func is aten.copy_.default and tensor_id(args[0]) == tensor_id(args[1])):
            results = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, torch.Tensor)]
            if func._schema.is_mutable or not results or not all(self._is_known(result) for result in results):
                self.accesses.append(f"{self._names[storage_id(known[0])]} is used by {func}")
        return outcome

    def _is_known(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and storage_id(leaf) in self._names


def _layout_reasons(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        live = module._parameters.get(name)
        if live is None:
            yield f"{name} is gone after loading"
        elif (live.shape, live.stride(), live.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            yield f"{name} {list(tensor.shape)} is kept as {list(live.shape)}"


def _is_known_plain(module: Any) -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and type(module.quant_method).__name__ in PLAIN_ON_CUDA


def _configuration(module: Any, tensors: Mapping[str, torch.Tensor]) -> object:
    """Return a key that is equal for modules that vLLM processes in the same way."""
    layouts = tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors.items())
    settings = {**vars(module), **vars(module.quant_method)}.items()
    flags = tuple(sorted((name, value) for name, value in settings if isinstance(value, bool)))
    return type(module), type(module.quant_method), layouts, flags


def _try_processing(module: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Process the module with random weights; yield everything that copying into live tensors would not do."""
    device = next((tensor.device for tensor in module.parameters() if not tensor.is_meta), torch.device("cpu"))
    scratch = {name: materialize(tensor, device) for name, tensor in tensors.items()}
    for tensor in scratch.values():
        _randomize(tensor)
    before = {name: checksum(flat_bytes(tensor)) for name, tensor in scratch.items()}
    method = module.quant_method
    with _restored(module), _restored(method), swapped_parameters(module, scratch):
        layer_state, method_state = dict(vars(module)), dict(vars(method))
        try:
            with torch.no_grad(), AccessTracker(scratch) as tracker:
                process_weights(module)
        except Exception as error:
            yield f"processing it fails on random weights: {error}"
            return
        yield from tracker.accesses
        # Kernels that are no torch operations go unseen: look at what has changed, too.
        for name, tensor in scratch.items():
            after = module._parameters.get(name)
            if after is None or tensor_id(after) != tensor_id(tensor):
                yield f"{name} is replaced"
            elif checksum(flat_bytes(tensor)) != before[name]:
                yield f"{name} is changed"
        yield from _new_attributes("layer", layer_state, vars(module))
        yield from _new_attributes("method", method_state, vars(method))


def _new_attributes(owner: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, value in after.items():
        if name not in TENSOR_DICTS and before.get(name, before) is not value and not _is_harmless(value):
            yield f"{owner}.{name} is set"


def _is_harmless(value: Any) -> bool:
    """Return whether the value cannot hold a copy of the weights."""
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    plain = bool | int | float | str | torch.dtype | torch.device | types.BuiltinFunctionType
    return value is None or isinstance(value, plain)


@contextmanager
def _restored(owner: Any) -> Iterator[None]:
    """Restore the owner's attributes, parameters and buffers on exit."""
    containers = [vars(owner)] if owner is not None else []
    if isinstance(owner, nn.Module):
        containers += [owner._parameters, owner._buffers]
    states = [dict(container) for container in containers]
    try:
        yield
    finally:
        for container, state in zip(containers, states, strict=True):
            container.clear()
            container.update(state)


def _randomize(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            tensor.data.normal_()
        elif tensor.dtype.is_floating_point:
            tensor.data.copy_(torch.randn(tensor.shape, device=tensor.device))
        else:
            tensor.data.zero_()
