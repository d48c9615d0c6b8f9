"""Applies a landing plan to tensors of the same process: no wire, and one pass over the memory.

Shows what a sync costs a worker beside the wire (`landing_cost.py`), and lands weights in tests without an engine.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from rollcast.comm import Move
from rollcast.rollout.landing.apply import LiveLanding


class LocalTransfer:
    """Writes weights from tensors of this process into a vLLM model, again and again.

    `sources` are contiguous, in the manifest's order, shapes and dtypes; else `ValueError` is raised.
    """

    def __init__(self, landing: LiveLanding, sources: Sequence[torch.Tensor]) -> None:
        for spec, tensor in zip(landing.plan.manifest.specs, sources, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype) or not tensor.is_contiguous():
                raise ValueError(f"expected {spec}, contiguous; got {list(tensor.shape)} {tensor.dtype}")
        self.landing = landing
        self._direct: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._staged: dict[int, list[tuple[Move, torch.Tensor]]] = defaultdict(list)
        for move in landing.plan.moves:
            source = move.source.view(sources[move.param])
            if move.stage is None:
                self._direct[0].append(move.region.view(landing.live(move.target)))
                self._direct[1].append(source)
            else:
                self._staged[move.stage].append((move, source))

    def apply(self, *, verifying: bool = False) -> None:
        """Write the current values of the sources. Collective only where vLLM's processing is.

        When `verifying`, compare what is computed of them instead, and leave out what is copied.
        """
        with torch.no_grad():
            self.landing.begin(verifying=verifying)
            if self._direct[0] and not verifying:
                torch._foreach_copy_(*self._direct)
            for stage, moves in self._staged.items():
                names = {move.target for move, _ in moves}
                staging = {name: self.landing.staging(stage, name) for name in names}
                # No function call for each move: a model can have tens of thousands.
                targets = [
                    staging[move.target].as_strided(move.region.shape, move.region.stride, move.region.offset)
                    for move, _ in moves
                ]
                torch._foreach_copy_(targets, [source for _, source in moves])
                self.landing.finish(stage)
            self.landing.commit()
