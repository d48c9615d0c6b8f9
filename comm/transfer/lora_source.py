"""The weights of a peft model: its LoRA adapter alone, or folded into the base weights (trainer).

peft itself is not imported: its models say all that is asked here.
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rollcast.comm.plan.manifest import Manifest
from rollcast.comm.transfer.source import Weights, WeightSource, full, plain_name, unwrapped

PEFT_LEVELS = "base_model.model."
# Ways to start an adapter that leave the base weights as they are; the others (PiSSA, OLoRA, ...) change them.
INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# What peft's configuration may ask for beside A and B, and engines and folding know nothing of.
FEATURES = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
FEATURES += ("modules_to_save", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A linear layer of a peft model that has A and B."""

    name: str
    """As the model knows it, peft's own levels included."""
    module: Any
    adapter: str

    @property
    def a(self) -> torch.Tensor:
        """[rank, in]"""
        return self.module.lora_A[self.adapter].weight

    @property
    def b(self) -> torch.Tensor:
        """[out, rank]"""
        return self.module.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by: alpha / rank, alpha / sqrt(rank), or as peft says."""
        return float(self.module.scaling[self.adapter])

    def delta(self) -> torch.Tensor:
        """B @ A times the scaling, in the layout of the layer's weight. Collective if they are sharded."""
        product = (full(self.b.detach()) @ full(self.a.detach())) * self.scaling
        return product.T if getattr(self.module, "fan_in_fan_out", False) else product


class AdapterSource(WeightSource):
    """A and B of a peft model, under peft's checkpoint names; B is multiplied by the scaling on its way.

    source = AdapterSource(peft_model, dtype=torch.bfloat16)        # a `WeightSource`

    Raises `ValueError` for adapters that are more than A and B, or whose base weights are not the checkpoint's.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None, dtype: torch.dtype | None = None) -> None:
        self._layers = lora_layers(model, adapter=adapter, folded=False)
        self._scaled: dict[str, LoraLayer] = {f"{layer.name}.lora_B.weight": layer for layer in self._layers}
        super().__init__(model, dtype=dtype)

    @property
    def settings(self) -> str:
        """See `WeightSource.settings`."""
        scalings = repr([layer.scaling for layer in self._layers])
        return f", scaling {hashlib.sha256(scalings.encode()).hexdigest()[:8]}"

    def walk(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """See `WeightSource.walk`."""
        for param, tensor in super().walk(order):
            layer = self._scaled.get(self.manifest.specs[param].name)
            yield param, tensor * layer.scaling if layer is not None and layer.scaling != 1.0 else tensor

    def steady(self) -> None:
        """See `WeightSource.steady`: a scaled B is made anew for each sync."""

    def _named(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = {}
        for layer in self._layers:
            named[f"{layer.name}.lora_A.weight"] = layer.a.detach()
            named[f"{layer.name}.lora_B.weight"] = layer.b.detach()
        return named


class MergedSource(WeightSource):
    """A peft model as the plain model that computes the same: base weights with the adapter folded in.

    Names are those of the model without peft. The trainer's weights stay as they are: sums are made one parameter
    at a time. Raises `ValueError` for adapters that are more than A and B.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None, dtype: torch.dtype | None = None) -> None:
        layers = lora_layers(model, adapter=adapter, folded=True)
        self._folded = {base_name(f"{layer.name}.base_layer.weight"): layer for layer in layers}
        super().__init__(model, dtype=dtype)

    def current(self) -> Manifest:
        """See `WeightSource.current`. Raises `ValueError` when peft itself has folded an adapter in."""
        for layer in self._folded.values():
            if layer.module.merged_adapters:
                raise ValueError(f"{layer.name}: peft has merged an adapter already: call unmerge_adapter() first")
        return super().current()

    def walk(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """See `WeightSource.walk`."""
        for param, tensor in super().walk(order):
            layer = self._folded.get(self.manifest.specs[param].name)
            yield param, tensor if layer is None else (tensor + layer.delta()).to(tensor.dtype)

    def steady(self) -> None:
        """See `WeightSource.steady`: sums are made anew for each sync."""

    def _named(self) -> dict[str, torch.Tensor]:
        every = super()._named().items()
        named = {base_name(name): tensor for name, tensor in every if not _is_adapters(name)}
        for name, layer in self._folded.items():
            if name not in named:
                raise ValueError(f"{layer.name} is tied to another layer, which has no adapter: untie them")
        return named


def open_source(
    weights: Weights, *, adapters: bool, adapter: str | None = None, dtype: torch.dtype | None = None
) -> WeightSource:
    """The source that fits the weights, and engines that take `adapters` or do not (a peft model is folded then).

    `adapter` is the name of one, if the peft model has several active. Raises `ValueError` for what does not fit.
    """
    if isinstance(weights, nn.Module) and hasattr(unwrapped(weights), "peft_config"):
        kind = AdapterSource if adapters else MergedSource
        return kind(weights, adapter=adapter, dtype=dtype)
    if adapters:
        raise ValueError(
            "engines with lora_rank keep their base weights and take adapters: pass the peft model, or start the "
            "engines without lora_rank to send full weights"
        )
    return WeightSource(weights, dtype=dtype)


def lora_layers(model: nn.Module, *, adapter: str | None, folded: bool) -> list[LoraLayer]:
    """Every layer with the adapter. Raises `ValueError` for what A and B do not say, by name."""
    name = _adapter_name(model, adapter)
    config = unwrapped(model).peft_config[name]
    if reason := _unlike_lora(config, folded=folded):
        raise ValueError(f"adapter {name!r} has {reason}: {_ADVICE}")
    layers: list[LoraLayer] = []
    for path, module in unwrapped(model).named_modules():
        if name in getattr(module, "lora_embedding_A", ()):
            raise ValueError(f"{plain_name(path)} is an embedding: leave it out of the adapter's target_modules")
        if name in getattr(module, "lora_A", ()):
            layers.append(_layer(LoraLayer(plain_name(path), module, name)))
    if not layers:
        raise ValueError(f"adapter {name!r} has no layers")
    return layers


def base_name(name: str) -> str:
    """The name of a base weight in the model without peft."""
    return name.removeprefix(PEFT_LEVELS).replace(".base_layer.", ".")


def _is_adapters(name: str) -> bool:
    """Whether a parameter is peft's own."""
    return any(level.startswith("lora_") for level in name.split("."))


_ADVICE = "only A and B of linear layers can be sent"


def _adapter_name(model: nn.Module, adapter: str | None) -> str:
    peft: Any = unwrapped(model)
    names: list[str] = [] if adapter is None else [adapter]
    if adapter is None:
        # A method, where transformers holds the adapters.
        active: Any = peft.active_adapters
        names = [*(active() if inspect.ismethod(active) else active)]
    if len(names) != 1 or names[0] not in peft.peft_config:
        known = ", ".join(peft.peft_config)
        raise ValueError(f"pass adapter=, one of {known}: {', '.join(names) or 'none'} cannot be sent as one")
    return names[0]


def _unlike_lora(config: Any, *, folded: bool) -> str:
    """What of an adapter's configuration is not said by A, B and the scaling."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"peft_type {kind}"
    init = config.init_lora_weights
    if not folded and isinstance(init, str) and init.lower() not in INITS:
        return f"init_lora_weights {init!r}, which changes the base weights that the engines keep"
    if not folded and config.bias != "none":
        return f"bias {config.bias!r}, which changes the base weights that the engines keep"
    return next((f"{name} {its!r}" for name in FEATURES if (its := getattr(config, name, None))), "")


def _layer(layer: LoraLayer) -> LoraLayer:
    variant = getattr(layer.module, "lora_variant", {}).get(layer.adapter)
    if variant is not None:
        raise ValueError(f"{layer.name} is a {type(variant).__name__}: {_ADVICE}")
    if layer.a.ndim != 2 or layer.b.ndim != 2:
        raise ValueError(f"{layer.name} is not a linear layer: leave it out of the adapter's target_modules")
    return layer
