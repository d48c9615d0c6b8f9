"""Whether every element of a tensor is written exactly once."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rollcast.comm import Manifest, Move, Region

Runs = NDArray[np.int64]


def coverage(whole: Region, written: Sequence[Region], filled: Sequence[Region]) -> str | None:
    """What is wrong with the writes to a tensor, in words; None if each element is written once or set once."""
    loads = _sorted(written)
    overlap = np.flatnonzero(loads[1:, 0] < loads[:-1, 1])
    if overlap.size:
        first = overlap[0]
        return f"the loader writes elements {loads[first + 1, 0]} to {loads[first, 1]} twice"
    expected, found = _joined(_sorted([whole])), _joined(_sorted([*written, *filled]))
    if np.array_equal(expected, found):
        return None
    if _count(_joined(_by_start([expected, found]))) > _count(expected):
        return "the loader writes outside of it"
    missing = whole.numel - _count(found)
    return f"{missing} of {whole.numel} elements would not be written: the trainer does not send what they need"


class Elements:
    """A set of elements of a flat tensor, which grows."""

    def __init__(self) -> None:
        self._joined = _sorted([])
        self._pending: list[Region] = []

    def add(self, region: Region) -> None:
        self._pending.append(region)

    def covers(self, part: Region) -> bool:
        """Whether it has every element of `part`."""
        have = self._have()
        return np.array_equal(_joined(_by_start([have, _runs(part)])), have)

    def overlaps(self, part: Region) -> bool:
        """Whether it has any element of `part`."""
        have, more = self._have(), _joined(_sorted([part]))
        return _count(_joined(_by_start([have, more]))) < _count(have) + _count(more)

    def _have(self) -> Runs:
        if self._pending:
            self._joined = _joined(_by_start([self._joined, *map(_runs, self._pending)]))
            self._pending = []
        return self._joined


def _count(runs: Runs) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum())


def _sorted(regions: Sequence[Region]) -> Runs:
    """All runs of elements [start, end) of the flat tensor, by their start."""
    return _by_start([np.empty((0, 2), np.int64), *map(_runs, regions)])


def _by_start(parts: Sequence[Runs]) -> Runs:
    runs = np.concatenate(parts)
    return runs[np.argsort(runs[:, 0], kind="stable")]


def _runs(region: Region) -> Runs:
    if region.numel == 0:
        return np.empty((0, 2), np.int64)
    dims = [(size, stride) for size, stride in zip(region.shape, region.stride, strict=True) if size > 1]
    dims.sort(key=lambda dim: -dim[1])
    run = 1
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    starts = np.array([region.offset], np.int64)
    for size, stride in dims:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return np.stack([starts, starts + run], axis=1)


def _joined(runs: Runs) -> Runs:
    """Sorted runs with those that adjoin or overlap made one."""
    if not len(runs):
        return runs
    ends = np.maximum.accumulate(runs[:, 1])
    breaks = np.flatnonzero(runs[1:, 0] > ends[:-1])
    return np.stack([runs[np.append(0, breaks + 1), 0], ends[np.append(breaks, len(runs) - 1)]], axis=1)


NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
SHOWN = 4


class Relatives:
    """The tensors of a worker that are the same but for the layer, and the parameters that they are made of."""

    def __init__(self, moves: Sequence[Move], manifest: Manifest) -> None:
        self._sent = {spec.name for spec in manifest.specs}
        # By name without numbers: by name: the parameters, as the keys of a dict to keep their order.
        self._made_of: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for move in moves:
            name = manifest.specs[move.param].name
            self._made_of[NUMBER.sub("#", move.target)][move.target][name] = None

    def left_out(self, target: str) -> str:
        """Names of parameters that `target` lacks and its relatives have, in words; empty if there are none."""
        for relative, names in self._made_of.get(NUMBER.sub("#", target), {}).items():
            wanted = [_in_place_of(name, relative, target) for name in names]
            if absent := [name for name in wanted if name not in self._sent]:
                more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
                return f", by the look of other layers {', '.join(absent[:SHOWN])}{more}"
        return ""


def _in_place_of(name: str, relative: str, target: str) -> str:
    """What the parameter `name` of `relative` is called for `target`."""
    for theirs, own in zip(relative.split("."), target.split("."), strict=True):
        if theirs != own:
            return re.sub(rf"(?<=\.){theirs}(?=\.)", own, name, count=1)
    return name
