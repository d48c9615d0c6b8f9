"""Records what vLLM's loader does with tensors that have no data (worker)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rollcast.comm import Region
from rollcast.comm.device.storage import storage_id
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.dtypes import widens
from rollcast.rollout.landing.tape import COPY, PLACEMENT_ARGUMENTS, Op, Ref

aten = torch.ops.aten

# Copies that keep every element in its place: reading them is reading the original.
FAITHFUL_COPIES = frozenset({aten.clone.default, aten._to_copy.default})
# Operations without tensor results whose outcome depends on shapes only.
SHAPE_QUERIES = frozenset({aten.is_same_size.default})
# Operations that use only the shape and dtype of their first argument.
SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
# Operations that write the values of their second argument into the first.
COPIES = frozenset({aten.copy_.default, aten.fill_.Tensor})


class Recorder(TorchDispatchMode):
    """Records the operations on sources and live tensors (all on meta) and on whatever is computed from them.

    Tensors are known by their storage, which all views of a tensor share, on meta too: any chain of views is one
    strided region, and need not be recorded.
    """

    def __init__(self, sources: Sequence[torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.values: list[torch.Tensor] = []
        self.current = "no parameter yet"
        """The parameter that the loader was given last, for messages."""
        # By storage. Everything known is kept alive: a later tensor could get the same storage id.
        self._whole: dict[int, torch.Tensor] = {}
        self._roots: dict[int, tuple[str, int | str, int]] = {}
        # Temporaries that are faithful copies -> what they are a copy of, and their own layout.
        self._copies: dict[int | str, tuple[Ref, Region]] = {}
        self._temps = 0
        # Storage of a temporary -> the parameter that the loader was given last when it made it.
        self._made_of: dict[int, str] = {}
        for index, tensor in enumerate(sources):
            self._register("source", index, tensor)
        for name, tensor in live.items():
            self._register("live", name, tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((*args, *kwargs.values()))
        if not any(map(self._is_known, tensors)):
            if tensors and func is aten._to_copy.default:
                # What the loader puts beside a weight, such as numbers of experts, keeps its values.
                kwargs.pop("device", None)
            if not _is_made_on_meta(kwargs):
                return func(*args, **kwargs)
        if func is aten.index.Tensor and (rows := _evenly_spaced(args[1])) is not None:
            return args[0][rows]
        if func is aten.scalar_tensor.default:
            return func(*args, **kwargs | {"device": torch.device("cpu")})
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise LandingError(f"the loader draws random numbers ({func})")
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args, kwargs)
        if func._schema.is_mutable:
            self._record_write(func, args, kwargs)
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        if not all(tensor.is_meta for tensor in tensors):
            outcome = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        else:
            outcome = func(*args, **kwargs)
        results = _tensors((outcome,))
        if not results and func not in SHAPE_QUERIES:
            raise LandingError(f"what the loader does depends on the values of the weights ({func})")
        if not all(self._is_known(result) for result in results):
            self._record_results(func, args, kwargs, results)
        return outcome

    def still_referenced(self) -> Iterator[int | str]:
        """Yield what the loader has kept: sources by index, temporaries by the parameter that they were made of."""
        unused = _use_count(torch.empty(0, device="meta"))
        for root, whole in self._whole.items():
            kind, key, _ = self._roots[root]
            if kind != "live" and _use_count(whole) > unused:
                yield self._made_of.get(root, key)

    def _record_results(self, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        if func._schema.name.removeprefix("aten::") in SHAPE_ONLY:
            args = (self._blank(args[0]), *args[1:])
        plain_args, plain_kwargs = tree_map(self._argument, (args, kwargs))
        refs = tuple(None if self._is_known(result) else self._new_temp(result) for result in results)
        self._record(func, plain_args, plain_kwargs, refs)
        if func in FAITHFUL_COPIES and refs[0] is not None and self._is_known(args[0]):
            origin = self._ref(args[0])
            if origin.kind == "source" and widens(origin.region.dtype, results[0].dtype):
                self._copies[refs[0].key] = origin, Region.of(results[0])

    def _view_in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that makes the tensor itself a view, such as `t_()`. Refuse it if the memory changes."""
        before, nbytes = self._roots.get(storage_id(args[0])), args[0].untyped_storage().nbytes()
        outcome = func(*args, **kwargs)
        after = self._roots.get(storage_id(args[0])), args[0].untyped_storage().nbytes()
        if before is None or before[0] == "live" or after != (before, nbytes):
            raise LandingError(f"the loader changes the shape or the memory of a tensor in place ({func})")
        return outcome

    def _blank(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape and dtype without values."""
        layout = list(like.shape), list(like.stride())
        blank = torch.empty_strided(*layout, dtype=like.dtype, device="meta")
        self._record(aten.empty_strided.default, layout, {"dtype": like.dtype}, (self._new_temp(blank),))
        return blank

    def _record_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        changed = [argument.name for argument in func._schema.arguments if _is_written(argument)]
        if changed != [func._schema.arguments[0].name]:
            raise LandingError(f"the loader changes a tensor in a way that cannot be recorded ({func})")
        target = args[0]
        if not self._is_known(target):
            raise LandingError("the loader copies a weight into a tensor of its own")
        kind, key, _ = self._roots[storage_id(target)]
        if kind == "source":
            self._separate(target)
        elif kind == "temp":
            self._copies.pop(key, None)
        if func in COPIES:
            source = torch.as_tensor(args[1])
            source = source.expand(target.shape) if self._is_known(source) else source
            self.ops.append(Op(COPY, (self._ref(target), self._argument(source, widened=True)), {}, writes=True))
            return
        plain_args, plain_kwargs = tree_map(self._argument, (args, kwargs))
        self._record(func, plain_args, plain_kwargs, (), writes=True)

    def _record(
        self, func: Any, args: Any, kwargs: Any, results: tuple[Ref | None, ...], *, writes: bool = False
    ) -> None:
        kept = {name: value for name, value in kwargs.items() if name not in PLACEMENT_ARGUMENTS}
        self.ops.append(Op(str(func), tuple(args), kept, results, writes))

    def _separate(self, source: torch.Tensor) -> None:
        """Treat the source's memory as a copy from here on: the loader is about to change it."""
        root = storage_id(source)
        whole = self._whole[root]
        origin = self._ref(whole)
        del self._roots[root], self._whole[root]
        self.ops.append(Op("aten.clone.default", (origin,), {}, (self._new_temp(whole),)))

    def _argument(self, leaf: Any, *, widened: bool = False) -> Any:
        """Return a tensor as a `Ref`, and anything else as it is."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if self._is_known(leaf):
            return self._ref(leaf, widened=widened)
        if leaf.is_meta:
            raise LandingError("the loader computes with a tensor whose values are not known")
        self.values.append(leaf.detach().clone(memory_format=torch.contiguous_format))
        return Ref("value", len(self.values) - 1, Region.whole(leaf.shape, leaf.dtype))

    def _ref(self, tensor: torch.Tensor, *, widened: bool = False) -> Ref:
        """Return what the tensor is a part of; with `widened`, also through copies that have a wider dtype."""
        kind, key, base = self._roots[storage_id(tensor)]
        whole = self._whole[storage_id(tensor)]
        if tensor.dtype != whole.dtype or tensor.is_conj() or tensor.is_neg():
            raise LandingError(f"the loader takes the bytes of {whole.dtype} for something else")
        region = Region.of(tensor, base_offset_bytes=base)
        if kind == "temp" and key in self._copies:
            origin, layout = self._copies[key]
            if widened or origin.region.dtype == tensor.dtype:
                original = region_before_copy(origin.region, layout, region)
                if original is not None:
                    return Ref(origin.kind, origin.key, original)
        return Ref(kind, key, region)

    def _new_temp(self, tensor: torch.Tensor) -> Ref:
        self._temps += 1
        self._made_of[storage_id(tensor)] = self.current
        self._register("temp", self._temps, tensor)
        return self._ref(tensor)

    def _register(self, kind: str, key: int | str, tensor: torch.Tensor) -> None:
        base = int(tensor.storage_offset()) * tensor.element_size()
        self._roots.setdefault(storage_id(tensor), (kind, key, base))
        # Not the tensor itself: the loader can give that another memory, or another shape.
        self._whole.setdefault(storage_id(tensor), tensor.data)

    def _is_known(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and storage_id(leaf) in self._roots


def _use_count(tensor: torch.Tensor) -> int:
    """Return how many tensors share the memory, plus a constant."""
    return torch._C._storage_Use_Count(storage_id(tensor))  # pyright: ignore[reportAttributeAccessIssue]


def _tensors(leaves: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among these, and in lists among these. (`tree_leaves` would take most of a compile's time.)"""
    tensors: list[torch.Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, list | tuple):
            tensors += _tensors(leaf)
    return tensors


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf


def _evenly_spaced(indices: Sequence[Any]) -> slice | None:
    """Return the slice that selects the same of the first dimension; None if there is none, or it is not known."""
    if len(indices) != 1 or not isinstance(indices[0], torch.Tensor) or indices[0].is_meta or indices[0].dim() != 1:
        return None
    numbers: list[int] = indices[0].tolist()
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if indices[0].dtype == torch.bool or not numbers or step < 1 or numbers[0] < 0:
        return None
    rows = slice(numbers[0], numbers[-1] + 1, step)
    return rows if numbers == [*range(rows.start, rows.stop, step)] else None


def _is_made_on_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def region_before_copy(original: Region, copy: Region, part: Region) -> Region | None:
    """Return the region of `original` that `part` of its copy holds; None if its elements are not evenly strided.

    `copy` is the layout of the whole copy, of the same shape as `original`.
    """
    dims: list[tuple[int, int, int]] = []
    by_stride = sorted(zip(copy.shape, copy.stride, original.stride, strict=True), key=lambda dim: -dim[1])
    for size, stride, origin in by_stride:
        if size == 1:
            continue
        if dims and (dims[-1][1], dims[-1][2]) == (size * stride, size * origin):
            size *= dims.pop()[0]
        dims.append((size, stride, origin))
    offset, rest = original.offset, part.offset - copy.offset
    reached: list[int] = []
    for _, stride, origin in dims:
        steps, rest = divmod(rest, stride)
        reached.append(steps)
        offset += steps * origin
    strides: list[int] = []
    for size, stride in zip(part.shape, part.stride, strict=True):
        if size == 1 or stride == 0:
            strides.append(0)
            continue
        for index, (length, step, origin) in enumerate(dims):
            if stride % step == 0 and reached[index] + stride // step * (size - 1) < length:
                reached[index] += stride // step * (size - 1)
                strides.append(stride // step * origin)
                break
        else:
            return None
    return None if rest else Region(part.shape, tuple(strides), offset, original.dtype)
