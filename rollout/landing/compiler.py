"""Compiles vLLM's loader into a `LandingPlan` (worker).

`model.load_weights` runs once, on meta tensors, under a mode that records every operation on a source or a live
tensor. A copy from one into the other becomes a `Move`; other operations become a tape; constants become fills.
What a plan cannot express is refused by name, never guessed.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rollcast.comm import Kept, Manifest, Move, Region
from rollcast.comm.device.storage import tensor_id
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.coverage import ElementSet
from rollcast.rollout.landing.derived import derived_tensors
from rollcast.rollout.landing.dtypes import assumed_manifest, landed_manifest
from rollcast.rollout.landing.kept import leave_out
from rollcast.rollout.landing.plan import Fill, LandingPlan, Stage, Target, input_name
from rollcast.rollout.landing.post_load import derived_attention, staged_modules
from rollcast.rollout.landing.recording import Recording, record
from rollcast.rollout.landing.tape import Op, Ref, mark_transforms
from rollcast.rollout.landing.vllm_reload import LoadFormat, live_tensors, load_format, recomputable

NOTHING_KEPT = Kept()


def compile_landing(model: Any, manifest: Manifest, *, dtype: torch.dtype, kept: Kept = NOTHING_KEPT) -> LandingPlan:
    """Return the plan of one vLLM worker for its model as it is. `dtype` is the engine's; `kept` is not sent.

    `manifest` states the trainer's own dtypes; that of the plan has those of the wire. The model's weights are not
    touched, and it can go on serving. All workers of an engine call it (some of vLLM's processing is collective).
    Raises `LandingError` for a loader that cannot be followed.
    """
    everything = Manifest((*manifest.specs, *kept.manifest.specs))
    run = _run_loader(model, assumed_manifest(everything, dtype))
    landed = landed_manifest(everything, run.recording.landing_dtypes())
    if landed != run.manifest:
        run = _run_loader(model, landed)
    plan = assemble(
        run.recording,
        run.formats.tensors,
        run.manifest,
        staged=staged_modules(model, run.formats),
        parameters=run.formats.parameters,
        shared=run.formats.shared,
    )
    refused = [f"{name}: its loader puts another tensor in its place" for name in run.rebound]
    refused += _misplaced(model, plan)
    attention = tuple(derived_attention(model, dtype))
    recomputed = tuple(path for path, module in model.named_modules() if recomputable(module))
    plan = replace(plan, attention=attention, recomputed=recomputed)
    views, unexplained = derived_tensors(model, plan)
    plan = replace(plan, views=views, refused=(*refused, *unexplained))
    return leave_out(plan, manifest, kept)


@dataclass(frozen=True)
class _LoaderRun:
    """One run of a model's loader."""

    manifest: Manifest
    recording: Recording
    formats: LoadFormat
    rebound: list[str]
    """Names under which it has put another tensor."""


def _run_loader(model: Any, manifest: Manifest) -> _LoaderRun:
    """Record what the model's loader does with parameters of the manifest's dtypes."""
    with load_format(model) as formats:
        before = {name: tensor_id(tensor) for name, tensor in formats.tensors.items()}
        recording = record(model.load_weights, formats.tensors, manifest)
        rebound = [name for name, tensor in before.items() if _registered_id(model, name) != tensor]
    return _LoaderRun(manifest, recording, formats, rebound)


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
    `targets`. Raises `LandingError` if the order of the operations matters in a way that a plan cannot keep.
    """
    writes: dict[str, list[Op]] = defaultdict(list)
    for op in recording.ops:
        if op.target is not None and op.target.kind == "live":
            writes[str(op.target.key)].append(op)
    taped = {name for name, ops in writes.items() if not all(op.moves_or_fills for op in ops)}
    taped |= {str(ref.key) for op in recording.ops for ref in op.reads() if ref.kind == "live" and ref.key in writes}
    required = set(parameters)
    processed = {name for name in required if _module(name) in staged}
    modules = dict.fromkeys(_module(name) for name in targets if name in taped or name in processed)
    modules |= dict.fromkeys(_module(name) for name in shared if _module(name) in staged)
    order = {name: index for index, name in enumerate(targets)}
    moves: list[tuple[int, Move]] = []
    fills: list[Fill] = []
    stages: list[Stage] = []
    for number, module in enumerate(modules):
        owned = [name for name in targets if _module(name) == module and (name in processed or name in taped)]
        contents = _stage_contents(recording, set(owned), number)
        first = min((order[name] for name in owned), default=0)
        moves += [(order.get(move.target, first), move) for move in contents.moves]
        fills += contents.fills
        ties = tuple((name, owner) for name, owner in shared.items() if _module(name) == module)
        reasons = tuple(staged.get(module, ())) or tuple(f"{name} is computed" for name in owned)
        kind = "staged" if module in staged else "tape"
        stages.append(Stage(module, kind, reasons, contents.inputs, contents.tape, ties))
    for name, ops in writes.items():
        if name not in taped and name not in processed:
            check_order(ops, ())
            moves += [(order[name], _move(op)) for op in ops if op.moves]
            fills += [Fill(op) for op in ops if not op.moves]
    moves.sort(key=lambda entry: (entry[0], entry[1].region.offset))
    described = tuple(Target(name, Region.of(tensor), name in required) for name, tensor in targets.items())
    ordered = tuple(move for _, move in moves)
    return LandingPlan(manifest, described, ordered, tuple(fills), tuple(stages), recording.values)


@dataclass(frozen=True)
class _StageContents:
    """The operations of a stage: moves into its tensors, constants, parts of sources, and what is computed of them."""

    moves: list[Move]
    fills: list[Fill]
    inputs: tuple[Region, ...]
    tape: tuple[Op, ...]


def _stage_contents(recording: Recording, owned: set[str], number: int) -> _StageContents:
    moves: list[Move] = []
    fills: list[Fill] = []
    sources: dict[Ref, int] = {}
    tape: list[Op] = []

    def as_input(ref: Ref) -> Ref:
        if ref.kind != "source":
            return ref
        index = sources.setdefault(ref, len(sources))
        return Ref("input", index, replace(ref.region, offset=0))

    ops = mark_transforms(recording.producers(owned))
    check_order(ops, owned)
    for op in ops:
        into_live = op.target is not None and op.target.kind == "live"
        if into_live and op.moves:
            moves.append(_move(op, stage=number))
        elif into_live and op.fills:
            fills.append(Fill(op, number))
        else:
            tape.append(op.map(as_input))
    inputs = tuple(_input_region(ref.region) for ref in sources)
    for index, (ref, region) in enumerate(zip(sources, inputs, strict=True)):
        source = replace(region, offset=ref.region.offset)
        moves.append(Move(int(ref.key), source, input_name(index), region, number))
    return _StageContents(moves, fills, inputs, tuple(tape))


def _input_region(region: Region) -> Region:
    """Return the region's elements, each once and in the order of memory, in a tensor with the same strides.

    Strides decide in which order sums are made, and so their last bits.
    """
    dims = zip(region.stride, region.shape, strict=True)
    kept = sorted((dim for dim in dims if dim[1] != 1 and (dim[0] or not region.numel)), reverse=True)
    return Region(tuple(size for _, size in kept), tuple(stride for stride, _ in kept), 0, region.dtype)


def _move(op: Op, *, stage: int | None = None) -> Move:
    target, source = op.args
    return Move(int(source.key), source.region, str(target.key), target.region, stage)


def check_order(ops: Sequence[Op], owned: Collection[str]) -> None:
    """Raise `LandingError` if `ops`, in the loader's order, would have another outcome in the plan's order.

    The plan fills first, then moves, then computes. `owned` are the live tensors that are loaded together: only
    their values can be read.
    """
    written: dict[int | str, ElementSet] = defaultdict(ElementSet)
    loaded: dict[int | str, ElementSet] = defaultdict(ElementSet)
    computed: dict[int | str, ElementSet] = defaultdict(ElementSet)
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
        if op.moves_or_fills and computed[key].overlaps(region):
            raise LandingError(f"the loader sets a part of {key} that it has computed with")
        written[key].add(region)
        if not op.fills:
            loaded[key].add(region)
        if not op.moves_or_fills:
            computed[key].add(region)


def _registered_id(model: nn.Module, name: str) -> object:
    """Return the id of the tensor that the model has under this name; None if it has none."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters.get(attribute)
    tensor = module._buffers.get(attribute) if tensor is None else tensor
    return None if tensor is None else tensor_id(tensor)


def _misplaced(model: nn.Module, plan: LandingPlan) -> Iterator[str]:
    """Describe direct moves into live tensors that have another layout: buffers, or modules without a method."""
    wholes = {target.name: target.whole for target in plan.targets}
    live = live_tensors(model)
    for name in dict.fromkeys(move.target for move in plan.moves if move.stage is None):
        if name not in live or _layout(live[name]) != wholes[name]:
            yield f"{name}: vLLM keeps it in another layout than it loads it"


def _layout(tensor: torch.Tensor) -> Region:
    return Region.of(tensor, base_offset_bytes=int(tensor.storage_offset()) * tensor.element_size())


def _module(name: str) -> str:
    return name.rpartition(".")[0]
