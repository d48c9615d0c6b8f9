"""Weights that every trainer rank gathers whole, or computes, for each sync (trainer)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch.distributed.tensor import DTensor

from rollcast.comm.plan.box import Box
from rollcast.comm.plan.holders import HeldParam
from rollcast.comm.transfer.holding import LocalParam
from rollcast.comm.transfer.source import LocalFormat, WeightSource, is_made

# Gathered tensors that are kept while checkpoint parameters are made of parts of them.
CACHED_TENSORS = 2


class GatheringSource(WeightSource):
    """Weights that are computed, or gathered whole, on every trainer rank for each sync: each has all of them.

    Raises `ValueError` for parameters that FSDP1 or ZeRO-3 has flattened.
    """

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        """See `WeightSource.gather`. Collective: sharded tensors are gathered one at a time."""
        self.check_unchanged()
        for index, tensor in self._full_tensors(order):
            yield index, [tensor.contiguous()]

    def stable_params(self) -> None:
        """See `WeightSource.stable_params`: all are made anew."""

    @property
    def statement(self) -> list[HeldParam]:
        """See `WeightSource.statement`."""
        return [HeldParam(spec, (Box.whole(spec.shape),)) for spec in self.manifest.specs]

    def formats(self) -> list[list[LocalFormat]]:
        """See `WeightSource.formats`."""
        pairs = zip(self.manifest.specs, super().formats(), strict=True)
        return [
            [replace(formats[0], box=(box := Box.whole(spec.shape)), strides=box.strides)] for spec, formats in pairs
        ]

    def _bind(self, held: dict[str, LocalParam]) -> dict[str, LocalParam]:
        """Return every checkpoint parameter; its tensor has the dtype and the device, not the elements."""
        for name, param in held.items():
            if not isinstance(param.held, DTensor) and param.boxes != (Box.whole(param.shape),):
                raise ValueError(f"{name}: a peft model that FSDP1 or ZeRO-3 has flattened cannot be gathered")
        converted = self._converter.converted(held)
        if converted is None:
            return held
        likes = {each.name: held[each.pieces[0].name].tensors for each in converted}
        return {
            each.name: LocalParam(each.shape, (Box.whole(each.shape),), likes[each.name], each) for each in converted
        }

    def _full_tensors(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, full tensor) in the given order. Collective."""
        # The same on all ranks. Checkpoint parameters that are parts of one tensor follow each other.
        full = lru_cache(CACHED_TENSORS)(lambda name: self._full_tensor(name, self._held[name]))
        names = [spec.name for spec in self.manifest.specs]
        for index in order:
            param = self._params[index]
            yield index, param.held.assemble(full) if is_made(param) else full(names[index])

    def _full_tensor(self, name: str, param: LocalParam) -> torch.Tensor:
        """Return the whole of one of the trainer's parameters. Collective."""
        return full_tensor(param.held)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor. Collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
