"""Tensors of a vLLM model that come from loaded weights without being loaded themselves (worker).

    watch_building()                       # before vLLM builds its model
    views, refused = derived_tensors(model, plan)

When vLLM has built a model, the views of its parameters are noted, with checksums of all other tensors. When the plan
is compiled, the model has loaded, processed and used its weights. A view whose parameter has got other memory since is
written by every sync, with what a load would have left there. A tensor that has changed or is new was computed
meanwhile: vLLM's own step computes it again, or the model is refused.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rollcast.comm import Region
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes, storage_id
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.model_tensors import Tensors, model_tensors, owner_path
from rollcast.rollout.landing.plan import LandingPlan, ParameterView
from rollcast.rollout.landing.vllm_reload import call_after_building, recomputable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AsBuilt:
    """What a model's tensors other than its parameters were before anything was loaded."""

    views: tuple[ParameterView, ...]
    checksums: dict[str, int] = field(repr=False)
    """Of the others, by name."""


_as_built: "WeakKeyDictionary[nn.Module, AsBuilt]" = WeakKeyDictionary()


def watch_building() -> None:
    """Note the tensors of every model that vLLM builds in this process from now on. Idempotent."""
    call_after_building(_note)


def derived_tensors(model: nn.Module, plan: LandingPlan) -> tuple[tuple[ParameterView, ...], list[str]]:
    """Return the views that a sync must write, and descriptions of tensors that no step is known for.

    Raises `LandingError` for a model that was built unseen.
    """
    built = _as_built.get(model)
    if built is None:
        raise LandingError("vLLM built its model before the worker could watch it: use rollcast's worker extension")
    tensors = model_tensors(model)
    parted = tuple(view for view in built.views if _is_parted(view, tensors))
    known = {storage_id(tensor) for tensor in (*model.parameters(), *(tensors[view.name] for view in parted))}
    known |= {storage_id(tensors[name]) for name in plan.written if name in tensors}
    unexplained = [
        (name, tensor)
        for name, tensor in tensors.items()
        if storage_id(tensor) not in known and _is_unexplained(name, tensor, model, plan, built)
    ]
    return parted, list(_refused(unexplained))


def _refused(unexplained: Sequence[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """Describe the tensors; kernels of GPUs also keep work space that looks the same: those are warned of."""
    for name, tensor in unexplained:
        shape = list(tensor.shape)
        text = f"{name} {shape} is computed while the engine loads or runs, and there is no step that repeats it"
        if tensor.is_cuda and ":" in name:
            logger.warning("%s: if it is made of weights, it keeps those that the engine started with", text)
        else:
            yield text


def _note(model: nn.Module) -> None:
    tensors = model_tensors(model)
    parameters = dict(model.named_parameters())
    by_storage = {storage_id(parameter): name for name, parameter in parameters.items() if parameter.numel()}
    views: list[ParameterView] = []
    checksums: dict[str, int] = {}
    for name, tensor in _others(model, tensors):
        owner = by_storage.get(storage_id(tensor))
        if owner is not None:
            start = int(parameters[owner].storage_offset()) * parameters[owner].element_size()
            views.append(ParameterView(name, owner, Region.of(tensor, base_offset_bytes=start)))
        elif not tensor.is_meta:
            checksums[name] = int(checksum(flat_bytes(tensor)))
    _as_built[model] = AsBuilt(tuple(views), checksums)


def _others(model: nn.Module, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from ((name, tensor) for name, tensor in tensors.items() if name not in parameters)


def _is_parted(view: ParameterView, tensors: Tensors) -> bool:
    """Return whether the view is still there, and its parameter no longer has the same memory."""
    if view.name not in tensors:
        return False
    parameter = tensors.get(view.parameter)
    return parameter is None or storage_id(parameter) != storage_id(tensors[view.name])


def _is_unexplained(name: str, tensor: torch.Tensor, model: nn.Module, plan: LandingPlan, built: AsBuilt) -> bool:
    """Return whether the tensor may hold something computed from weights that nothing computes again."""
    path = owner_path(name)
    module = model.get_submodule(path)
    repeated = {*plan.attention, *(stage.module for stage in plan.stages if stage.kind == "staged")}
    # Whether attention computes something of weights was tried: what else its implementation has is work space.
    is_work_space = name.startswith(f"{path}:impl.")
    if path in repeated or recomputable(module) or is_work_space or not tensor.is_floating_point():
        return False
    # What a module without parameters keeps (tables, workspaces) comes from no weights of its own.
    if next(module.parameters(), None) is None:
        return False
    return tensor.is_meta or built.checksums.get(name) != int(checksum(flat_bytes(tensor)))
