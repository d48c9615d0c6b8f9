"""Whether every element of a tensor is written exactly once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rollcast.comm import Region

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
