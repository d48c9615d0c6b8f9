"""Tensor operations of vLLM's loader as data: they can be stored, compared and replayed (worker).

A tape is a tuple of `Op`s whose tensors are `Ref`s.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from rollcast.comm import Region
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.coverage import ElementSet

COPY = "aten.copy_.default"
# Operations that set a region to a constant.
FILLS = frozenset({"aten.zero_.default", "aten.fill_.Scalar"})
# Arguments that say where a result is put. A replay puts it where the weights are.
PLACEMENT_ARGUMENTS = frozenset({"device", "pin_memory"})


@dataclass(frozen=True, slots=True)
class Ref:
    """A region of a tensor that the loader works with."""

    kind: str
    """"source" (a parameter of the manifest), "live" (a tensor of the model), "temp" (an operation's result),
    "value" (a constant of the loader), "input" (a part of a source, as received)."""
    key: int | str
    region: Region


@dataclass(frozen=True, slots=True)
class Op:
    """One tensor operation; tensors among its arguments are `Ref`s."""

    func: str
    """Such as "aten.exp.default"."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Ref | None, ...] = ()
    """The temporaries that it makes, in the layout that later operations address; None for a view of a known tensor."""
    writes: bool = False
    """Whether it changes its first argument."""
    transforms: bool = False
    """Whether it computes what it writes from what was loaded there (w.copy_(f(w))), which is no second load."""

    @property
    def target(self) -> Ref | None:
        """What it changes."""
        return self.args[0] if self.writes else None

    def reads(self) -> list[Ref]:
        """Return what its outcome depends on."""
        if self.func == COPY:
            return [self.args[1]]
        leaves = tree_leaves((self.args, dict(self.kwargs)), is_leaf=_is_ref)
        refs = [leaf for leaf in leaves if isinstance(leaf, Ref)]
        return refs[1:] if self.func in FILLS else refs

    @property
    def fills(self) -> bool:
        """Whether it sets its target to a constant."""
        return self.func in FILLS or (self.func == COPY and self.args[1].kind == "value")

    @property
    def moves(self) -> bool:
        """Whether it copies a part of a source into its target."""
        return self.func == COPY and self.args[1].kind == "source"

    @property
    def moves_or_fills(self) -> bool:
        """Whether a plan can express it without a tape."""
        return self.moves or self.fills

    def map(self, change: Any) -> "Op":
        """Return the same operation with `change(ref)` in place of every `Ref`."""
        args, kwargs = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Ref) else leaf,
            (self.args, dict(self.kwargs)),
            is_leaf=_is_ref,
        )
        return replace(self, args=args, kwargs=kwargs)


def replay(ops: tuple[Op, ...], tensors: dict[tuple[str, int | str], torch.Tensor]) -> None:
    """Run the operations on real tensors of one device, by (kind, key). Adds the temporaries to `tensors`.

    Raises `LandingError` if a result has another shape or dtype than when it was recorded.
    """
    device = next((tensor.device for tensor in tensors.values()), None)

    def bind(leaf: Any) -> Any:
        return leaf.region.view(tensors[leaf.kind, leaf.key]) if isinstance(leaf, Ref) else leaf

    for op in ops:
        func = _torch_op(op.func)
        args, kwargs = tree_map(bind, (op.args, dict(op.kwargs)), is_leaf=_is_ref)
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = device
        outcome = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, torch.Tensor)]
        for ref, tensor in zip(op.results, leaves, strict=bool(op.results)):
            if ref is not None:
                tensors["temp", ref.key] = _with_layout(tensor, ref.region)


def mark_transforms(ops: Sequence[Op]) -> list[Op]:
    """Return the operations, with `transforms` set on those that only change what earlier ones have loaded."""
    marked: list[Op] = []
    loaded: dict[int | str, ElementSet] = defaultdict(ElementSet)
    # Temporary -> the live tensors that it is computed from.
    origins: dict[int | str, set[int | str]] = defaultdict(set)
    for op in ops:
        refs = [ref for ref in op.reads() if ref.kind in ("live", "temp")]
        computed_from = set().union(*({ref.key} if ref.kind == "live" else origins[ref.key] for ref in refs))
        target = op.target
        changed = (target,) if target is not None and target.kind == "temp" else op.results
        for ref in changed:
            if ref is not None:
                origins[ref.key] |= computed_from
        if target is not None and target.kind == "live":
            if target.key in computed_from and loaded[target.key].covers(target.region):
                op = replace(op, transforms=True)
            else:
                loaded[target.key].add(target.region)
        marked.append(op)
    return marked


def to_plain(value: Any) -> Any:
    """Return regions, references, operations and torch's constants as lists, maps, numbers and strings."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Region():
            return {"region": [value.shape, value.stride, value.offset, _torch_name(value.dtype)]}
        case Ref():
            return {"ref": [value.kind, value.key, to_plain(value.region)]}
        case Op():
            rest = [to_plain(value.results), value.writes, value.transforms]
            return {"op": [value.func, to_plain(list(value.args)), to_plain(dict(value.kwargs)), *rest]}
        case torch.Tensor():
            content = flat_bytes(value).cpu().numpy().tobytes()
            return {"tensor": [list(value.shape), _torch_name(value.dtype), content]}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {"torch": _torch_name(value)}
        case list() | tuple():
            return [to_plain(item) for item in value]
        case dict():
            return {"map": {key: to_plain(item) for key, item in value.items()}}
    raise LandingError(f"the loader passes a {type(value).__name__} to an operation")


def from_plain(value: Any) -> Any:
    """Return the inverse of `to_plain`; lists come back as tuples."""
    if isinstance(value, list | tuple):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((kind, data),) = value.items()
    match kind:
        case "region":
            shape, stride, offset, dtype = data
            return Region(tuple(shape), tuple(stride), offset, getattr(torch, dtype))
        case "ref":
            return Ref(data[0], data[1], from_plain(data[2]))
        case "op":
            return Op(data[0], from_plain(data[1]), from_plain(data[2]), from_plain(data[3]), *data[4:])
        case "tensor":
            shape, dtype, content = data
            flat = (
                torch.frombuffer(bytearray(content), dtype=torch.uint8)
                if content
                else torch.empty(0, dtype=torch.uint8)
            )
            return flat.view(getattr(torch, dtype)).view(shape)
        case "torch":
            return getattr(torch, data)
    return {key: from_plain(item) for key, item in data.items()}


def _with_layout(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """Return the tensor with the strides of `region`: later operations address its parts by them."""
    if (tuple(tensor.shape), tensor.dtype) != (region.shape, region.dtype):
        raise LandingError(f"expected {list(region.shape)} {region.dtype}, got {list(tensor.shape)} {tensor.dtype}")
    if tensor.stride() == region.stride:
        return tensor
    return torch.empty_strided(region.shape, region.stride, dtype=region.dtype, device=tensor.device).copy_(tensor)


def _torch_op(func: str) -> Any:
    """Return torch's operation of a name such as "aten.exp.default"."""
    namespace, name, overload = func.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)
