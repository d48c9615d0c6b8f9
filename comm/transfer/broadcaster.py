"""The sending side of a plan (every trainer rank)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.plan.transfer import TransferPlan
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.holding import LocalParam
from rollcast.comm.transfer.lane_sender import Formats, LaneSender, OutgoingBucket
from rollcast.comm.transfer.source import WeightSource
from rollcast.comm.transport import Group


class WeightBroadcaster:
    """Streams what this trainer rank sends of a source's weights, in the plan's order, on its lanes.

        broadcaster = WeightBroadcaster(source, plan, rank=trainer_rank, device=torch.device("cpu"))
        source.peek_manifest()                                                   # before every send
        broadcaster.send(groups, deadline=Deadline(60), timer=PhaseTimer())      # groups: {lane index: group}

    Bucket k + 1 is packed while bucket k is on the wire. Buffers are allocated at the first send and kept. Weights
    that stay in the same memory keep their bucket views as well: later syncs run no Python per tensor, and buckets
    that need no buffer are all on their way at once.
    """

    def __init__(self, source: WeightSource, plan: TransferPlan, *, rank: int = 0, device: torch.device) -> None:
        self.source = source
        self._plan = plan
        self._device = device
        self._lanes_sent = [lane for lane in plan.lanes if lane.sender == rank and lane.buckets]
        index = {spec.name: number for number, spec in enumerate(source.manifest.specs)}
        # The plan's parameters that this source has, in the order of sending, and their numbers in the source.
        self._own = {p: index[name] for p in plan.order if (name := plan.manifest.specs[p].name) in index}
        self._lanes: dict[int, LaneSender] = {}
        self._formats: Formats = ()
        # The buckets of the last sync in sending order, and the source's tensor list that they are views of.
        self._cached: tuple[list[LocalParam], list[OutgoingBucket]] | None = None

    def send(
        self, groups: Mapping[int, Group], *, deadline: Deadline, timer: PhaseTimer, checksums: bool = False
    ) -> None:
        """Send this rank's share once, then the checksums if asked to. Collective if the source gathers.

        `groups` has the groups of this rank's lanes, of which it is rank 0. The caller has called
        `source.peek_manifest()` for this sync, which notices weights that were replaced. Raises `ValueError` for
        weights that no longer match the plan, and a transport's `RuntimeError` or `TimeoutError`; whatever it raises,
        only after a source that gathers was gathered whole, for the other trainer ranks gather with this one.
        """
        try:
            self._prepare_lanes()
        except Exception:
            _exhaust(self.source.gather([*self._own.values()]))
            raise
        buckets = self._outgoing(timer)
        try:
            for lane in self._lanes.values():
                lane.begin(groups[lane.index], deadline, timer, checksums=checksums)
            for bucket in buckets:
                self._lanes[bucket.lane].send(bucket)
            for lane in self._lanes.values():
                lane.finish()
        except Exception:
            _exhaust(buckets)
            raise

    def release(self) -> None:
        """Drop the references to the weights' memory; the next `send` gathers them again. Buffers are kept."""
        self._cached = None

    def _prepare_lanes(self) -> None:
        """Lay out the buffers for the weights' present dtypes and devices, unless the cached buckets are valid."""
        if self._cached is not None and self._cached[0] is self.source.stable_params():
            if all(bucket.is_valid() for bucket in self._cached[1][:1]):
                return
            # As a rule, if one weight was moved all were: read all of them now instead of bucket by bucket.
            self.source.current_manifest()
        formats = self.source.formats()
        if not self._lanes or formats != self._formats:
            self._lanes = {
                lane.index: LaneSender(lane, formats, self._device, own=self._own) for lane in self._lanes_sent
            }
            self._formats = formats
        self._cached = None

    def _outgoing(self, timer: PhaseTimer) -> Iterator[OutgoingBucket]:
        """Yield every bucket of every lane in the order of gathering, ready to be packed and sent."""
        sent = 0
        if self._cached is not None:
            # Each is checked just before it is sent, while those before it are on the wire.
            for bucket in takewhile(OutgoingBucket.is_valid, self._cached[1]):
                yield bucket
                sent += 1
            if sent == len(self._cached[1]):
                return
            # The trainer has moved weights since the last sync.
            self.source.check_unchanged()
            self._check_formats()
        yield from islice(self._gathered(timer), sent, None)

    def _check_formats(self) -> None:
        """Raise `ValueError` naming the first weight whose dtype, device or layout is another than at the last sync."""
        for spec, before, now in zip(self.source.manifest.specs, self._formats, self.source.formats(), strict=True):
            if now != before:
                raise ValueError(f"{spec} changed its dtype, device or layout since the last sync")

    def _gathered(self, timer: PhaseTimer) -> Iterator[OutgoingBucket]:
        """Yield the same buckets from newly gathered weights; cache them if the weights' memory stays the same."""
        stable = self.source.stable_params()
        buckets: list[OutgoingBucket] = []
        params = _timed(self.source.gather([*self._own.values()]), timer)
        try:
            for param, tensors in params:
                for lane in self._lanes.values():
                    for bucket in lane.add(param, tensors):
                        if stable is not None:
                            bucket.snapshot = self.source.storage_snapshot(bucket.params)
                            buckets.append(bucket)
                        yield bucket
        except Exception:
            _exhaust(params)
            raise
        self._cached = (stable, buckets) if stable is not None else None


def _exhaust(rest: Iterator[object]) -> None:
    """Gather the rest, which the other ranks gather too."""
    for _ in rest:
        pass


def _timed(
    params: Iterator[tuple[int, Sequence[torch.Tensor]]], timer: PhaseTimer
) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
    while True:
        with timer("gather"):
            item = next(params, None)
        if item is None:
            return
        yield item
