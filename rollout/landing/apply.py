"""A landing plan bound to a live model: carries it out at every sync (worker)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rollcast.comm import Move, VerifyError
from rollcast.comm.device.storage import Places, flat_bytes
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.tape import carry_out
from rollcast.rollout.landing.vllm_reload import (
    Tensors,
    at_their_addresses,
    attention_layers,
    live_tensors,
    load_format,
    materialize,
    probe,
    process,
    process_attention,
    wearing,
)


class LiveLanding:
    """A `Landing` into the parameters of a vLLM model.

    Live tensors are found once. `moved(model)` says whether they still are where they were.
    """

    def __init__(self, plan: LandingPlan, model: nn.Module, *, dtype: torch.dtype) -> None:
        self.plan = plan
        self._live = live_tensors(model)
        self._wanted = {move.target for move in plan.moves}
        self._places = _places(model, self._wanted)
        self._model, self._held = model, Places.of_module(model)
        self._device = next((tensor.device for tensor in self._live.values()), torch.device("cpu"))
        with load_format(model) as formats:
            modules = formats.modules
        self._stages = [
            StagedModule(plan, number, model.get_submodule(stage.module), modules[stage.module], self._live)
            for number, stage in enumerate(plan.stages)
        ]
        with_moves = {move.stage for move in plan.moves if move.source.numel}
        self._last = [number for number in range(len(plan.stages)) if number not in with_moves]
        self._attention = [attention_layers(model)[path] for path in plan.attention]
        self._dtype = dtype
        self._fills = tuple(fill.op for fill in plan.fills if fill.stage is None and fill.target.region.numel)
        self._fillable: dict[tuple[str, int | str], torch.Tensor] = {
            ("value", key): value.to(self._device) for key, value in enumerate(plan.values)
        }
        self._fillable |= {("live", name): tensor.data for name, tensor in self._live.items()}

    def moved(self, model: nn.Module) -> str | None:
        """The first tensor of the model, as it is now, that is not the one that was found, or not where it was."""
        if model is self._model and self._held.unchanged():
            return None
        now = _places(model, self._wanted)
        moved = next((name for name in now | self._places if now.get(name) != self._places.get(name)), None)
        if moved is None:
            # It was a buffer that no sync writes.
            self._model, self._held = model, Places.of_module(model)
        return moved

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._live[target].data

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`."""
        return self._stages[stage].room(target)

    def begin(self, *, confirming: bool = False) -> None:
        """See `Landing.begin`. Constants are written first: memory that was put to sleep may have lost them."""
        for stage in self._stages:
            stage.begin(confirming=confirming)
        if self._fills and not confirming:
            carry_out(self._fills, dict(self._fillable))

    def finish(self, stage: int) -> None:
        """See `Landing.finish`."""
        self._stages[stage].finish()

    def commit(self) -> None:
        """See `Landing.commit`."""
        for stage in self._last:
            self.finish(stage)
        for layer in self._attention:
            process_attention(layer, self._dtype)

    def abandon(self) -> None:
        """See `Landing.abandon`."""
        for stage in self._stages:
            stage.drop()

    def bind(self, sources: Sequence[torch.Tensor]) -> "LocalTransfer":
        """Make ready to apply `sources` (contiguous, in the manifest's order, shapes and dtypes) again and again.

        For a trainer that shares the worker's device: no wire, and one pass over the memory.
        """
        return LocalTransfer(self, sources)


class LocalTransfer:
    """Writes weights from tensors of this process into the model."""

    def __init__(self, landing: LiveLanding, sources: Sequence[torch.Tensor]) -> None:
        for spec, tensor in zip(landing.plan.manifest.specs, sources, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype) or not tensor.is_contiguous():
                raise ValueError(f"expected {spec}, contiguous; got {list(tensor.shape)} {tensor.dtype}")
        self._landing = landing
        self._direct: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._staged: dict[int, list[tuple[Move, torch.Tensor]]] = defaultdict(list)
        for move in landing.plan.moves:
            source = move.source.view(sources[move.param])
            if move.stage is None:
                self._direct[0].append(move.region.view(landing.live(move.target)))
                self._direct[1].append(source)
            else:
                self._staged[move.stage].append((move, source))

    def apply(self) -> None:
        """Write the sources' values of now. Not collective, unless vLLM's processing is."""
        with torch.no_grad():
            self._landing.begin()
            if self._direct[0]:
                torch._foreach_copy_(*self._direct)
            for stage, pieces in self._staged.items():
                names = {move.target for move, _ in pieces}
                rooms = {name: self._landing.staging(stage, name) for name in names}
                # No function of ours for each piece: a model can have tens of thousands.
                targets = [
                    rooms[move.target].as_strided(move.region.shape, move.region.stride, move.region.offset)
                    for move, _ in pieces
                ]
                torch._foreach_copy_(targets, [source for _, source in pieces])
                self._landing.finish(stage)
            self._landing.commit()


def _places(model: nn.Module, wanted: set[str]) -> dict[str, tuple[int, int]]:
    """By name, of every parameter and every wanted buffer: which object it is, and the address of its data."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in wanted}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | buffers
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()}


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
