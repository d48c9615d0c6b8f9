"""Checkpoint parameters as parts of the trainer's tensors: a function on whole tensors, read as regions (trainer).

The function runs once, on tensors without data. Views, splits, permutations, reshapes, concatenation and stacking are
followed element by element; nothing is copied on the trainer, and every rank sends what it holds of the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollcast.comm.device.storage import storage_id
from rollcast.comm.plan.box import Box, Strided, cut, localize_copy, unwrap
from rollcast.comm.plan.region import Region
from rollcast.comm.transfer.holding import LocalParam

Conversion = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Returns the checkpoint's tensors by name, made of the trainer's full tensors by name.

    lambda state: {f"model.{name}": tensor for name, tensor in state.items()}

They may be made by views, splits, permutations, reshapes, concatenation and stacking. It is called once, with tensors
without data.
"""

aten = torch.ops.aten

# Operations whose result has the elements of their first argument, in the same order.
CLONES = frozenset({aten.clone.default, aten._to_copy.default, aten.contiguous.default})
ADVICE = "only views, splits, permutations, reshapes, concatenation and stacking can be sent"


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a checkpoint parameter that are in one of the trainer's parameters."""

    name: str
    """The trainer's name."""
    copy: Strided
    """From the full trainer's parameter to the full checkpoint parameter, both contiguous."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One checkpoint parameter, made of the trainer's."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    view: tuple[int, ...]
    """Shape in which what ranks hold of it is a range of indices in each dimension: the same on all ranks."""
    same: bool
    """Whether it has the elements of one trainer's parameter in the same order."""

    def bind(self, params: Mapping[str, LocalParam]) -> LocalParam:
        """Return what this rank holds of it, as views of what it holds of the trainer's parameters."""
        if self.same:
            return replace(params[self.pieces[0].name], shape=self.shape)
        boxes: list[Box] = []
        tensors: list[torch.Tensor] = []
        owners: list[torch.Tensor] = []
        for piece in self.pieces:
            param = params[piece.name]
            for box, tensor in zip(param.boxes, param.tensors, strict=True):
                for part in _parts_in(piece.copy, box, tensor.stride()):
                    for place, strides, offset in _places(part, self.view):
                        boxes.append(place)
                        tensors.append(tensor.as_strided(place.extent, strides, tensor.storage_offset() + offset))
                        owners.append(tensor)
        return LocalParam(self.shape, tuple(boxes), tuple(tensors), self, tuple(owners))

    def assemble(self, full: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the whole parameter; `full` returns a whole trainer's parameter."""
        if self.same:
            return full(self.pieces[0].name).reshape(self.shape)
        parts = [(piece.copy, full(piece.name).contiguous()) for piece in self.pieces]
        whole = torch.empty(self.shape, dtype=parts[0][1].dtype, device=parts[0][1].device)
        for copy, tensor in parts:
            sizes = [size for size, _, _ in copy.dims]
            source = tensor.as_strided(sizes, [step for _, step, _ in copy.dims], tensor.storage_offset() + copy.source)
            whole.as_strided(sizes, [step for _, _, step in copy.dims], copy.target).copy_(source)
        return whole


def trace(conversion: Conversion, params: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[Converted]:
    """Return what the conversion makes of parameters of these shapes and dtypes, in the order of its first pieces.

    Raises `ValueError` naming a parameter whose elements are not taken as they are.
    """
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in params.items()}
    tracer = _Tracer(sources)
    try:
        with torch.no_grad(), tracer:
            results = conversion(dict(sources))
    except KeyError as error:
        raise ValueError(f"checkpoint parameters are made of {error}, which this rank does not list") from error
    order = {name: index for index, name in enumerate(sources)}
    converted = [_converted(name, tensor, tracer, sources) for name, tensor in results.items()]
    return sorted(converted, key=lambda each: order[each.pieces[0].name] if each.pieces else len(order))


class Converter:
    """Makes checkpoint parameters of the trainer's. Traces the conversion again when names, shapes or dtypes change."""

    def __init__(self, conversion: Conversion | None) -> None:
        """None: the trainer's parameters are those of the checkpoint."""
        self._conversion = conversion
        self._specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._converted: list[Converted] = []

    def converted(self, params: Mapping[str, LocalParam]) -> list[Converted] | None:
        """Return the checkpoint parameters that these are converted to; None if they are the same."""
        if self._conversion is None:
            return None
        specs = {name: (param.shape, param.tensors[0].dtype) for name, param in params.items()}
        if specs != self._specs:
            self._converted, self._specs = trace(self._conversion, specs), specs
        return self._converted

    def bind(self, params: dict[str, LocalParam]) -> dict[str, LocalParam]:
        """Return what this rank holds of the checkpoint's parameters, by name; not those of which it has nothing."""
        converted = self.converted(params)
        if converted is None:
            return params
        bound = {each.name: each.bind(params) for each in converted}
        return {name: param for name, param in bound.items() if param.boxes}


@dataclass(frozen=True, slots=True)
class _Root:
    """The memory of a tensor without data, and where its elements come from."""

    tensor: torch.Tensor
    """Keeps the memory alive: another tensor could get its number."""
    name: str = ""
    """Of a trainer's parameter."""
    parts: tuple[tuple[Box, torch.Tensor], ...] = ()
    """Of a copy: boxes of it, and the tensors that they are copies of."""
    computed: str = ""
    """What else made it."""


class _Tracer(TorchDispatchMode):
    """Follows copies between tensors without data. Views need nothing: they share their memory."""

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._roots = {storage_id(tensor): _Root(tensor, name=name) for name, tensor in sources.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what its results are made of."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._set_computed(func, args[0], (args, kwargs))
        for tensor in tree_leaves(result):
            is_new = isinstance(tensor, torch.Tensor) and storage_id(tensor) not in self._roots
            if is_new and not self._set_parts(tensor, _copied(func, args, kwargs, tensor)):
                self._set_computed(func, tensor, (args, kwargs))
        return result

    def pieces(self, tensor: torch.Tensor) -> list[Piece]:
        """Return where a tensor's elements come from. Raises `ValueError` if they are not copies."""
        copy = Strided.of(Region.of(tensor), Region.whole(tensor.shape, tensor.dtype))
        return list(self._trace_back(tensor, copy))

    def _trace_back(self, tensor: torch.Tensor, copy: Strided) -> Iterator[Piece]:
        """Yield the pieces of a copy from the memory of `tensor`."""
        root = self._roots.get(storage_id(tensor))
        if root is None:
            raise ValueError(f"it is not made of the trainer's tensors: {ADVICE}")
        if root.computed or tensor.dtype != root.tensor.dtype or tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"it is computed by {root.computed or 'a change of dtype'}: {ADVICE}")
        if root.name:
            yield Piece(root.name, copy)
        for box, origin in root.parts:
            for part in _parts_in(copy, box, origin.stride()):
                yield from self._trace_back(origin, replace(part, source=part.source + origin.storage_offset()))

    def _set_parts(self, tensor: torch.Tensor, parts: list[tuple[Box, torch.Tensor]]) -> bool:
        """Note that a new tensor is a copy of these. Return False if it is not."""
        order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
        # In the order of memory, where a copy may keep the strides of a permuted tensor.
        if not parts or not tensor.permute(order).is_contiguous():
            return False
        if any(origin.dtype != tensor.dtype for _, origin in parts):
            return False
        permuted = [(_permuted(box, order), origin.permute(order)) for box, origin in parts]
        self._roots[storage_id(tensor)] = _Root(tensor, parts=tuple(permuted))
        return True

    def _set_computed(self, func: Any, tensor: torch.Tensor, arguments: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        names = {root.name: None for leaf in leaves if (root := self._roots.get(storage_id(leaf))) and root.name}
        of = f" of {', '.join(names)}" if names else ""
        self._roots[storage_id(tensor)] = _Root(tensor, computed=f"{func}{of}")


def _copied(func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """Return boxes of the result and the tensors that they are copies of; nothing if it is computed."""
    if func in CLONES:
        return [(Box.whole(result.shape), args[0])]
    if func not in (aten.cat.default, aten.stack.default):
        return []
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.dim()
    tensors = [tensor.unsqueeze(dim) for tensor in args[0]] if func is aten.stack.default else args[0]
    parts: list[tuple[Box, torch.Tensor]] = []
    first = 0
    for tensor in (tensor for tensor in tensors if tensor.dim() == result.dim()):
        last = first + tensor.shape[dim]
        start = [first if each == dim else 0 for each in range(result.dim())]
        stop = [last if each == dim else size for each, size in enumerate(result.shape)]
        parts.append((Box(tuple(result.shape), tuple(start), tuple(stop)), tensor))
        first = last
    return parts


def _converted(name: str, tensor: Any, tracer: _Tracer, sources: Mapping[str, torch.Tensor]) -> Converted:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is not a tensor but {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    try:
        pieces = tuple(tracer.pieces(tensor))
        view = _common_view(shape, [part for piece in pieces for part in _unfolded(piece.copy, sources[piece.name])])
    except ValueError as error:
        raise ValueError(f"{name} cannot be made of the trainer's weights: {error}") from None
    return Converted(name, shape, pieces, view, _is_same(pieces, shape, sources))


def _is_same(pieces: Sequence[Piece], shape: tuple[int, ...], sources: Mapping[str, torch.Tensor]) -> bool:
    if len(pieces) != 1 or sources[pieces[0].name].numel() != prod(shape):
        return False
    copy = pieces[0].copy
    return copy.source == copy.target == 0 and all(step == target for _, step, target in copy.dims)


def _unfolded(copy: Strided, source: torch.Tensor) -> list[Strided]:
    """Return the copy in parts none of whose dimensions runs over several of the source's."""
    parts = [copy]
    for size, stride in zip(source.shape, source.stride(), strict=True):
        if size > 1:
            parts = [unwrapped for part in parts for unwrapped in unwrap(part, size * stride)]
    return parts


def _common_view(shape: tuple[int, ...], parts: Sequence[Strided]) -> tuple[int, ...]:
    """Return a shape of the same elements that has a dimension for every stride of the parts' targets, if any has."""
    dims = [*zip(shape, Box.whole(shape).strides, strict=True)]
    dims += [(size, target) for part in parts for size, _, target in part.dims]
    view: list[int] = []
    above = prod(shape)
    for stride in sorted({stride for size, stride in dims if size > 1}, reverse=True):
        if above % stride:
            return shape
        view.append(above // stride)
        above = stride
    plain = [size for size in shape if size != 1]
    return shape if [size for size in view if size != 1] == plain or not prod(shape) else tuple(view)


def _parts_in(copy: Strided, box: Box, strides: Sequence[int]) -> Iterator[Strided]:
    """Yield the parts of a copy whose source is in the box, with the box's own tensor, of these strides, as source."""
    for part in cut(copy, box):
        yield from localize_copy(part, box, strides)


def _places(part: Strided, view: tuple[int, ...]) -> Iterator[tuple[Box, list[int], int]]:
    """Yield boxes of `view` that the part writes, with the strides and the offset of the source of each."""
    steps = Box.whole(view).strides
    start, rest = [], part.target
    for stride in steps:
        index, rest = divmod(rest, stride) if stride else (0, rest)
        start.append(index)
    by_stride = {stride: dim for dim, (size, stride) in enumerate(zip(view, steps, strict=True)) if size > 1}
    extent, strides = [1] * len(view), [1] * len(view)
    for number, (size, source, target) in enumerate(part.dims):
        while size > 1:
            dim = by_stride.get(target)
            count = 0 if dim is None else min(size, view[dim])
            if dim is None or size % count or start[dim] + count > view[dim]:
                # No range of indices of this view: each index by itself.
                for index in range(part.dims[number][0]):
                    yield from _places(part.part(number, index, 1), view)
                return
            extent[dim], strides[dim] = count, source
            size, source, target = size // count, source * count, target * count
    stop = map(sum, zip(start, extent, strict=True))
    yield Box(view, tuple(start), tuple(stop)), strides, part.source


def _permuted(box: Box, order: Sequence[int]) -> Box:
    shape, start, stop = ([values[dim] for dim in order] for values in (box.shape, box.start, box.stop))
    return Box(tuple(shape), tuple(start), tuple(stop))
