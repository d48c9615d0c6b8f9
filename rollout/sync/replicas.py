"""Whether trainer ranks that hold the same parameters have the same values (every trainer rank)."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import msgspec

from rollcast.comm import Deadline, Holders, Manifest, Overlap, WeightSource, replica_checksums
from rollcast.comm.agreement import Agreement
from rollcast.rollout.errors import Failure, SyncError

MAX_NAMED = 3


class Checksums(msgspec.Struct, frozen=True):
    """What one rank holds of the overlaps, or why it cannot be read."""

    sums: Mapping[int, Sequence[int]] = {}
    """Checksums of the rank's tensors, by index of the overlap."""
    error: str = ""


class Replicas:
    """Compares the tensors that several trainer ranks hold of the same parameters.

    Each element is sent by one of its holders only: what the others have would never be looked at.
    """

    def __init__(self, agreement: Agreement, source: WeightSource, holders: Holders, *, manifest: Manifest) -> None:
        """`manifest` is the transfer plan's, with the dtypes of the wire."""
        self._agreement = agreement
        self._source = source
        self._holders = holders
        self._manifest = manifest

    @cached_property
    def _overlaps(self) -> Sequence[Overlap]:
        """Looked for when they are compared first: most syncs are not verified."""
        return self._holders.overlaps()

    def compare(self, topic: str, *, deadline: Deadline) -> None:
        """Raise `SyncError` on all ranks, naming parameters and ranks, where replicas differ. Collective.

        Compared are the bits that would be sent, on their devices; checksums cross the job's store.
        """
        if not self._overlaps:
            return
        try:
            own = Checksums(replica_checksums(self._source, self._manifest, self._overlaps))
        except Exception as error:
            own = Checksums(error=str(error) or type(error).__name__)
        verdict = self._agreement.decide(f"{topic}/replicas", own, self._take, deadline=deadline)
        if verdict.error:
            raise SyncError(verdict.error, failures=[Failure(text=verdict.error, phase="verify")])

    def _take(self, of_ranks: Sequence[Checksums]) -> Checksums:
        """Rank 0: raise `ValueError` if any overlap has different checksums."""
        if errors := [f"trainer rank {rank}: {each.error}" for rank, each in enumerate(of_ranks) if each.error]:
            raise ValueError("; ".join(errors))
        different = [
            problem for number in range(len(self._overlaps)) if (problem := self._difference(number, of_ranks))
        ]
        if different:
            more = f", and {len(different) - MAX_NAMED} more parts" if len(different) > MAX_NAMED else ""
            raise ValueError(
                f"trainer ranks hold different values of the same weights: {'; '.join(different[:MAX_NAMED])}{more}. "
                "Load or broadcast the same weights on all of them"
            )
        return Checksums()

    def _difference(self, number: int, of_ranks: Sequence[Checksums]) -> str:
        """Describe the first two ranks that differ in an overlap; empty if none do."""
        sums = [(rank, each) for rank, checksums in enumerate(of_ranks) for each in checksums.sums.get(number, ())]
        for rank, each in sums:
            if each != sums[0][1]:
                overlap = self._overlaps[number]
                spec = self._manifest.specs[overlap.param]
                where = f"{spec.name} {overlap.box}"
                return (
                    f"{where} (twice on rank {rank})"
                    if rank == sums[0][0]
                    else f"{where} (ranks {sums[0][0]} and {rank})"
                )
        return ""
