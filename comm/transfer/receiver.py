"""The receiving side of a plan (every vLLM worker)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.comm.device.storage import aligned
from rollcast.comm.plan.transfer import Lane, digest_of
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.bucket_work import broadcast_bucket
from rollcast.comm.transfer.buffer_ring import DEPTH
from rollcast.comm.transfer.landing import Landing
from rollcast.comm.transfer.lane_receiver import LaneReceiver, ReceiveSlot
from rollcast.comm.transport import Group, PersistentTensors, Work

# Most buckets that are received while an engine still reads the live parameters: what the wire carries in the time of
# a decoding step or two.
MAX_PREFETCHED = 4


class WeightReceiver:
    """Receives the buckets of a worker's lanes, in place wherever the layouts allow.

        receiver = WeightReceiver(lanes, landing, device=device)
        receiver.receive(groups, deadline=Deadline(60), timer=PhaseTimer())       # groups: {lane index: group}

    Bucket k + 1 of a lane is on its way before its bucket k has arrived; buckets are waited for in the order in which
    their last parameters are sent, lane after lane. Views and buffers are made once and kept.

    `start_prefetch` uses the time in which live parameters are still read: the first buckets are received beside them.
    """

    def __init__(self, lanes: Sequence[Lane], landing: Landing, *, device: torch.device) -> None:
        self._landing = landing
        self.device = device
        self.planned = tuple(lanes)
        self.digest = digest_of(lanes)
        """Digest of the lanes."""
        self.lanes = {lane.index: LaneReceiver(lane, landing, device) for lane in lanes}
        ends = [(bucket.position, lane.index, n) for lane in lanes for n, bucket in enumerate(lane.buckets)]
        self._arrivals = [(self.lanes[index], number) for _, index, number in sorted(ends)]
        self.first_lane = self._arrivals[0][0].index if self._arrivals else None
        """The lane of the bucket that is waited for first. Senders keep the same order: it needs no other lane."""
        # How many lanes have messages of a stage: it is complete when as many have sent their last.
        self._lanes_of_stage = Counter(stage for lane in lanes for bucket in lane.buckets for stage in bucket.finishes)
        self._missing: Counter[int] = Counter()
        self._prefetched: list[PrefetchedBucket] = []
        self.prefetch_count = 0
        """Buckets under way since `start_prefetch`."""

    def prepare_prefetch(self, spare_bytes_of: Callable[[torch.device], int]) -> bool:
        """Allocate memory for `start_prefetch`, once, of at most `spare_bytes_of(device)` bytes.

        Returns whether there is memory for any bucket.
        """
        if not self._prefetched:
            spare = spare_bytes_of(self.device)
            first = self._arrivals[:MAX_PREFETCHED]
            buffered = any(not slot.in_place for lane, number in first for slot in lane.slots[number])
            for lane, number in first[: DEPTH if buffered else MAX_PREFETCHED]:
                spare -= in_place_bytes(lane.slots[number])
                if spare < 0:
                    break
                try:
                    self._prefetched.append(PrefetchedBucket(lane.slots[number], lane.bind(number).posted))
                except torch.OutOfMemoryError:
                    # Spare memory may be fragmented.
                    break
        return bool(self._prefetched)

    def release(self) -> None:
        """Free the buffers and the memory of prefetched buckets; they are allocated again when they are needed."""
        self._prefetched = []
        for lane in self.lanes.values():
            lane.release()

    def start_prefetch(self, groups: Mapping[int, Group], *, deadline: Deadline) -> None:
        """Start to receive the first buckets that the senders have ready, beside the live parameters.

        Call `prepare_prefetch` before. `receive` continues from there.
        """
        self._reset()
        count = 0
        for (lane, number), bucket in zip(self._arrivals, self._prefetched, strict=False):
            group = groups[lane.index]
            if count and not group.ready():
                break
            bucket.work = broadcast_bucket(group, lane.planned, number, bucket.posted, deadline=deadline)
            count += 1
        self.prefetch_count = count

    def receive(
        self,
        groups: Mapping[int, Group],
        *,
        deadline: Deadline,
        timer: PhaseTimer,
        checksums: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Receive and land every weight once. Collective over each lane.

        With `checksums` the senders' are received too and compared with those of what arrived. Raises
        `VerifyError` naming the first message that differs. `meanwhile` is called when the first bytes are on their
        way.
        """
        prefetched, self.prefetch_count = self.prefetch_count, 0
        if not prefetched:
            self._reset()
        sums: dict[int, list[torch.Tensor]] = {index: [] for index in self.lanes}
        self._missing = self._lanes_of_stage.copy()
        beside = {(lane.index, number): at for at, (lane, number) in enumerate(self._arrivals[:prefetched])}

        def post(lane: LaneReceiver, number: int) -> None:
            if number < len(lane.slots) and (lane.index, number) not in beside:
                lane.post(number, groups[lane.index], deadline)

        try:
            self._landing.begin()
            for lane in self.lanes.values():
                post(lane, 0)
            for arrival, (lane, number) in enumerate(self._arrivals):
                early = self._prefetched[arrival] if arrival < prefetched else None
                with timer("wire"):
                    # Before the wait: the wire must not be idle between two buckets.
                    post(lane, number + 1)
                    if meanwhile is not None and not arrival:
                        meanwhile()
                    if early is not None:
                        early.wait(deadline)
                    else:
                        lane.wait(number, deadline)
                if checksums:
                    with timer("verify"):
                        sums[lane.index] += map(checksum, (early or lane.bind(number)).posted)
                with timer("apply"):
                    if early is not None:
                        early.copy.run()
                    lane.apply(number)
                    self._finish(lane, number)
            if checksums:
                with timer("verify"):
                    for index, of_lane in sums.items():
                        self.lanes[index].compare(of_lane, groups[index], deadline)
            with timer("apply"):
                self._landing.commit()
        except BaseException:
            self._landing.abort()
            raise

    def verify(self, groups: Mapping[int, Group], *, deadline: Deadline, timer: PhaseTimer) -> None:
        """Receive everything again and compare it with what is in memory. Collective over each lane.

        Live parameters are compared bit for bit; a stage is landed and processed again, which must change
        nothing. Raises `VerifyError` naming the first part that differs.
        """
        self._missing = self._lanes_of_stage.copy()
        with timer("verify"):
            try:
                self._landing.begin(verifying=True)
                for lane, number in self._arrivals:
                    lane.verify(number, groups[lane.index], deadline)
                    self._finish(lane, number)
                self._landing.commit()
            except BaseException:
                self._landing.abort()
                raise

    def _reset(self) -> None:
        for lane in self.lanes.values():
            lane.ring.reset()

    def _finish(self, lane: LaneReceiver, number: int) -> None:
        """Process the stages that this bucket, as the last, completes."""
        for stage in lane.planned.buckets[number].finishes:
            self._missing[stage] -= 1
            if not self._missing[stage]:
                self._landing.finish(stage)


class PrefetchedBucket:
    """Memory for a bucket that is received before the live parameters may be written.

    Messages that would be received in place are received into spare memory, and copied from there by `copy`.
    """

    def __init__(self, bucket: Sequence[ReceiveSlot], posted: PersistentTensors) -> None:
        live = [tensor for slot, tensor in zip(bucket, posted, strict=True) if slot.in_place]
        spare = torch.empty(in_place_bytes(bucket), dtype=torch.uint8, device=posted[0].device)
        sizes = [aligned(tensor.numel()) for tensor in live]
        parts = [part[: tensor.numel()] for part, tensor in zip(spare.split(sizes), live, strict=True)]
        in_order = iter(parts)
        pairs = zip(bucket, posted, strict=True)
        self.posted = PersistentTensors(next(in_order) if slot.in_place else tensor for slot, tensor in pairs)
        self.copy = FusedCopy(live, parts)
        self.work: Work | None = None

    def wait(self, deadline: Deadline) -> None:
        """Wait until the bucket has arrived."""
        work, self.work = self.work, None
        assert work is not None
        work.wait(deadline)


def in_place_bytes(bucket: Sequence[ReceiveSlot]) -> int:
    """Return the spare bytes that prefetching the bucket takes."""
    return sum(aligned(slot.nbytes) for slot in bucket if slot.in_place)
