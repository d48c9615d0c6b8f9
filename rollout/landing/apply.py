"""A landing plan bound to a live model: carries it out at every sync (worker)."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from rollcast.comm import Move
from rollcast.comm.device.storage import Places
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.stages import StagedModule
from rollcast.rollout.landing.tape import carry_out
from rollcast.rollout.landing.vllm_reload import attention_layers, live_tensors, load_format, process_attention


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
