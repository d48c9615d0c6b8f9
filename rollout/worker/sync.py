"""What a sync does in a vLLM worker (every tensor-parallel rank of every engine)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rollcast.comm import Deadline, Group, Lane, Manifest, PhaseTimer, WeightReceiver
from rollcast.comm.deadline import nap
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.lora import AdapterLanding, compile_adapter
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.protocol.worker_channel import Bell
from rollcast.rollout.worker.fingerprint import hashes, raise_if_changed
from rollcast.rollout.worker.shadow import Shadow, spare_bytes
from rollcast.rollout.worker.step_gate import Gate

MOVED = "{} was moved while weights were on their way: sync again"


def wait_until_ready(group: Group, gate: Gate, deadline: Deadline) -> None:
    """Until the first broadcast can start."""
    start = time.perf_counter()
    while not group.ready():
        deadline.left("the trainer's first bucket")
        nap(start, gentle=gate.busy)


class SyncedWorker:
    """The part of `RollcastWorker` that the bell calls, on its own thread."""

    rollcast_group: Group | None = None
    rollcast_gate: Gate | None = None
    rollcast_bell: Bell
    rollcast_landing: LiveLanding | AdapterLanding
    rollcast_receiver: WeightReceiver
    rollcast_shadow: Shadow | None = None
    rollcast_seen: int = -1
    """The gate's count of calls when the live tensors were last found where they are."""

    def rollcast_receive(
        self, version: int, digests: list[str], slot: int, verify: str, unchanged: bool, timeout_s: float
    ) -> dict[str, dict[str, Any]]:
        """Receive one sync into the live parameters. Collective over the lane.

        Returns "phases_s" and "tokens": of each request, how many are of the old weights.

        `digests` are those of the lanes of the engine's workers; `slot` is where an adapter goes; with `unchanged`
        no tensor may change. On any failure the worker leaves the group, which makes the sender fail at once, and the
        parameters are a mixture until a later sync succeeds.
        """
        timer, deadline = PhaseTimer(), Deadline(timeout_s)
        with self._rollcast_leaving(), self._rollcast_after_steps(deadline, timer) as (gate, stream):
            group = self._rollcast_ready(version, digests, slot, gentle=False)
            before = hashes(self._rollcast_model()) if unchanged else {}
            how: dict[str, Any] = {"checksums": verify != "none", "meanwhile": self._rollcast_make_sure}
            self.rollcast_receiver.receive(group, deadline=deadline, timer=timer, **how)
            if verify == "full":
                self.rollcast_receiver.confirm(group, deadline=deadline, timer=timer)
            if unchanged:
                raise_if_changed(before, hashes(self._rollcast_model()))
            if stream is not None:
                # Before the next step begins: nothing else orders it after this stream.
                stream.synchronize()
            phases_s = timer.phases_s | {"total": timer.total_s()}
            return {"phases_s": phases_s, "tokens": gate.steps.tokens()}

    def rollcast_receive_aside(
        self, version: int, digests: list[str], slot: int, verify: str, timeout_s: float
    ) -> dict[str, dict[str, Any]]:
        """Receive one sync into spare memory while the engine decodes. Collective over the lane.

        Returns "phases_s". Raises `LandingError` if the memory is not there.
        """
        worker: Any = self
        deadline = Deadline(timeout_s)
        with self._rollcast_leaving():
            with self._rollcast_between_steps(deadline) as gate:
                group = self._rollcast_ready(version, digests, slot, gentle=True)
                if self.rollcast_shadow is None:
                    lane = self.rollcast_receiver.lane
                    with gate.beside() as stream:
                        gate.follow(stream)
                        self.rollcast_shadow = Shadow(self.rollcast_landing, lane, device=worker.device)
            with gate.beside(), torch.no_grad():
                phases_s = self.rollcast_shadow.receive(group, verify=verify, deadline=deadline)
                self._rollcast_make_sure()
                return {"phases_s": phases_s}

    def rollcast_apply(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Switch to the weights that have been received aside. Later GPU work of this worker uses them.

        Returns "tokens", as `rollcast_receive` does.
        """
        with self._rollcast_between_steps(Deadline(timeout_s)) as gate:
            if self.rollcast_shadow is None or (gate.others != self.rollcast_seen and self._rollcast_moved()):
                raise RuntimeError("the weights were moved while new ones were received: sync again")
            with gate.in_line():
                self.rollcast_shadow.apply()
            return {"tokens": gate.steps.tokens()}

    def rollcast_release(self) -> None:
        """Give back what a sync may keep: spare memory, and the trainer's memory that is mapped here. Idempotent."""
        self.rollcast_shadow = None
        if hasattr(self, "rollcast_receiver"):
            self.rollcast_receiver.release()
        if self.rollcast_group is not None:
            self.rollcast_group.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rollcast_leave(self) -> None:
        """Leave the weight group. Idempotent."""
        if self.rollcast_group is not None:
            self.rollcast_group.close()
            self.rollcast_group = None

    @contextmanager
    def _rollcast_between_steps(self, deadline: Deadline, prepare: Callable[[], None] | None = None) -> Iterator[Gate]:
        """On the bell's thread: vLLM begins nothing meanwhile."""
        gate = self.rollcast_gate
        assert gate is not None
        closed = gate.closed(partial(self.rollcast_bell.agree, deadline=deadline), prepare, deadline=deadline)
        with closed, torch.no_grad(), self._rollcast_settings():
            yield gate

    @contextmanager
    def _rollcast_after_steps(
        self, deadline: Deadline, timer: PhaseTimer
    ) -> Iterator[tuple[Gate, torch.cuda.Stream | None]]:
        """The same, and GPU work waits on a stream of its own until queued steps are done. Meanwhile, bytes travel."""
        gate, group, receiver = self.rollcast_gate, self.rollcast_group, self.rollcast_receiver
        assert gate is not None

        def start() -> None:
            if group and alone and gate.busy and receiver.get_ahead(spare_bytes):
                # Steps need the GPU.
                group.gentle = True
                receiver.start(group, deadline=deadline)

        # Workers of one engine would wait for each other, and the sender for one of them.
        alone = self.rollcast_bell.workers == 1
        with gate.beside() as stream:
            if group and alone:
                # The trainer may still gather or pack: the engine need not stand still for that.
                wait_until_ready(group, gate, deadline)
                if gate.busy:
                    receiver.get_ahead(spare_bytes)
            waited_s = timer.total_s()
            with self._rollcast_between_steps(deadline, start):
                timer.phases_s["gate"] = timer.total_s() - waited_s
                gate.follow(stream)
                yield gate, stream

    @contextmanager
    def _rollcast_leaving(self) -> Iterator[None]:
        """If it fails, leave the group: that of now, for a later sync may join another."""
        group = self.rollcast_group
        try:
            yield
        except BaseException:
            if group is not None:
                group.close()
            if self.rollcast_group is group:
                self.rollcast_group = None
            raise

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

    def _rollcast_has_lora(self) -> bool:
        worker: Any = self
        return worker.vllm_config.lora_config is not None

    def _rollcast_compile(self, manifest: Manifest) -> LandingPlan:
        with self._rollcast_settings():
            if self._rollcast_has_lora():
                return compile_adapter(self._rollcast_model(), manifest)
            return compile_landing(self._rollcast_model(), manifest, dtype=self._rollcast_dtype())

    def _rollcast_land(self, plan: LandingPlan) -> LiveLanding | AdapterLanding:
        if self._rollcast_has_lora():
            return AdapterLanding(plan, self._rollcast_model())
        return LiveLanding(plan, self._rollcast_model(), dtype=self._rollcast_dtype())

    def _rollcast_follow(self) -> None:
        """Find the live tensors again if a call of vLLM's has moved any since the last sync."""
        assert self.rollcast_gate is not None
        others, seen = self.rollcast_gate.others, self.rollcast_seen
        if others == seen:
            return
        moved, self.rollcast_seen = self._rollcast_moved(), others
        if moved is None:
            return
        if self.rollcast_receiver.started:
            raise LandingError(MOVED.format(moved))
        known = self.rollcast_landing.plan
        plan = self._rollcast_compile(known.manifest)
        if plan.digest != known.digest:
            raise LandingError(f"{moved} was replaced and the weights now land elsewhere: sync again to plan anew")
        self.rollcast_landing = self._rollcast_land(plan)
        self._rollcast_bind(self.rollcast_receiver.lane)

    def _rollcast_moved(self) -> str | None:
        """A tensor that is not where it was, if any."""
        return self.rollcast_landing.moved(self._rollcast_model())

    def _rollcast_make_sure(self) -> None:
        """That the live tensors are where they were, though nothing that could move them has been seen."""
        if (moved := self._rollcast_moved()) is not None:
            raise LandingError(MOVED.format(moved))

    def _rollcast_bind(self, lane: Lane) -> None:
        worker: Any = self
        self.rollcast_receiver = WeightReceiver(lane, self.rollcast_landing, device=worker.device)
        self.rollcast_shadow = None

    def _rollcast_ready(self, version: int, digests: list[str], slot: int, *, gentle: bool) -> Group:
        """The group, if this worker can receive the sync that was announced."""
        worker: Any = self
        if self.rollcast_group is None:
            raise RuntimeError("this worker is not in the weight group")
        self._rollcast_follow()
        if self.rollcast_receiver.lane.digest != digests[worker.rank]:
            raise ValueError(f"version {version} was announced with another plan than the one joined with")
        if isinstance(self.rollcast_landing, AdapterLanding):
            self.rollcast_landing.slot = slot
        self.rollcast_group.gentle = gentle
        return self.rollcast_group
