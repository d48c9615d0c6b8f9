"""Where each byte of the manifest lands in a vLLM worker, found by running vLLM's own loader once (worker).

`model.load_weights` runs on meta tensors under a dispatch mode that knows sources and live parameters by their
storage. Every copy from one into the other is noted as a `Move` and not executed; a sync then replays the moves
and calls no loader. What cannot be expressed so is refused by name, never guessed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rollcast.comm import Manifest, Region
from rollcast.rollout.recorder import Fill, LandingError, Move, Recorder, intervals


@dataclass(frozen=True)
class LandingPlan:
    """All moves of one worker."""

    manifest: Manifest
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...]
    """Parts that the loader sets to a constant (padding): written once, not at every sync."""

    def check(self, live: dict[str, torch.Tensor]) -> list[str]:
        """Problems, each naming a parameter: live elements not written exactly once, sources that land nowhere."""
        written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        filled: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for move in self.moves:
            written[move.target] += intervals(move.region)
        for fill in self.fills:
            filled[fill.target] += intervals(fill.region)
        problems = [
            f"{name}: {problem}"
            for name, tensor in live.items()
            if isinstance(tensor, nn.Parameter) or written[name]
            if (problem := _coverage(tensor.numel(), written[name], filled[name]))
        ]
        landed = {move.param for move in self.moves}
        return problems + [
            f"{spec.name}: the engine's model has no place for it"
            for index, spec in enumerate(self.manifest.specs)
            if index not in landed and spec.numel
        ]


def compile_landing(
    load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], Any],
    live: dict[str, torch.Tensor],
    manifest: Manifest,
) -> LandingPlan:
    """Run the loader on meta tensors and note where everything goes. The live tensors are not written.

    Raises `LandingError` naming the parameter that the loader was busy with when it did what a move cannot say.
    """
    sources = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in manifest.specs]
    recorder = Recorder(sources, live)
    shown = manifest.specs[0]

    def feed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal shown
        for shown, tensor in zip(manifest.specs, sources, strict=True):
            yield shown.name, tensor

    try:
        with torch.no_grad(), recorder:
            load_weights(feed())
    except Exception as error:
        why = str(error) or f"{type(error).__name__} without a message"
        raise LandingError(f"vLLM's loader does not take parameter {shown}: {why}") from error
    return LandingPlan(manifest, tuple(recorder.moves), tuple(recorder.fills))


class DirectLanding:
    """A `Landing` into live parameters: one copy for each move, no loader."""

    def __init__(self, plan: LandingPlan, live: dict[str, torch.Tensor]) -> None:
        self._pieces: dict[int, list[tuple[Region, torch.Tensor]]] = defaultdict(list)
        for move in plan.moves:
            self._pieces[move.param].append((move.source, move.region.view(live[move.target].data)))
        self._fills = [(fill.region.view(live[fill.target].data), fill.value) for fill in plan.fills]

    def begin(self) -> None:
        """See `Landing.begin`. Constants are written before the first sync's moves, as the loader does it."""
        for target, value in self._fills:
            target.copy_(value)
        self._fills.clear()

    def land(self, param: int, tensor: torch.Tensor) -> None:
        """See `Landing.land`."""
        for source, target in self._pieces[param]:
            target.copy_(source.view(tensor))

    def commit(self) -> None:
        """See `Landing.commit`. Nothing to do: direct modules need no processing."""


def _coverage(numel: int, written: list[tuple[int, int]], filled: list[tuple[int, int]]) -> str | None:
    end = total = 0
    for start, stop in sorted(written):
        if start < end:
            return f"the loader writes elements {start} to {min(stop, end)} twice"
        total, end = total + stop - start, stop
    covered, end = 0, 0
    for start, stop in sorted(written + filled):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    if covered == numel:
        return None
    return f"{numel - covered} of {numel} elements would not be written: the trainer does not send what they need"
