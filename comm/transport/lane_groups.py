"""The groups of a worker's lanes (vLLM workers)."""

from rollcast.comm.transport.base import Group


class LaneGroups(dict[int, Group]):
    """The groups of one worker, by lane: joined, used and left together."""

    def set_low_priority(self, low_priority: bool) -> None:
        """See `Group.low_priority`."""
        for group in self.values():
            group.low_priority = low_priority

    def unmap(self) -> None:
        """See `Group.unmap`."""
        for group in self.values():
            group.unmap()

    def close(self) -> None:
        """See `Group.close`."""
        for group in self.values():
            group.close()
