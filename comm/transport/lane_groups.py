"""The groups of a worker's lanes (vLLM workers)."""

from collections.abc import Mapping

from rollcast.comm.transport.base import Group


class LaneGroups(dict[int, Group]):
    """The groups of one worker, by lane: joined, used and left together."""

    def __init__(self, groups: Mapping[int, Group]) -> None:
        super().__init__(groups)

    def set_low_priority(self, low_priority: bool) -> None:
        """See `Group.low_priority`."""
        for group in self.values():
            group.low_priority = low_priority

    def ready(self) -> bool:
        """Return whether a broadcast of every group can start without waiting for its root."""
        return all(group.ready() for group in self.values())

    def unmap(self) -> None:
        """See `Group.unmap`."""
        for group in self.values():
            group.unmap()

    def close(self) -> None:
        """See `Group.close`."""
        for group in self.values():
            group.close()
