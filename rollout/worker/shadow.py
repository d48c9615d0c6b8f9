"""New weights beside the ones that serve: received while the engine decodes, switched to in one pass (worker)."""

import sys
from typing import Any

import torch

from rollcast.comm import Deadline, Group, Landing, Lane, PhaseTimer, WeightReceiver
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.rollout.errors import LandingError

# Of the GPU's memory: what vLLM may still need for itself.
SPARE_BYTES = 1 << 30


class ShadowLanding:
    """A `Landing` into spare memory. `apply` brings what has arrived into the live landing."""

    def __init__(self, landing: Landing, lane: Lane, *, device: torch.device) -> None:
        staged = {(message.stage, message.target) for message in lane.messages if message.stage is not None}
        direct = dict.fromkeys(message.target for message in lane.messages if message.stage is None)
        self._landing = landing
        rooms = {key: landing.staging(*key) for key in staged}
        _make_sure_it_fits(sum(t.nbytes for t in (*map(landing.live, direct), *rooms.values())), device)
        # Copies, so that what no move writes (padding) stays what it is.
        self._direct = {target: landing.live(target).clone() for target in direct}
        self._rooms: dict[int, dict[str, torch.Tensor]] = {
            stage: {} for bucket in lane.buckets for stage in bucket.finishes
        }
        for (stage, target), room in rooms.items():
            self._rooms[stage][target] = room.clone()
        landing.abandon()
        self._copy = FusedCopy([landing.live(target) for target in direct], list(self._direct.values()))

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._direct[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`."""
        return self._rooms[stage][target]

    def begin(self, *, confirming: bool = False) -> None:
        """See `Landing.begin`. Nothing is processed before `apply`, so there is nothing to confirm but bytes."""

    def finish(self, stage: int) -> None:
        """See `Landing.finish`."""

    def commit(self) -> None:
        """See `Landing.commit`."""

    def abandon(self) -> None:
        """See `Landing.abandon`."""

    def apply(self) -> None:
        """Write the live parameters, on the current stream. Collective where vLLM's processing is."""
        self._landing.begin()
        try:
            self._copy.run()
            for stage, rooms in self._rooms.items():
                for target, room in rooms.items():
                    self._landing.staging(stage, target).copy_(room)
                self._landing.finish(stage)
            self._landing.commit()
        except BaseException:
            self._landing.abandon()
            raise


class Shadow:
    """Receives beside decoding, one sync at a time (the bell's thread, on a stream of its own)."""

    def __init__(self, landing: Landing, lane: Lane, *, device: torch.device) -> None:
        self._landing = ShadowLanding(landing, lane, device=device)
        self._receiver = WeightReceiver(lane, self._landing, device=device)
        self._device = device
        self._switched: Any = None
        self._arrived = False

    def receive(self, group: Group, *, verify: str, deadline: Deadline) -> dict[str, float]:
        """Receive; return the seconds by phase. Not served before `apply`."""
        self._arrived = False
        timer = PhaseTimer()
        if self._switched is not None:
            # The last switch may still read what is now received into.
            torch.cuda.current_stream(self._device).wait_event(self._switched)
        self._receiver.receive(group, deadline=deadline, timer=timer, checksums=verify != "none")
        if verify == "full":
            self._receiver.confirm(group, deadline=deadline, timer=timer)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._arrived = True
        return timer.phases_s | {"total": timer.total_s()}

    def apply(self) -> None:
        """Switch to what has arrived, on the current stream."""
        if not self._arrived:
            raise RuntimeError("there is nothing complete to switch to")
        self._arrived = False
        self._landing.apply()
        if self._device.type == "cuda":
            self._switched = torch.cuda.current_stream(self._device).record_event()


def spare_bytes(device: torch.device) -> int:
    """GPU memory that a sync may take and keep."""
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - SPARE_BYTES


def _make_sure_it_fits(nbytes: int, device: torch.device) -> None:
    if (spare := spare_bytes(device)) < nbytes:
        total = torch.cuda.get_device_properties(device).total_memory
        raise LandingError(
            f"mode 'shadow' needs {nbytes / 1e9:.1f} GB of spare GPU memory for the new weights, and "
            f"{max(spare, 0) / 1e9:.1f} of {total / 1e9:.1f} GB can be had: lower gpu_memory_utilization, or sync with "
            "mode='in_place'"
        )
