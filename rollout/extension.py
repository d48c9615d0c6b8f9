"""rollcast inside a vLLM worker process: `worker_extension_cls` (every tensor-parallel rank of every engine).

vLLM adds `RollcastWorker` to the bases of its own worker class, so `self` is that worker. Its `__init__` never
runs, and every attribute must be new to the worker: hence the prefix.
"""

import hashlib
import logging
from typing import Any

import torch
from torch import nn

from rollcast.comm import (
    Deadline,
    Group,
    Lane,
    Manifest,
    PhaseTimer,
    VerifyError,
    WeightReceiver,
    join_group,
)
from rollcast.comm.buckets import fill_buckets
from rollcast.comm.checksum import checksum
from rollcast.comm.region import flat_bytes
from rollcast.rollout.compiler import compile_landing
from rollcast.rollout.landing import LandingPlan
from rollcast.rollout.layout import choose_cpu_layout
from rollcast.rollout.live import LiveLanding
from rollcast.rollout.reload import live_tensors, probe
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
        self,
        transport: str,
        address: str,
        assignments: list[list[Any]],
        walk: list[int],
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        """Join this worker's lane: (index, rank in it, its size, sender, digest). Collective over the lane.

        Raises `ValueError` if this side's buckets differ from the sender's.
        """
        self.rollcast_leave()
        worker: Any = self
        index, rank, size, sender, digest = assignments[worker.rank]
        buckets = fill_buckets(self.rollcast_landing.plan.moves, walk, bucket_bytes=bucket_bytes)
        lane = Lane(index, sender, (), buckets)
        if lane.digest != digest:
            raise ValueError(f"worker {worker.rank} made another plan than the trainer: run one version of rollcast")
        self.rollcast_receiver = WeightReceiver(lane, self.rollcast_landing, device=worker.device)
        self.rollcast_group = join_group(
            transport,
            address,
            rank=rank,
            size=size,
            deadline=Deadline(timeout_s),
            device=worker.device,
            name=f"lane-{index}",
        )

    def rollcast_receive(
        self, version: int, digests: list[str], verify: str, unchanged: bool, timeout_s: float
    ) -> dict[str, float]:
        """Receive one sync into the live parameters; return seconds by phase. Collective over the lane.

        `digests` are those of the lanes of the engine's workers; with `unchanged` no tensor may change. On any
        failure the worker leaves the group, which makes the sender fail at once, and the parameters are a mixture
        until a later sync succeeds.
        """
        worker: Any = self
        timer, deadline = PhaseTimer(), Deadline(timeout_s)
        try:
            group = self.rollcast_group
            if group is None:
                raise RuntimeError("this worker is not in the weight group")
            self._rollcast_follow()
            if self.rollcast_receiver.lane.digest != digests[worker.rank]:
                raise ValueError(f"version {version} was announced with another plan than the one joined with")
            before = self._rollcast_hashes() if unchanged else {}
            with torch.no_grad(), self._rollcast_settings():
                self.rollcast_receiver.receive(group, deadline=deadline, timer=timer, checksums=verify != "none")
                if verify == "full":
                    self.rollcast_receiver.confirm(group, deadline=deadline, timer=timer)
            if torch.cuda.is_available():
                # The answer says that the weights are in place, not that they soon will be.
                torch.cuda.synchronize()
            if unchanged:
                _raise_if_changed(before, self._rollcast_hashes())
        except BaseException:
            self.rollcast_leave()
            raise
        return timer.phases_s | {"total": timer.total_s()}

    def rollcast_leave(self) -> None:
        """Leave the weight group. Idempotent."""
        if self.rollcast_group is not None:
            self.rollcast_group.close()
            self.rollcast_group = None

    def rollcast_fingerprint(self) -> dict[str, str]:
        """SHA-256 of every live parameter and buffer, by vLLM's name, and of what packed linears compute."""
        return {name: _sha256(tensor) for name, tensor in self._rollcast_tensors().items()}

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
        worker: Any = self
        moved = self.rollcast_landing.moved(self._rollcast_model())
        if moved is None:
            return
        known = self.rollcast_landing.plan
        plan = self._rollcast_compile(known.manifest)
        if plan.digest != known.digest:
            raise LandingError(f"{moved} was replaced and the weights now land elsewhere: sync again to plan anew")
        self.rollcast_landing = LiveLanding(plan, self._rollcast_model(), dtype=self._rollcast_dtype())
        lane = self.rollcast_receiver.lane
        self.rollcast_receiver = WeightReceiver(lane, self.rollcast_landing, device=worker.device)

    def _rollcast_tensors(self) -> dict[str, torch.Tensor]:
        model = self._rollcast_model()
        probes = {f"{path} (computed)": probe(module) for path, module in model.named_modules()}
        return live_tensors(model) | {name: made for name, made in probes.items() if made is not None}

    def _rollcast_hashes(self) -> dict[str, int]:
        return {name: int(checksum(flat_bytes(tensor))) for name, tensor in self._rollcast_tensors().items()}


def _raise_if_changed(before: dict[str, int], after: dict[str, int]) -> None:
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        shown = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise VerifyError(
            f"self-test: {len(changed)} of {len(before)} tensors changed in a sync that should change nothing: "
            f"{shown}. Either the trainer did not start from the engine's checkpoint, or weights land in wrong places"
        )


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(flat_bytes(tensor).cpu().numpy().tobytes()).hexdigest()
