"""The model inside the wrappers that trainers put around it, and its tensors by their plain names (trainer)."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from rollcast.comm.transfer.checkpoint_names import is_transformers_model
from rollcast.comm.transfer.fsdp import fsdp1_state
from rollcast.comm.transfer.holding import Weights

# Wrappers that add a level to the names of the modules they wrap, and no weight of their own.
WRAPPER_LEVELS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def state_of(weights: Weights) -> Iterator[tuple[str, Any]]:
    """Yield every parameter and persistent buffer as this rank has it, by the name that a plain model gives it."""
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    module = _without_data_parallel(weights)
    state = fsdp1_state(module)
    for name, held in (module.state_dict(keep_vars=True) if state is None else state).items():
        yield plain_name(name), held


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without the levels that wrappers add."""
    return ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS)


def unwrap(module: nn.Module) -> Any:
    """Return the model inside all wrappers."""
    while (inner := _inside(module)) is not None or (inner := _child(module, "_fsdp_wrapped_module")) is not None:
        module = inner
    return module


def _without_data_parallel(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers but FSDP1's, which have the weights."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """Return the module that this one wraps without having its weights; None if it is no such wrapper.

    DDP, DataParallel, DeepSpeed's engine and others keep the model, and nothing else, in `module`; torch.compile in
    `_orig_mod`; trl's models with a value head keep the policy in `pretrained_model`, beside the head.
    """
    if len(module._modules) == 1 and not module._parameters and not module._buffers:
        for name in ("module", "_orig_mod", "_checkpoint_wrapped_module"):
            if (inner := _child(module, name)) is not None:
                return inner
    policy = _child(module, "pretrained_model")
    has_policy = policy is not None and (hasattr(policy, "peft_config") or is_transformers_model(unwrap(policy)))
    return policy if has_policy else None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)
