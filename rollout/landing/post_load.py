"""Which modules vLLM processes after loading, so that copying into their live tensors is not enough (worker)."""

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.landing.vllm_reload import (
    LoadFormat,
    attention_layers,
    is_processed,
    materialize,
    process,
    wearing,
)

aten = torch.ops.aten

# On CUDA these methods leave the weights as they were loaded.
PLAIN_ON_CUDA = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
TENSOR_DICTS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def staged_modules(model: nn.Module, formats: LoadFormat) -> dict[str, tuple[str, ...]]:
    """The modules that must be processed after each sync, with the reasons.

    A module is tried on random weights: processing must read nothing, change nothing, replace nothing and leave
    nothing behind that could hold a copy. Modules of the same make are tried once.
    """
    staged: dict[str, tuple[str, ...]] = {}
    tried: dict[object, tuple[str, ...]] = {}
    modules = dict(model.named_modules())
    for path, tensors in formats.modules.items():
        module = modules[path]
        if not is_processed(module):
            continue
        reasons = tuple(_layout_reasons(module, tensors))
        if not _is_known_plain(module):
            make = _make(module, tensors)
            if make not in tried:
                tried[make] = tuple(dict.fromkeys(_try_processing(module, tensors)))
            reasons += tried[make]
        if reasons:
            staged[path] = reasons
    return staged


def derived_attention(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Attention layers that hold something computed from weights; it must be computed again after each sync."""
    live = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}
    derived: list[str] = []
    for path, layer in attention_layers(model).items() if live else ():
        with _restored(layer), _restored(getattr(layer, "impl", None)), torch.no_grad(), Taint(live) as taint:
            layer.process_weights_after_loading(dtype)
        if taint.reads:
            derived.append(path)
    return derived


class Taint(TorchDispatchMode):
    """Notes what reads or changes the data of the given tensors. Views, and copies onto itself, do neither."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._names = {_storage(tensor): name for name, tensor in tensors.items() if tensor.numel()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_known(leaf)]
        outcome = func(*args, **(kwargs or {}))
        if known and not (func is aten.copy_.default and _same_place(args[0], args[1])):
            results = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, torch.Tensor)]
            if func._schema.is_mutable or not results or not all(self._is_known(result) for result in results):
                self.reads.append(f"{self._names[_storage(known[0])]} is used by {func}")
        return outcome

    def _is_known(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and _storage(leaf) in self._names


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


def _make(module: Any, tensors: Mapping[str, torch.Tensor]) -> object:
    layouts = tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors.items())
    settings = {**vars(module), **vars(module.quant_method)}.items()
    plain = tuple(sorted((name, value) for name, value in settings if isinstance(value, bool)))
    return type(module), type(module.quant_method), layouts, plain


def _try_processing(module: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    device = next((tensor.device for tensor in module.parameters() if not tensor.is_meta), torch.device("cpu"))
    scratch = {name: materialize(tensor, device) for name, tensor in tensors.items()}
    for tensor in scratch.values():
        _randomize(tensor)
    before = {name: checksum(flat_bytes(tensor)) for name, tensor in scratch.items()}
    method = module.quant_method
    with _restored(module), _restored(method), wearing(module, scratch):
        layer_state, method_state = dict(vars(module)), dict(vars(method))
        try:
            with torch.no_grad(), Taint(scratch) as taint:
                process(module)
        except Exception as error:
            yield f"processing it fails on random weights: {error}"
            return
        yield from taint.reads
        # Kernels that are no torch operations go unseen: look at what has changed, too.
        for name, tensor in scratch.items():
            after = module._parameters.get(name)
            if after is None or not _same_place(after, tensor):
                yield f"{name} is replaced"
            elif checksum(flat_bytes(tensor)) != before[name]:
                yield f"{name} is changed"
        yield from _left_behind("layer", layer_state, vars(module))
        yield from _left_behind("method", method_state, vars(method))


def _left_behind(owner: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, value in after.items():
        if name not in TENSOR_DICTS and before.get(name, before) is not value and not _is_harmless(value):
            yield f"{owner}.{name} is set"


def _is_harmless(value: Any) -> bool:
    """Whether it cannot hold a copy of the weights."""
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    plain = bool | int | float | str | torch.dtype | torch.device | types.BuiltinFunctionType
    return value is None or isinstance(value, plain)


@contextmanager
def _restored(thing: Any) -> Iterator[None]:
    """Put attributes, parameters and buffers back that change inside."""
    places = [vars(thing)] if thing is not None else []
    if isinstance(thing, nn.Module):
        places += [thing._parameters, thing._buffers]
    states = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, state in zip(places, states, strict=True):
            place.clear()
            place.update(state)


def _randomize(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            tensor.data.normal_()
        elif tensor.dtype.is_floating_point:
            tensor.data.copy_(torch.randn(tensor.shape, device=tensor.device))
        else:
            tensor.data.zero_()


def _same_place(first: torch.Tensor, second: torch.Tensor) -> bool:
    def place(tensor: torch.Tensor) -> object:
        return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    return place(first) == place(second)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
