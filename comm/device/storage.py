"""Whether tensors still are where they were, asked at every sync (both sides)."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_dtype = torch.Tensor.dtype.__get__  # pyright: ignore[reportAttributeAccessIssue]


class Spots:
    """Where the memory of plain tensors is. A look costs some cache misses for each, which thousands can feel."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._found = self._look()

    def unchanged(self) -> bool:
        """Whether all are at the same addresses, in the same layouts."""
        return self._look() == self._found

    def _look(self) -> list[list[Any]]:
        """What changes when a tensor is given other memory. (A tensor's shape takes ten times as long.)"""
        questions = (torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous, _dtype)
        # vLLM's parameters would answer each through Python, twenty times as slowly.
        with torch._C.DisableTorchFunctionSubclass():
            return [list(map(question, self._tensors)) for question in questions]


class Places:
    """Where plain tensors are kept."""

    def __init__(self, containers: list[dict[str, Any]]) -> None:
        self._containers = containers
        self._sizes = list(map(len, containers))
        self._keys = list(chain.from_iterable(containers))
        self._things = list(chain.from_iterable(map(dict.values, containers)))
        self.tensors = [thing for thing in self._things if isinstance(thing, torch.Tensor)]
        self._spots = Spots(self.tensors)

    @classmethod
    def of_module(cls, module: nn.Module) -> "Places":
        """Of all parameters, buffers and modules below one."""
        return cls([its for part in module.modules() for its in (part._parameters, part._buffers, part._modules)])

    def same(self) -> bool:
        """Whether the same tensors are in the same places, and no others beside them. Touches none of them."""
        return (
            list(map(len, self._containers)) == self._sizes
            and all(map(is_, chain.from_iterable(self._containers), self._keys))
            and all(map(is_, chain.from_iterable(map(dict.values, self._containers)), self._things))
        )

    def unchanged(self) -> bool:
        """Whether, besides, their memory is where it was."""
        return self.same() and self._spots.unchanged()


def identity(tensor: torch.Tensor) -> object:
    """Equal for two names of one tensor. The memory's identity, not its address: empty shards have no address."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    place = local.storage_offset(), tuple(local.shape), tuple(local.stride())
    return local.untyped_storage()._cdata, place, tuple(tensor.shape), tensor.dtype


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, flat; a copy if it is not contiguous."""
    # One element counts as contiguous with any stride; viewed as bytes, it needs stride 1.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


# Copies are fastest, and views of any dtype possible, when every message starts at a multiple of this.
ALIGN_BYTES = 256


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGN_BYTES`."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
