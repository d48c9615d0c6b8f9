"""Tensor memory: which tensors share a storage, whether it has moved since the last sync, its bytes (both sides).

The one place that says when two tensors are the same memory.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Copies are fastest, and views of any dtype possible, when every message starts at a multiple of this.
ALIGN_BYTES = 256
_dtype = torch.Tensor.dtype.__get__  # pyright: ignore[reportAttributeAccessIssue]


class StorageSnapshot:
    """The addresses and layouts that plain tensors had when this was made.

    To compare costs some cache misses for each tensor, which is noticeable with thousands of them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._taken = self._take()

    def unchanged(self) -> bool:
        """Return whether all tensors are at the same addresses, in the same layouts."""
        return self._take() == self._taken

    def _take(self) -> list[list[Any]]:
        """Read what changes when a tensor gets other memory. (Not its shape: reading that takes ten times as long.)"""
        readers = (torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous, _dtype)
        # vLLM's parameters would answer each of these through Python, twenty times as slowly.
        with torch._C.DisableTorchFunctionSubclass():
            taken: list[list[Any]] = [list(map(reader, self._tensors)) for reader in readers]
            contiguous = taken[2]
            taken.append([t.stride() for t, plain in zip(self._tensors, contiguous, strict=True) if not plain])
            return taken


class ModuleSnapshot:
    """The tensors that some dictionaries (a module's, or a state dict) held when this was made, and their storage."""

    def __init__(
        self, containers: list[dict[str, Any]], *, tensors_of: Callable[[Any], Sequence[torch.Tensor]] | None = None
    ) -> None:
        """`tensors_of` returns the tensors of a value; by default of a tensor that itself, or its shard."""
        self._containers = containers
        self._sizes = list(map(len, containers))
        self._keys = list(chain.from_iterable(containers))
        self._values = list(chain.from_iterable(map(dict.values, containers)))
        named = [(value, shard_attribute(value)) for value in self._values]
        self._shards = [(value, name, getattr(value, name)) for value, name in named if name]
        self.tensors = list(chain.from_iterable(map(tensors_of or _local_tensors, self._values)))
        self._storage = StorageSnapshot(self.tensors)

    @classmethod
    def of_module(cls, module: nn.Module) -> "ModuleSnapshot":
        """Take a snapshot of all parameters, buffers and submodules of a module."""
        return cls([each for part in module.modules() for each in (part._parameters, part._buffers, part._modules)])

    def same_tensors(self) -> bool:
        """Return whether the dictionaries hold the same objects and no others. Reads no tensor: see `unchanged`."""
        return (
            list(map(len, self._containers)) == self._sizes
            and all(map(is_, chain.from_iterable(self._containers), self._keys))
            and all(map(is_, chain.from_iterable(map(dict.values, self._containers)), self._values))
            and all(getattr(value, name) is shard for value, name, shard in self._shards)
        )

    def unchanged(self) -> bool:
        """Return whether they are the same tensors and their memory has not moved."""
        return self.same_tensors() and self._storage.unchanged()


def _local_tensors(value: object) -> list[torch.Tensor]:
    return [local_tensor(value)] if isinstance(value, torch.Tensor) else []


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that has this rank's elements: of a sharded tensor its shard."""
    name = shard_attribute(tensor)
    return getattr(tensor, name) if name else tensor


def shard_attribute(value: object) -> str:
    """Return the attribute of a sharded tensor that is this rank's shard; "" for anything else."""
    if isinstance(value, DTensor):
        return "_local_tensor"
    # DeepSpeed's ZeRO-3.
    return "ds_tensor" if getattr(value, "ds_tensor", None) is not None else ""


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that is equal for tensors of one storage, for as long as that lives.

    Not an address: storages without elements, such as empty shards, have none.
    """
    return tensor.untyped_storage()._cdata


def tensor_id(tensor: torch.Tensor) -> object:
    """Return a hashable value that is equal for two names of one tensor (tied weights), and for equal views of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    layout = local.storage_offset(), tuple(local.shape), tuple(local.stride())
    return storage_id(local), layout, tuple(tensor.shape), tensor.dtype


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes as flat uint8: a view, or a copy if it is not contiguous."""
    # One element counts as contiguous with any stride; viewed as bytes, it needs stride 1.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def aligned(nbytes: int) -> int:
    """Return the next multiple of `ALIGN_BYTES`."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
