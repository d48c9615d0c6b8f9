"""Modules whose weights are not simply copied: what has arrived becomes what the module keeps (worker)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rollcast.comm import VerifyError
from rollcast.comm.plan.region import flat_bytes
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.tape import LandingError, carry_out
from rollcast.rollout.landing.vllm_reload import Tensors, at_their_addresses, materialize, probe, process, wearing


class StagedModule:
    """One `Stage` of a plan, bound to its module.

    The pieces arrive in tensors of the load format: in the live memory where it has that layout, else in memory
    that exists from the first piece until `finish`. Then the module keeps what vLLM makes of them in the tensors
    that it had: CUDA graphs know their addresses.
    """

    def __init__(
        self, plan: LandingPlan, number: int, module: Any, formats: Tensors, live: Mapping[str, torch.Tensor]
    ) -> None:
        self._stage = plan.stages[number]
        self._plan = plan
        self._module = module
        self._live = live
        self._fills = tuple(fill.op for fill in plan.fills if fill.stage == number)
        prefix = f"{self._stage.module}." if self._stage.module else ""
        taped = {ref.key for op in self._stage.tape for ref in (*op.reads(), op.target) if ref and ref.kind == "live"}
        wanted = {prefix + name: meta for name, meta in formats.items()}
        self._formats = wanted if self._is_staged else {name: wanted[name] for name in wanted if name in taped}
        self._attributes = {prefix + name: name for name in formats}
        self._rooms: Tensors = {}
        self._confirming = False

    @property
    def _is_staged(self) -> bool:
        return self._stage.kind == "staged"

    def room(self, target: str) -> torch.Tensor:
        """The tensor that a move to `target` writes. Valid until `finish` or `drop`."""
        if not self._rooms:
            self._open()
        return self._rooms[target]

    def begin(self, *, confirming: bool) -> None:
        """A sync starts. When `confirming` nothing is written, and the outcome must be what is there."""
        self._rooms = {}
        self._confirming = confirming

    def finish(self) -> None:
        """Everything has arrived: make the module's weights of it. Raises `VerifyError` when confirming."""
        if not self._rooms:
            self._open()
        carry_out(self._stage.tape, self._tensors())
        for own, owner in self._stage.shares:
            self._rooms[own].data.copy_(self._live[owner].data)
        if self._is_staged:
            self._process()
        else:
            for name in self._formats:
                self._keep(name, self._live[name], self._rooms[name])
        self.drop()

    def drop(self) -> None:
        """Forget what has arrived."""
        self._rooms = {}

    def _open(self) -> None:
        device = next(iter(self._live.values())).device
        for name, meta in self._formats.items():
            live = self._live.get(name)
            memory = None if live is None or self._confirming or not _same_layout(live, meta) else live.detach()
            self._rooms[name] = materialize(meta, device, memory=memory)
        for index, region in enumerate(self._stage.inputs):
            room = torch.empty_strided(region.shape, region.stride, dtype=region.dtype, device=device)
            self._rooms[f"input/{index}"] = room
        carry_out(self._fills, self._tensors())

    def _tensors(self) -> dict[tuple[str, int | str], torch.Tensor]:
        device = next(iter(self._live.values())).device
        tensors: dict[tuple[str, int | str], torch.Tensor] = {}
        for name, room in self._rooms.items():
            kind, _, index = name.rpartition("/")
            tensors[("input", int(index)) if kind else ("live", name)] = room.data
        for index, value in enumerate(self._plan.values):
            tensors["value", index] = value.to(device)
        return tensors

    def _process(self) -> None:
        module = self._module
        kept, before = _tensors_of(module), probe(module) if self._confirming else None
        with wearing(module, {self._attributes[name]: self._rooms[name] for name in self._formats}):
            with at_their_addresses(vars(module), vars(module.quant_method)):
                process(module)
            made = _tensors_of(module)
        for attribute, tensor in kept.items():
            name = f"{self._stage.module}.{attribute}"
            if attribute not in made:
                raise LandingError(f"{name}: vLLM's processing no longer makes it")
            self._keep(name, tensor, made[attribute])
        if self._confirming and before is not None:
            after = probe(module)
            if after is None or not torch.equal(before, after):
                raise VerifyError(f"{self._stage.module} packs the same weights to something else than it has")

    def _keep(self, name: str, live: torch.Tensor, made: torch.Tensor) -> None:
        """Put what was made where the engine expects it, or compare."""
        if (live.shape, live.dtype) != (made.shape, made.dtype):
            shapes = f"{list(made.shape)} {made.dtype} of what the engine has as {list(live.shape)} {live.dtype}"
            raise LandingError(f"{name}: vLLM's processing makes {shapes}")
        if self._confirming:
            if not torch.equal(flat_bytes(live), flat_bytes(made)):
                raise VerifyError(f"{name} in memory is not what the trainer's weights make")
        elif not (live.data_ptr() == made.data_ptr() and _same_layout(live, made)):
            shares = live.untyped_storage()._cdata == made.untyped_storage()._cdata
            live.data.copy_(made.data.clone() if shares else made.data)


def _tensors_of(module: nn.Module) -> Tensors:
    named = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _same_layout(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)
