"""Compiles vLLM's loader into a `LandingPlan` (worker).

`model.load_weights` runs once, on meta tensors, under a mode that notes every operation on a source or a live
tensor. A copy from one into the other becomes a `Move`; other operations become a tape; constants become fills.
What cannot be expressed is refused by name, never guessed.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rollcast.comm import Manifest, Move, Region
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.coverage import Elements
from rollcast.rollout.landing.plan import Fill, LandingPlan, Stage, Target
from rollcast.rollout.landing.post_load import derived_attention, staged_modules
from rollcast.rollout.landing.recorder import Recorder
from rollcast.rollout.landing.tape import Op, Ref, mark_transforms
from rollcast.rollout.landing.vllm_reload import live_tensors, load_format

Loader = Callable[[Iterator[tuple[str, torch.Tensor]]], Any]


@dataclass(frozen=True)
class Recording:
    """What the loader did."""

    ops: tuple[Op, ...]
    values: tuple[torch.Tensor, ...]

    @cached_property
    def writers(self) -> dict[tuple[str, int | str], list[int]]:
        """By tensor: the operations that make or change it, in order."""
        found: dict[tuple[str, int | str], list[int]] = defaultdict(list)
        for index, op in enumerate(self.ops):
            for ref in (op.target, *op.results):
                if ref is not None:
                    found[ref.kind, ref.key].append(index)
        return found

    def what_makes(self, live: Iterable[str]) -> list[Op]:
        """The operations that the values of these live tensors come from, in order."""
        chosen: set[int] = set()
        wanted: list[tuple[str, int | str, int]] = [("live", name, len(self.ops)) for name in live]
        while wanted:
            kind, key, end = wanted.pop()
            for index in self.writers.get((kind, key), ()):
                if index < end and index not in chosen:
                    chosen.add(index)
                    wanted += [("temp", ref.key, index) for ref in self.ops[index].reads() if ref.kind == "temp"]
        return [self.ops[index] for index in sorted(chosen)]


def record(load_weights: Loader, targets: Mapping[str, torch.Tensor], manifest: Manifest) -> Recording:
    """Run the loader on meta sources; `targets` (meta, by vLLM's name) are what it may write.

    Raises `LandingError` naming the parameter that the loader was busy with when it did what cannot be noted.
    """
    sources: list[torch.Tensor] = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in manifest.specs]
    recorder = Recorder(sources, targets)

    def feed() -> Iterator[tuple[str, torch.Tensor]]:
        for index, spec in enumerate(manifest.specs):
            recorder.shown = f"parameter {spec}"
            yield spec.name, sources[index]
        recorder.shown += ", the last one, or one that it had put aside"

    try:
        with torch.no_grad(), recorder:
            load_weights(feed())
    except Exception as error:
        why = str(error) or f"{type(error).__name__} without a message"
        raise LandingError(f"vLLM's loader does not take {recorder.shown}: {why}") from error
    sources.clear()
    if any(recorder.kept()):
        gc.collect()
    for kept in recorder.kept():
        what = f"parameter {manifest.specs[kept]}" if isinstance(kept, int) else f"what it makes of {kept}"
        raise LandingError(f"vLLM's loader holds on to {what}, where only copies into parameters can be repeated")
    return Recording(tuple(recorder.ops), tuple(recorder.values))


def assemble(
    recording: Recording,
    targets: Mapping[str, torch.Tensor],
    manifest: Manifest,
    *,
    staged: Mapping[str, Sequence[str]],
    parameters: Iterable[str],
    shared: Mapping[str, str],
) -> LandingPlan:
    """Sort what the loader did into moves, fills and stages.

    `targets` is in the order of the worker's memory. `staged` maps modules that vLLM processes after loading to
    the reasons; `parameters` names what must be written; `shared` maps names of tied tensors to the one in
    `targets`.
    """
    writes: dict[str, list[int]] = defaultdict(list)
    for index, op in enumerate(recording.ops):
        if op.target is not None and op.target.kind == "live":
            writes[str(op.target.key)].append(index)
    taped = {name for name, its in writes.items() if not all(recording.ops[index].is_plain for index in its)}
    taped |= {str(ref.key) for op in recording.ops for ref in op.reads() if ref.kind == "live" and ref.key in writes}
    must = set(parameters)
    processed = {name for name in must if _module(name) in staged}
    modules = dict.fromkeys(_module(name) for name in targets if name in taped or name in processed)
    modules |= dict.fromkeys(_module(name) for name in shared if _module(name) in staged)
    order = {name: index for index, name in enumerate(targets)}
    moves: list[tuple[int, Move]] = []
    fills: list[Fill] = []
    stages: list[Stage] = []
    for number, module in enumerate(modules):
        owned = [name for name in targets if _module(name) == module and (name in processed or name in taped)]
        its_moves, its_fills, inputs, tape = _slice(recording, set(owned), number)
        first = min((order[name] for name in owned), default=0)
        moves += [(order.get(move.target, first), move) for move in its_moves]
        fills += its_fills
        ties = tuple((name, owner) for name, owner in shared.items() if _module(name) == module)
        why = tuple(staged.get(module, ())) or tuple(f"{name} is computed" for name in owned)
        stages.append(Stage(module, "staged" if module in staged else "tape", why, inputs, tape, ties))
    for name, its in writes.items():
        if name not in taped and name not in processed:
            ops = [recording.ops[index] for index in its]
            check_order(ops, ())
            moves += [(order[name], _move(op)) for op in ops if op.moves]
            fills += [Fill(op) for op in ops if not op.moves]
    moves.sort(key=lambda placed: (placed[0], placed[1].region.offset))
    described = tuple(Target(name, Region.of(tensor), name in must) for name, tensor in targets.items())
    placed = tuple(move for _, move in moves)
    return LandingPlan(manifest, described, placed, tuple(fills), tuple(stages), recording.values)


def _slice(
    recording: Recording, owned: set[str], number: int
) -> tuple[list[Move], list[Fill], tuple[Region, ...], tuple[Op, ...]]:
    """What concerns a stage's tensors: moves into them, constants, whole inputs, and the operations in between."""
    moves: list[Move] = []
    fills: list[Fill] = []
    inputs: dict[Ref, int] = {}
    tape: list[Op] = []

    def received(ref: Ref) -> Ref:
        if ref.kind != "source":
            return ref
        index = inputs.setdefault(ref, len(inputs))
        return Ref("input", index, replace(ref.region, offset=0))

    kept = mark_transforms(recording.what_makes(owned))
    check_order(kept, owned)
    for op in kept:
        into_live = op.target is not None and op.target.kind == "live"
        if into_live and op.moves:
            moves.append(_move(op, stage=number))
        elif into_live and op.fills:
            fills.append(Fill(op, number))
        else:
            tape.append(op.map(received))
    pieces = tuple(_piece(ref.region) for ref in inputs)
    for index, (ref, piece) in enumerate(zip(inputs, pieces, strict=True)):
        moves.append(Move(int(ref.key), replace(piece, offset=ref.region.offset), f"input/{index}", piece, number))
    return moves, fills, pieces, tuple(tape)


def _piece(region: Region) -> Region:
    """The region's elements, each once and in the order of memory, in a tensor with the same strides.

    Strides decide in which order sums are made, and so their last bits.
    """
    dims = zip(region.stride, region.shape, strict=True)
    kept = sorted((dim for dim in dims if dim[1] != 1 and (dim[0] or not region.numel)), reverse=True)
    return Region(tuple(size for _, size in kept), tuple(stride for stride, _ in kept), 0, region.dtype)


def _move(op: Op, *, stage: int | None = None) -> Move:
    target, source = op.args
    return Move(int(source.key), source.region, str(target.key), target.region, stage)


def compile_landing(model: Any, manifest: Manifest, *, dtype: torch.dtype) -> LandingPlan:
    """The plan of one vLLM worker, from the model as it is. `dtype` is the engine's.

    The model's weights are not touched, and it can go on serving. All workers of an engine call it (some of
    vLLM's processing is collective). Raises `LandingError` for a loader that cannot be followed.
    """
    with load_format(model) as formats:
        before = {name: _place(tensor) for name, tensor in formats.tensors.items()}
        recording = record(model.load_weights, formats.tensors, manifest)
        rebound = [name for name, place in before.items() if _registered(model, name) != place]
    plan = assemble(
        recording,
        formats.tensors,
        manifest,
        staged=staged_modules(model, formats),
        parameters=formats.parameters,
        shared=formats.shared,
    )
    refused = [f"{name}: its loader puts another tensor in its place" for name in rebound]
    refused += _misplaced(model, plan)
    return replace(plan, attention=tuple(derived_attention(model, dtype)), refused=tuple(refused))


def _registered(model: nn.Module, name: str) -> object:
    """The place of the tensor that the model has under this name."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters.get(attribute)
    tensor = module._buffers.get(attribute) if tensor is None else tensor
    return None if tensor is None else _place(tensor)


def _place(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same part of the same memory."""
    return tensor.untyped_storage()._cdata, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _misplaced(model: nn.Module, plan: LandingPlan) -> Iterator[str]:
    """Targets of direct moves whose live tensor is laid out differently: buffers, or modules without a method."""
    wholes = {target.name: target.whole for target in plan.targets}
    live = live_tensors(model)
    for name in dict.fromkeys(move.target for move in plan.moves if move.stage is None):
        if name not in live or _layout(live[name]) != wholes[name]:
            yield f"{name}: vLLM keeps it in another layout than it loads it"


def _layout(tensor: torch.Tensor) -> Region:
    return Region.of(tensor, base_offset_bytes=int(tensor.storage_offset()) * tensor.element_size())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def check_order(ops: Sequence[Op], owned: Any) -> None:
    """Raise `LandingError` if `ops`, in the loader's order, would have another outcome in the plan's.

    `owned`: the live tensors that are loaded together. Of others nothing can be read.
    """
    written: dict[int | str, Elements] = defaultdict(Elements)
    loaded: dict[int | str, Elements] = defaultdict(Elements)
    computed: dict[int | str, Elements] = defaultdict(Elements)
    for op in ops:
        for ref in op.reads():
            if ref.kind != "live":
                continue
            if ref.key not in owned:
                raise LandingError(f"the loader computes with {ref.key}, which belongs to another module")
            if not written[ref.key].covers(ref.region):
                raise LandingError(f"the loader computes with the old values of {ref.key}")
            computed[ref.key].add(ref.region)
        target = op.target
        if target is None or target.kind != "live":
            continue
        key, region = target.key, target.region
        if op.fills and loaded[key].overlaps(region):
            raise LandingError(f"the loader overwrites a part of {key} that it has loaded")
        if op.is_plain and computed[key].overlaps(region):
            raise LandingError(f"the loader sets a part of {key} that it has computed with")
        written[key].add(region)
        if not op.fills:
            loaded[key].add(region)
        if not op.is_plain:
            computed[key].add(region)
