"""rollcast inside a vLLM worker process: `worker_extension_cls` (every tensor-parallel rank of every engine).

vLLM adds `RollcastWorker` to the bases of its own worker class, so `self` is that worker. Its `__init__` never
runs, and every attribute must be new to the worker: hence the prefix.
"""

import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from rollcast.comm import (
    Deadline,
    Group,
    Lane,
    Manifest,
    PhaseTimer,
    WeightReceiver,
    join_group,
)
from rollcast.comm.buckets import fill_buckets
from rollcast.comm.gpus import gpu_state, gpu_uuid
from rollcast.rollout.asides import report
from rollcast.rollout.compiler import compile_landing
from rollcast.rollout.hashes import fingerprints, hashes, raise_if_changed
from rollcast.rollout.landing import LandingPlan
from rollcast.rollout.layout import choose_cpu_layout
from rollcast.rollout.live import LiveLanding
from rollcast.rollout.records import Assignment
from rollcast.rollout.shadow import Shadow
from rollcast.rollout.steps import StepWatch
from rollcast.rollout.tape import LandingError

# vLLM imports this module after the worker process has started and before it loads the model, and offers no
# later hook that is still early enough.
choose_cpu_layout()

SHOWN = 10
logger = logging.getLogger(__name__)


class RollcastWorker:
    """Methods that `AsyncLLM.collective_rpc` calls; arguments and results are plain msgpack values."""

    rollcast_group: Group | None = None
    rollcast_landing: LiveLanding
    rollcast_receiver: WeightReceiver
    rollcast_shadow: Shadow | None = None
    rollcast_steps: StepWatch

    def rollcast_call(self, method: str, args: list[Any]) -> list[Any]:
        """Call a method by name: [None, its result], or [the text of what it raised, None].

        vLLM must not see a worker raise: it would leave the other workers' replies unread, and take each of them
        for the reply to the next call.
        """
        try:
            return [None, getattr(self, method)(*args)]
        except Exception as error:
            logger.exception("%s failed", method)
            return [str(error) or type(error).__name__, None]

    def rollcast_watch(self) -> None:
        """From now on, know how many tokens each request has. Called once, before the first request."""
        worker: Any = self
        steps = self.rollcast_steps = StepWatch()
        execute = worker.execute_model

        def execute_model(scheduled: Any, *arguments: Any, **more: Any) -> Any:
            steps.note(scheduled)
            return execute(scheduled, *arguments, **more)

        # On the instance: executors look the method up at every step.
        worker.execute_model = execute_model

    def rollcast_prepare(self, manifest: bytes) -> str:
        """Compile the landing plan; return its digest. Collective over the engine's workers.

        Raises `LandingError` if the model cannot take the manifest, naming the parameters.
        """
        self._rollcast_refuse()
        plan = self._rollcast_compile(Manifest.from_bytes(manifest))
        if problems := plan.check():
            shown = "\n  ".join(problems[:SHOWN]) + ("\n  ..." if len(problems) > SHOWN else "")
            raise LandingError(f"the trainer's weights do not fit the engine's model:\n  {shown}")
        self.rollcast_landing = LiveLanding(plan, self._rollcast_model(), dtype=self._rollcast_dtype())
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

    def rollcast_receive(
        self, version: int, digests: list[str], verify: str, unchanged: bool, timeout_s: float
    ) -> dict[str, dict[str, Any]]:
        """Receive one sync into the live parameters. Collective over the lane.

        Returns "phases_s" and "tokens": of each request, how many are of the old weights.

        `digests` are those of the lanes of the engine's workers; with `unchanged` no tensor may change. On any
        failure the worker leaves the group, which makes the sender fail at once, and the parameters are a mixture
        until a later sync succeeds.
        """
        timer, deadline = PhaseTimer(), Deadline(timeout_s)
        try:
            group = self._rollcast_ready(version, digests)
            before = hashes(self._rollcast_model()) if unchanged else {}
            with torch.no_grad(), self._rollcast_settings():
                self.rollcast_receiver.receive(group, deadline=deadline, timer=timer, checksums=verify != "none")
                if verify == "full":
                    self.rollcast_receiver.confirm(group, deadline=deadline, timer=timer)
            if torch.cuda.is_available():
                # The answer says that the weights are in place, not that they soon will be.
                torch.cuda.current_stream().synchronize()
            if unchanged:
                raise_if_changed(before, hashes(self._rollcast_model()))
        except BaseException:
            self.rollcast_leave()
            raise
        phases_s = timer.phases_s | {"total": timer.total_s()}
        return {"phases_s": phases_s, "tokens": self.rollcast_steps.tokens()}

    def rollcast_receive_aside(
        self, version: int, digests: list[str], verify: str, timeout_s: float, place: list[Any]
    ) -> None:
        """Start to receive one sync into spare memory, and return. Collective over the lane.

        How it went is reported to `place`, see `Asides`. Raises `LandingError` if the memory is not there.
        """
        worker: Any = self
        try:
            group = self._rollcast_ready(version, digests)
            if self.rollcast_shadow is None:
                lane = self.rollcast_receiver.lane
                self.rollcast_shadow = Shadow(self.rollcast_landing, lane, device=worker.device)
            tell = partial(report, place, worker.rank)
            self.rollcast_shadow.receive(group, verify=verify, timeout_s=timeout_s, report=tell)
        except BaseException:
            self.rollcast_leave()
            raise

    def rollcast_apply(self) -> dict[str, dict[str, Any]]:
        """Switch to the weights that have been received aside. Later GPU work of this worker uses them.

        Returns "tokens", as `rollcast_receive` does.
        """
        if self.rollcast_shadow is None or self.rollcast_landing.moved(self._rollcast_model()) is not None:
            raise RuntimeError("the weights were moved while new ones were received: sync again")
        with self._rollcast_settings():
            self.rollcast_shadow.apply()
        return {"tokens": self.rollcast_steps.tokens()}

    def rollcast_leave(self) -> None:
        """Leave the weight group. Idempotent."""
        if self.rollcast_group is not None:
            self.rollcast_group.close()
            self.rollcast_group = None

    def rollcast_fingerprint(self) -> dict[str, str]:
        """SHA-256 of every live parameter and buffer, by vLLM's name, and of what packed linears compute."""
        return fingerprints(self._rollcast_model())

    def rollcast_gpu_state(self) -> dict[str, int | None]:
        """Memory and NVLink counters of this worker's GPU: a `GpuState` as a dict."""
        worker: Any = self
        return asdict(gpu_state(gpu_uuid(worker.device)))

    def _rollcast_model(self) -> nn.Module:
        worker: Any = self
        return worker.model_runner.get_model()

    def _rollcast_dtype(self) -> torch.dtype:
        worker: Any = self
        return worker.model_config.dtype

    def _rollcast_settings(self) -> Any:
        """vLLM's loaders and kernels ask for the configuration of the moment."""
        from vllm.config import set_current_vllm_config

        worker: Any = self
        return set_current_vllm_config(worker.vllm_config)

    def _rollcast_refuse(self) -> None:
        """Settings under which weights move or change their names while the engine runs."""
        worker: Any = self
        if getattr(worker.vllm_config.parallel_config, "enable_eplb", False):
            raise LandingError("expert load balancing moves experts between workers: set enable_eplb to False")
        if worker.vllm_config.lora_config is not None:
            raise LandingError("an engine with enable_lora wraps its layers: full weights cannot be synced into it")

    def _rollcast_compile(self, manifest: Manifest) -> LandingPlan:
        with self._rollcast_settings():
            return compile_landing(self._rollcast_model(), manifest, dtype=self._rollcast_dtype())

    def _rollcast_follow(self) -> None:
        """Find the live tensors again if vLLM has moved any since the last sync."""
        moved = self.rollcast_landing.moved(self._rollcast_model())
        if moved is None:
            return
        known = self.rollcast_landing.plan
        plan = self._rollcast_compile(known.manifest)
        if plan.digest != known.digest:
            raise LandingError(f"{moved} was replaced and the weights now land elsewhere: sync again to plan anew")
        self.rollcast_landing = LiveLanding(plan, self._rollcast_model(), dtype=self._rollcast_dtype())
        self._rollcast_bind(self.rollcast_receiver.lane)

    def _rollcast_bind(self, lane: Lane) -> None:
        worker: Any = self
        self.rollcast_receiver = WeightReceiver(lane, self.rollcast_landing, device=worker.device)
        self.rollcast_shadow = None

    def _rollcast_ready(self, version: int, digests: list[str]) -> Group:
        """The group, if this worker can receive the sync that was announced."""
        worker: Any = self
        if self.rollcast_group is None:
            raise RuntimeError("this worker is not in the weight group")
        self._rollcast_follow()
        if self.rollcast_receiver.lane.digest != digests[worker.rank]:
            raise ValueError(f"version {version} was announced with another plan than the one joined with")
        return self.rollcast_group
