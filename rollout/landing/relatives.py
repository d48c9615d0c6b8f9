"""Which parameters a trainer has left out, judging by what it sends for other layers (worker)."""

import re
from collections import defaultdict
from collections.abc import Sequence

from rollcast.comm import Manifest, Move

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
