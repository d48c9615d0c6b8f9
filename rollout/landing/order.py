"""Whether what a loader did in one order may be done in a plan's: constants, then moves, then the tape (worker)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rollcast.rollout.landing.coverage import Elements
from rollcast.rollout.landing.tape import LandingError, Op


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
