"""Toy loaders, run natively and through a landing plan, without vLLM.

A toy loader is a function of the weights, as (name, tensor) pairs, and of the parameters by name.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rollcast.comm import Manifest, ParamSpec
from rollcast.rollout.landing.apply import StagedModule
from rollcast.rollout.landing.compiler import assemble, record
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.tape import replay

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]
Loader = Callable[[Iterator[tuple[str, torch.Tensor]], Tensors], Any]
Change = Callable[[torch.Tensor], torch.Tensor]
Each = Callable[[torch.Tensor, torch.Tensor], Any]


class Toy(NamedTuple):
    """A loader, with the shapes and dtypes of what it reads and writes."""

    load: Loader
    sources: dict[str, Shape]
    targets: dict[str, Shape]
    wire: torch.dtype = torch.float32
    kept: torch.dtype = torch.float32

    def weights(self, *, seed: int) -> Tensors:
        return random_tensors(self.sources, self.wire, seed=seed)

    def parameters(self, *, seed: int = 7) -> Tensors:
        return random_tensors(self.targets, self.kept, seed=seed)

    def native(self, *, seed: int) -> Tensors:
        """Return the parameters as the loader itself leaves them."""
        live = self.parameters()
        with torch.no_grad():
            self.load(iter(self.weights(seed=seed).items()), live)
        return live

    def compile(self, *, ties: dict[str, str] | None = None, buffers: Sequence[str] = ()) -> LandingPlan:
        """Compile the plan from shapes alone.

        `ties` maps other names of targets to these; `buffers` are targets that are no parameters.
        """
        metas = {name: torch.empty(shape, dtype=self.kept, device="meta") for name, shape in self.targets.items()}
        known = metas | {name: metas[owner] for name, owner in (ties or {}).items()}
        specs = tuple(ParamSpec(name, shape, self.wire) for name, shape in self.sources.items())
        recording = record(lambda pairs: self.load(pairs, known), metas, manifest := Manifest(specs))
        parameters = metas.keys() - buffers
        return assemble(recording, metas, manifest, staged={}, parameters=parameters, shared=ties or {})


def random_tensors(shapes: dict[str, Shape], dtype: torch.dtype, *, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 8).to(dtype) for name, shape in shapes.items()}


def land(plan: LandingPlan, live: Tensors, sources: Sequence[torch.Tensor]) -> None:
    """Apply the plan as a sync does: constants, moves, then what is computed."""
    formats = {name: torch.empty_like(tensor, device="meta") for name, tensor in live.items()}
    stages = [
        StagedModule(plan, number, None, {name.rpartition(".")[2]: meta for name, meta in formats.items()}, live)
        for number in range(len(plan.stages))
    ]
    for stage in stages:
        stage.begin(verifying=False)
    values: dict[tuple[str, int | str], torch.Tensor] = {("value", key): v for key, v in enumerate(plan.values)}
    tensors = values | {("live", name): tensor for name, tensor in live.items()}
    replay(tuple(fill.op for fill in plan.fills if fill.stage is None), tensors)
    for move in plan.moves:
        target = live[move.target] if move.stage is None else stages[move.stage].staging(move.target)
        move.region.view(target).copy_(move.source.view(sources[move.param]))
    for stage in stages:
        stage.finish()


def each(change: Change) -> Loader:
    """Return a loader that copies `change(weight)` into the parameter of the weight's name."""
    return both(lambda p, w: p.copy_(change(w)))


def both(step: Each) -> Loader:
    """Return a loader that calls `step` with each parameter and its weight."""

    def load(pairs: Iterator[tuple[str, torch.Tensor]], live: Tensors) -> None:
        for name, weight in pairs:
            step(live[name], weight)

    return load


def whole(step: Callable[[Tensors, Tensors], Any]) -> Loader:
    """Return a loader that calls `step` with all parameters and all weights."""
    return lambda pairs, live: step(live, dict(pairs))


def changed(got: Tensors, expected: Tensors) -> list[str]:
    """Return the names of the tensors whose bytes differ."""
    flat = {name: (got[name].reshape(-1), tensor.reshape(-1)) for name, tensor in expected.items()}
    return [name for name, (a, b) in flat.items() if not torch.equal(a.view(torch.uint8), b.view(torch.uint8))]
