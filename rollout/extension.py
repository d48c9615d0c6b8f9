"""rollcast inside a vLLM worker process: `worker_extension_cls` (every tensor-parallel rank of every engine).

vLLM adds `RollcastWorker` to the bases of its own worker class, so `self` is that worker. Its `__init__` never
runs, and every attribute must be new to the worker: hence the prefix.
"""

import hashlib
from typing import Any

import torch
from torch import nn

from rollcast.comm import (
    Deadline,
    Group,
    Manifest,
    PhaseTimer,
    WeightReceiver,
    build_plan,
    join_group,
)
from rollcast.rollout.landing import DirectLanding, LandingError, compile_landing
from rollcast.rollout.layout import check_layout, use_plain_cpu_layout

# vLLM imports this module after the worker process has started and before it loads the model, and offers no
# later hook that is still early enough.
use_plain_cpu_layout()


class RollcastWorker:
    """Methods that `AsyncLLM.collective_rpc` calls; arguments and results are plain msgpack values."""

    rollcast_group: Group | None = None
    rollcast_receiver: WeightReceiver
    rollcast_landing: DirectLanding

    def rollcast_prepare(self, manifest: bytes, bucket_bytes: int, digest: str) -> None:
        """Compile the landing and make the plan. Not collective.

        Raises `LandingError` if the model cannot take the manifest, `ValueError` if this side's plan differs
        from the sender's `digest`.
        """
        worker: Any = self
        plan = build_plan(Manifest.from_bytes(manifest), bucket_bytes=bucket_bytes)
        if plan.digest != digest:
            raise ValueError(f"worker {worker.rank} made another plan than the trainer: run one version of rollcast")
        self.rollcast_landing = self._rollcast_compile(plan.manifest)
        self.rollcast_receiver = WeightReceiver(plan, device=worker.device)

    def rollcast_join(self, transport: str, address: str, first_rank: int, size: int, timeout_s: float) -> None:
        """Join the weight group as rank `first_rank` + this worker's rank. Collective over the group."""
        self.rollcast_leave()
        worker: Any = self
        self.rollcast_group = join_group(
            transport,
            address,
            rank=first_rank + worker.rank,
            size=size,
            deadline=Deadline(timeout_s),
            device=worker.device,
        )

    def rollcast_receive(self, version: int, digest: str, timeout_s: float) -> dict[str, float]:
        """Receive one sync into the live parameters; return seconds by phase. Collective over the group.

        On any failure the worker leaves the group, which makes the sender fail at once, and the parameters are
        a mixture until a later sync succeeds.
        """
        timer = PhaseTimer()
        try:
            if self.rollcast_group is None:
                raise RuntimeError("this worker is not in the weight group")
            if self.rollcast_receiver.plan.digest != digest:
                raise ValueError(f"version {version} was announced with another plan than the one joined with")
            with torch.no_grad():
                self.rollcast_receiver.receive(
                    self.rollcast_group, self.rollcast_landing, deadline=Deadline(timeout_s), timer=timer
                )
            if torch.cuda.is_available():
                # The answer says that the weights are in place, not that they soon will be.
                torch.cuda.synchronize()
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
        """SHA-256 of the bytes of every live parameter and buffer, by vLLM's name."""
        return {name: _sha256(tensor) for name, tensor in live_tensors(self._rollcast_model()).items()}

    def _rollcast_model(self) -> nn.Module:
        worker: Any = self
        return worker.model_runner.get_model()

    def _rollcast_compile(self, manifest: Manifest) -> DirectLanding:
        model: Any = self._rollcast_model()
        check_layout(model)
        live = live_tensors(model)
        plan = compile_landing(model.load_weights, live, manifest)
        if problems := plan.check(live):
            shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
            raise LandingError(f"the trainer's weights do not fit the engine's model:\n  {shown}")
        return DirectLanding(plan, live)


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a vLLM model, by its name; a tied one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
