"""The landing plan: where each byte of the manifest lands in a vLLM worker, as data.

    python -m rollcast.rollout.landing --model PATH     # prints the plan of a model

A worker makes it: `compiler.py` runs vLLM's own loader once, and `apply.py` carries the plan out at every sync.
Trainers receive it as bytes and make a `TransferPlan` of its moves.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgspec
import torch

from rollcast.comm import Manifest, Move, Region
from rollcast.rollout.landing.coverage import MissingParameters, coverage
from rollcast.rollout.landing.dtypes import number_kind
from rollcast.rollout.landing.tape import Op, Ref, from_plain, to_plain


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that vLLM's loader can write, in the layout that the loader sees."""

    name: str
    whole: Region
    loadable: bool
    """Whether it must be written: parameters must, buffers may."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A module whose weights are not simply copied."""

    module: str
    """vLLM's path of the module."""
    kind: str
    """"tape": operations compute its weights from what arrives. "staged": vLLM processes them after loading."""
    reasons: tuple[str, ...]
    inputs: tuple[Region, ...] = ()
    """Parts of sources that the operations read; moves name them by `input_name` of their index."""
    tape: tuple[Op, ...] = ()
    """Replayed when all moves have arrived."""
    shares: tuple[tuple[str, str], ...] = ()
    """(own tensor, live tensor that shares its memory): tied weights."""


def input_name(index: int) -> str:
    """Return the name by which moves address one of `Stage.inputs`."""
    return f"input/{index}"


def input_index(name: str) -> int | None:
    """Return the index that `input_name` has encoded; None for the name of one of the model's tensors."""
    kind, _, index = name.rpartition("/")
    return int(index) if kind else None


@dataclass(frozen=True, slots=True)
class Fill:
    """A region that the loader sets to a constant (padding) before it loads the rest."""

    op: Op
    stage: int | None = None
    """Index of the stage whose tensor it is; None for a live tensor."""

    @property
    def target(self) -> Ref:
        """The region that is set."""
        return self.op.args[0]


@dataclass(frozen=True, slots=True)
class ParameterView:
    """A tensor that was a view of a parameter when the model was built, and that vLLM has parted from it since."""

    name: str
    """See `model_tensors`."""
    parameter: str
    region: Region
    """Of the parameter, in the layout that the loader sees."""


@dataclass(frozen=True, eq=False)
class LandingPlan:
    """All moves of one worker, in the order of its memory, and what is done when they have arrived.

    Workers with equal digests receive the same bytes: they share a lane.
    """

    manifest: Manifest
    """The trainer's parameters, in the dtypes in which this worker receives them."""
    targets: tuple[Target, ...]
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...] = ()
    stages: tuple[Stage, ...] = ()
    values: tuple[torch.Tensor, ...] = ()
    """Constants of the loader."""
    attention: tuple[str, ...] = ()
    """Attention layers that compute weights of their own from others (MLA): processed when everything has arrived."""
    kept: tuple[tuple[str, Region], ...] = ()
    """(live tensor, region of it) that stays as the engine has it."""
    views: tuple[ParameterView, ...] = ()
    """Tensors that get the values of parameters, as they did when the engine loaded them."""
    recomputed: tuple[str, ...] = ()
    """Modules that keep something computed from weights and can compute it again: done when everything has arrived."""
    refused: tuple[str, ...] = ()
    """What cannot be expressed, each naming a parameter or module."""

    def check(self) -> list[str]:
        """Return the problems, each naming a tensor.

        Elements that are not written exactly once, casts that lose the numbers, and what cannot be expressed.
        """
        written, filled = self._writes()
        problems = list(self.refused)
        missing = MissingParameters(self.moves, self.manifest)
        for target in self.targets:
            if not target.loadable and not written[target.name]:
                continue
            if problem := coverage(target.whole, written[target.name], filled[target.name]):
                problems.append(f"{target.name}: {problem}{missing.hint(target.name)}")
        return problems + list(dict.fromkeys(self._lossy_casts()))

    @property
    def written(self) -> set[str]:
        """Names of the targets that get weights or constants."""
        return {name for by_target in self._writes() for name in by_target}

    @property
    def unused(self) -> list[int]:
        """Indices of the parameters of which this worker keeps nothing: remote experts, or a mistake."""
        used = {move.param for move in self.moves}
        return [index for index, spec in enumerate(self.manifest.specs) if index not in used and spec.numel]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything but the reasons, which are text for people."""
        without_reasons = replace(self, stages=tuple(replace(stage, reasons=()) for stage in self.stages))
        return hashlib.sha256(without_reasons.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the plan as msgpack."""
        return msgspec.msgpack.encode(
            {
                "manifest": self.manifest.to_bytes(),
                "targets": [[target.name, to_plain(target.whole), target.loadable] for target in self.targets],
                "moves": [_encode_move(move) for move in self.moves],
                "fills": [[to_plain(fill.op), fill.stage] for fill in self.fills],
                "stages": [_encode_stage(stage) for stage in self.stages],
                "values": [to_plain(value) for value in self.values],
                "attention": self.attention,
                "kept": [[name, to_plain(region)] for name, region in self.kept],
                "views": [[view.name, view.parameter, to_plain(view.region)] for view in self.views],
                "recomputed": self.recomputed,
                "refused": self.refused,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "LandingPlan":
        """Return the plan that `to_bytes` has encoded."""
        plain = msgspec.msgpack.decode(data)
        return cls(
            manifest=Manifest.from_bytes(plain["manifest"]),
            targets=tuple(Target(name, from_plain(whole), loadable) for name, whole, loadable in plain["targets"]),
            moves=tuple(_decode_move(move) for move in plain["moves"]),
            fills=tuple(Fill(from_plain(op), stage) for op, stage in plain["fills"]),
            stages=tuple(_decode_stage(stage) for stage in plain["stages"]),
            values=from_plain(plain["values"]),
            attention=tuple(plain["attention"]),
            kept=tuple((name, from_plain(region)) for name, region in plain["kept"]),
            views=tuple(ParameterView(name, owner, from_plain(region)) for name, owner, region in plain["views"]),
            recomputed=tuple(plain["recomputed"]),
            refused=tuple(plain["refused"]),
        )

    def _lossy_casts(self) -> Iterator[str]:
        """Describe moves between kinds of numbers: vLLM's loaders cast silently, and garbage comes out."""
        for move in self.moves:
            wire, live = move.source.dtype, move.region.dtype
            if number_kind(wire) != number_kind(live):
                yield f"{move.target}: the trainer's {self.manifest.specs[move.param]} does not fit into {live}"

    def _writes(self) -> tuple[dict[str, list[Region]], dict[str, list[Region]]]:
        """Return, by target, the regions that get weights, and those that are set to constants or kept."""
        written: dict[str, list[Region]] = defaultdict(list)
        filled: dict[str, list[Region]] = defaultdict(list)
        for move in self.moves:
            written[move.target].append(move.region)
        for name, region in self.kept:
            filled[name].append(region)
        for fill in self.fills:
            filled[str(fill.target.key)].append(fill.target.region)
        for op in (op for stage in self.stages for op in stage.tape):
            target = op.target
            if target is None or target.kind != "live":
                continue
            # A transformation of what was loaded (w.copy_(f(w))) is no second load.
            if not op.transforms:
                written[str(target.key)].append(target.region)
        return written, filled


def _encode_move(move: Move) -> list[Any]:
    return [move.param, to_plain(move.source), move.target, to_plain(move.region), move.stage]


def _decode_move(plain: list[Any]) -> Move:
    param, source, target, region, stage = plain
    return Move(param, from_plain(source), target, from_plain(region), stage)


def _encode_stage(stage: Stage) -> list[Any]:
    return [stage.module, stage.kind, stage.reasons, to_plain(stage.inputs), to_plain(stage.tape), stage.shares]


def _decode_stage(plain: list[Any]) -> Stage:
    module, kind, reasons, inputs, tape, shares = plain
    return Stage(module, kind, tuple(reasons), from_plain(inputs), from_plain(tape), from_plain(shares))
