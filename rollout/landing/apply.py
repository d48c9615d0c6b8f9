"""A landing plan bound to a live model: writes what every sync sends into vLLM's parameters (worker)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rollcast.comm import VerifyError
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import ModuleSnapshot, flat_bytes, storage_id
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.model_tensors import Tensors, model_tensors
from rollcast.rollout.landing.plan import LandingPlan, ParameterView, input_index, input_name
from rollcast.rollout.landing.tape import replay
from rollcast.rollout.landing.vllm_reload import (
    attention_layers,
    keep_storage,
    live_tensors,
    load_format,
    materialize,
    overwrite,
    probe,
    process_attention,
    process_weights,
    recompute,
    swapped_parameters,
)


class LiveLanding:
    """A `Landing` into the parameters of a vLLM model.

    Live tensors are looked up once; `moved(model)` tells whether they still are where they were. `dtype` is the
    engine's.
    """

    def __init__(self, plan: LandingPlan, model: nn.Module, *, dtype: torch.dtype) -> None:
        self.plan = plan
        self._live = live_tensors(model)
        self._targets = {move.target for move in plan.moves}
        self._addresses = _addresses(model, self._targets)
        self._model, self._snapshot = model, ModuleSnapshot.of_module(model)
        device = next((tensor.device for tensor in self._live.values()), torch.device("cpu"))
        with load_format(model) as formats:
            modules = formats.modules
        self._stages = [
            StagedModule(plan, number, model.get_submodule(stage.module), modules[stage.module], self._live)
            for number, stage in enumerate(plan.stages)
        ]
        with_moves = {move.stage for move in plan.moves if move.source.numel}
        self._stages_without_moves = [number for number in range(len(plan.stages)) if number not in with_moves]
        self._attention = [attention_layers(model)[path] for path in plan.attention]
        self._recomputed = [model.get_submodule(path) for path in plan.recomputed]
        tensors = model_tensors(model) if plan.views else {}
        self._views = [(view, tensors[view.name]) for view in plan.views]
        for stage in self._stages:
            stage.take_views(self._views)
        self._verifying = False
        self._dtype = dtype
        self._fills = tuple(fill.op for fill in plan.fills if fill.stage is None and fill.target.region.numel)
        self._fill_tensors: dict[tuple[str, int | str], torch.Tensor] = {
            ("value", key): value.to(device) for key, value in enumerate(plan.values)
        }
        self._fill_tensors |= {("live", name): tensor.data for name, tensor in self._live.items()}

    def moved(self, model: nn.Module) -> str | None:
        """Return the name of a tensor of the model that was replaced, or whose memory has moved; None if there is none.

        `model` is the worker's model as it is now.
        """
        if model is self._model and self._snapshot.unchanged():
            return None
        now = _addresses(model, self._targets)
        moved = next((name for name in now | self._addresses if now.get(name) != self._addresses.get(name)), None)
        if moved is None:
            # It was a buffer that no sync writes.
            self._model, self._snapshot = model, ModuleSnapshot.of_module(model)
        return moved

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._live[target].data

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`."""
        return self._stages[stage].staging(target)

    def begin(self, *, verifying: bool = False) -> None:
        """See `Landing.begin`. Constants are written first: memory that was put to sleep may have lost them."""
        self._verifying = verifying
        for stage in self._stages:
            stage.begin(verifying=verifying)
        if self._fills and not verifying:
            replay(self._fills, dict(self._fill_tensors))

    def finish(self, stage: int) -> None:
        """See `Landing.finish`."""
        self._stages[stage].finish()

    def commit(self) -> None:
        """See `Landing.commit`."""
        for stage in self._stages_without_moves:
            self.finish(stage)
        for view, tensor in self._views:
            if not any(stage.has(view.parameter) for stage in self._stages):
                write_back(view.name, tensor, view.region.view(self._live[view.parameter].data), self._verifying)
        for layer in self._attention:
            with self._unchanged(layer, getattr(layer, "impl", None)):
                process_attention(layer, self._dtype)
        for module in self._recomputed:
            with self._unchanged(module):
                recompute(module)

    @contextmanager
    def _unchanged(self, *owners: Any) -> Iterator[None]:
        """Raise `VerifyError` if a tensor of these objects changes inside, when verifying."""
        if not self._verifying:
            yield
            return
        before = _checksums(owners)
        yield
        after = _checksums(owners)
        if changed := [name for name in before if before[name] != after.get(name)]:
            raise VerifyError(f"{', '.join(changed)} in memory is not what the trainer's weights make")

    def abort(self) -> None:
        """See `Landing.abort`."""
        for stage in self._stages:
            stage.discard()


class StagedModule:
    """One `Stage` of a plan, bound to its module.

    Weights arrive in staging tensors of the load format: in the live memory where it has that layout, else in memory
    that exists from the first move until `finish`. Then vLLM's result is written into the tensors that the module
    had: CUDA graphs know their addresses.
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
        named = {prefix + name: meta for name, meta in formats.items()}
        self._formats = named if self._is_staged else {name: named[name] for name in named if name in taped}
        self._attributes = {prefix + name: name for name in formats}
        self._staging: Tensors = {}
        self._views: list[tuple[ParameterView, torch.Tensor]] = []
        self._verifying = False

    def has(self, parameter: str) -> bool:
        """Return whether the parameter arrives in a staging tensor."""
        return parameter in self._formats

    def take_views(self, views: Sequence[tuple[ParameterView, torch.Tensor]]) -> None:
        """Write those views that are of this module's parameters, from now on."""
        self._views = [(view, tensor) for view, tensor in views if self.has(view.parameter)]

    @property
    def _is_staged(self) -> bool:
        return self._stage.kind == "staged"

    def staging(self, target: str) -> torch.Tensor:
        """Return the tensor that a move to `target` writes. Valid until `finish` or `discard`."""
        if not self._staging:
            self._allocate()
        return self._staging[target]

    def begin(self, *, verifying: bool) -> None:
        """Start a sync. When `verifying`, nothing is written: the outcome is compared with what is there."""
        self._staging = {}
        self._verifying = verifying

    def finish(self) -> None:
        """Compute the module's weights from what has arrived. Raises `VerifyError` if they differ when verifying."""
        if not self._staging:
            self._allocate()
        replay(self._stage.tape, self._tensors())
        for own, owner in self._stage.shares:
            self._staging[own].data.copy_(self._live[owner].data)
        # Before vLLM processes the staging tensors: it may do so in their memory.
        for view, tensor in self._views:
            self._write_back(view.name, tensor, view.region.view(self._staging[view.parameter].data))
        if self._is_staged:
            self._process()
        else:
            for name in self._formats:
                self._write_back(name, self._live[name], self._staging[name])
        self.discard()

    def discard(self) -> None:
        """Drop what has arrived."""
        self._staging = {}

    def _allocate(self) -> None:
        device = next(iter(self._live.values())).device
        for name, meta in self._formats.items():
            live = self._live.get(name)
            memory = None if live is None or self._verifying or not _same_layout(live, meta) else live.detach()
            self._staging[name] = materialize(meta, device, memory=memory)
        for index, region in enumerate(self._stage.inputs):
            piece = torch.empty_strided(region.shape, region.stride, dtype=region.dtype, device=device)
            self._staging[input_name(index)] = piece
        replay(self._fills, self._tensors())

    def _tensors(self) -> dict[tuple[str, int | str], torch.Tensor]:
        device = next(iter(self._live.values())).device
        tensors: dict[tuple[str, int | str], torch.Tensor] = {}
        for name, tensor in self._staging.items():
            index = input_index(name)
            tensors[("live", name) if index is None else ("input", index)] = tensor.data
        for index, value in enumerate(self._plan.values):
            tensors["value", index] = value.to(device)
        return tensors

    def _process(self) -> None:
        """Run vLLM's processing on the staging tensors, and write its result into the module's own."""
        module = self._module
        own, before = _tensors_of(module), probe(module) if self._verifying else None
        with swapped_parameters(module, {self._attributes[name]: self._staging[name] for name in self._formats}):
            with keep_storage(vars(module), vars(module.quant_method)):
                process_weights(module)
            processed = _tensors_of(module)
        for attribute, tensor in own.items():
            name = f"{self._stage.module}.{attribute}"
            if attribute not in processed:
                raise LandingError(f"{name}: vLLM's processing no longer makes it")
            self._write_back(name, tensor, processed[attribute])
        if self._verifying and before is not None:
            after = probe(module)
            if after is None or not torch.equal(flat_bytes(before), flat_bytes(after)):
                raise VerifyError(f"{self._stage.module} packs the same weights to something else than it has")

    def _write_back(self, name: str, live: torch.Tensor, new: torch.Tensor) -> None:
        write_back(name, live, new, self._verifying)


def write_back(name: str, live: torch.Tensor, new: torch.Tensor, verifying: bool) -> None:
    """Copy the new weights into the tensor that the engine has, or compare when verifying."""
    if (live.shape, live.dtype) != (new.shape, new.dtype):
        shapes = f"{list(new.shape)} {new.dtype} of what the engine has as {list(live.shape)} {live.dtype}"
        raise LandingError(f"{name}: vLLM's processing makes {shapes}")
    if verifying:
        if not torch.equal(flat_bytes(live), flat_bytes(new)):
            raise VerifyError(f"{name} in memory is not what the trainer's weights make")
    elif not (live.data_ptr() == new.data_ptr() and _same_layout(live, new)):
        shares = storage_id(live) == storage_id(new)
        overwrite(live, new.clone() if shares else new)


def _addresses(model: nn.Module, targets: set[str]) -> dict[str, tuple[int, int]]:
    """Return, for every parameter and every buffer among `targets`, the tensor object's id and its data's address.

    Not `storage.tensor_id`: a storage that is resized keeps its id and gets another address.
    """
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in targets}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | buffers
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()}


def _tensors_of(module: nn.Module) -> Tensors:
    named = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _same_layout(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)


def _checksums(owners: Sequence[Any]) -> dict[str, int]:
    """Return checksums of the tensors that some objects have, by attribute."""
    tensors: Tensors = {}
    for owner in owners:
        tensors |= _tensors_of(owner) if isinstance(owner, nn.Module) else {}
        attributes = {} if owner is None else vars(owner)
        tensors |= {name: value for name, value in attributes.items() if isinstance(value, torch.Tensor)}
    return {name: int(checksum(flat_bytes(tensor))) for name, tensor in tensors.items()}
