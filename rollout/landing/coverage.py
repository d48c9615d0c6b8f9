"""Coverage of a tensor by writes: find elements that are written twice or not at all, and what the trainer left out.

Pure functions of regions and moves, for the compiler and for `LandingPlan.check` (worker).
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rollcast.comm import Manifest, Move, Region

Runs = NDArray[np.int64]
"""Runs of elements [start, end) of a flat tensor, one a row."""

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Names that a message lists at most.
MAX_NAMES = 4


def coverage(whole: Region, written: Sequence[Region], filled: Sequence[Region]) -> str | None:
    """Describe what is wrong with the writes to a tensor; None if each element is loaded once or set to a constant."""
    loads = _sorted_runs(written)
    overlap = np.flatnonzero(loads[1:, 0] < loads[:-1, 1])
    if overlap.size:
        first = overlap[0]
        return f"the loader writes elements {loads[first + 1, 0]} to {loads[first, 1]} twice"
    expected, covered = _merged(_sorted_runs([whole])), _merged(_sorted_runs([*written, *filled]))
    if np.array_equal(expected, covered):
        return None
    if _count(_union(expected, covered)) > _count(expected):
        return "the loader writes outside of it"
    missing = whole.numel - _count(covered)
    return (
        f"{missing} of {whole.numel} elements would not be written: the trainer does not send what they need, nor says "
        "by keep= of job.broadcaster() that the engine keeps what it has"
    )


class ElementSet:
    """A growing set of elements of a flat tensor."""

    def __init__(self) -> None:
        self._runs = _sorted_runs([])
        self._pending: list[Region] = []

    def add(self, region: Region) -> None:
        """Add every element of `region`."""
        self._pending.append(region)

    def covers(self, region: Region) -> bool:
        """Return whether every element of `region` is in the set."""
        runs = self._merge_pending()
        return np.array_equal(_union(runs, _runs_of(region)), runs)

    def overlaps(self, region: Region) -> bool:
        """Return whether any element of `region` is in the set."""
        runs, other = self._merge_pending(), _merged(_sorted_runs([region]))
        return _count(_union(runs, other)) < _count(runs) + _count(other)

    def _merge_pending(self) -> Runs:
        if self._pending:
            self._runs = _union(self._runs, *map(_runs_of, self._pending))
            self._pending = []
        return self._runs


class MissingParameters:
    """Guesses which parameters the trainer left out, from the layers for which it sent everything."""

    def __init__(self, moves: Sequence[Move], manifest: Manifest) -> None:
        self._sent = {spec.name for spec in manifest.specs}
        # Target without layer numbers -> target -> its parameters, as the keys of a dict to keep their order.
        self._parameters: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for move in moves:
            name = manifest.specs[move.param].name
            self._parameters[LAYER_NUMBER.sub("#", move.target)][move.target][name] = None

    def hint(self, target: str) -> str:
        """Return a clause that names the parameters which `target` lacks and another layer has; empty if none."""
        for other, names in self._parameters.get(LAYER_NUMBER.sub("#", target), {}).items():
            expected = [_renamed_for(target, name, other) for name in names]
            if absent := [name for name in expected if name not in self._sent]:
                rest = f" and {len(absent) - MAX_NAMES} more" if len(absent) > MAX_NAMES else ""
                return f" (judging by other layers: {', '.join(absent[:MAX_NAMES])}{rest})"
        return ""


def _renamed_for(target: str, name: str, other: str) -> str:
    """Return what the parameter `name` of the tensor `other` is called in the layer of `target`."""
    for theirs, own in zip(other.split("."), target.split("."), strict=True):
        if theirs != own:
            return re.sub(rf"(?<=\.){theirs}(?=\.)", own, name, count=1)
    return name


def _count(runs: Runs) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum())


def _union(*parts: Runs) -> Runs:
    return _merged(_sorted(parts))


def _sorted_runs(regions: Sequence[Region]) -> Runs:
    """Return all runs of the regions, sorted by start; overlapping runs stay apart."""
    return _sorted([np.empty((0, 2), np.int64), *map(_runs_of, regions)])


def _sorted(parts: Sequence[Runs]) -> Runs:
    runs = np.concatenate(parts)
    return runs[np.argsort(runs[:, 0], kind="stable")]


def _merged(runs: Runs) -> Runs:
    """Join sorted runs that adjoin or overlap."""
    if not len(runs):
        return runs
    ends = np.maximum.accumulate(runs[:, 1])
    breaks = np.flatnonzero(runs[1:, 0] > ends[:-1])
    return np.stack([runs[np.append(0, breaks + 1), 0], ends[np.append(breaks, len(runs) - 1)]], axis=1)


def _runs_of(region: Region) -> Runs:
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
