"""The weights of a peft model: its LoRA adapter alone, or merged into the base weights (trainer).

peft itself is not imported: everything that is needed is an attribute of its models.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rollcast.comm.plan.manifest import Manifest
from rollcast.comm.transfer.checkpoint_names import checkpoint_names
from rollcast.comm.transfer.conversion import Conversion
from rollcast.comm.transfer.gathering import GatheringSource, full_tensor
from rollcast.comm.transfer.holding import LocalParam, Weights, local_param
from rollcast.comm.transfer.source import WeightSource
from rollcast.comm.transfer.wrappers import plain_name, unwrap

# What peft puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."
# Values of `init_lora_weights` that leave the base weights as they are; the others (PiSSA, OLoRA, ...) change them.
NEUTRAL_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# Options of a `LoraConfig` that need more than lora_A, lora_B and the scaling: neither vLLM nor `LoraLayer.delta`
# knows them.
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
UNSUPPORTED += ("modules_to_save", "trainable_token_indices", "target_parameters")
ADVICE = "only lora_A and lora_B of linear layers can be sent"


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A linear layer of a peft model that has an adapter."""

    name: str
    """Its name in the model, peft's own levels included."""
    module: Any
    """peft's `LoraLayer`."""
    adapter: str
    """Name of the adapter."""

    @property
    def a(self) -> torch.Tensor:
        """The weight of lora_A: [rank, in]."""
        return self.module.lora_A[self.adapter].weight

    @property
    def b(self) -> torch.Tensor:
        """The weight of lora_B: [out, rank]."""
        return self.module.lora_B[self.adapter].weight

    def halves(self) -> list[tuple[str, torch.Tensor]]:
        """Return both weights, with "A" and "B"."""
        return [("A", self.a), ("B", self.b)]

    @property
    def scaling(self) -> float:
        """The factor of B @ A: alpha / rank, alpha / sqrt(rank), or what `set_scale` made of it."""
        return float(self.module.scaling[self.adapter])

    def delta(self) -> torch.Tensor:
        """Return B @ A times the scaling, in the layout of the layer's weight. Collective if they are sharded."""
        product = (full_tensor(self.b.detach()) @ full_tensor(self.a.detach())) * self.scaling
        return product.T if getattr(self.module, "fan_in_fan_out", False) else product


class AdapterSource(GatheringSource):
    """lora_A and lora_B of a peft model, under peft's checkpoint names; lora_B is multiplied by the scaling.

    source = AdapterSource(peft_model)        # a `WeightSource`

    Raises `ValueError` for adapters that need more than A and B, or whose base weights differ from the checkpoint's.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None) -> None:
        self._layers = lora_layers(model, adapter=adapter, merged=False)
        self._scaled: dict[str, LoraLayer] = {f"{layer.name}.lora_B.weight": layer for layer in self._layers}
        # An adapter's names stay as they are.
        super().__init__(model, names=dict)

    @property
    def settings(self) -> str:
        """See `WeightSource.settings`: a digest of the layers' scalings."""
        scalings = repr([layer.scaling for layer in self._layers])
        return f", scaling {hashlib.sha256(scalings.encode()).hexdigest()[:8]}"

    def _full_tensor(self, name: str, param: LocalParam) -> torch.Tensor:
        layer, tensor = self._scaled.get(name), super()._full_tensor(name, param)
        return tensor * layer.scaling if layer is not None and layer.scaling != 1.0 else tensor

    def _named(self) -> dict[str, LocalParam]:
        named = [(f"{layer.name}.lora_{half}.weight", part) for layer in self._layers for half, part in layer.halves()]
        return {name: local_param(name, part) for name, part in named}


class MergedSource(GatheringSource):
    """A peft model as the plain model that computes the same: base weights with the adapter merged into them.

    Names are those of the model without peft. The trainer's weights stay as they are: sums are made one parameter
    at a time. Raises `ValueError` for adapters that need more than A and B.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: str | None = None,
        names: Conversion | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        layers = lora_layers(model, adapter=adapter, merged=True)
        self._merged = {base_name(f"{layer.name}.base_layer.weight"): layer for layer in layers}
        super().__init__(model, names=names or checkpoint_names(_base_model(model)), keep=keep)

    def current_manifest(self) -> Manifest:
        """See `WeightSource.current_manifest`. Raises `ValueError` when peft itself has merged an adapter."""
        for layer in self._merged.values():
            if layer.module.merged_adapters:
                raise ValueError(f"{layer.name}: peft has merged an adapter already: call unmerge_adapter() first")
        return super().current_manifest()

    def _full_tensor(self, name: str, param: LocalParam) -> torch.Tensor:
        layer, tensor = self._merged.get(name), super()._full_tensor(name, param)
        return tensor if layer is None else (tensor + layer.delta()).to(tensor.dtype)

    def _named(self) -> dict[str, LocalParam]:
        named = {base_name(name): tensor for name, tensor in super()._named().items() if not _is_lora(name)}
        for name, layer in self._merged.items():
            if name not in named:
                raise ValueError(f"{layer.name} is tied to another layer, which has no adapter: untie them")
        return named


def open_source(
    weights: Weights,
    *,
    adapters: bool,
    adapter: str | None = None,
    names: Conversion | None = None,
    keep: Sequence[str] = (),
    keep_frozen: bool = False,
) -> WeightSource:
    """Make the source for `weights`, and for engines that take LoRA adapters (`adapters`) or full weights.

    A peft model's adapter is merged for engines that take full weights. `adapter` names the one to send, if the peft
    model has several active. The others: see `WeightSource`. Raises `ValueError` for weights that the engines cannot
    take.
    """
    if isinstance(weights, nn.Module) and hasattr(unwrap(weights), "peft_config"):
        if keep_frozen:
            raise ValueError("keep_frozen is not for peft models, whose base weights are frozen: name what to keep")
        if adapters:
            return AdapterSource(weights, adapter=adapter)
        return MergedSource(weights, adapter=adapter, names=names, keep=keep)
    if adapters:
        raise ValueError(
            "engines with lora_rank keep their base weights and take adapters: pass the peft model, or start the "
            "engines without lora_rank to send full weights"
        )
    return WeightSource(weights, names=names, keep=keep, keep_frozen=keep_frozen)


def lora_layers(model: nn.Module, *, adapter: str | None, merged: bool) -> list[LoraLayer]:
    """Return every layer that has the adapter.

    Raises `ValueError` naming what of the adapter cannot be sent, or (with `merged`) cannot be merged.
    """
    name = _adapter_name(model, adapter)
    config = unwrap(model).peft_config[name]
    if reason := _unsupported(config, merged=merged):
        raise ValueError(f"adapter {name!r} has {reason}: {ADVICE}")
    layers: list[LoraLayer] = []
    for path, module in unwrap(model).named_modules():
        if name in getattr(module, "lora_embedding_A", ()):
            raise ValueError(f"{plain_name(path)} is an embedding: leave it out of the adapter's target_modules")
        if name in getattr(module, "lora_A", ()):
            layers.append(_checked(LoraLayer(plain_name(path), module, name)))
    if not layers:
        raise ValueError(f"adapter {name!r} has no layers")
    return layers


def base_name(name: str) -> str:
    """Return the name of a base weight in the model without peft."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _base_model(model: nn.Module) -> Any:
    """Return the model that peft wraps, or that has the adapters itself."""
    peft_model: Any = unwrap(model)
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model


def _is_lora(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return any(level.startswith("lora_") for level in name.split("."))


def _adapter_name(model: nn.Module, adapter: str | None) -> str:
    peft: Any = unwrap(model)
    names: list[str] = [] if adapter is None else [adapter]
    if adapter is None:
        # A method where transformers holds the adapters, a property in peft's own models.
        active: Any = peft.active_adapters
        names = [*(active() if inspect.ismethod(active) else active)]
    if len(names) != 1 or names[0] not in peft.peft_config:
        known = ", ".join(peft.peft_config)
        raise ValueError(f"pass adapter=, one of {known}: {', '.join(names) or 'none'} cannot be sent as one")
    return names[0]


def _unsupported(config: Any, *, merged: bool) -> str:
    """Return the first option of an adapter's configuration that needs more than A, B and the scaling; "" if none."""
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    if peft_type != "LORA":
        return f"peft_type {peft_type}"
    init = config.init_lora_weights
    if not merged and isinstance(init, str) and init.lower() not in NEUTRAL_INITS:
        return f"init_lora_weights {init!r}, which changes the base weights that the engines keep"
    if not merged and config.bias != "none":
        return f"bias {config.bias!r}, which changes the base weights that the engines keep"
    return next((f"{option} {value!r}" for option in UNSUPPORTED if (value := getattr(config, option, None))), "")


def _checked(layer: LoraLayer) -> LoraLayer:
    """Return the layer if it is a plain LoRA of a linear layer; raise `ValueError` otherwise."""
    variant = getattr(layer.module, "lora_variant", {}).get(layer.adapter)
    if variant is not None:
        raise ValueError(f"{layer.name} is a {type(variant).__name__}: {ADVICE}")
    if layer.a.ndim != 2 or layer.b.ndim != 2:
        raise ValueError(f"{layer.name} is not a linear layer: leave it out of the adapter's target_modules")
    return layer
