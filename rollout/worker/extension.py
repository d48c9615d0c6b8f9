"""rollcast inside a vLLM worker process: `worker_extension_cls` (every tensor-parallel rank of every engine).

vLLM adds `RollcastWorker` to the bases of its own worker class, so `self` is that worker. Its `__init__` never
runs, and every attribute must be new to the worker: hence the prefix. What a sync needs at once (`receive`,
`receive_aside`, `apply`) is called by the worker's bell, on its thread, and is in `synced.py`; all else by vLLM.
"""

import logging
import sys
from dataclasses import asdict
from typing import Any

from rollcast.comm import Deadline, Lane, Manifest, join_group
from rollcast.comm.device.nvml import gpu_state, gpu_uuid
from rollcast.comm.plan.buckets import fill_buckets
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.lora import is_adapter, register_adapters
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout
from rollcast.rollout.protocol.messages import Assignment
from rollcast.rollout.protocol.worker_channel import Bell
from rollcast.rollout.worker.fingerprint import fingerprints
from rollcast.rollout.worker.step_gate import Gate
from rollcast.rollout.worker.sync import SyncedWorker

# vLLM imports this module after the worker process has started and before it loads the model, and offers no
# later hook that is still early enough.
choose_cpu_layout()

SHOWN = 10
# While a worker decodes and receives at the same time, neither may keep the interpreter for long.
SWITCH_INTERVAL_S = 0.001
logger = logging.getLogger(__name__)


class RollcastWorker(SyncedWorker):
    """Methods that `AsyncLLM.collective_rpc` calls; arguments and results are plain msgpack values."""

    def rollcast_call(self, method: str, args: list[Any]) -> list[Any]:
        """Call a method by name, for vLLM: see `rollcast_outcome`."""
        if self.rollcast_gate is None:
            return self.rollcast_outcome(method, args)
        with self.rollcast_gate.passing():
            return self.rollcast_outcome(method, args)

    def rollcast_outcome(self, method: str, args: list[Any]) -> list[Any]:
        """Call a method by name: [None, its result], or [the text of what it raised, None].

        vLLM must not see a worker raise: it would leave the other workers' replies unread, and take each of them
        for the reply to the next call.
        """
        try:
            return [None, getattr(self, method)(*args)]
        except Exception as error:
            logger.exception("%s failed", method)
            return [str(error) or type(error).__name__, None]

    def rollcast_watch(self, address: str, workers: int, lora_versions: int) -> None:
        """From now on count steps and tokens, and answer the bell. Called once, before the first request.

        `lora_versions` adapters of zeros are there from then on: 0 for engines without LoRA.
        """
        worker: Any = self
        if lora_versions:
            register_adapters(self._rollcast_model(), versions=lora_versions)
        self.rollcast_gate = Gate(worker)
        self.rollcast_bell = Bell(address, rank=worker.rank, workers=workers, run=self.rollcast_outcome)
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def rollcast_prepare(self, manifest: bytes) -> str:
        """Compile the landing plan; return its digest. Collective over the engine's workers.

        Raises `LandingError` if the model cannot take the manifest, naming the parameters.
        """
        self._rollcast_refuse()
        weights = Manifest.from_bytes(manifest)
        self._rollcast_refuse_kind(weights)
        plan = self._rollcast_compile(weights)
        if problems := plan.check():
            shown = "\n  ".join(problems[:SHOWN]) + ("\n  ..." if len(problems) > SHOWN else "")
            raise LandingError(f"the trainer's weights do not fit the engine's model:\n  {shown}")
        self.rollcast_landing = self._rollcast_land(plan)
        return plan.digest

    def rollcast_describe_landing(self) -> bytes:
        """The landing plan. Not collective."""
        return self.rollcast_landing.plan.to_bytes()

    def rollcast_join(
        self, address: str, assignments: list[list[Any]], walk: list[int], bucket_bytes: int, timeout_s: float
    ) -> None:
        """Join this worker's lane; its assignment is an `Assignment` as a list. Collective over the lane.

        Raises `ValueError` if this side's buckets differ from the sender's.
        """
        self.rollcast_leave()
        worker: Any = self
        mine = Assignment(*assignments[worker.rank])
        buckets = fill_buckets(self.rollcast_landing.plan.moves, walk, bucket_bytes=bucket_bytes)
        lane = Lane(mine.lane, mine.sender, (), buckets)
        if lane.digest != mine.digest:
            raise ValueError(f"worker {worker.rank} made another plan than the trainer: run one version of rollcast")
        self._rollcast_bind(lane)
        self.rollcast_group = join_group(
            mine.transport,
            address,
            rank=mine.rank,
            size=mine.size,
            deadline=Deadline(timeout_s),
            device=worker.device,
            name=f"lane-{mine.lane}",
            label=mine.label,
        )

    def rollcast_fingerprint(self) -> dict[str, str]:
        """SHA-256 of every live parameter and buffer, by vLLM's name, and of what packed linears compute."""
        return fingerprints(self._rollcast_model())

    def rollcast_gpu_state(self) -> dict[str, int | None]:
        """Memory and NVLink counters of this worker's GPU: a `GpuState` as a dict."""
        worker: Any = self
        return asdict(gpu_state(gpu_uuid(worker.device)))

    def _rollcast_refuse(self) -> None:
        """Settings under which weights move or change their names while the engine runs."""
        worker: Any = self
        if getattr(worker.vllm_config.parallel_config, "enable_eplb", False):
            raise LandingError("expert load balancing moves experts between workers: set enable_eplb to False")

    def _rollcast_refuse_kind(self, manifest: Manifest) -> None:
        """Full weights for an engine with LoRA, and the other way round."""
        adapter, wanted = is_adapter(manifest), self._rollcast_has_lora()
        if wanted and not adapter:
            raise LandingError(
                "an engine with enable_lora wraps its layers, and full weights cannot be synced into it: set lora_rank "
                "and send a peft model's adapter, or start the engines without LoRA"
            )
        if adapter and not wanted:
            raise LandingError("an engine without LoRA takes no adapters: start the engines with lora_rank")
