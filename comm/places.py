"""Whether tensors still are where they were, asked at every sync (both sides)."""

from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_dtype = torch.Tensor.dtype.__get__  # pyright: ignore[reportAttributeAccessIssue]


class Places:
    """Where plain tensors are kept. Looking whether they still are there takes a tenth of a microsecond for each."""

    def __init__(self, containers: list[dict[str, Any]]) -> None:
        held = [(place, *item) for place in containers for item in place.items() if item[1] is not None]
        self._containers = containers
        self._sizes = list(map(len, containers))
        self._dicts = [place for place, _, _ in held]
        self._keys = [key for _, key, _ in held]
        self._things = [thing for _, _, thing in held]
        self.tensors = [thing for thing in self._things if isinstance(thing, torch.Tensor)]
        self._layouts = self._look()

    @classmethod
    def of_module(cls, module: nn.Module) -> "Places":
        """Of all parameters, buffers and modules below one."""
        return cls([its for part in module.modules() for its in (part._parameters, part._buffers, part._modules)])

    def unchanged(self) -> bool:
        """Whether the same tensors are in the same places and at the same addresses, and no others beside them."""
        return (
            list(map(len, self._containers)) == self._sizes
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._things))
            and self._look() == self._layouts
        )

    def _look(self) -> list[list[Any]]:
        """What changes when a tensor is given other memory. (A tensor's shape takes ten times as long.)"""
        questions = (torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous, _dtype)
        # vLLM's parameters would answer each through Python, twenty times as slowly.
        with torch._C.DisableTorchFunctionSubclass():
            return [list(map(question, self.tensors)) for question in questions]


def identity(tensor: torch.Tensor) -> object:
    """Equal for two names of one tensor. The memory's identity, not its address: empty shards have no address."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    place = local.storage_offset(), tuple(local.shape), tuple(local.stride())
    return local.untyped_storage()._cdata, place, tuple(tensor.shape), tensor.dtype
