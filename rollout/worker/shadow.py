"""New weights in spare memory: received while the engine decodes, then copied in at once (vLLM worker process)."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from rollcast.comm import Deadline, Landing, Lane, LaneGroups, PhaseTimer, WeightReceiver
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.rollout.errors import LandingError

# GPU memory left to vLLM, which may still allocate.
RESERVED_BYTES = 1 << 30


class ShadowLanding:
    """A `Landing` into spare memory. `apply` copies what it holds into the live landing."""

    def __init__(self, landing: Landing, lanes: Sequence[Lane], *, device: torch.device) -> None:
        messages = [message for lane in lanes for message in lane.messages]
        staged = {(message.stage, message.target) for message in messages if message.stage is not None}
        direct = dict.fromkeys(message.target for message in messages if message.stage is None)
        self._landing = landing
        buffers = {key: landing.staging(*key) for key in staged}
        _raise_if_too_large(sum(t.nbytes for t in (*map(landing.live, direct), *buffers.values())), device)
        # Copies, because no move writes the padding, which must stay as it is.
        self._direct = {target: landing.live(target).clone() for target in direct}
        self._staged: dict[int, dict[str, torch.Tensor]] = {stage: {} for stage in stages_in_order(lanes)}
        for (stage, target), buffer in buffers.items():
            self._staged[stage][target] = buffer.clone()
        landing.abort()
        self._copy = FusedCopy([landing.live(target) for target in direct], list(self._direct.values()))

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._direct[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`."""
        return self._staged[stage][target]

    def begin(self, *, verifying: bool = False) -> None:
        """See `Landing.begin`. Nothing is processed before `apply`, so only the bytes can be verified."""

    def finish(self, stage: int) -> None:
        """See `Landing.finish`."""

    def commit(self) -> None:
        """See `Landing.commit`."""

    def abort(self) -> None:
        """See `Landing.abort`."""

    def apply(self) -> None:
        """Write the live parameters, on the current stream. Collective where vLLM's processing is."""
        self._landing.begin()
        try:
            self._copy.run()
            for stage, buffers in self._staged.items():
                for target, buffer in buffers.items():
                    self._landing.staging(stage, target).copy_(buffer)
                self._landing.finish(stage)
            self._landing.commit()
        except BaseException:
            self._landing.abort()
            raise


class Shadow:
    """Receives into spare memory while the engine decodes, one sync at a time (endpoint's thread, side stream)."""

    def __init__(self, landing: Landing, lanes: Sequence[Lane], *, device: torch.device) -> None:
        self._landing = ShadowLanding(landing, lanes, device=device)
        self._receiver = WeightReceiver(lanes, self._landing, device=device)
        self._device = device
        self._applied: Any = None
        self._complete = False

    def receive(self, groups: LaneGroups, *, verify: str, deadline: Deadline) -> dict[str, float]:
        """Receive a version, which serves after `apply`; return the seconds by phase. Collective over the lanes."""
        self._complete = False
        timer = PhaseTimer()
        if self._applied is not None:
            # The last `apply` may still read the memory that is received into now.
            torch.cuda.current_stream(self._device).wait_event(self._applied)
        self._receiver.receive(groups, deadline=deadline, timer=timer, checksums=verify != "none")
        if verify == "full":
            self._receiver.verify(groups, deadline=deadline, timer=timer)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._complete = True
        return timer.phases_s | {"total": timer.total_s()}

    def apply(self) -> None:
        """Copy the received version into the live parameters, on the current stream.

        Raises `RuntimeError` if there is none that is complete.
        """
        if not self._complete:
            raise RuntimeError("no complete version has been received into spare memory: sync again")
        self._complete = False
        self._landing.apply()
        if self._device.type == "cuda":
            self._applied = torch.cuda.current_stream(self._device).record_event()


def stages_in_order(lanes: Sequence[Lane]) -> list[int]:
    """Return the stages of some lanes in the order in which the last of their messages are sent."""
    last = {
        stage: max(bucket.position for lane in lanes for bucket in lane.buckets if stage in bucket.finishes)
        for stage in {stage for lane in lanes for bucket in lane.buckets for stage in bucket.finishes}
    }
    return sorted(last, key=lambda stage: (last[stage], stage))


def spare_bytes(device: torch.device) -> int:
    """Return the bytes of GPU memory that a sync may allocate and keep."""
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - RESERVED_BYTES


def _raise_if_too_large(nbytes: int, device: torch.device) -> None:
    if (spare := spare_bytes(device)) < nbytes:
        total = torch.cuda.get_device_properties(device).total_memory
        raise LandingError(
            f"mode 'shadow' needs {nbytes / 1e9:.1f} GB of spare GPU memory for the new weights, and "
            f"{max(spare, 0) / 1e9:.1f} of {total / 1e9:.1f} GB are available: lower gpu_memory_utilization, or sync "
            "with mode='in_place'"
        )
