"""The sending side of a plan (runs on every trainer rank)."""

from collections.abc import Iterator, Mapping
from itertools import islice, takewhile

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.plan.transfer import TransferPlan
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.lane_sender import Formats, Load, Outbox
from rollcast.comm.transfer.source import WeightSource
from rollcast.comm.transport.base import Group


class WeightBroadcaster:
    """Walks a source in the plan's order and streams the lanes that this trainer rank sends.

        broadcaster = WeightBroadcaster(source, plan, rank=trainer_rank, device=torch.device("cpu"))
        broadcaster.send(groups, deadline=Deadline(60), timer=PhaseTimer())      # groups: {lane index: group}

    Bucket k + 1 is packed while bucket k is on the wire. Buffers are made at the first send and kept; so are the
    views of weights that stay where they are, and then no weight costs a line of Python, and what needs no buffer is on
    its way at once.
    """

    def __init__(self, source: WeightSource, plan: TransferPlan, *, rank: int = 0, device: torch.device) -> None:
        self._source = source
        self._plan = plan
        self._device = device
        self._own = [lane for lane in plan.lanes if lane.sender == rank and lane.buckets]
        self._lanes: dict[int, Outbox] = {}
        self._formats: Formats = ()
        self._bound: tuple[list[torch.Tensor], list[Load]] | None = None

    def send(
        self,
        groups: Mapping[int, Group],
        *,
        deadline: Deadline,
        timer: PhaseTimer,
        checksums: bool = False,
        looked: bool = False,
    ) -> None:
        """Send every weight once, then their checksums if asked to. Collective over the trainer ranks.

        `groups` has the groups of this rank's lanes, of which it is rank 0. With `looked` the caller has called
        `source.glance()` for this very send. A failure of the wire is raised after the walk: the other trainer
        ranks gather shards with this one and would wait for it for ever.
        """
        if not looked:
            self._source.glance()
        self._lay_out()
        loads = self._loads(timer)
        try:
            for lane in self._lanes.values():
                lane.open(groups[lane.index], deadline, timer, checksums=checksums)
            for load in loads:
                self._lanes[load.lane].flush(load)
            for lane in self._lanes.values():
                lane.finish()
        except Exception:
            drain(loads)
            raise

    def release(self) -> None:
        """Let go of the weights' memory; the next `send` finds it again. Buffers are kept."""
        self._bound = None

    def _lay_out(self) -> None:
        """Plan the buffers, for weights as the trainer has them now."""
        if self._bound is not None and self._bound[0] is self._source.steady():
            if all(load.holds() for load in self._bound[1][:1]):
                return
            # As a rule, if one was moved all were.
            self._source.current()
        formats = self._source.formats()
        if not self._lanes or formats != self._formats:
            self._lanes = {lane.index: Outbox(lane, formats, self._device) for lane in self._own}
            self._formats = formats
        self._bound = None

    def _loads(self, timer: PhaseTimer) -> "Iterator[Load]":
        """Every bucket of every lane, in the order of the walk, ready to be packed and sent."""
        sent = 0
        if self._bound is not None:
            # Each is looked at when its turn comes: meanwhile, those before it travel.
            for load in takewhile(Load.holds, self._bound[1]):
                yield load
                sent += 1
            if sent == len(self._bound[1]):
                return
            # The trainer has given its weights other memory since.
            self._source.check()
            if self._source.formats() != self._formats:
                raise ValueError("weights have changed their dtype or device since the last sync")
        yield from islice(self._made(timer), sent, None)

    def _made(self, timer: PhaseTimer) -> "Iterator[Load]":
        """The same, from a walk; they are kept if weights stay where they are."""
        steady = self._source.steady()
        made: list[Load] = []
        for param, tensor in _timed(self._source.walk(self._plan.walk), timer):
            for lane in self._lanes.values():
                for load in lane.feed(param, tensor):
                    if steady is not None:
                        load.spots = self._source.spots(load.params)
                        made.append(load)
                    yield load
        self._bound = (steady, made) if steady is not None else None


def drain(tensors: Iterator[object]) -> None:
    """Walk the rest, which the other ranks walk too."""
    for _ in tensors:
        pass


def _timed(tensors: Iterator[tuple[int, torch.Tensor]], timer: PhaseTimer) -> Iterator[tuple[int, torch.Tensor]]:
    while True:
        with timer("gather"):
            item = next(tensors, None)
        if item is None:
            return
        yield item
