"""rollcast in a vLLM worker: `worker_extension_cls` (vLLM worker process, every tensor-parallel rank).

vLLM adds `RollcastWorker` to the bases of its own worker class, so `self` is that worker. `__init__` never runs, and
every attribute must be new to vLLM's class: hence the prefix. What the methods do is in `WorkerSync`.
"""

import sys
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import msgspec

from rollcast.comm.device.nvml import gpu_state, gpu_uuid
from rollcast.rollout.landing.derived import watch_building
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout
from rollcast.rollout.protocol.messages import JoinGroup
from rollcast.rollout.protocol.worker_channel import attempt
from rollcast.rollout.worker.fingerprint import fingerprint_sha256
from rollcast.rollout.worker.sync import WorkerSync

# vLLM imports this module after the worker process has started and before it loads the model, and offers no
# later hook that is still early enough.
choose_cpu_layout()
watch_building()

# Python threads switch this often: while a worker decodes and receives at the same time, neither may keep the
# interpreter for long.
SWITCH_INTERVAL_S = 0.001


class RollcastWorker:
    """The methods that `AsyncLLM.collective_rpc` calls; arguments and results are plain msgpack values.

    A subclass adds methods of its own for `pool.call_workers`, and may replace what a sync does:

        class MyWorker(RollcastWorker):
            rollcast_sync_class = MyWorkerSync      # a subclass of WorkerSync
    """

    rollcast_sync_class: ClassVar[type[WorkerSync]] = WorkerSync

    @cached_property
    def rollcast_sync(self) -> WorkerSync:
        """This worker's side of the syncs."""
        return self.rollcast_sync_class(self)

    def rollcast_call(self, method: str, args: list[Any], phase: str) -> bytes:
        """Call a method by name. Return its `CallOutcome` in msgpack; `phase` is that of its failure.

        vLLM must not see a worker raise: it would leave the other workers' replies unread, and take each of them
        for the reply to the next call.
        """

        def act() -> msgspec.Raw:
            # Encoded in here: a result that msgpack cannot hold is a failure of the method, too.
            return msgspec.Raw(msgspec.msgpack.encode(getattr(self, method)(*args)))

        with self.rollcast_sync.passing_gate():
            return msgspec.msgpack.encode(attempt(act, worker=self.rollcast_sync.rank, phase=phase))

    def rollcast_connect(self, address: str, workers: int, lora_versions: int) -> None:
        """See `WorkerSync.connect`."""
        self.rollcast_sync.connect(address, workers=workers, lora_versions=lora_versions)
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def rollcast_prepare(self, manifest: bytes, kept: bytes) -> str:
        """See `WorkerSync.prepare`."""
        return self.rollcast_sync.prepare(manifest, kept)

    def rollcast_describe_landing(self) -> bytes:
        """Return the landing plan. Not collective."""
        return self.rollcast_sync.landing.plan.to_bytes()

    def rollcast_join(self, request: bytes) -> None:
        """See `WorkerSync.join`; `request` is a `JoinGroup` in msgpack."""
        self.rollcast_sync.join(msgspec.msgpack.decode(request, type=JoinGroup))

    def rollcast_leave(self) -> None:
        """See `WorkerSync.leave`."""
        self.rollcast_sync.leave()

    def rollcast_release(self) -> None:
        """See `WorkerSync.release`."""
        self.rollcast_sync.release()

    def rollcast_fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every live parameter and buffer by vLLM's name, and of what packed linears compute."""
        return fingerprint_sha256(self.rollcast_sync.model.module)

    def rollcast_gpu_state(self) -> dict[str, int | None]:
        """Return the memory and NVLink counters of this worker's GPU: a `GpuState` as a dict."""
        return asdict(gpu_state(gpu_uuid(self.rollcast_sync.device)))
