"""vLLM's hooks for loading weights a second time, and its layout of weights on CPU (worker).

The one place that knows these internals of vLLM (0.26 to 0.33).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn

from rollcast.rollout.config import CPU_WEIGHTS, CPU_WEIGHTS_VARIABLE
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.model_tensors import Tensors

PROBE_ROWS = 8


def choose_cpu_layout() -> None:
    """Keep linear weights as they are loaded if the environment says "plain" (CPU only). Call before the model loads.

    By default vLLM's CPU kernels pack every linear weight after loading, and drop the original. "plain" is the
    layout that weights have on CUDA.
    """
    from vllm.platforms import current_platform

    if os.environ.get(CPU_WEIGHTS_VARIABLE, CPU_WEIGHTS[0]) != "plain" or not current_platform.is_cpu():
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    vllm_ops: Any = _custom_ops
    vllm_ops._supports_onednn = False
    linear_utils: Any = utils
    linear_utils.check_cpu_sgl_kernel = lambda *_: False


def live_tensors(model: nn.Module) -> Tensors:
    """Return every parameter and buffer of a vLLM model by its name; a tied one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@dataclass(frozen=True)
class LoadFormat:
    """The tensors that vLLM's loader sees, on meta."""

    tensors: Tensors = field(default_factory=dict)
    """By vLLM's name, in the model's order; a tied one once."""
    parameters: set[str] = field(default_factory=set)
    """Names in `tensors` that are no buffers."""
    shared: dict[str, str] = field(default_factory=dict)
    """Other names of tied parameters -> their name in `tensors`."""
    modules: dict[str, Tensors] = field(default_factory=dict)
    """Module path -> its parameters, tied ones included, by their names in it."""

    def add(self, name: str, owner: str, meta: torch.Tensor) -> torch.Tensor:
        """Add a parameter; if it is tied to another, `owner`, return the tensor of that one in its place."""
        if owner == name:
            self.tensors[name] = meta
            self.parameters.add(name)
        else:
            self.shared[name] = owner
        path, _, attribute = name.rpartition(".")
        self.modules.setdefault(path, {})[attribute] = self.tensors[owner]
        return self.tensors[owner]


@contextmanager
def load_format(model: nn.Module) -> Iterator[LoadFormat]:
    """Give the model the tensors, on meta, that it had before loading; afterwards the live ones are back.

    The modules' attributes come back, too: loaders set some.
    """
    saved = [
        (module, dict(module._parameters), dict(module._buffers), dict(vars(module))) for module in model.modules()
    ]
    formats = LoadFormat()
    owners: dict[int, str] = {}
    try:
        for path, module in model.named_modules():
            parameters, buffers = _load_metadata(module)
            prefix = f"{path}." if path else ""
            for name, meta in parameters.items():
                live = module._parameters.get(name)
                tie = id(live) if live is not None and live.numel() else id(meta)
                parameters[name] = formats.add(prefix + name, owners.setdefault(tie, prefix + name), meta)
            formats.tensors.update({prefix + name: meta for name, meta in buffers.items()})
            _replace_items(module._parameters, parameters)
            module._buffers.update(buffers)
        yield formats
    finally:
        for module, parameters, buffers, attributes in saved:
            _replace_items(module._parameters, parameters)
            _replace_items(module._buffers, buffers)
            _replace_items(vars(module), attributes)


@contextmanager
def swapped_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the module these parameters and no others; afterwards its own parameters and buffers are back."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    try:
        _replace_items(module._parameters, tensors)
        yield
    finally:
        _replace_items(module._parameters, parameters)
        _replace_items(module._buffers, buffers)


@contextmanager
def keep_storage(*containers: dict[str, Any]) -> Iterator[None]:
    """Keep the tensors in these dicts: what replaces one inside is copied into it. CUDA graphs know their addresses.

    Raises `LandingError` if the replacement has another shape or dtype.
    """
    before = [dict(container) for container in containers]
    yield
    for container, old_items in zip(containers, before, strict=True):
        for name, tensor in old_items.items():
            new = container.get(name)
            if not isinstance(tensor, torch.Tensor) or not isinstance(new, torch.Tensor) or new is tensor:
                continue
            if (new.shape, new.dtype) != (tensor.shape, tensor.dtype):
                raise LandingError(
                    f"{name}: vLLM's processing makes {list(new.shape)} {new.dtype} of what the engine has as "
                    f"{list(tensor.shape)} {tensor.dtype}"
                )
            overwrite(tensor, new)
            container[name] = tensor


def overwrite(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Copy new values into a tensor, also into one that a forward pass has made: inference mode allows that."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.data.copy_(new.data)


def materialize(meta: torch.Tensor, device: torch.device, *, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Return a tensor with the class and attributes of `meta`, in memory of its own or in that of `memory`."""
    tensor: Any = memory
    if memory is None:
        tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
    # What vLLM does itself (materialize_meta_tensor): loaders and kernels look at class and attributes.
    tensor.__class__ = meta.__class__
    tensor.__dict__ = meta.__dict__.copy()
    return tensor


def move_to_meta(model: nn.Module) -> None:
    """Put the model's parameters on meta, in place. Tied ones stay tied."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    metas: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                metas.setdefault(id(tensor), to_meta_tensor(tensor))
                module._parameters[name] = metas[id(tensor)]  # type: ignore[assignment]


def has_quant_method(module: nn.Module) -> bool:
    """Return whether vLLM processes the module by a method of its own after loading."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)


def process_weights(module: Any) -> None:
    """Do what vLLM does to a module after loading it, with the same effect as at the first load."""
    from vllm.platforms import current_platform

    method = module.quant_method
    again = getattr(method, "moe_kernel", None) is not None
    module.__dict__.pop("_already_called_process_weights_after_loading", None)
    method.process_weights_after_loading(module)
    if again and current_platform.is_cpu() and type(method).__name__ == "UnquantizedFusedMoEMethod":
        # vLLM packs experts on CPU only while it makes the kernel, which it does once.
        method.moe_kernel.fused_experts.process_weights_after_loading(module)
    if hasattr(module, "update_param_tp_status"):
        module.update_param_tp_status()


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that vLLM processes after all others, by path."""
    is_deferred = _deferred_layer_check()
    return {path: module for path, module in model.named_modules() if is_deferred(module)}


def process_attention(layer: Any, dtype: torch.dtype) -> None:
    """Do what vLLM does to an attention layer after loading. What it computes keeps its memory."""
    implementation = [vars(layer.impl)] if hasattr(layer, "impl") else []
    with keep_storage(vars(layer), layer._parameters, layer._buffers, *implementation):
        layer.process_weights_after_loading(dtype)


def call_after_building(act: Callable[[nn.Module], None]) -> None:
    """Let vLLM call `act` with each model that it has built, before anything is loaded. Idempotent."""
    from vllm.model_executor.model_loader import utils

    loader_utils: Any = utils
    record = loader_utils.record_metadata_for_reloading
    if hasattr(record, "__wrapped__"):
        return

    @wraps(record)
    def record_and_act(model: nn.Module) -> None:
        record(model)
        act(model)

    loader_utils.record_metadata_for_reloading = record_and_act


def recomputable(module: Any) -> bool:
    """Return whether `recompute` makes again what the module computes of its weights in its first forward pass."""
    return hasattr(module, "_maybe_fuse_gate_weights") or (
        hasattr(module, "update_cache") and hasattr(module, "_compute_cos_sin_cache")
    )


def recompute(module: Any) -> None:
    """Do what the module did in its first forward pass, if it had one. What it computes keeps its memory."""
    with keep_storage(vars(module), module._buffers):
        if hasattr(module, "_maybe_fuse_gate_weights"):
            if module._combined_gate_weight is not None:
                module._combined_gate_weight = None
                module._maybe_fuse_gate_weights()
        elif not module.update_cache:
            module.cos_sin_cache = module._compute_cos_sin_cache().to(module.cos_sin_cache.dtype)


def probe(module: Any) -> torch.Tensor | None:
    """Return the output, for a fixed input, of a linear layer whose kernel hides its packed weight; None for others."""
    # The module's own: LoRA's wrappers show that of the layer inside.
    linear = vars(module).get("cpu_linear")
    if linear is None or not getattr(linear, "__closure__", None):
        return None
    weight = _load_metadata(module)[0]["weight"]
    rows = torch.arange(PROBE_ROWS * weight.shape[1], dtype=torch.float32).sin()
    with torch.no_grad():
        return linear(rows.view(PROBE_ROWS, -1).to(weight.dtype), module.weight, None)


def _deferred_layer_check() -> Callable[[nn.Module], bool]:
    from vllm.model_executor.layers import attention

    layers: Any = attention
    if hasattr(layers, "is_deferred_attention_layer"):
        return layers.is_deferred_attention_layer
    return lambda module: isinstance(module, layers.Attention | layers.MLAAttention)


def _load_metadata(module: nn.Module) -> tuple[Tensors, Tensors]:
    """Return parameters and buffers of a module in the layout that its loader wants, on meta."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    parameters, buffers = get_layerwise_info(module).restore_metadata
    known = bool(parameters or buffers)
    live = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    # What vLLM keeps no metadata of is loaded as it is. Loaders look into maps of experts, which have to stay.
    as_it_is = {name: tensor for name, tensor in live.items() if name in SKIP_TENSORS or not known}
    biases = {
        name: tensor
        for name, tensor in module._buffers.items()
        if name in SKIP_TENSORS and tensor is not None and tensor.is_floating_point()
    }
    order = dict.fromkeys([*live, *parameters])
    wanted = {**parameters, **as_it_is}
    wanted_buffers = {name: tensor for name, tensor in {**buffers, **biases}.items() if name in module._buffers}
    return (
        {name: _fresh_meta(wanted[name], module) for name in order if name in wanted},
        {name: _fresh_meta(tensor, module) for name, tensor in wanted_buffers.items()},
    )


def _fresh_meta(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return a meta tensor with the class and attributes of `tensor`, and its loader as it was before any reload."""
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    meta = restore_layer_refs(to_meta_tensor(tensor), module)
    attributes: Any = meta
    # vLLM looks at the loader's name, which a `partial` has not: that is none of its wrappers.
    if hasattr(getattr(tensor, "weight_loader", None), "__name__"):
        attributes.weight_loader = _get_original_loader(meta)
    return meta


def _replace_items(container: dict[str, Any], items: Mapping[str, Any]) -> None:
    container.clear()
    container.update(items)
