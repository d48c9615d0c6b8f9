"""The names and shapes that transformers' models have in their checkpoints (trainer).

The one place that knows transformers' conversion of weights (5.x): `save_pretrained` runs it, backwards.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rollcast.comm.transfer.conversion import Conversion


def is_transformers_model(module: object) -> bool:
    """Return whether the module is a model of transformers."""
    # Not imported, which takes seconds: who has a model of transformers has done so.
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def checkpoint_names(model: nn.Module) -> Conversion | None:
    """Return the function that makes checkpoint parameters of a transformers model's parameters in memory.

    None for other modules, and for transformers 4, whose models have their checkpoints' names in memory. It is what
    `save_pretrained` does, and takes full tensors by the names of `model.state_dict()`; those of a pipeline stage or
    of a state dict will do.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    if not is_transformers_model(model) or not hasattr(loading, "revert_weight_conversion"):
        return None
    return partial(_revert, model, loading.revert_weight_conversion)


def _revert(model: Any, revert: Any, tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    ignored = set(model._keys_to_ignore_on_save or ())
    with _without_fsdp_classes(model), _with_conversions(model):
        return revert(model, {name: tensor for name, tensor in tensors.items() if name not in ignored})


@contextmanager
def _with_conversions(model: Any) -> Iterator[None]:
    """Give a model that was not loaded the conversions of published checkpoints of its kind.

    transformers keeps those that a loaded model needed. For any other it leaves out the names of levels that the model
    has no longer, which published checkpoints with towers have (`vision_tower.vision_model`), and vLLM with them.
    """
    if getattr(model, "_weight_conversions", None) is not None:
        yield
        return
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    found = mapping.get_model_conversion_mapping(model, add_legacy=False)
    kept = [each for each in found if not isinstance(each, mapping.PrefixChange) or each.scope_prefix]
    model._weight_conversions = kept
    try:
        yield
    finally:
        del model._weight_conversions


@contextmanager
def _without_fsdp_classes(model: nn.Module) -> Iterator[None]:
    """Let classes that FSDP2 has derived pass for the originals: transformers looks conversions up by class name."""
    derived: dict[Any, tuple[str, str]] = {}
    for module in model.modules():
        kind: Any = type(module)
        if isinstance(module, FSDPModule) and kind not in derived:
            derived[kind] = kind.__name__, kind.__module__
            original = next(base for base in kind.__mro__[1:] if not issubclass(base, FSDPModule))
            kind.__name__, kind.__module__ = original.__name__, original.__module__
    try:
        yield
    finally:
        for kind, (name, module_name) in derived.items():
            kind.__name__, kind.__module__ = name, module_name
